//! Reading small files of the kernel.

use std::path::Path;

/// The content of a file below `root`, without white space around it; `None` if it cannot be read.
pub fn text(root: &Path, path: &str) -> Option<String> {
    let bytes = std::fs::read(root.join(path)).ok()?;
    Some(String::from_utf8_lossy(&bytes).trim().to_owned())
}

/// A file that holds one number.
pub fn number(root: &Path, path: &str) -> Option<u64> {
    text(root, path)?.parse().ok()
}

/// How many numbers a list such as `0-3,8` names (the kernel's cpulist format).
pub fn list_len(list: &str) -> Option<u64> {
    list.trim().split(',').filter(|part| !part.is_empty()).try_fold(0u64, |sum, part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.trim().parse::<u64>().ok()?, last.trim().parse::<u64>().ok()?);
        sum.checked_add(last.checked_sub(first)?.checked_add(1)?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_counted() {
        assert_eq!(list_len("0-3,8\n"), Some(5));
        assert_eq!(list_len("0"), Some(1));
        assert_eq!(list_len(""), Some(0));
        assert_eq!(list_len("3-1"), None);
        assert_eq!(list_len("0-18446744073709551615"), None);
        assert_eq!(list_len("all"), None);
    }
}

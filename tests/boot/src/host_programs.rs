//! Programs of the host for the guest: with the libraries that they need, at the same places.

use std::path::PathBuf;
use std::process::Command;

use crate::initrd::File;

/// The program `name` and its libraries (ldd(1)); `None` if it is not installed.
///
/// # Errors
/// What the host says when one of the files cannot be read.
pub fn host_program(name: &str) -> std::io::Result<Option<Vec<File>>> {
    let directories = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&directories).map(|d| d.join(name));
    let Some(program) = places.into_iter().find(|p| p.is_file()) else { return Ok(None) };
    let output = Command::new("ldd").arg(&program).output()?;
    let listed = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut files = vec![(PathBuf::from("/usr/bin").join(name), program)];
    for word in listed.split_whitespace().filter(|w| w.starts_with('/')) {
        files.push((word.into(), word.into()));
    }
    files.sort();
    files.dedup();
    let read = |(inside, outside): (PathBuf, PathBuf)| {
        Ok(File { path: inside.to_string_lossy().into_owned(), content: std::fs::read(outside)? })
    };
    files.into_iter().map(read).collect::<std::io::Result<_>>().map(Some)
}

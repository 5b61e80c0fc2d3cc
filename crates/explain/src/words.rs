//! Flags of page-table entries and of machine frames in words.

use berth_memory::PageState;

use crate::paging::{Paging, PagingMode};
use crate::walk::{Level, Step, entry};

/// The flags of the entry of `step` (SDM volume 3, 4.3 to 4.5), those that are clear only where that says something.
pub(crate) fn entry_words(step: &Step, paging: &Paging) -> Vec<String> {
    let set = |bit: u64| step.value & bit != 0;
    if !set(entry::P) {
        let rest = if step.value == 0 { "empty" } else { "the other bits are the system's own" };
        return vec!["not present".to_owned(), rest.to_owned()];
    }
    let mut words = vec!["present"];
    let has_rights = !(paging.mode == PagingMode::Pae && step.level == Level::Pdpt);
    if has_rights {
        words.push(if set(entry::W) { "writable" } else { "read-only" });
        words.push(if set(entry::U) { "user" } else { "supervisor" });
    }
    let pat = if step.level == Level::Pt { entry::PS } else { entry::PAT_LARGE };
    let named = [
        (set(entry::NX) && paging.nxe, "no-execute"),
        (has_rights && set(entry::A), "accessed"),
        (step.is_page && set(entry::D), "dirty"),
        (step.is_page && paging.pge && set(entry::G), "global"),
        (set(entry::PWT), "write-through"),
        (set(entry::PCD), "cache-disabled"),
        (step.is_page && set(pat), "PAT"),
    ];
    words.extend(named.iter().filter(|(set, _)| *set).map(|(_, word)| *word));
    let mut words: Vec<String> = words.into_iter().map(str::to_owned).collect();
    if step.is_page && step.level != Level::Pt {
        words.push(format!("{} page", size(step.covers)));
    }
    if step.reserved != 0 {
        words.push(format!("reserved bits {:#x}", step.reserved));
    }
    words
}

/// Bits of `/proc/kpageflags` that say something here (include/uapi/linux/kernel-page-flags.h).
const FRAME_FLAGS: [(u32, &str); 15] = [
    (0, "locked"),
    (2, "referenced"),
    (4, "dirty"),
    (5, "in a reclaim list"),
    (6, "active"),
    (8, "under writeback"),
    (12, "anonymous"),
    (13, "in the swap cache"),
    (17, "hugetlb"),
    (18, "unevictable"),
    (19, "damaged"),
    (21, "merged by KSM"),
    (22, "transparent huge page"),
    (24, "the zero page"),
    (25, "idle"),
];

/// What `/proc/kpageflags` says of a frame.
pub(crate) fn frame_words(flags: u64) -> Vec<String> {
    FRAME_FLAGS.iter().filter(|(bit, _)| flags >> bit & 1 != 0).map(|(_, word)| (*word).to_owned()).collect()
}

/// A page's state in a word.
pub(crate) fn state_word(state: PageState) -> &'static str {
    match state {
        PageState::Untouched => "untouched",
        PageState::Resident => "resident",
        PageState::Shared => "shared",
        PageState::Stored => "stored",
        PageState::Released => "released",
    }
}

/// `bytes` with the largest binary unit that divides it, such as `2 MiB`.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let step = if bytes == 0 { 0 } else { (bytes.trailing_zeros() / 10).min(4) };
    format!("{} {}", bytes >> (10 * step), UNITS[step as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_the_largest_unit_that_divides_them() {
        for (bytes, text) in
            [(0, "0 bytes"), (4096, "4 KiB"), (1 << 21, "2 MiB"), (3 << 29, "1536 MiB"), (1 << 30, "1 GiB")]
        {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn frames_are_described_by_the_bits_of_the_kernel() {
        assert_eq!(frame_words(1 << 12 | 1 << 21), ["anonymous", "merged by KSM"]);
        assert!(frame_words(1 << 63).is_empty());
    }
}

//! States of a page of guest memory.

use serde::{Deserialize, Serialize};

use crate::host::{HostPage, PagemapEntry};

/// Where a page of guest memory is. Each is in exactly one state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PageState {
    /// The host has nothing for it: the guest has not touched it, or has given it back.
    Untouched,
    /// In a frame of its own.
    Resident,
    /// In a frame that others have too, copied when it is written.
    Shared,
    /// In the host's swap.
    Swapped,
}

impl PageState {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Untouched, Self::Resident, Self::Shared, Self::Swapped];

    /// In a word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Untouched => "untouched",
            Self::Resident => "resident",
            Self::Shared => "shared",
            Self::Swapped => "swapped",
        }
    }

    /// What the host's kernel makes of the page.
    pub fn of_host_page(page: &HostPage) -> Self {
        match (page.present, page.swapped, page.shared) {
            (true, _, true) => Self::Shared,
            (true, ..) => Self::Resident,
            (_, true, _) => Self::Swapped,
            _ => Self::Untouched,
        }
    }

    /// What the entry of a pagemap says.
    pub fn of_entry(entry: PagemapEntry) -> Self {
        if entry.shared() {
            Self::Shared
        } else if entry.present() {
            Self::Resident
        } else if entry.swapped() {
            Self::Swapped
        } else {
            Self::Untouched
        }
    }
}

//! In which state each page of guest memory is, and what a VM costs the host.
//!
//! ```text
//!   untouched ──guest──► resident ──reclaim──► stored        resident, shared: what the kernel has behind the page
//!                         ▲    │                  │          stored:           what the cold store has
//!                         │    └─balloon, report──┼─► released
//!                         └──────guest────────────┴───────┘
//! ```
//!
//! A page with memory behind it is resident or shared, whatever else is known of it; a page without is stored if the
//! store has it, released if the guest gave it back and has not used it since, and untouched otherwise. So every page
//! is in exactly one state, and the counts add up to the size of the VM. A page that the kernel shows as its page of
//! zeros has no memory behind it.

use std::fs;
use std::io;

use serde::{Deserialize, Serialize};

use crate::pagemap::{self, Backing};
use crate::{GuestMemory, GuestPhysAddr, PAGE_SHIFT, PAGE_SIZE};

/// Where a page of guest memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PageState {
    /// The guest has never written it.
    Untouched,
    /// It has memory of its own.
    Resident,
    /// It is a page of a file or of another VM until the guest writes it.
    Shared,
    /// It is in the cold store, or in the host's swap.
    Stored,
    /// The guest gave it back, through the balloon or by reporting it free, and has not used it since.
    Released,
}

/// Pages next to each other in the same state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateRange {
    /// First address.
    pub start: GuestPhysAddr,
    /// Length in bytes, a multiple of 4096.
    pub len: u64,
    /// State of all of it.
    pub state: PageState,
}

/// How much memory is in each state, in bytes. The sum is the size of the VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StateCounts {
    /// [`PageState::Untouched`].
    pub untouched: u64,
    /// [`PageState::Resident`].
    pub resident: u64,
    /// [`PageState::Shared`].
    pub shared: u64,
    /// [`PageState::Stored`].
    pub stored: u64,
    /// [`PageState::Released`].
    pub released: u64,
}

impl StateCounts {
    /// The size of the VM.
    pub fn total(&self) -> u64 {
        self.untouched + self.resident + self.shared + self.stored + self.released
    }

    fn add(&mut self, range: StateRange) {
        *match range.state {
            PageState::Untouched => &mut self.untouched,
            PageState::Resident => &mut self.resident,
            PageState::Shared => &mut self.shared,
            PageState::Stored => &mut self.stored,
            PageState::Released => &mut self.released,
        } += range.len;
    }
}

/// What a VM costs the host, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct MemoryUsage {
    /// Guest memory by state.
    pub guest: StateCounts,
    /// All else that the VM's process has: translated code, devices, the store, page tables, and its part of program
    /// text that other processes use as well.
    pub overhead: u64,
    /// What the process has resident in all, as its smaps_rollup says (Rss).
    pub process_resident: u64,
}

impl GuestMemory {
    /// Calls `visit` for all of RAM in ascending order, a range for each run of pages in one state.
    ///
    /// Pages may change their state meanwhile; each is visited once all the same.
    ///
    /// # Errors
    /// When the host does not tell what is resident (/proc is not mounted).
    pub fn for_each_state(&self, mut visit: impl FnMut(StateRange)) -> io::Result<()> {
        for region in self.regions() {
            let first = self.page_index(region.start).unwrap_or_default();
            let mut runs = Merged { start: region.start, next: 0, run: None, visit: &mut visit };
            let without = |page: u64| {
                let index = first + page as usize;
                if self.is_stored(index) {
                    PageState::Stored
                } else if self.is_released(index) {
                    PageState::Released
                } else {
                    PageState::Untouched
                }
            };
            pagemap::scan(region.host, region.len, |run, backing| {
                (runs.next..run.start).for_each(|page| runs.push(page, without(page)));
                for page in run {
                    let state = match backing {
                        Backing::Memory => PageState::Resident,
                        Backing::File => PageState::Shared,
                        Backing::Swap => PageState::Stored,
                        Backing::Zero => without(page),
                    };
                    runs.push(page, state);
                }
            })?;
            (runs.next..region.len >> PAGE_SHIFT).for_each(|page| runs.push(page, without(page)));
            runs.finish();
        }
        Ok(())
    }

    /// How much memory is in each state.
    ///
    /// # Errors
    /// As [`Self::for_each_state`].
    pub fn state_counts(&self) -> io::Result<StateCounts> {
        let mut counts = StateCounts::default();
        self.for_each_state(|range| counts.add(range))?;
        Ok(counts)
    }

    /// What the VM costs the host, all of this process counted as the VM's.
    ///
    /// # Errors
    /// As [`Self::for_each_state`].
    pub fn usage(&self) -> io::Result<MemoryUsage> {
        let guest = self.state_counts()?;
        let process = ProcessMemory::read()?;
        // Guest memory is private, so its part of Pss is all of it.
        let overhead = process.proportional.saturating_sub(guest.resident) + process.page_tables;
        Ok(MemoryUsage { guest, overhead, process_resident: process.resident })
    }
}

/// Joins pages to ranges.
struct Merged<'a, F> {
    start: GuestPhysAddr,
    /// The page that is pushed next.
    next: u64,
    /// First page and state of the range that is not visited yet.
    run: Option<(u64, PageState)>,
    visit: &'a mut F,
}

impl<F: FnMut(StateRange)> Merged<'_, F> {
    fn push(&mut self, page: u64, state: PageState) {
        match self.run {
            Some((_, same)) if same == state => {}
            _ => {
                self.finish();
                self.run = Some((page, state));
            }
        }
        self.next = page + 1;
    }

    fn finish(&mut self) {
        if let Some((first, state)) = self.run.take() {
            let len = (self.next - first) * PAGE_SIZE;
            (self.visit)(StateRange { start: self.start + first * PAGE_SIZE, len, state });
        }
    }
}

/// What this process has, in bytes.
struct ProcessMemory {
    resident: u64,
    proportional: u64,
    page_tables: u64,
}

impl ProcessMemory {
    fn read() -> io::Result<Self> {
        let rollup = fs::read_to_string("/proc/self/smaps_rollup")?;
        let status = fs::read_to_string("/proc/self/status")?;
        Ok(Self {
            resident: kibibytes(&rollup, "Rss:"),
            proportional: kibibytes(&rollup, "Pss:"),
            page_tables: kibibytes(&status, "VmPTE:"),
        })
    }
}

/// The value of a line `KEY N kB`; 0 if there is none.
fn kibibytes(text: &str, key: &str) -> u64 {
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.split_whitespace().next()?.parse().ok());
    value.unwrap_or(0u64) * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rss of the mapping that begins at `start`.
    fn resident_in_smaps(start: u64) -> u64 {
        let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
        let at = smaps.find(&format!("{start:x}-")).unwrap();
        kibibytes(&smaps[at..], "Rss:")
    }

    #[test]
    fn states_add_up_and_agree_with_the_kernel() {
        let m = GuestMemory::new(64 << 20).unwrap();
        assert_eq!(m.state_counts().unwrap(), StateCounts { untouched: 64 << 20, ..StateCounts::default() });
        for page in 0..2000 {
            m.write(GuestPhysAddr(page * 3 * PAGE_SIZE), &[1]).unwrap();
        }
        m.read(GuestPhysAddr(PAGE_SIZE), &mut [0]).unwrap();
        m.discard(GuestPhysAddr(0), 30 * PAGE_SIZE).unwrap();
        m.write(GuestPhysAddr(PAGE_SIZE), &[1]).unwrap();
        let counts = m.state_counts().unwrap();
        assert_eq!(counts.total(), m.size());
        assert_eq!(counts.resident, 1991 * PAGE_SIZE);
        assert_eq!(counts.released, 29 * PAGE_SIZE);
        assert_eq!((counts.stored, counts.shared), (0, 0));
        // The kernel may have joined the mapping with a small one next to it.
        let smaps = resident_in_smaps(m.regions()[0].host.0);
        assert!(smaps.abs_diff(counts.resident) * 100 < smaps, "{smaps} in smaps, {counts:?}");
    }

    #[test]
    fn ranges_are_in_order_and_without_gaps() {
        let m = GuestMemory::new((3 << 30) + (2 << 20)).unwrap();
        let second = m.regions()[1].start;
        m.write(second + PAGE_SIZE, &[1]).unwrap();
        let mut ranges = Vec::new();
        m.for_each_state(|range| ranges.push(range)).unwrap();
        let range = |start, len, state| StateRange { start, len, state };
        assert_eq!(
            ranges,
            [
                range(GuestPhysAddr(0), 3 << 30, PageState::Untouched),
                range(second, PAGE_SIZE, PageState::Untouched),
                range(second + PAGE_SIZE, PAGE_SIZE, PageState::Resident),
                range(second + 2 * PAGE_SIZE, (2 << 20) - 2 * PAGE_SIZE, PageState::Untouched),
            ]
        );
    }

    #[test]
    fn the_process_is_counted_as_the_vms() {
        let m = GuestMemory::new(32 << 20).unwrap();
        for page in 0..4096 {
            m.write(GuestPhysAddr(page * PAGE_SIZE), &[1]).unwrap();
        }
        let usage = m.usage().unwrap();
        assert!(usage.overhead > 0);
        assert!(usage.process_resident >= usage.guest.resident);
    }
}

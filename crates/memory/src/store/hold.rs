//! Pages that system calls work on, which must stay where they are.
//!
//! Where the host handles only faults of user mode, a system call on a page in the store fails instead of bringing
//! it back. So a device holds the pages first: held pages are not evicted, and are brought in by the holder's own
//! accesses. Counts are kept for stretches of [`STRETCH`] pages; too many on one stretch only keep more pages in.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::{RwLock, RwLockWriteGuard};

/// Pages that are counted together.
const STRETCH: usize = 16;

/// How often each stretch is held.
pub(crate) struct Holds {
    counts: Box<[AtomicU32]>,
    /// Held for writing while pages are taken away, for reading while a count goes up: so a page is either held
    /// before it is looked at for eviction, or taken away before the holder touches it.
    eviction: RwLock<()>,
}

impl Holds {
    pub(crate) fn new(pages: usize) -> Self {
        let zeroed = vec![0u32; pages.div_ceil(STRETCH)].into_boxed_slice();
        // SAFETY: AtomicU32 has the same size, alignment and valid values as u32.
        let counts = unsafe { Box::from_raw(Box::into_raw(zeroed) as *mut [AtomicU32]) };
        Self { counts, eviction: RwLock::new(()) }
    }

    /// Keeps out who wants to hold pages.
    pub(super) fn evicting(&self) -> RwLockWriteGuard<'_, ()> {
        self.eviction.write()
    }

    pub(super) fn is_held(&self, page: usize) -> bool {
        self.counts.get(page / STRETCH).is_some_and(|count| count.load(Ordering::SeqCst) != 0)
    }
}

/// Pages that stay resident until this is dropped.
#[must_use = "the pages are held only as long as this lives"]
pub struct Hold {
    holds: Arc<Holds>,
    stretches: Vec<usize>,
}

impl Hold {
    pub(crate) fn new(
        holds: Arc<Holds>,
        pages: impl Iterator<Item = std::ops::RangeInclusive<usize>>,
    ) -> Self {
        let mut stretches: Vec<usize> = pages.flat_map(|p| p.start() / STRETCH..=p.end() / STRETCH).collect();
        stretches.dedup();
        {
            let _gate = holds.eviction.read();
            for &stretch in &stretches {
                if let Some(count) = holds.counts.get(stretch) {
                    count.fetch_add(1, Ordering::SeqCst);
                }
            }
        }
        Self { holds, stretches }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        for &stretch in &self.stretches {
            if let Some(count) = self.holds.counts.get(stretch) {
                count.fetch_sub(1, Ordering::SeqCst);
            }
        }
    }
}

impl std::fmt::Debug for Hold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hold").field("stretches", &self.stretches.len()).finish()
    }
}

//! Dirty logging: which pages of guest memory were written. Snapshots and migration copy those again.
//!
//! A page counts as written when a vCPU, a device, or the engine itself (accessed bits of page tables, structures of
//! the paravirtual interface) stores to it, whatever the value.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use berth_memory::{GuestMemory, GuestPhysAddr, PAGE_SIZE};

/// Pages of one region of RAM, a bit each from the region's start on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DirtyPages(pub Vec<u64>);

impl DirtyPages {
    /// Numbers of the pages that were written, ascending: 0 is the region's first.
    pub fn pages(&self) -> impl Iterator<Item = u64> + '_ {
        (0..).zip(&self.0).flat_map(|(n, &word): (u64, _)| {
            (0..64).filter(move |bit| word >> bit & 1 != 0).map(move |bit| n * 64 + bit)
        })
    }

    /// Adds the pages of `other`.
    pub fn add(&mut self, other: &Self) {
        for (word, more) in self.0.iter_mut().zip(&other.0) {
            *word |= more;
        }
    }
}

/// A log that any thread may write to: what an engine that has none by itself keeps for all of guest memory, and any
/// engine for the writes of devices.
#[derive(Debug)]
pub struct DirtyMap {
    on: AtomicBool,
    regions: Vec<Region>,
}

#[derive(Debug)]
struct Region {
    start: GuestPhysAddr,
    len: u64,
    words: Box<[AtomicU64]>,
}

impl DirtyMap {
    /// A log for this memory, off. It is not resident before it is used.
    pub fn new(memory: &GuestMemory) -> Self {
        let region = |r: &berth_memory::RamRegion| {
            let words = (r.len / PAGE_SIZE).div_ceil(64) as usize;
            let zeroed = vec![0_u64; words].into_boxed_slice();
            // SAFETY: AtomicU64 has the same size, alignment and valid values as u64.
            let words = unsafe { Box::from_raw(Box::into_raw(zeroed) as *mut [AtomicU64]) };
            Region { start: r.start, len: r.len, words }
        };
        Self { on: AtomicBool::new(false), regions: memory.regions().iter().map(region).collect() }
    }

    /// Whether writes are to be noted.
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::SeqCst)
    }

    /// Begins with an empty log, or ends logging.
    pub fn switch(&self, on: bool) {
        self.on.store(on, Ordering::SeqCst);
        if on {
            self.regions.iter().flat_map(|r| r.words.iter()).for_each(|word| word.store(0, Ordering::SeqCst));
        }
    }

    /// Notes a write to the page of `addr`; nothing if logging is off or there is no RAM.
    ///
    /// Must come after the write, unless something keeps [`Self::take`] away between the two.
    pub fn mark(&self, addr: GuestPhysAddr) {
        if self.is_on() {
            self.mark_range(addr, 1);
        }
    }

    /// Notes a write of `len` bytes; as [`Self::mark`].
    pub fn mark_range(&self, start: GuestPhysAddr, len: u64) {
        if !self.is_on() || len == 0 {
            return;
        }
        let end = start.0.saturating_add(len);
        for region in &self.regions {
            let first = start.0.max(region.start.0);
            let last = end.min(region.start.0 + region.len);
            if first >= last {
                continue;
            }
            for page in (first - region.start.0) / PAGE_SIZE..=(last - 1 - region.start.0) / PAGE_SIZE {
                region.words[page as usize / 64].fetch_or(1 << (page % 64), Ordering::SeqCst);
            }
        }
    }

    /// What was written to region `index` since the last call, or since [`Self::switch`]; empty if there is no such
    /// region.
    pub fn take(&self, index: usize) -> DirtyPages {
        let words = self.regions.get(index).map_or(&[][..], |region| &region.words);
        DirtyPages(words.iter().map(|word| word.swap(0, Ordering::SeqCst)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(map: &DirtyMap, region: usize) -> Vec<u64> {
        map.take(region).pages().collect()
    }

    #[test]
    fn a_log_has_what_was_written_once() {
        let map = DirtyMap::new(&GuestMemory::new(1 << 20).unwrap());
        map.mark(GuestPhysAddr(0x1000));
        assert_eq!(pages(&map, 0), [0; 0]);
        map.switch(true);
        map.mark(GuestPhysAddr(0x1fff));
        map.mark_range(GuestPhysAddr(0x4_0fff), 0x1002);
        map.mark_range(GuestPhysAddr(0x8_0000), 0);
        assert_eq!(pages(&map, 0), [1, 0x40, 0x41, 0x42]);
        assert_eq!(pages(&map, 0), [0; 0]);
        map.switch(false);
        map.mark(GuestPhysAddr(0x1000));
        map.switch(true);
        assert_eq!(pages(&map, 0), [0; 0]);
        assert_eq!(map.take(7), DirtyPages::default());
    }

    #[test]
    fn regions_are_apart_and_what_is_no_ram_is_nothing() {
        let map = DirtyMap::new(&GuestMemory::new(4 << 30).unwrap());
        map.switch(true);
        map.mark_range(GuestPhysAddr(0), u64::MAX);
        let low = berth_memory::layout::LOW_RAM_END.0 / PAGE_SIZE;
        assert_eq!(map.take(0).pages().count() as u64, low);
        assert_eq!(map.take(1).pages().count() as u64, (4 << 30) / PAGE_SIZE - low);
        map.mark(berth_memory::layout::HIGH_RAM_START);
        map.mark(berth_memory::layout::LOW_RAM_END);
        assert_eq!((pages(&map, 0), pages(&map, 1)), (vec![], vec![0]));
    }
}

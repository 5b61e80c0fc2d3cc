//! Guest physical to host addresses.
//!
//! Whoever accesses guest memory gets its address here, and keeps it in the first level of a TLB at the most. So this is
//! where pages are marked as accessed: once these levels were emptied, each page that is accessed passes by again.

use berth_memory::layout::HIGH_RAM_START;
use berth_memory::{GuestMemory, GuestPhysAddr, PAGE_SHIFT};

/// The one or two regions of RAM, flat for speed.
#[derive(Debug)]
pub(crate) struct HostMap {
    low_len: u64,
    low: u64,
    high_len: u64,
    high: u64,
    memory: GuestMemory,
}

impl HostMap {
    pub(crate) fn new(memory: &GuestMemory) -> Self {
        let mut map = Self { low_len: 0, low: 0, high_len: 0, high: 0, memory: memory.clone() };
        for region in memory.regions() {
            if region.start.0 == 0 {
                (map.low_len, map.low) = (region.len, region.host.0);
            } else {
                debug_assert_eq!(region.start, HIGH_RAM_START);
                (map.high_len, map.high) = (region.len, region.host.0);
            }
        }
        map
    }

    /// Host address of guest physical `addr`, if it is RAM, for an access. Valid to the end of the page.
    pub(crate) fn host(&self, addr: GuestPhysAddr) -> Option<u64> {
        if addr.0 < self.low_len {
            self.memory.mark_page_accessed((addr.0 >> PAGE_SHIFT) as usize);
            return Some(self.low + addr.0);
        }
        let offset = addr.0.checked_sub(HIGH_RAM_START.0).filter(|offset| *offset < self.high_len)?;
        self.memory.mark_page_accessed(((self.low_len + offset) >> PAGE_SHIFT) as usize);
        Some(self.high + offset)
    }

    /// The guest physical address of `host`, if that is guest memory.
    pub(crate) fn guest(&self, host: u64) -> Option<GuestPhysAddr> {
        let within = |start: u64, len: u64| host.checked_sub(start).filter(|&offset| offset < len);
        match within(self.low, self.low_len) {
            Some(offset) => Some(GuestPhysAddr(offset)),
            None => within(self.high, self.high_len).map(|offset| HIGH_RAM_START + offset),
        }
    }
}

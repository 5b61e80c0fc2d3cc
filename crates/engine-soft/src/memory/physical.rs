//! Guest physical to host addresses.

use berth_memory::layout::HIGH_RAM_START;
use berth_memory::{GuestMemory, GuestPhysAddr};

/// The one or two regions of RAM, flat for speed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HostMap {
    low_len: u64,
    low: u64,
    high_len: u64,
    high: u64,
}

impl HostMap {
    pub(crate) fn new(memory: &GuestMemory) -> Self {
        let mut map = Self { low_len: 0, low: 0, high_len: 0, high: 0 };
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

    /// Host address of guest physical `addr`, if it is RAM. Valid to the end of the page.
    pub(crate) fn host(&self, addr: GuestPhysAddr) -> Option<u64> {
        if addr.0 < self.low_len {
            return Some(self.low + addr.0);
        }
        let offset = addr.0.checked_sub(HIGH_RAM_START.0)?;
        (offset < self.high_len).then(|| self.high + offset)
    }
}

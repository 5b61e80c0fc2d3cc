//! The memory map that the guest is told, whatever the boot protocol's form for it.

use berth_memory::layout::{PCI_ECAM_SIZE, PCI_ECAM_START};
use berth_memory::{GuestMemory, GuestPhysAddr};

use crate::low_memory::{CONVENTIONAL_END, HIGH_MEMORY};

/// What a range is, with the number that E820, multiboot and PVH all use (ACPI 6.5, table 15.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RangeKind {
    /// RAM that the guest may use.
    Ram = 1,
    /// Not RAM, or RAM that the guest must leave alone.
    Reserved = 2,
}

/// One range of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: GuestPhysAddr,
    /// Length in bytes.
    pub len: u64,
    /// What it is.
    pub kind: RangeKind,
}

/// The map of `memory`: RAM without the area from 639 KiB to 1 MiB, and the PCI configuration space, which Linux
/// wants to see reserved before it uses it. Ascending, at most 5 ranges.
pub fn memory_map(memory: &GuestMemory) -> Vec<Range> {
    let range = |start: GuestPhysAddr, end: GuestPhysAddr, kind| Range { start, len: end - start, kind };
    let mut map = vec![
        range(GuestPhysAddr(0), CONVENTIONAL_END, RangeKind::Ram),
        range(CONVENTIONAL_END, HIGH_MEMORY, RangeKind::Reserved),
    ];
    for region in memory.regions() {
        let start = region.start.max(HIGH_MEMORY);
        if region.end() > start {
            map.push(range(start, region.end(), RangeKind::Ram));
        }
    }
    map.push(Range { start: PCI_ECAM_START, len: PCI_ECAM_SIZE, kind: RangeKind::Reserved });
    map.sort_by_key(|r| r.start);
    map
}

/// End of the RAM below 4 GiB.
pub fn low_ram_end(memory: &GuestMemory) -> GuestPhysAddr {
    memory.regions().first().map_or(GuestPhysAddr(0), |r| r.end())
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_memory::layout::{HIGH_RAM_START, LOW_RAM_END};

    fn ram_bytes(map: &[Range]) -> u64 {
        map.iter().filter(|r| r.kind == RangeKind::Ram).map(|r| r.len).sum()
    }

    #[test]
    fn ram_is_all_but_the_bios_area_and_ranges_do_not_overlap() {
        for size in [1 << 20, 64 << 20, 3 << 30, 5 << 30_u64] {
            let memory = GuestMemory::new(size).unwrap();
            let map = memory_map(&memory);
            assert_eq!(ram_bytes(&map), size - (HIGH_MEMORY - CONVENTIONAL_END));
            assert!(map.windows(2).all(|w| w[0].start.0 + w[0].len <= w[1].start.0), "{map:?}");
        }
    }

    #[test]
    fn the_hole_is_not_ram() {
        let map = memory_map(&GuestMemory::new(4 << 30).unwrap());
        let in_hole = |r: &&Range| r.start < HIGH_RAM_START && r.start.0 + r.len > LOW_RAM_END.0;
        assert!(map.iter().filter(in_hole).all(|r| r.kind == RangeKind::Reserved));
    }
}

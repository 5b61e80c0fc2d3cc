//! A read-only walk of the guest's page tables, for accounts of a stopped vCPU: no rights are checked, no accessed
//! bits are set, and nothing is cached.

use berth_memory::{GuestMemory, GuestPhysAddr, GuestVirtAddr};

const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
/// Bits 12 to 51 of an entry: the address.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// What CR0, CR3, CR4 and EFER say about paging (SDM volume 3, 4.1.1).
#[derive(Clone, Copy, Debug)]
pub struct Paging {
    /// CR0.PG.
    pub enabled: bool,
    /// EFER.LMA: 4-level paging.
    pub long: bool,
    /// CR4.PAE.
    pub pae: bool,
    /// CR4.PSE: 4 MiB pages in 32-bit paging.
    pub large: bool,
    /// CR3.
    pub root: u64,
}

/// The guest physical address that `virt` is mapped to, if it is.
pub fn translate(memory: &GuestMemory, paging: &Paging, virt: GuestVirtAddr) -> Option<GuestPhysAddr> {
    if !paging.enabled {
        return Some(GuestPhysAddr(virt.0));
    }
    match (paging.long, paging.pae) {
        (true, _) => walk(memory, paging.root & ADDRESS, 4, virt.0),
        // The page-directory-pointer table of PAE has four entries and no large pages; bits 30 and 31 index it.
        (false, true) => {
            let entry = read(memory, (paging.root & 0xffff_ffe0) + (virt.0 >> 30 & 3) * 8, 8)?;
            (entry & PRESENT != 0).then(|| walk(memory, entry & ADDRESS, 2, virt.0))?
        }
        (false, false) => walk_32(memory, paging, virt.0),
    }
}

/// Tables of 512 entries of 8 bytes, `levels` of them (SDM volume 3, 4.4 and 4.5).
fn walk(memory: &GuestMemory, root: u64, levels: u32, virt: u64) -> Option<GuestPhysAddr> {
    let mut table = root;
    for level in (0..levels).rev() {
        let shift = 12 + 9 * level;
        let entry = read(memory, table + (virt >> shift & 511) * 8, 8)?;
        if entry & PRESENT == 0 {
            return None;
        }
        let is_page = level == 0 || (level <= 2 && entry & LARGE != 0);
        if is_page {
            let offset_mask = (1 << shift) - 1;
            return Some(GuestPhysAddr((entry & ADDRESS & !offset_mask) | (virt & offset_mask)));
        }
        table = entry & ADDRESS;
    }
    None
}

/// Two tables of 1024 entries of 4 bytes (SDM volume 3, 4.3).
fn walk_32(memory: &GuestMemory, paging: &Paging, virt: u64) -> Option<GuestPhysAddr> {
    let entry = read(memory, (paging.root & 0xffff_f000) + (virt >> 22 & 1023) * 4, 4)?;
    if entry & PRESENT == 0 {
        return None;
    }
    if entry & LARGE != 0 && paging.large {
        // Bits 13 to 20 of the entry are bits 32 to 39 of the address (PSE-36).
        let high = (entry >> 13 & 0xff) << 32;
        return Some(GuestPhysAddr(high | (entry & 0xffc0_0000) | (virt & 0x3f_ffff)));
    }
    let entry = read(memory, (entry & 0xffff_f000) + (virt >> 12 & 1023) * 4, 4)?;
    (entry & PRESENT != 0).then_some(GuestPhysAddr((entry & 0xffff_f000) | (virt & 0xfff)))
}

/// The table entry of `len` (4 or 8) bytes at `at`.
fn read(memory: &GuestMemory, at: u64, len: usize) -> Option<u64> {
    let mut bytes = [0; 8];
    memory.read(GuestPhysAddr(at), &mut bytes[..len]).ok()?;
    Some(u64::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory_with(entries: &[(u64, u64)]) -> GuestMemory {
        let memory = GuestMemory::new(1 << 20).unwrap();
        for (at, entry) in entries {
            memory.write(GuestPhysAddr(*at), &entry.to_le_bytes()).unwrap();
        }
        memory
    }

    fn at(memory: &GuestMemory, paging: &Paging, virt: u64) -> Option<u64> {
        translate(memory, paging, GuestVirtAddr(virt)).map(|p| p.0)
    }

    #[test]
    fn four_levels_with_pages_of_all_sizes() {
        let memory = memory_with(&[
            (0x1000 + 511 * 8, 0x2003),
            (0x2000, 0x3003),
            (0x2008, 0x4000_0083),
            (0x3000, 0x4003),
            (0x3008, 0x60_0083),
            (0x4008, 0x8000_0000_0000_5003),
        ]);
        let paging = Paging { enabled: true, long: true, pae: true, large: false, root: 0x1018 };
        let base = 0xffff_ff80_0000_0000;
        assert_eq!(at(&memory, &paging, base + 0x1234), Some(0x5234));
        assert_eq!(at(&memory, &paging, base + 0x20_5678), Some(0x60_5678));
        assert_eq!(at(&memory, &paging, base + 0x4012_3456), Some(0x4012_3456));
        assert_eq!(at(&memory, &paging, base), None);
        assert_eq!(at(&memory, &paging, 0), None);
    }

    #[test]
    fn pae_and_32_bit_paging() {
        let memory = memory_with(&[(0x1018, 0x2001), (0x2000, 0x3003), (0x3008, 0x5003)]);
        let pae = Paging { enabled: true, long: false, pae: true, large: false, root: 0x1000 };
        assert_eq!(at(&memory, &pae, 0xc000_1234), Some(0x5234));
        assert_eq!(at(&memory, &pae, 0x1234), None);
        let memory = memory_with(&[(0x1c00, 0x2003), (0x2004, 0x5003), (0x1004, 0x80_0083)]);
        let legacy = Paging { pae: false, large: true, ..pae };
        assert_eq!(at(&memory, &legacy, 0xc000_1234), Some(0x5234));
        assert_eq!(at(&memory, &legacy, 0x40_1234), Some(0x80_1234));
    }
}

//! The state of vCPU 0 at the kernel's entry, and the tables in memory that it refers to.

use berth_cpu::bits::{cr0, cr4, efer, gpr, rflags};
use berth_cpu::{CpuState, Segment, TableRegister};
use berth_memory::{GuestMemory, GuestPhysAddr, MemoryError, PAGE_SIZE};

use crate::low_memory::{GDT, PAGE_DIRECTORIES, PDPT, PML4};

/// Selector of the flat code segment: Linux's `__BOOT_CS`.
const CODE_SELECTOR: u16 = 0x10;
/// Selector of the flat data segment: Linux's `__BOOT_DS`.
const DATA_SELECTOR: u16 = 0x18;
/// Selector of the task state segment.
const TASK_SELECTOR: u16 = 0x20;

/// Type, S, P and granularity of a flat code segment that was accessed; D/B or L come on top.
const FLAT_CODE: u16 =
    Segment::TYPE_CODE | Segment::TYPE_RW | Segment::TYPE_ACCESSED | Segment::S | Segment::P | Segment::G;
/// The same for a flat 32-bit data segment.
const FLAT_DATA: u16 =
    Segment::TYPE_RW | Segment::TYPE_ACCESSED | Segment::S | Segment::P | Segment::G | Segment::DB;
/// A busy 32-bit or 64-bit TSS (SDM volume 3, table 3-2).
const BUSY_TSS: u16 = 0xb | Segment::P;

/// Bits of page-table entries (SDM volume 3, 4.5).
const PRESENT_WRITABLE: u64 = 3;
const LARGE_PAGE: u64 = 1 << 7;
/// Size that one page-directory entry maps.
const LARGE_PAGE_SIZE: u64 = 2 << 20;

/// 32-bit protected mode without paging, flat segments: what PVH and multiboot 1 ask for (multiboot 0.6.96, 3.2).
/// Writes the GDT.
pub fn protected_mode(memory: &GuestMemory, entry: u32) -> Result<CpuState, MemoryError> {
    let mut state = flat(memory, FLAT_CODE | Segment::DB)?;
    state.rip = u64::from(entry);
    state.cr0 = cr0::PE | cr0::ET;
    Ok(state)
}

/// 64-bit mode with the first 4 GiB mapped one to one: the 64-bit entry of Linux (Documentation/arch/x86/boot.rst,
/// "64-bit boot protocol"). Writes the GDT and the page tables.
pub fn long_mode(memory: &GuestMemory, entry: u64) -> Result<CpuState, MemoryError> {
    write_page_tables(memory)?;
    let mut state = flat(memory, FLAT_CODE | Segment::L)?;
    state.rip = entry;
    state.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::PG;
    state.cr3 = PML4.0;
    state.cr4 = cr4::PAE;
    state.efer = efer::LME | efer::LMA;
    Ok(state)
}

/// Puts `value` into RSI, EBX or the like: an index of [`gpr`].
pub fn with_register(mut state: CpuState, index: usize, value: u64) -> CpuState {
    state.gpr[index] = value;
    state
}

fn flat(memory: &GuestMemory, code_attr: u16) -> Result<CpuState, MemoryError> {
    let code = Segment { selector: CODE_SELECTOR, base: 0, limit: u32::MAX, attr: code_attr };
    let data = Segment { selector: DATA_SELECTOR, base: 0, limit: u32::MAX, attr: FLAT_DATA };
    let task = Segment { selector: TASK_SELECTOR, base: 0, limit: 0x67, attr: BUSY_TSS };
    // Slot 5 stays zero: in 64-bit mode it is the upper half of the TSS descriptor.
    let gdt = [0, 0, descriptor(&code), descriptor(&data), descriptor(&task), 0];
    memory.write(GDT, &gdt.map(u64::to_le_bytes).concat())?;
    Ok(CpuState {
        rflags: rflags::ONE,
        cs: code,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: task,
        gdtr: TableRegister { base: GDT.0, limit: (gdt.len() * 8 - 1) as u16 },
        idtr: TableRegister::default(),
        ..CpuState::reset()
    })
}

/// The descriptor in memory that loads as `segment` (SDM volume 3, 3.4.5).
fn descriptor(segment: &Segment) -> u64 {
    let limit = u64::from(if segment.attr & Segment::G != 0 { segment.limit >> 12 } else { segment.limit });
    let base = segment.base;
    (limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | u64::from(segment.attr) << 40
        | (limit >> 16 & 0xf) << 48
        | (base >> 24 & 0xff) << 56
}

/// Maps the first 4 GiB one to one with pages of 2 MiB.
fn write_page_tables(memory: &GuestMemory) -> Result<(), MemoryError> {
    let mut pml4 = [0_u64; 512];
    pml4[0] = PDPT.0 | PRESENT_WRITABLE;
    write_table(memory, PML4, &pml4)?;
    let mut pdpt = [0_u64; 512];
    let mut address = 0;
    for (i, entry) in (0..4).zip(pdpt.iter_mut()) {
        let directory = PAGE_DIRECTORIES + i * PAGE_SIZE;
        *entry = directory.0 | PRESENT_WRITABLE;
        let mut entries = [0_u64; 512];
        for entry in &mut entries {
            *entry = address | LARGE_PAGE | PRESENT_WRITABLE;
            address += LARGE_PAGE_SIZE;
        }
        write_table(memory, directory, &entries)?;
    }
    write_table(memory, PDPT, &pdpt)
}

fn write_table(memory: &GuestMemory, at: GuestPhysAddr, table: &[u64; 512]) -> Result<(), MemoryError> {
    memory.write(at, &table.map(u64::to_le_bytes).concat())
}

/// Index of RSI, where Linux's 64-bit entry expects the zero page.
pub const ZERO_PAGE_REGISTER: usize = gpr::RSI;

#[cfg(test)]
mod tests {
    use super::*;

    fn read_u64(memory: &GuestMemory, at: u64) -> u64 {
        let mut bytes = [0; 8];
        memory.read(GuestPhysAddr(at), &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    /// Walks the page tables as the CPU does.
    fn translate(memory: &GuestMemory, state: &CpuState, address: u64) -> u64 {
        let mut table = state.cr3;
        for shift in [39, 30] {
            let entry = read_u64(memory, table + (address >> shift & 511) * 8);
            assert_eq!(entry & PRESENT_WRITABLE, PRESENT_WRITABLE);
            table = entry & !0xfff;
        }
        let entry = read_u64(memory, table + (address >> 21 & 511) * 8);
        assert_eq!(entry & (PRESENT_WRITABLE | LARGE_PAGE), PRESENT_WRITABLE | LARGE_PAGE);
        (entry & !(LARGE_PAGE_SIZE - 1)) + address % LARGE_PAGE_SIZE
    }

    #[test]
    fn the_first_four_gibibytes_are_mapped_one_to_one() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        let state = long_mode(&memory, 0x100_0200).unwrap();
        for address in [0, 0x1234, 0x20_0000, 0x3fff_ffff, 0x4000_0000, 0xfee0_0020, 0xffff_ffff] {
            assert_eq!(translate(&memory, &state, address), address);
        }
    }

    #[test]
    fn descriptors_are_those_of_the_manual() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        let long = long_mode(&memory, 0).unwrap();
        let at = |selector: u16| read_u64(&memory, long.gdtr.base + u64::from(selector));
        assert_eq!(at(long.cs.selector), 0x00af_9b00_0000_ffff);
        assert_eq!(at(long.ds.selector), 0x00cf_9300_0000_ffff);
        assert_eq!(at(long.tr.selector), 0x0000_8b00_0000_0067);
        let protected = protected_mode(&memory, 0).unwrap();
        assert_eq!(read_u64(&memory, GDT.0 + u64::from(protected.cs.selector)), 0x00cf_9b00_0000_ffff);
    }
}

//! The guest's page tables, walked without touching them: no accessed bits are set and nothing is cached.
//!
//! This is for people who look; what executes guest code walks by itself. The vCPUs may change tables meanwhile: then
//! the walk shows each entry as it was when it was read.

use berth_memory::{GuestMemory, GuestPhysAddr, GuestVirtAddr};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::paging::{Paging, PagingMode};

/// Bits of an entry (SDM volume 3, 4.3 to 4.5).
pub(crate) mod entry {
    pub const P: u64 = 1 << 0;
    pub const W: u64 = 1 << 1;
    pub const U: u64 = 1 << 2;
    pub const PWT: u64 = 1 << 3;
    pub const PCD: u64 = 1 << 4;
    pub const A: u64 = 1 << 5;
    pub const D: u64 = 1 << 6;
    /// In a table of the last level: page attribute table.
    pub const PS: u64 = 1 << 7;
    pub const G: u64 = 1 << 8;
    /// Page attribute table in an entry for a large page.
    pub const PAT_LARGE: u64 = 1 << 12;
    pub const NX: u64 = 1 << 63;
}

/// A level of page tables, by the manual's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum Level {
    /// Page map level 4: an entry covers 512 GiB.
    Pml4,
    /// Page-directory-pointer table: 1 GiB.
    Pdpt,
    /// Page directory: 2 MiB, or 4 MiB with 32-bit paging.
    Pd,
    /// Page table: 4 KiB.
    Pt,
}

impl Level {
    /// The manual's abbreviation.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pml4 => "PML4",
            Self::Pdpt => "PDPT",
            Self::Pd => "PD",
            Self::Pt => "PT",
        }
    }
}

/// How a level of a paging mode is laid out.
#[derive(Clone, Copy)]
struct Layout {
    level: Level,
    /// log2 of what one entry covers.
    shift: u32,
    /// log2 of the number of entries.
    index_bits: u32,
}

const FOUR_LEVEL: [Layout; 4] = [
    Layout { level: Level::Pml4, shift: 39, index_bits: 9 },
    Layout { level: Level::Pdpt, shift: 30, index_bits: 9 },
    Layout { level: Level::Pd, shift: 21, index_bits: 9 },
    Layout { level: Level::Pt, shift: 12, index_bits: 9 },
];
const PAE: [Layout; 3] =
    [Layout { level: Level::Pdpt, shift: 30, index_bits: 2 }, FOUR_LEVEL[2], FOUR_LEVEL[3]];
const BITS32: [Layout; 2] = [
    Layout { level: Level::Pd, shift: 22, index_bits: 10 },
    Layout { level: Level::Pt, shift: 12, index_bits: 10 },
];

/// An entry that was read on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Which table.
    pub level: Level,
    /// Where the table is.
    pub table: GuestPhysAddr,
    /// Which entry.
    pub index: u16,
    /// How many entries the table has.
    pub entries: u16,
    /// Where the entry is.
    pub at: GuestPhysAddr,
    /// The entry.
    pub value: u64,
    /// Whether the entry maps a page, rather than pointing to the next table. Of an entry that is not present: no.
    pub is_page: bool,
    /// Bytes of the address space that one entry covers.
    pub covers: u64,
    /// Bits that are set and must not be.
    pub reserved: u64,
}

/// Where a walk ended with success: the page and the rights of all levels together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// First guest physical address of the page.
    pub base: GuestPhysAddr,
    /// Size in bytes.
    pub size: u64,
    /// Every level allows writes.
    pub writable: bool,
    /// Every level allows user accesses.
    pub user: bool,
    /// A level forbids execution.
    pub no_execute: bool,
}

/// How a walk ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// At a page.
    Page(Page),
    /// The last step's entry is not present.
    NotPresent,
    /// The last step's entry has reserved bits.
    Reserved,
    /// The next table is not in RAM.
    NoTable {
        /// Which table.
        level: Level,
        /// Where it should be.
        table: GuestPhysAddr,
    },
    /// Bits 48 to 63 are not all equal to bit 47: no table is looked at.
    NonCanonical,
}

/// All of a walk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Walk {
    /// The address.
    pub virt: GuestVirtAddr,
    /// The entries that were read, from the root on.
    pub steps: Vec<Step>,
    /// How it ended.
    pub end: End,
}

impl Walk {
    /// The guest physical address, if the walk ended at a page.
    pub fn physical(&self) -> Option<GuestPhysAddr> {
        match self.end {
            End::Page(page) => Some(page.base + (self.virt.0 & (page.size - 1))),
            _ => None,
        }
    }
}

/// The guest physical address that `virt` is mapped to, if it is. Rights are not looked at.
pub fn translate(memory: &GuestMemory, paging: &Paging, virt: GuestVirtAddr) -> Option<GuestPhysAddr> {
    walk(memory, paging, virt).physical()
}

/// Fills `data` from `virt` on. Returns how many bytes could be read before a page that is not there.
pub fn read_virtual(memory: &GuestMemory, paging: &Paging, virt: GuestVirtAddr, data: &mut [u8]) -> usize {
    let mut done = 0;
    while done < data.len() {
        let at = virt.wrapping_add(done as u64);
        let part = (data.len() - done).min((berth_memory::PAGE_SIZE - at.page_offset()) as usize);
        let Some(physical) = translate(memory, paging, at) else { break };
        if memory.read(physical, &mut data[done..done + part]).is_err() {
            break;
        }
        done += part;
    }
    done
}

/// Walks the tables for `virt`. Outside of 4-level paging bits 32 to 63 of it are ignored.
pub fn walk(memory: &GuestMemory, paging: &Paging, virt: GuestVirtAddr) -> Walk {
    let mut steps = Vec::new();
    let end = match paging.mode {
        PagingMode::Off => End::Page(Page {
            base: GuestPhysAddr(virt.0 & 0xffff_f000),
            size: berth_memory::PAGE_SIZE,
            writable: true,
            user: true,
            no_execute: false,
        }),
        PagingMode::FourLevel if (virt.0 as i64) << 16 >> 16 != virt.0 as i64 => End::NonCanonical,
        PagingMode::FourLevel => {
            let root = paging.cr3 & paging.address_mask();
            descend(memory, paging, &FOUR_LEVEL, root, virt, &mut steps)
        }
        PagingMode::Pae => {
            let root = paging.cr3 & 0xffff_ffe0;
            descend(memory, paging, &PAE, root, virt, &mut steps)
        }
        PagingMode::Bits32 => {
            let root = paging.cr3 & 0xffff_f000;
            descend(memory, paging, &BITS32, root, virt, &mut steps)
        }
    };
    Walk { virt, steps, end }
}

fn descend(
    memory: &GuestMemory,
    paging: &Paging,
    layouts: &[Layout],
    root: u64,
    virt: GuestVirtAddr,
    steps: &mut Vec<Step>,
) -> End {
    let mut page = Page { base: GuestPhysAddr(0), size: 0, writable: true, user: true, no_execute: false };
    let mut table = root;
    for layout in layouts {
        let Some(step) = read_step(memory, paging, *layout, table, virt) else {
            return End::NoTable { level: layout.level, table: GuestPhysAddr(table) };
        };
        steps.push(step);
        if step.value & entry::P == 0 {
            return End::NotPresent;
        }
        if step.reserved != 0 {
            return End::Reserved;
        }
        // The entries of PAE's first table have no rights (SDM volume 3, 4.4.1).
        if !(paging.mode == PagingMode::Pae && layout.level == Level::Pdpt) {
            page.writable &= step.value & entry::W != 0;
            page.user &= step.value & entry::U != 0;
            page.no_execute |= step.value & entry::NX != 0;
        }
        if step.is_page {
            page.size = step.covers;
            page.base = GuestPhysAddr(page_address(paging, &step) & !(step.covers - 1));
            return End::Page(page);
        }
        table = next_table(paging, step.value);
    }
    // The last layout's shift is 12: an entry of it is a page or not present.
    End::NotPresent
}

/// The entry for `virt` in the table at `table`, if that is RAM.
fn read_step(
    memory: &GuestMemory,
    paging: &Paging,
    layout: Layout,
    table: u64,
    virt: GuestVirtAddr,
) -> Option<Step> {
    let width = if paging.mode == PagingMode::Bits32 { 4 } else { 8 };
    let index = virt.0 >> layout.shift & ((1 << layout.index_bits) - 1);
    let at = GuestPhysAddr(table + index * width);
    let mut bytes = [0; 8];
    memory.read(at, &mut bytes[..width as usize]).ok()?;
    let value = u64::from_le_bytes(bytes);
    let mut step = Step {
        level: layout.level,
        table: GuestPhysAddr(table),
        // At most 1023.
        index: index as u16,
        entries: 1 << layout.index_bits,
        at,
        value,
        is_page: false,
        covers: 1 << layout.shift,
        reserved: 0,
    };
    if value & entry::P != 0 {
        step.is_page = is_page(paging, &step);
        step.reserved = value & reserved_bits(paging, &step);
    }
    Some(step)
}

fn is_page(paging: &Paging, step: &Step) -> bool {
    match (paging.mode, step.level) {
        (_, Level::Pt) => true,
        (PagingMode::Bits32, _) => paging.pse && step.value & entry::PS != 0,
        (_, Level::Pd) | (PagingMode::FourLevel, Level::Pdpt) => step.value & entry::PS != 0,
        _ => false,
    }
}

/// The bits that must be clear in a present entry (SDM volume 3, tables 4-4 to 4-20).
fn reserved_bits(paging: &Paging, step: &Step) -> u64 {
    if paging.mode == PagingMode::Bits32 {
        // PSE-36: bits 20 to 13 are bits 39 to 32 of the address.
        let implemented = (1_u64 << (paging.physical_bits.min(40) - 32)) - 1;
        let too_high = (0xff << 13) & !(implemented << 13);
        return if step.is_page && step.level == Level::Pd { 1 << 21 | too_high } else { 0 };
    }
    let above = !paging.address_mask() & 0x000f_ffff_ffff_f000;
    let execute = if paging.nxe { 0 } else { entry::NX };
    let ignored_or_reserved = if paging.mode == PagingMode::Pae { 0x7ff0_0000_0000_0000 } else { 0 };
    let misaligned = if step.is_page && step.level != Level::Pt { (step.covers - 1) & !0x1fff } else { 0 };
    let of_level = match (paging.mode, step.level) {
        (PagingMode::Pae, Level::Pdpt) => 0x1e6 | entry::NX,
        (PagingMode::FourLevel, Level::Pml4) => entry::PS,
        _ => 0,
    };
    above | execute | ignored_or_reserved | misaligned | of_level
}

/// The address bits of an entry that maps a page.
fn page_address(paging: &Paging, step: &Step) -> u64 {
    match (paging.mode, step.level) {
        (PagingMode::Bits32, Level::Pd) => step.value & 0xffc0_0000 | (step.value >> 13 & 0xff) << 32,
        (PagingMode::Bits32, _) => step.value & 0xffff_f000,
        _ => step.value & paging.address_mask(),
    }
}

fn next_table(paging: &Paging, value: u64) -> u64 {
    value & if paging.mode == PagingMode::Bits32 { 0xffff_f000 } else { paging.address_mask() }
}

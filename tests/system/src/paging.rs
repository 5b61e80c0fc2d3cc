//! Page tables of guests, in the three formats (SDM volume 3, chapter 4).

use berth_cpu::CpuState;
use berth_cpu::bits::{cr0, cr4, efer};
use berth_memory::{GuestMemory, GuestPhysAddr};

use crate::layout::{TABLES, TABLES_END};

/// Bits of paging-structure entries.
#[allow(missing_docs)]
pub mod flag {
    pub const P: u64 = 1 << 0;
    pub const W: u64 = 1 << 1;
    pub const U: u64 = 1 << 2;
    pub const A: u64 = 1 << 5;
    pub const D: u64 = 1 << 6;
    pub const PS: u64 = 1 << 7;
    pub const G: u64 = 1 << 8;
    pub const NX: u64 = 1 << 63;
    /// Present, writable, level 0 only.
    pub const KERNEL: u64 = P | W;
    /// Present, writable, for every level.
    pub const USER: u64 = P | W | U;
}

/// Format of page tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paging {
    /// 32-bit entries, two levels.
    TwoLevel,
    /// 64-bit entries, three levels.
    Pae,
    /// 64-bit entries, four levels.
    FourLevel,
}

impl Paging {
    /// log2 of what an entry maps, from the root down.
    fn levels(self) -> &'static [u32] {
        match self {
            Self::TwoLevel => &[22, 12],
            Self::Pae => &[30, 21, 12],
            Self::FourLevel => &[39, 30, 21, 12],
        }
    }

    fn entry_size(self) -> u64 {
        if self == Self::TwoLevel { 4 } else { 8 }
    }

    fn index(self, address: u64, shift: u32) -> u64 {
        let bits = match (self, shift) {
            (Self::TwoLevel, _) => 10,
            (Self::Pae, 30) => 2,
            _ => 9,
        };
        address >> shift & ((1 << bits) - 1)
    }

    /// The format that a CPU state uses, `None` without paging.
    pub fn of(state: &CpuState) -> Option<Self> {
        if state.cr0 & cr0::PG == 0 {
            None
        } else if state.cr4 & cr4::PAE == 0 {
            Some(Self::TwoLevel)
        } else if state.efer & efer::LMA == 0 {
            Some(Self::Pae)
        } else {
            Some(Self::FourLevel)
        }
    }
}

/// A tree of page tables in guest memory.
#[derive(Clone, Debug)]
pub struct PageTables {
    memory: GuestMemory,
    format: Paging,
    /// Guest physical address of the root, for CR3.
    pub root: u64,
}

/// Hands out zeroed pages for tables.
#[derive(Debug)]
pub struct TableSpace {
    memory: GuestMemory,
    next: u64,
}

impl TableSpace {
    /// All of the space is free.
    pub fn new(memory: &GuestMemory) -> Self {
        Self { memory: memory.clone(), next: TABLES }
    }

    /// A zeroed page.
    pub fn page(&mut self) -> u64 {
        let page = self.next;
        assert!(page < TABLES_END, "the space for page tables is used up");
        self.next += 4096;
        self.memory.write(GuestPhysAddr(page), &[0; 4096]).expect("RAM");
        page
    }
}

fn load(memory: &GuestMemory, at: u64, size: u64) -> u64 {
    let mut bytes = [0; 8];
    // Outside of RAM nothing is present.
    let _ = memory.read(GuestPhysAddr(at), &mut bytes[..size as usize]);
    u64::from_le_bytes(bytes)
}

impl PageTables {
    /// An empty tree.
    pub fn new(memory: &GuestMemory, format: Paging, space: &mut TableSpace) -> Self {
        Self { memory: memory.clone(), format, root: space.page() }
    }

    /// Where the entry is that maps `address` at the level where one entry covers 2^`shift` bytes.
    pub fn entry(&self, address: u64, shift: u32) -> u64 {
        self.find(address, shift, None).expect("the tables above exist")
    }

    fn find(&self, address: u64, shift: u32, mut space: Option<&mut TableSpace>) -> Option<u64> {
        let size = self.format.entry_size();
        let mut table = self.root;
        for &level in self.format.levels() {
            let at = table + self.format.index(address, level) * size;
            if level == shift {
                return Some(at);
            }
            let mut value = load(&self.memory, at, size);
            if value & flag::P == 0 {
                let rights = if self.format == Paging::Pae && level == 30 { flag::P } else { flag::USER };
                value = space.as_deref_mut()?.page() | rights;
                self.memory.write(GuestPhysAddr(at), &value.to_le_bytes()[..size as usize]).expect("RAM");
            }
            assert!(value & flag::PS == 0 || level == 39, "{address:#x} is inside a large page");
            table = value & 0x000f_ffff_ffff_f000;
        }
        None
    }

    /// Maps 2^`shift` bytes at `address` to `physical`; PS is added for large pages.
    pub fn map(&mut self, space: &mut TableSpace, address: u64, physical: u64, flags: u64, shift: u32) {
        let at = self.find(address, shift, Some(space)).expect("a level of this format");
        let value = physical | flags | if shift == 12 { 0 } else { flag::PS };
        self.set(at, value);
    }

    /// Writes an entry.
    pub fn set(&self, at: u64, value: u64) {
        let size = self.format.entry_size() as usize;
        self.memory.write(GuestPhysAddr(at), &value.to_le_bytes()[..size]).expect("RAM");
    }

    /// Reads an entry.
    pub fn get(&self, at: u64) -> u64 {
        load(&self.memory, at, self.format.entry_size())
    }
}

/// Guest physical address of `address` in `state`, without any check of rights.
pub fn resolve(memory: &GuestMemory, state: &CpuState, address: u64) -> Option<u64> {
    let Some(format) = Paging::of(state) else { return Some(address & 0xffff_ffff) };
    let mut table = state.cr3 & 0x000f_ffff_ffff_f000;
    for &shift in format.levels() {
        let at = table + format.index(address, shift) * format.entry_size();
        let value = load(memory, at, format.entry_size());
        if value & flag::P == 0 {
            return None;
        }
        if shift == 12 || value & flag::PS != 0 && shift != 39 {
            let within = (1u64 << shift) - 1;
            return Some(value & 0x000f_ffff_ffff_f000 & !within | address & within);
        }
        table = value & 0x000f_ffff_ffff_f000;
    }
    None
}

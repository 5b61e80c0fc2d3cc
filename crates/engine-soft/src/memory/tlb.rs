//! The software TLBs of one vCPU.
//!
//! The first level is what translated code searches: one table for each privilege class and kind of access,
//! indexed by page number, with entries {tag, host page}. A hit is `address - tag < 4096 - size + 1` as an
//! unsigned comparison: it proves in one step that the page matches and that the access does not cross it.
//! Pages that need more than a plain host access (MMIO, watched, stores to pages with translations) are never
//! installed. An empty entry has the tag of a page that belongs to another index, so nothing matches it.
//!
//! The second level lives in Rust. Its entries are tagged with a *generation*: one for global pages and one
//! for each PCID. Flushing an address space takes a new generation for it; nothing is cleared. The jump cache
//! is tagged in the same way, through [`crate::state::State::jump_key`].

use berth_memory::PAGE_SHIFT;

use crate::cpu::Cpu;
use crate::mode::TlbClass;

/// Entries of one first-level table.
pub const TLB_ENTRIES: usize = 1024;
/// First-level tables: three privilege classes, each for loads and for stores.
pub const TLB_TABLES: usize = 6;
const SECOND_LEVEL_ENTRIES: usize = 4096;

/// One first-level entry.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct TlbEntry {
    /// Linear address of the page.
    pub tag: u64,
    /// Host address of the page.
    pub host: u64,
}

/// Number of a first-level table: of a privilege class, for loads or for stores (and read-modify-write).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TlbTable(u8);

impl TlbTable {
    /// All of them.
    pub const ALL: [Self; TLB_TABLES] = [Self(0), Self(1), Self(2), Self(3), Self(4), Self(5)];

    /// The table of `class` for loads, or for stores.
    pub const fn new(class: TlbClass, write: bool) -> Self {
        Self(class as u8 * 2 + write as u8)
    }

    /// Less than [`TLB_TABLES`].
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// Whether it is for stores.
    pub const fn is_write(self) -> bool {
        self.0 & 1 != 0
    }
}

/// All first-level tables, indexed by [`TlbTable`].
#[repr(C)]
pub struct Tlb(pub [[TlbEntry; TLB_ENTRIES]; TLB_TABLES]);

/// Index of the page with number `page` in a first-level table.
pub const fn index(page: u64) -> usize {
    page as usize & (TLB_ENTRIES - 1)
}

fn empty(index: usize) -> TlbEntry {
    TlbEntry { tag: ((index ^ 1) as u64) << PAGE_SHIFT, host: 0 }
}

/// A translation, as the page walk found it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Translation {
    /// Guest physical address of the 4 KiB page.
    pub gpa: u64,
    /// All levels allow writes.
    pub writable: bool,
    /// All levels allow CPL 3.
    pub user: bool,
    /// A level forbids execution.
    pub no_execute: bool,
    /// The dirty bit is set.
    pub dirty: bool,
    /// A global page and CR4.PGE.
    pub global: bool,
    /// log2 of the page size: 12, 21, 22 or 30.
    pub size_shift: u8,
}

#[derive(Clone, Copy)]
struct SecondLevel {
    page: u64,
    generation: u64,
    translation: Translation,
}

/// What [`Cpu::flush_tlb`] drops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// Everything, global pages included.
    All,
    /// The page of this linear address in the current PCID, and global ones.
    Page(u64),
    /// Everything of one PCID except global pages.
    Pcid(u16),
    /// One page of one PCID; global pages stay.
    PcidPage(u16, u64),
    /// Every PCID.
    AllPcids {
        /// Global pages stay.
        keep_global: bool,
    },
}

/// The part of a vCPU's memory state that only Rust code uses.
pub(crate) struct CpuMemory {
    second: Box<[SecondLevel]>,
    /// Generation of each PCID; 0: none yet.
    pcid_generation: Box<[u64]>,
    last_generation: u64,
    global_generation: u64,
    /// Generation of jump-cache entries for CPL 0 to 2.
    kernel_code_generation: u64,
    /// Generation of jump-cache entries for CPL 3.
    user_code_generation: u64,
    /// Code of CPL 0 to 2 was entered through pages that are not global.
    kernel_code_not_global: bool,
    /// First-level entries that are not of global pages: table and index.
    not_global: Vec<(TlbTable, u16)>,
    /// Hashes of pages that jump-cache entries were made for.
    code_pages: Filter,
    /// Hashes of 2 MiB regions that were entered from larger pages than 4 KiB.
    large_pages: Filter,
    /// The same for 1 GiB pages.
    huge_pages: Filter,
    /// What a store in the slow path still has to do after the instruction.
    pub(super) post: super::slow::Post,
}

/// A set that may claim to have what it has not: two bits for each member.
struct Filter(Box<[u64]>);

impl Filter {
    /// A filter of 2^`bits` bits.
    fn new(bits: u32) -> Self {
        Self(vec![0; 1 << (bits - 6)].into())
    }
    fn places(&self, value: u64) -> [(usize, u64); 2] {
        let hash = value.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        [hash >> 40, hash >> 16].map(|h| ((h >> 6) as usize & (self.0.len() - 1), 1 << (h & 63)))
    }
    fn add(&mut self, value: u64) {
        for (word, bit) in self.places(value) {
            self.0[word] |= bit;
        }
    }
    fn may_have(&self, value: u64) -> bool {
        self.places(value).into_iter().all(|(word, bit)| self.0[word] & bit != 0)
    }
    fn clear(&mut self) {
        self.0.fill(0);
    }
}

impl CpuMemory {
    pub(crate) fn new() -> Self {
        let none = SecondLevel { page: 0, generation: 0, translation: Translation::default() };
        Self {
            second: vec![none; SECOND_LEVEL_ENTRIES].into(),
            pcid_generation: vec![0; 4096].into(),
            last_generation: 4,
            global_generation: 1,
            kernel_code_generation: 2,
            user_code_generation: 3,
            kernel_code_not_global: false,
            not_global: Vec::new(),
            code_pages: Filter::new(16),
            large_pages: Filter::new(13),
            huge_pages: Filter::new(10),
            post: super::slow::Post::None,
        }
    }

    fn new_generation(&mut self) -> u64 {
        self.last_generation += 1;
        self.last_generation
    }

    fn pcid_generation(&mut self, pcid: u16) -> u64 {
        let slot = usize::from(pcid & 0xfff);
        if self.pcid_generation[slot] == 0 {
            self.pcid_generation[slot] = self.new_generation();
        }
        self.pcid_generation[slot]
    }
}

impl Cpu {
    /// The PCID in CR3, or 0 where CR4.PCIDE is off.
    fn pcid(&self) -> u16 {
        if self.s.cr4 & berth_cpu::bits::cr4::PCIDE != 0 { (self.s.cr3 & 0xfff) as u16 } else { 0 }
    }

    /// Recomputes [`crate::state::State::jump_key`] from the mode and the code generations.
    pub(crate) fn update_jump_key(&mut self) {
        let mode = self.s.mode;
        let generation =
            if mode.cpl() == 3 { self.mem.user_code_generation } else { self.mem.kernel_code_generation };
        self.s.jump_key = generation << 24 | u64::from(mode.0);
    }

    /// Looks `lin` up in the second level.
    pub(super) fn second_level(&mut self, lin: u64) -> Option<Translation> {
        let pcid = self.pcid();
        let own = self.mem.pcid_generation(pcid);
        let page = lin >> PAGE_SHIFT;
        let e = &self.mem.second[page as usize % SECOND_LEVEL_ENTRIES];
        (e.page == page && (e.generation == own || e.generation == self.mem.global_generation))
            .then_some(e.translation)
    }

    /// Remembers what a walk for `lin` found.
    pub(super) fn set_second_level(&mut self, lin: u64, translation: Translation) {
        let pcid = self.pcid();
        let generation =
            if translation.global { self.mem.global_generation } else { self.mem.pcid_generation(pcid) };
        if translation.size_shift > 12 {
            self.mem.large_pages.add(lin >> 21);
            if translation.size_shift == 30 {
                self.mem.huge_pages.add(lin >> 30);
            }
        }
        let page = lin >> PAGE_SHIFT;
        self.mem.second[page as usize % SECOND_LEVEL_ENTRIES] = SecondLevel { page, generation, translation };
    }

    /// Installs a page for translated code.
    pub(super) fn install(&mut self, lin: u64, table: TlbTable, host_page: u64, global: bool) {
        let i = index(lin >> PAGE_SHIFT);
        if !global {
            if self.mem.not_global.len() >= 2048 {
                self.clear_first_level();
            }
            self.mem.not_global.push((table, i as u16));
        }
        self.s.tlb.0[table.index()][i] = TlbEntry { tag: lin & !0xfff, host: host_page };
    }

    /// Empties the first level.
    pub(crate) fn clear_first_level(&mut self) {
        self.mem.not_global.clear();
        for table in TlbTable::ALL {
            for (i, entry) in self.s.tlb.0[table.index()].iter_mut().enumerate() {
                *entry = empty(i);
            }
            self.s.slots.clear(table);
        }
    }

    /// Empties the slots as well, which are not valid before.
    pub(crate) fn initialize_first_level(&mut self) {
        self.s.slots.initialize();
        self.clear_first_level();
    }

    fn clear_not_global(&mut self) {
        let mut list = std::mem::take(&mut self.mem.not_global);
        let mut tables = [false; TLB_TABLES];
        for (table, i) in list.drain(..) {
            tables[table.index()] = true;
            self.s.tlb.0[table.index()][usize::from(i)] = empty(usize::from(i));
        }
        self.mem.not_global = list;
        // Slots do not know which of them are of global pages.
        for table in TlbTable::ALL.into_iter().filter(|table| tables[table.index()]) {
            self.s.slots.clear(table);
        }
    }

    /// Removes all first-level entries for stores: each page is looked at again, and so marked in the log of written
    /// pages.
    pub(crate) fn drop_all_write_entries(&mut self) {
        for table in TlbTable::ALL.into_iter().filter(|table| table.is_write()) {
            for (i, entry) in self.s.tlb.0[table.index()].iter_mut().enumerate() {
                *entry = empty(i);
            }
            self.s.slots.clear(table);
        }
    }

    /// Removes every first-level entry for stores to the host page at `host_page`.
    pub(crate) fn drop_write_entries(&mut self, host_page: u64) {
        for table in TlbTable::ALL.into_iter().filter(|table| table.is_write()) {
            for (i, entry) in self.s.tlb.0[table.index()].iter_mut().enumerate() {
                if entry.host == host_page {
                    *entry = empty(i);
                }
            }
            self.s.slots.clear_if(table, |slot| slot.tag.wrapping_add(slot.delta) == host_page);
        }
    }

    /// Removes first-level entries of the region of 2^`shift` bytes that holds `lin`.
    fn drop_region(&mut self, lin: u64, shift: u32) {
        for table in TlbTable::ALL {
            let entries = &mut self.s.tlb.0[table.index()];
            if shift == PAGE_SHIFT {
                let i = index(lin >> PAGE_SHIFT);
                if entries[i].tag >> PAGE_SHIFT == lin >> PAGE_SHIFT {
                    entries[i] = empty(i);
                }
                self.s.slots.clear_page(table, lin);
            } else {
                for (i, entry) in entries.iter_mut().enumerate() {
                    if entry.tag >> shift == lin >> shift {
                        *entry = empty(i);
                    }
                }
                self.s.slots.clear_if(table, |slot| slot.tag >> shift == lin >> shift);
            }
        }
        let drop = |e: &mut SecondLevel| {
            if e.page >> (shift - PAGE_SHIFT) == lin >> shift {
                e.generation = 0;
            }
        };
        if shift == PAGE_SHIFT {
            drop(&mut self.mem.second[(lin >> PAGE_SHIFT) as usize % SECOND_LEVEL_ENTRIES]);
        } else {
            self.mem.second.iter_mut().for_each(drop);
        }
    }

    fn new_kernel_code_generation(&mut self) {
        self.mem.kernel_code_generation = self.mem.new_generation();
        self.mem.kernel_code_not_global = false;
    }

    /// Called when a jump-cache entry is made for code at `lin`.
    pub(crate) fn note_code_page(&mut self, lin: u64, global: bool) {
        self.mem.code_pages.add(lin >> PAGE_SHIFT);
        if self.s.mode.cpl() != 3 && !global {
            self.mem.kernel_code_not_global = true;
        }
    }

    /// Drops translations as INVLPG, INVPCID and writes to CR0, CR3 and CR4 ask for it (SDM volume 3, 4.10.4).
    pub fn flush_tlb(&mut self, what: Flush) {
        let current = self.pcid();
        let kind = match what {
            Flush::All | Flush::AllPcids { .. } => 0,
            Flush::Pcid(_) => 1,
            Flush::Page(_) | Flush::PcidPage(..) => 2,
        };
        self.counters().flushes[kind].add(1);
        match what {
            Flush::All | Flush::AllPcids { keep_global: false } => {
                self.mem.pcid_generation.fill(0);
                self.mem.global_generation = self.mem.new_generation();
                self.mem.code_pages.clear();
                self.mem.large_pages.clear();
                self.mem.huge_pages.clear();
                self.new_kernel_code_generation();
                self.mem.user_code_generation = self.mem.pcid_generation(current);
                self.clear_first_level();
            }
            Flush::AllPcids { keep_global: true } => {
                self.mem.pcid_generation.fill(0);
                self.enter_address_space(current);
            }
            Flush::Pcid(pcid) => {
                self.mem.pcid_generation[usize::from(pcid & 0xfff)] = 0;
                if pcid == current {
                    self.enter_address_space(current);
                }
            }
            Flush::PcidPage(pcid, lin) => {
                if pcid == current {
                    self.flush_page(lin);
                } else {
                    self.mem.pcid_generation[usize::from(pcid & 0xfff)] = 0;
                }
            }
            Flush::Page(lin) => self.flush_page(lin),
        }
        self.update_jump_key();
    }

    fn flush_page(&mut self, lin: u64) {
        self.drop_region(lin, PAGE_SHIFT);
        if self.mem.huge_pages.may_have(lin >> 30) {
            self.drop_region(lin, 30);
        } else if self.mem.large_pages.may_have(lin >> 21) {
            // A 4 MiB page of 32-bit paging covers two regions.
            self.drop_region(lin, 22);
        }
        // Code of the whole 1 GiB region may have been mapped by one large page: the filter only knows pages.
        if self.mem.code_pages.may_have(lin >> PAGE_SHIFT) || self.mem.large_pages.may_have(lin >> 21) {
            let pcid = self.pcid();
            self.new_kernel_code_generation();
            self.mem.code_pages.clear();
            // Second-level entries of this address space stay valid: only jump-cache entries must go.
            self.mem.user_code_generation = self.mem.new_generation();
            self.mem.pcid_code_moved(pcid);
        }
    }

    /// Makes first level and jump cache those of `pcid`.
    fn enter_address_space(&mut self, pcid: u16) {
        self.clear_not_global();
        self.mem.user_code_generation = self.mem.pcid_generation(pcid);
        if self.mem.kernel_code_not_global {
            self.new_kernel_code_generation();
        }
    }

    /// Loads CR3. `keep`: translations of the new PCID stay (bit 63 of the written value with CR4.PCIDE).
    /// The caller has checked the value; bit 63 is not part of it.
    pub fn set_cr3(&mut self, value: u64, keep: bool) {
        self.s.cr3 = value;
        self.counters().flushes[1].add(u64::from(!keep));
        let pcid = self.pcid();
        if !keep {
            self.mem.pcid_generation[usize::from(pcid)] = 0;
        }
        self.enter_address_space(pcid);
        self.update_jump_key();
    }
}

impl CpuMemory {
    /// After code generations were renewed in the middle of an address space: coming back to it must not
    /// revive older jump-cache entries, so its own generation moves on as well.
    fn pcid_code_moved(&mut self, pcid: u16) {
        self.pcid_generation[usize::from(pcid)] = self.user_code_generation;
    }
}

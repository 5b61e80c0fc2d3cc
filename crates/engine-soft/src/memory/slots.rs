//! Slots: for each memory access in translated code, the page that it met last.
//!
//! Most accesses meet the page that they met before, so each one has a *slot* at a fixed place in the state
//! block: its address is compared with the slot's tag without computing where to look. A miss copies the entry of the
//! first-level TLB into the slot (the refill stubs), or calls [`Cpu::slow_access`] if there is none. So slots hold
//! nothing that the TLB could not hold, and are emptied whenever the TLB loses entries.
//!
//! Accesses to the stack share a few slots, so that a switch of stacks does not make each of them miss. Kernel code has
//! slots for these only: it works for one task after the other, each with pages of its own, and measured slower with
//! slots for everything.
//!
//! Slots are handed out in the order of translation and shared when there are more accesses than slots; the tag
//! decides, so sharing costs misses and is never wrong. An access to the user's stack that misses often, because its
//! frame lies in two pages, is translated again with a slot of its own. Another access that misses often (a walk through
//! a table, a hash) is translated again without a slot, if misses take a share of the time: see [`Cpu::give_slot_up`].

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use berth_memory::{GuestPhysAddr, PAGE_SHIFT};

use super::tlb::{TLB_ENTRIES, TLB_TABLES, TlbTable, index};
use crate::cpu::Cpu;

/// Slots for each privilege class and kind of access.
pub const SLOTS: usize = 2048;
/// The first slots are for accesses to the stack, which share them: after a switch of stacks each of them misses
/// once instead of every access. Code that is close together shares the same.
const STACK_SLOTS: usize = 8;
/// log2 of what is close together, in bytes.
const STACK_CODE_SHIFT: u32 = 8;
/// Slots that are emptied together.
const GROUP: usize = 64;
/// log2 of the bytes of a group, for the refill stubs.
pub(crate) const GROUP_SHIFT: u8 = (GROUP * size_of::<Slot>()).trailing_zeros() as u8;
const GROUPS: usize = SLOTS / GROUP;
/// The tag of an empty slot: a page of non-canonical addresses. An access there would pass the check, but the
/// host's CPU refuses the address just as the guest's would.
const EMPTY: u64 = 1 << 63;
/// Count of misses at which an access gives its slot up; the refill stubs see it by the sign.
const TOO_MANY_MISSES: u16 = 1 << 15;
/// Where counts of misses start. The number of misses that it takes is halved again and again, so frequent ones
/// are meant.
const NO_MISSES: u16 = TOO_MANY_MISSES - (1 << 13);

/// One slot.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Slot {
    /// Linear address of the page.
    pub tag: u64,
    /// What added to a linear address in the page gives the host address.
    pub delta: u64,
}

/// All slots of a vCPU, indexed by [`TlbTable`] and number.
#[repr(C)]
pub struct Slots {
    /// The slots.
    pub entries: [[Slot; SLOTS]; TLB_TABLES],
    /// Not 0: the group may have slots that are not empty.
    pub used: [[u8; GROUPS]; TLB_TABLES],
    /// Not 0: pages with this index in the TLB may be in slots.
    pub pages: [[u8; TLB_ENTRIES]; TLB_TABLES],
    /// Misses of each slot since it was last given up, halved every now and then.
    pub misses: [[u16; SLOTS]; TLB_TABLES],
}

impl Slots {
    /// Empties the slots of `table` for whose page `gone` is true.
    pub(super) fn clear_if(&mut self, table: TlbTable, gone: impl Fn(&Slot) -> bool) {
        let (entries, used) = (&mut self.entries[table.index()], &mut self.used[table.index()]);
        for (group, used) in entries.chunks_exact_mut(GROUP).zip(used).filter(|(_, used)| **used != 0) {
            let mut any = false;
            for slot in group {
                if slot.tag != EMPTY && gone(slot) {
                    *slot = Slot { tag: EMPTY, delta: 0 };
                }
                any |= slot.tag != EMPTY;
            }
            *used = u8::from(any);
        }
    }

    /// Empties all slots of `table`.
    pub(super) fn clear(&mut self, table: TlbTable) {
        self.clear_if(table, |_| true);
        self.pages[table.index()].fill(0);
    }

    /// Empties the slots of `table` for the page of `lin`.
    pub(super) fn clear_page(&mut self, table: TlbTable, lin: u64) {
        let page = lin >> PAGE_SHIFT;
        let may_have = &mut self.pages[table.index()][index(page)];
        // Others with the same index may stay, so this one cannot be reset.
        if *may_have != 0 {
            self.clear_if(table, |slot| slot.tag >> PAGE_SHIFT == page);
        }
    }

    /// Puts the page of `lin`, which is at `host` now, into a slot.
    pub(crate) fn fill(&mut self, table: TlbTable, number: usize, lin: u64, host: u64) {
        let tag = lin & !((1 << PAGE_SHIFT) - 1);
        self.entries[table.index()][number] = Slot { tag, delta: host.wrapping_sub(lin) };
        self.used[table.index()][number / GROUP] = 1;
        self.pages[table.index()][index(lin >> PAGE_SHIFT)] = 1;
    }

    /// Empties all slots, whatever they hold.
    pub(super) fn initialize(&mut self) {
        self.entries = [[Slot { tag: EMPTY, delta: 0 }; SLOTS]; TLB_TABLES];
        self.used = [[0; GROUPS]; TLB_TABLES];
        self.pages = [[0; TLB_ENTRIES]; TLB_TABLES];
        self.misses = [[NO_MISSES; SLOTS]; TLB_TABLES];
    }

    /// Forgets half of the misses, so that only frequent ones count.
    pub(crate) fn forget_misses(&mut self) {
        for misses in self.misses.iter_mut().flatten() {
            *misses = NO_MISSES + misses.saturating_sub(NO_MISSES) / 2;
        }
    }
}

/// Hands slots out, in the order of translation.
#[derive(Default)]
pub(crate) struct SlotNumbers([AtomicU32; TLB_TABLES]);

impl SlotNumbers {
    /// A slot in `table` for an access of the instruction at `rip`; `stack`: to the stack.
    pub(crate) fn next(&self, table: TlbTable, rip: u64, stack: bool) -> usize {
        if stack {
            return (rip >> STACK_CODE_SHIFT) as usize % STACK_SLOTS;
        }
        let n = self.0[table.index()].fetch_add(1, Ordering::Relaxed) as usize;
        STACK_SLOTS + n % (SLOTS - STACK_SLOTS)
    }
}

/// Accesses of which something was learnt, by the guest physical address of their instruction. It may claim to have
/// what it has not.
pub(crate) struct Sites(Box<[AtomicU64]>);

impl Sites {
    const WORDS: usize = 1024;

    pub(crate) fn new() -> Self {
        Self((0..Self::WORDS).map(|_| AtomicU64::new(0)).collect())
    }

    fn place(&self, instruction: GuestPhysAddr) -> (&AtomicU64, u64) {
        let hash = instruction.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48;
        (&self.0[hash as usize >> 6], 1 << (hash & 63))
    }

    pub(crate) fn has(&self, instruction: GuestPhysAddr) -> bool {
        let (word, bit) = self.place(instruction);
        word.load(Ordering::Relaxed) & bit != 0
    }

    fn add(&self, instruction: GuestPhysAddr) {
        let (word, bit) = self.place(instruction);
        word.fetch_or(bit, Ordering::Relaxed);
    }

    /// Forgets all.
    pub(crate) fn clear(&self) {
        self.0.iter().for_each(|word| word.store(0, Ordering::Relaxed));
    }
}

/// What is known of how often slots miss.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct MissRate {
    /// Time-stamp counter and number of misses when it was last measured.
    ticks: u64,
    misses: u64,
    rare: bool,
}

/// The rate is measured over so many misses at least.
const MEASURED_MISSES: u64 = 1024;
/// With so many ticks from one miss to the next, a search at every access would cost more than the misses do: one takes
/// some 40.
const RARE_MISS_TICKS: u64 = 300;

impl Cpu {
    /// Whether all slots together miss so seldom that it is not worth while to do without one. A walk through memory from
    /// one end to the other misses at every page, but hits hundreds of times in between.
    fn slot_misses_are_rare(&mut self) -> bool {
        let (ticks, misses) = (crate::host::ticks(), self.s.slot_misses);
        let rate = &mut self.miss_rate;
        let new = misses.wrapping_sub(rate.misses);
        if new >= MEASURED_MISSES {
            let rare = ticks.saturating_sub(rate.ticks) / new > RARE_MISS_TICKS;
            *rate = MissRate { ticks, misses, rare };
        }
        rate.rare
    }

    /// Called for a miss of slot `number`: if it missed many times, has the instruction at RIP translated
    /// without it.
    pub(crate) fn give_slot_up(&mut self, table: TlbTable, number: usize) {
        let misses = &mut self.s.slots.misses[table.index()][number];
        if *misses < TOO_MANY_MISSES {
            return;
        }
        *misses = NO_MISSES;
        let shared = number < STACK_SLOTS;
        if shared && (self.s.mode.cpl() < 3 || self.vm.debug.no_unshare) {
            return;
        }
        // The instruction was fetched, so this is a lookup.
        let Ok(t) = self.translate(self.s.rip, super::Access::Execute, super::Rights::of(self.s.mode)) else {
            return;
        };
        let instruction = GuestPhysAddr(t.gpa | self.s.rip & ((1 << PAGE_SHIFT) - 1));
        if !shared && !self.vm.debug.no_slot_rate && self.slot_misses_are_rare() {
            return;
        }
        self.counters().slots_given_up.add(1);
        if shared { &self.vm.unshared } else { &self.vm.slotless }.add(instruction);
        // The running block stays as it is until it is left; jumps to it find the new one.
        self.vm.cache.invalidate(instruction, 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_without_a_slot_are_remembered() {
        let slotless = Sites::new();
        assert!(!slotless.has(GuestPhysAddr(0x1234)));
        slotless.add(GuestPhysAddr(0x1234));
        assert!(slotless.has(GuestPhysAddr(0x1234)));
        assert!(!slotless.has(GuestPhysAddr(0x1235)));
        slotless.clear();
        assert!(!slotless.has(GuestPhysAddr(0x1234)));
    }

    #[test]
    fn accesses_to_the_stack_share_slots() {
        let numbers = SlotNumbers::default();
        let table = TlbTable::new(crate::mode::TlbClass::User, false);
        assert_eq!(numbers.next(table, 0x1200, true), numbers.next(table, 0x12ff, true));
        let mut others: Vec<_> = (0..SLOTS).map(|_| numbers.next(table, 0x1200, false)).collect();
        others.sort_unstable();
        others.dedup();
        assert_eq!(others, (STACK_SLOTS..SLOTS).collect::<Vec<_>>());
    }

    #[test]
    fn only_what_is_gone_is_emptied() {
        let layout = std::alloc::Layout::new::<Slots>();
        // SAFETY: the layout is not empty, and zero bytes are valid for all fields.
        let mut slots = unsafe { Box::from_raw(std::alloc::alloc_zeroed(layout).cast::<Slots>()) };
        slots.initialize();
        let table = TlbTable::new(crate::mode::TlbClass::Kernel, true);
        for (number, tag) in [(3, 0x1000), (4, 0x2000), (700, 0x1000)] {
            slots.fill(table, number, tag + 5, 0x7000);
        }
        assert_eq!(slots.entries[table.index()][4].delta, 0x7000 - 0x2005);
        slots.clear_page(table, 0x3fff);
        assert_eq!(slots.entries[table.index()][3].tag, 0x1000);
        slots.clear_page(table, 0x1fff);
        let entries = &slots.entries[table.index()];
        assert_eq!((entries[3].tag, entries[4].tag, entries[700].tag), (EMPTY, 0x2000, EMPTY));
        assert_eq!((slots.used[table.index()][0], slots.used[table.index()][700 / GROUP]), (1, 0));
        slots.clear(table);
        assert_eq!(slots.entries[table.index()][4].tag, EMPTY);
    }
}

//! The fixed pieces of host code: entering and leaving translated code, and calling Rust from it.

use berth_cpu::bits::{gpr as guest, vector};

use super::asm::{Asm, Label, Mem, cc, gpr_offset, gs};
use super::block::Helped;
use super::reason;
use super::regs::*;
use crate::cpu::Cpu;
use crate::fault::Fault;
use crate::memory::slots::{GROUP_SHIFT, SLOTS, Slot};
use crate::memory::slow::{Kind, Place};
use crate::memory::tlb::{TLB_ENTRIES, TLB_TABLES, TlbEntry, TlbTable};
use crate::state::{JUMP_CACHE_ENTRIES, JumpCacheEntry, Seg};

/// Addresses of the stubs in the code cache.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Stubs {
    /// `extern "C" fn(entry: u64)`: runs translated code at `entry` until it exits. Flags are in the state block.
    pub enter: u64,
    /// Exit with [`reason::LOOKUP`]; RIP is set, flags are in the state block.
    pub exit_lookup: u64,
    /// The same with RIP in r15.
    pub exit_lookup_r10: u64,
    /// Jump: looks for r15 in the second place of the jump cache, else as `exit_lookup_r10`.
    pub second_lookup: u64,
    /// Where a return on the empty call stack leads; r15 is the guest's target.
    pub empty_return: u64,
    /// Jump from a continuation that r15 does not lead to: empties the call stack and looks r15 up.
    pub other_return: u64,
    /// Call: exit with [`reason::LINK`]; the guest's flags are in the state block.
    pub link_memory: u64,
    /// The same with the guest's flags in the host's flags.
    pub link_host: u64,
    /// Call: exit with [`reason::TOMB`]; the guest's flags are in the state block.
    pub tomb_memory: u64,
    /// The same with the guest's flags in the host's flags.
    pub tomb_host: u64,
    /// Exit with [`reason::SIGNAL`]; where the signal handler goes on.
    pub exit_signal: u64,
    /// Call: executes the instruction whose [`Helped`] r15 points to.
    pub exec: u64,
    /// Call: resolves an access to linear (or segment-relative) r15 described by r11 ([`Descriptor`]). RIP is
    /// set. Returns the host address in r15; after [`Place::Special`] for a store it skips the five bytes after
    /// the call.
    pub slow: u64,
    /// Call, one for each [`TlbTable`]: r15 becomes a host address by the TLB's entry, which also goes to the slot;
    /// r11 is a [`RefillArgument`]. Without such an entry r15 stays, and the five bytes after the call are skipped.
    /// Destroys the flags.
    pub refill: [u64; TLB_TABLES],
    /// Call: finishes a special store; r15 is the RIP of the next instruction, or [`FINISH_ONLY`].
    pub finish: u64,
}

/// Tells the finish stub that the instruction goes on after the store, so it must not leave here.
pub(crate) const FINISH_ONLY: u64 = u64::MAX;

/// Description of an access, packed for the slow stub.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub kind: Kind,
    /// Bytes, 1 to 64.
    pub size: u8,
    /// Linear address; true if it came through the stack segment.
    pub stack: bool,
    /// A misaligned operand raises #GP before anything else.
    pub aligned: bool,
    /// The address is an offset in this segment.
    pub segment: Option<Seg>,
    /// The slot that missed.
    pub slot: Option<u16>,
}

impl Descriptor {
    pub(crate) fn pack(self) -> u32 {
        u32::from(self.size)
            | (self.kind as u32) << 8
            | u32::from(self.stack) << 10
            | u32::from(self.aligned) << 11
            | self.segment.map_or(0, |s| (s as u32 + 1) << 12)
            | self.slot.map_or(0, |n| (u32::from(n) + 1) << 16)
    }

    fn unpack(bits: u32) -> Self {
        Self {
            size: (bits & 0xff) as u8,
            kind: [Kind::Read, Kind::Write, Kind::Modify][(bits >> 8 & 3).min(2) as usize],
            stack: bits >> 10 & 1 != 0,
            aligned: bits >> 11 & 1 != 0,
            segment: (bits >> 12 & 0xf).checked_sub(1).and_then(|n| Seg::ALL.get(n as usize)).copied(),
            slot: (bits >> 16).checked_sub(1).map(|n| n as u16),
        }
    }
}

/// Argument of the refill stubs: the byte offset of a slot in its table, and the size of the access.
pub(crate) struct RefillArgument;

impl RefillArgument {
    const SIZE_SHIFT: u8 = 24;

    pub(crate) fn pack(slot: usize, size: usize) -> u32 {
        (slot * size_of::<Slot>()) as u32 | (size as u32) << Self::SIZE_SHIFT
    }
}

/// Offset from GS:0 of a first-level TLB table.
pub(crate) fn tlb_table_offset(table: TlbTable) -> i32 {
    gs!(tlb) + (table.index() * TLB_ENTRIES * size_of::<TlbEntry>()) as i32
}

/// Offset from GS:0 of a slot.
pub(crate) fn slot_offset(table: TlbTable, number: usize) -> i32 {
    gs!(slots.entries) + ((table.index() * SLOTS + number) * size_of::<Slot>()) as i32
}

/// Offsets in an entry of the jump cache.
pub(crate) const VA: usize = std::mem::offset_of!(JumpCacheEntry, va);
pub(crate) const KEY: usize = std::mem::offset_of!(JumpCacheEntry, key);
pub(crate) const ENTRY: usize = std::mem::offset_of!(JumpCacheEntry, entry);

/// Offset from GS:0 of a field (at `field`) of the jump cache's first entry.
pub(crate) fn jump_cache_offset(field: usize) -> i32 {
    gs!(jump_cache) + field as i32
}

/// Jumps to r15 by the first of the two entries that may have it, else goes on after this code.
fn emit_first_lookup(a: &mut Asm) {
    let (absent, restore) = (a.label(), a.label());
    a.mov(R11, ADDR);
    a.shr(true, R11, 12);
    a.reg(false, &[0x33], R11, ADDR); // xor
    a.alu_imm(false, 4, R11, (JUMP_CACHE_ENTRIES - 1) as i32);
    a.shl(false, R11, size_of::<JumpCacheEntry>().trailing_zeros() as u8);
    a.mem(&[], true, &[0x3b], ADDR, Mem::GsBase(R11, jump_cache_offset(VA)));
    a.jcc(cc::NE, absent);
    a.load(ADDR, Mem::Gs(gs!(jump_key)));
    a.mem(&[], true, &[0x3b], ADDR, Mem::GsBase(R11, jump_cache_offset(KEY)));
    a.jcc(cc::NE, restore);
    // The poll, as a test, because RIP is not known when this is assembled.
    a.mem(&[], true, &[0x83], 7, Mem::Gs(0)); // cmp qword gs:[poll], 0
    a.bytes(&[0]);
    a.jcc(cc::E, restore);
    a.mem(&[], false, &[0xff], 4, Mem::GsBase(R11, jump_cache_offset(ENTRY)));
    a.bind(restore);
    a.load(ADDR, Mem::GsBase(R11, jump_cache_offset(VA)));
    a.bind(absent);
}

/// Jumps to r15 by the second of the two entries that may have it; leaves to the run loop if it has not.
fn emit_second_lookup(a: &mut Asm, absent_r10: Label) {
    let other_key = a.label();
    a.mov(R11, ADDR);
    a.shr(true, R11, 12);
    a.reg(false, &[0x33], R11, ADDR); // xor
    a.alu_imm(false, 6, R11, 1);
    a.alu_imm(false, 4, R11, (JUMP_CACHE_ENTRIES - 1) as i32);
    a.shl(false, R11, size_of::<JumpCacheEntry>().trailing_zeros() as u8);
    a.mem(&[], true, &[0x3b], ADDR, Mem::GsBase(R11, jump_cache_offset(VA)));
    a.jcc(cc::NE, absent_r10);
    a.load(ADDR, Mem::Gs(gs!(jump_key)));
    a.mem(&[], true, &[0x3b], ADDR, Mem::GsBase(R11, jump_cache_offset(KEY)));
    a.jcc(cc::NE, other_key);
    // The poll, as at every indirect jump.
    a.mem(&[], true, &[0x83], 7, Mem::Gs(0)); // cmp qword gs:[poll], 0
    a.bytes(&[0]);
    a.jcc(cc::E, other_key);
    a.mem(&[], false, &[0xff], 4, Mem::GsBase(R11, jump_cache_offset(ENTRY)));
    a.bind(other_key);
    a.load(ADDR, Mem::GsBase(R11, jump_cache_offset(VA)));
    a.jmp(absent_r10);
}

/// The refill stub of `table`.
fn emit_refill(a: &mut Asm, table: TlbTable) {
    let entry = tlb_table_offset(table);
    let (tag, host) = (
        entry + std::mem::offset_of!(TlbEntry, tag) as i32,
        entry + std::mem::offset_of!(TlbEntry, host) as i32,
    );
    let slot = slot_offset(table, 0);
    let misses = gs!(slots.misses) + (table.index() * SLOTS * size_of::<u16>()) as i32;
    let pages = gs!(slots.pages) + (table.index() * TLB_ENTRIES) as i32;
    let used = gs!(slots.used) + (table.index() * ((SLOTS * size_of::<Slot>()) >> GROUP_SHIFT)) as i32;
    let absent = a.label();
    a.mem(&[], true, &[0xff], 0, Mem::Gs(gs!(slot_misses))); // inc
    for reg in [RAX, RCX, RDX] {
        push(a, reg);
    }
    // rax: offset of the slot; r11: size; rcx: offset of the TLB's entry.
    a.mov32(RAX, R11);
    a.alu_imm(false, 4, RAX, (1 << RefillArgument::SIZE_SHIFT) - 1);
    a.shr(false, R11, RefillArgument::SIZE_SHIFT);
    a.mov32(RCX, ADDR);
    a.shr(false, RCX, 8);
    a.alu_imm(false, 4, RCX, ((TLB_ENTRIES - 1) << 4) as i32);
    // Many misses: Rust code decides what to do about it.
    a.mov32(RDX, RAX);
    a.shr(false, RDX, 3);
    a.mem(&[0x66], false, &[0xff], 0, Mem::GsBase(RDX, misses)); // inc word
    a.jcc(cc::S, absent);
    a.mov(RDX, ADDR);
    a.mem(&[], true, &[0x2b], RDX, Mem::GsBase(RCX, tag));
    a.alu_imm(true, 7, RDX, 4095);
    a.jcc(cc::A, absent);
    a.lea(true, R11, Mem::Any { base: Some(R11), index: Some((RDX, 1)), disp: 0 });
    a.alu_imm(true, 7, R11, 4096);
    a.jcc(cc::A, absent);
    a.load(R11, Mem::GsBase(RCX, tag));
    a.store(Mem::GsBase(RAX, slot + std::mem::offset_of!(Slot, tag) as i32), R11);
    a.load(ADDR, Mem::GsBase(RCX, host));
    a.reg(true, &[0x2b], ADDR, R11);
    a.store(Mem::GsBase(RAX, slot + std::mem::offset_of!(Slot, delta) as i32), ADDR);
    // r15: delta + tag + offset in the page.
    a.reg(true, &[0x03], ADDR, R11);
    a.reg(true, &[0x03], ADDR, RDX);
    a.shr(false, RCX, size_of::<TlbEntry>().trailing_zeros() as u8);
    a.mem(&[], false, &[0xc6], 0, Mem::GsBase(RCX, pages)); // mov byte, 1
    a.bytes(&[1]);
    a.shr(false, RAX, GROUP_SHIFT);
    a.mem(&[], false, &[0xc6], 0, Mem::GsBase(RAX, used)); // mov byte, 1
    a.bytes(&[1]);
    for reg in [RDX, RCX, RAX] {
        pop(a, reg);
    }
    a.bytes(&[0xc3]);
    a.bind(absent);
    for reg in [RDX, RCX, RAX] {
        pop(a, reg);
    }
    a.mem(&[], true, &[0x83], 0, Mem::base(RSP, 0)); // add qword [rsp], imm8
    a.bytes(&[5]);
    a.bytes(&[0xc3]);
}

/// Guest registers that live in host registers, with those.
const HOMES: [(usize, HostReg); 13] = [
    (guest::RAX, RAX),
    (guest::RCX, RCX),
    (guest::RDX, RDX),
    (guest::RBX, RBX),
    (guest::RSP, GUEST_RSP),
    (guest::RBP, RBP),
    (guest::RSI, RSI),
    (guest::RDI, RDI),
    (guest::R8, R8),
    (guest::R9, R9),
    (guest::R10, R10),
    (guest::R12, R12),
    (guest::R14, R14),
];

fn save_registers(a: &mut Asm) {
    for (n, reg) in HOMES {
        a.store(Mem::Gs(gpr_offset(n)), reg);
    }
}

fn load_registers(a: &mut Asm) {
    for (n, reg) in HOMES {
        a.load(reg, Mem::Gs(gpr_offset(n)));
    }
}

/// Moves all vector registers to (0x11) or from (0x10) the state block.
fn move_vectors(a: &mut Asm, avx: bool, opcode: u8) {
    for n in 0..16u8 {
        let disp = gs!(ymm) + i32::from(n) * 32;
        if avx {
            // vmovups, 256 bits; the R bit of the two-byte VEX prefix is inverted.
            a.bytes(&[0x65, 0xc5, if n < 8 { 0xfc } else { 0x7c }, opcode, (n & 7) << 3 | 4, 0x25]);
            a.bytes(&disp.to_le_bytes());
        } else {
            a.mem(&[], false, &[0x0f, opcode], n, Mem::Gs(disp));
        }
    }
}

/// From guest to host: vector registers and MXCSR.
fn save_vectors(a: &mut Asm, avx: bool) {
    move_vectors(a, avx, 0x11);
    a.mem(&[], false, &[0x0f, 0xae], 3, Mem::Gs(gs!(mxcsr)));
    a.mem(&[], false, &[0x0f, 0xae], 2, Mem::Gs(gs!(host_mxcsr)));
    if avx {
        a.bytes(&[0xc5, 0xf8, 0x77]); // vzeroupper: Rust code is SSE code
    }
}

fn load_vectors(a: &mut Asm, avx: bool) {
    move_vectors(a, avx, 0x10);
    a.mem(&[], false, &[0x0f, 0xae], 2, Mem::Gs(gs!(mxcsr)));
}

const CALLEE_SAVED: [HostReg; 6] = [RBP, RBX, R12, 13, R14, 15];

fn push(a: &mut Asm, reg: HostReg) {
    if reg >= 8 {
        a.bytes(&[0x41]);
    }
    a.bytes(&[0x50 | reg & 7]);
}

fn pop(a: &mut Asm, reg: HostReg) {
    if reg >= 8 {
        a.bytes(&[0x41]);
    }
    a.bytes(&[0x58 | reg & 7]);
}

/// Calls a Rust function, on the thread's own stack. The guest's registers were saved.
fn call_rust(a: &mut Asm, function: u64) {
    a.mov(RBX, RSP);
    a.load(RSP, Mem::Gs(gs!(host_rsp)));
    a.mov_imm(RAX, function);
    a.bytes(&[0xff, 0xd0]); // call rax
    a.mov(RSP, RBX);
}

/// Emits all stubs at `base`, the address that they will have.
pub(crate) fn emit(a: &mut Asm, base: u64) -> Stubs {
    let avx = std::arch::is_x86_feature_detected!("avx");
    let at = |a: &Asm| base + u64::from(a.pos());
    let mut stubs = Stubs { enter: at(a), ..Stubs::default() };
    for reg in CALLEE_SAVED {
        push(a, reg);
    }
    a.alu_imm(true, 5, RSP, 8);
    a.store(Mem::Gs(gs!(host_rsp)), RSP);
    a.load(RSP, Mem::Gs(gs!(calls.pointer)));
    a.mov(R11, RDI);
    a.mem(&[], false, &[0x0f, 0xae], 3, Mem::Gs(gs!(host_mxcsr)));
    load_vectors(a, avx);
    load_registers(a);
    a.bytes(&[0x41, 0xff, 0xe3]); // jmp r11

    // `leave`: from a stub that translated code called.
    let (save_all, leave) = (a.label(), a.label());
    let exit = |a: &mut Asm, why: u64| {
        a.store_imm(gs!(exit_reason), why, R11);
        a.jmp(save_all);
    };
    let lookup_r10 = a.label();
    a.align(8, 0);
    stubs.other_return = at(a);
    stubs.empty_return = at(a);
    a.load(RSP, Mem::Gs(gs!(calls.bottom)));
    emit_first_lookup(a);
    a.align(8, 0);
    stubs.second_lookup = at(a);
    emit_second_lookup(a, lookup_r10);
    a.bind(lookup_r10);
    stubs.exit_lookup_r10 = at(a);
    a.store(Mem::Gs(gs!(rip)), ADDR);
    stubs.exit_lookup = at(a);
    exit(a, reason::LOOKUP);
    stubs.link_host = at(a);
    a.save_flags();
    stubs.link_memory = at(a);
    pop(a, R11);
    a.store(Mem::Gs(gs!(exit_value)), R11);
    exit(a, reason::LINK);
    stubs.tomb_host = at(a);
    a.save_flags();
    stubs.tomb_memory = at(a);
    pop(a, R11);
    a.store(Mem::Gs(gs!(exit_value)), R11);
    exit(a, reason::TOMB);
    stubs.exit_signal = at(a);
    exit(a, reason::SIGNAL);

    a.bind(save_all);
    save_registers(a);
    save_vectors(a, avx);
    let switch = a.label();
    a.jmp(switch);
    a.bind(leave);
    a.alu_imm(true, 0, RSP, 8);
    a.bind(switch);
    a.store(Mem::Gs(gs!(calls.pointer)), RSP);
    a.load(RSP, Mem::Gs(gs!(host_rsp)));
    a.alu_imm(true, 0, RSP, 8);
    for reg in CALLEE_SAVED.into_iter().rev() {
        pop(a, reg);
    }
    a.bytes(&[0xc3]);

    // The three calls into Rust share their shape: save, call, test, restore.
    a.align(8, 0);
    stubs.exec = at(a);
    save_registers(a);
    save_vectors(a, avx);
    a.load(RDI, Mem::Gs(gs!(cpu)));
    a.mov(RSI, ADDR);
    call_rust(a, exec_helper as *const () as u64);
    a.reg(false, &[0x85], RAX, RAX);
    a.jcc(cc::NE, leave);
    load_vectors(a, avx);
    load_registers(a);
    a.bytes(&[0xc3]);

    a.align(8, 0);
    stubs.finish = at(a);
    save_registers(a);
    save_vectors(a, avx);
    a.load(RDI, Mem::Gs(gs!(cpu)));
    a.mov(RSI, ADDR);
    call_rust(a, finish_helper as *const () as u64);
    a.reg(false, &[0x85], RAX, RAX);
    a.jcc(cc::NE, leave);
    load_vectors(a, avx);
    load_registers(a);
    a.bytes(&[0xc3]);

    for table in TlbTable::ALL {
        a.align(8, 0);
        stubs.refill[table.index()] = at(a);
        emit_refill(a, table);
    }

    a.align(8, 0);
    stubs.slow = at(a);
    save_registers(a);
    save_vectors(a, avx);
    a.load(RDI, Mem::Gs(gs!(cpu)));
    a.mov(RSI, ADDR);
    a.mov32(RDX, R11);
    call_rust(a, slow_helper as *const () as u64);
    a.mov(ADDR, RAX);
    a.alu_imm(false, 7, RDX, 1);
    a.jcc(cc::A, leave);
    let direct = a.label();
    a.jcc(cc::B, direct);
    // Special store: return to the copy of the instruction that finishes the store.
    a.mem(&[], true, &[0x83], 0, Mem::base(RSP, 0)); // add qword [rsp], imm8
    a.bytes(&[5]);
    a.bind(direct);
    load_vectors(a, avx);
    load_registers(a);
    a.bytes(&[0xc3]);
    a.finish();
    debug_assert!(a.calls.is_empty());
    stubs
}

/// What the slow stub gets back, in rax and rdx.
#[repr(C)]
struct SlowResult {
    host: u64,
    /// 0: use it. 1: special store. 2: leave translated code.
    how: u64,
}

/// A panic must not unwind through translated code: it becomes a failed exit.
fn guarded<T>(cpu: &mut Cpu, on_panic: T, work: impl FnOnce(&mut Cpu) -> T) -> T {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(cpu))) {
        Ok(value) => value,
        Err(_) => {
            cpu.fail("a helper of the soft engine panicked; this is a bug of Berth".to_owned());
            cpu.s.exit_reason = reason::FLOW;
            on_panic
        }
    }
}

extern "C" fn exec_helper(cpu: *mut Cpu, insn: *const Helped) -> u32 {
    // SAFETY: the stub passes the `Cpu` whose `run` entered translated code on this thread; its exclusive
    // borrow is suspended for the duration of that call.
    let cpu = unsafe { &mut *cpu };
    // SAFETY: the pointer is to an instruction that the block which called us owns; blocks are only freed while
    // no vCPU is inside translated code.
    let insn = unsafe { &*insn };
    guarded(cpu, 1, |cpu| u32::from(!cpu.exec_in_block(insn)))
}

extern "C" fn finish_helper(cpu: *mut Cpu, next_rip: u64) -> u32 {
    // SAFETY: as in `exec_helper`.
    let cpu = unsafe { &mut *cpu };
    guarded(cpu, 1, |cpu| {
        cpu.slow_finish();
        if next_rip == FINISH_ONLY || !cpu.must_leave_block() {
            return 0;
        }
        cpu.s.rip = next_rip;
        cpu.s.exit_reason = reason::LOOKUP;
        1
    })
}

extern "C" fn slow_helper(cpu: *mut Cpu, address: u64, descriptor: u32) -> SlowResult {
    // SAFETY: as in `exec_helper`.
    let cpu = unsafe { &mut *cpu };
    guarded(cpu, SlowResult { host: 0, how: 2 }, |cpu| {
        let d = Descriptor::unpack(descriptor);
        if let Some(number) = d.slot {
            let table = TlbTable::new(cpu.s.mode.tlb_class(), d.kind != Kind::Read);
            cpu.give_slot_up(table, usize::from(number) % SLOTS);
        }
        let place = match d.segment {
            Some(segment) => cpu.slow_segmented(segment, address, usize::from(d.size), d.kind, !d.aligned),
            None => cpu.slow_access(address, usize::from(d.size), d.kind, d.stack, !d.aligned),
        };
        match place {
            Ok(Place::Direct(host)) => {
                if let Some(number) = d.slot {
                    // It is in the TLB now.
                    let table = TlbTable::new(cpu.s.mode.tlb_class(), d.kind != Kind::Read);
                    cpu.s.slots.fill(table, usize::from(number) % SLOTS, address, host);
                }
                SlowResult { host, how: 0 }
            }
            Ok(Place::Special(host)) => SlowResult { host, how: u64::from(d.kind != Kind::Read) },
            Ok(Place::Alone) => {
                cpu.s.exit_reason = reason::ALONE;
                SlowResult { host: 0, how: 2 }
            }
            Err(mut fault) => {
                let misaligned = d.aligned && address & (u64::from(d.size) - 1) != 0;
                if misaligned && matches!(fault.vector, vector::PF | vector::SS) {
                    fault = Fault::gp(0);
                }
                cpu.pending_fault = Some(fault);
                cpu.s.exit_reason = reason::FAULT;
                SlowResult { host: 0, how: 2 }
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_survive_packing() {
        for segment in [None, Some(Seg::Es), Some(Seg::Gs)] {
            for kind in [Kind::Read, Kind::Write, Kind::Modify] {
                let d = Descriptor {
                    kind,
                    size: 32,
                    stack: segment.is_none(),
                    aligned: kind == Kind::Write,
                    segment,
                    slot: segment.is_some().then_some(SLOTS as u16 - 1),
                };
                assert_eq!(Descriptor::unpack(d.pack()), d);
            }
        }
    }
}

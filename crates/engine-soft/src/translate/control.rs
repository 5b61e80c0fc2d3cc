//! Jumps, and how a block is left.
//!
//! A jump to the same guest page is *linked*: it first leads to a stub that leaves with the jump's number; the
//! run loop finds the target and makes the jump lead there directly. Within a page this needs no check, because
//! the mapping by which the block was entered covers the target too. Every other jump looks its target up in the
//! vCPU's jump cache, whose key changes whenever a mapping that code was executed through may have changed.

use iced_x86::{Code, Instruction, OpKind};

use super::access::{Access, Address, seg_of};
use super::emit::Emitter;
use super::fetch::{MAX_INSTRUCTION_LEN, jump_cache_index};
use crate::code::asm::{Mem, cc, gs};
use crate::code::block::Link;
use crate::code::regs::{ADDR, R11, RCX};
use crate::code::stubs::{ENTRY, KEY, VA, jump_cache_offset};
use crate::memory::slow::Kind;
use crate::state::{JUMP_CACHE_ENTRIES, JumpCacheEntry};

impl Emitter<'_> {
    /// Leaves the block for guest address `rip`. `from`: the jump's own address, to recognise loops.
    pub(super) fn exit_to(&mut self, rip: u64, from: Option<u64>) {
        if from.is_some_and(|from| rip <= from) && self.chained {
            self.poll(rip);
        }
        self.leave_to(rip);
    }

    /// The same without a poll.
    fn leave_to(&mut self, rip: u64) {
        if !self.chained {
            self.flags.to_memory(self.asm);
            self.asm.store_imm(gs!(rip), rip, R11);
            self.asm.jmp_abs(self.stubs.exit_lookup);
        } else if self.is_linkable(rip) {
            self.asm.align(4, 1);
            self.asm.bytes(&[0xe9]);
            self.link(rip);
        } else {
            self.jump_known(rip);
        }
    }

    /// Whether a jump to `rip` needs no check when it was made once: the target is in this page as a whole.
    fn is_linkable(&self, rip: u64) -> bool {
        let may_cross = rip & 0xfff > 0x1000 - MAX_INSTRUCTION_LEN as u64;
        rip >> 12 == self.key.rip >> 12 && !may_cross
    }

    /// The host's call to the block for `rip`.
    pub(super) fn call_to(&mut self, rip: u64) {
        if self.is_linkable(rip) {
            self.asm.align(4, 1);
            self.asm.bytes(&[0xe8]);
            return self.link(rip);
        }
        let known = self.asm.label();
        self.asm.bytes(&[0xe8]);
        self.asm.rel32(known);
        self.asm.set_cold(true);
        self.asm.bind(known);
        self.jump_known(rip);
        self.asm.set_cold(false);
    }

    /// The rel32 field of a linkable jump, whose opcode was just emitted, and its stub.
    fn link(&mut self, rip: u64) {
        let stub = self.asm.label();
        let field = self.asm.pos();
        self.asm.rel32(stub);
        let was_cold = self.asm.is_cold();
        self.asm.set_cold(true);
        self.asm.bind(stub);
        self.asm.call_abs(if self.flags.in_memory() { self.stubs.link_memory } else { self.stubs.link_host });
        let exit = self.asm.pos();
        self.links.push(Link { field, exit, rip_low: (rip & 0xfff) as u16, flags: self.flags.place() });
        self.asm.set_cold(was_cold);
    }

    /// A jump to another page: through the jump cache at a known index.
    pub(super) fn jump_known(&mut self, rip: u64) {
        self.flags.to_memory(self.asm);
        self.flags.host_lost();
        let at = jump_cache_index(rip) * size_of::<JumpCacheEntry>();
        let miss = self.asm.label();
        let a = &mut *self.asm;
        a.mov_imm(ADDR, rip);
        a.load(R11, Mem::Gs(gs!(jump_key)));
        a.mem(&[], true, &[0x3b], ADDR, Mem::Gs(jump_cache_offset(at + VA)));
        a.jcc(cc::NE, miss);
        a.mem(&[], true, &[0x3b], R11, Mem::Gs(jump_cache_offset(at + KEY)));
        a.jcc(cc::NE, miss);
        a.mem(&[], false, &[0xff], 4, Mem::Gs(jump_cache_offset(at + ENTRY))); // jmp [entry]
        self.miss(miss);
    }

    fn miss(&mut self, label: crate::code::asm::Label) {
        let was_cold = self.asm.is_cold();
        self.asm.set_cold(true);
        self.asm.bind(label);
        self.asm.jmp_abs(self.stubs.second_lookup);
        self.asm.set_cold(was_cold);
    }

    /// Leaves the block for the guest address in r15. Flags are in memory.
    /// `from` is the branch itself.
    pub(super) fn exit_to_r10(&mut self, from: &Instruction) {
        debug_assert!(self.flags.in_memory());
        if !self.chained {
            self.asm.store_imm(gs!(branch), from.ip(), R11);
            self.asm.jmp_abs(self.stubs.exit_lookup_r10);
            return;
        }
        let (miss, restore, leave) = (self.asm.label(), self.asm.label(), self.asm.label());
        let a = &mut *self.asm;
        a.mov(R11, ADDR);
        a.shr(true, R11, 12);
        a.reg(false, &[0x33], R11, ADDR);
        a.alu_imm(false, 4, R11, (JUMP_CACHE_ENTRIES - 1) as i32);
        a.shl(false, R11, size_of::<JumpCacheEntry>().trailing_zeros() as u8);
        a.mem(&[], true, &[0x3b], ADDR, Mem::GsBase(R11, jump_cache_offset(VA)));
        a.jcc(cc::NE, miss);
        a.load(ADDR, Mem::Gs(gs!(jump_key)));
        a.mem(&[], true, &[0x3b], ADDR, Mem::GsBase(R11, jump_cache_offset(KEY)));
        a.jcc(cc::NE, restore);
        // The poll, as a test, because RIP is not known when this is assembled.
        a.mem(&[], true, &[0x83], 7, Mem::Gs(0)); // cmp qword gs:[poll], 0
        a.bytes(&[0]);
        a.jcc(cc::E, leave);
        a.mem(&[], false, &[0xff], 4, Mem::GsBase(R11, jump_cache_offset(ENTRY)));
        let was_cold = self.asm.is_cold();
        self.asm.set_cold(true);
        self.asm.bind(restore);
        self.asm.load(ADDR, Mem::GsBase(R11, jump_cache_offset(VA)));
        self.asm.bind(miss);
        self.asm.store_imm(gs!(branch), from.ip(), R11);
        self.asm.jmp_abs(self.stubs.second_lookup);
        self.asm.bind(leave);
        self.asm.load(ADDR, Mem::GsBase(R11, jump_cache_offset(VA)));
        self.asm.store_imm(gs!(branch), from.ip(), R11);
        self.asm.jmp_abs(self.stubs.exit_lookup_r10);
        self.asm.set_cold(was_cold);
    }

    /// JMP rel.
    pub(super) fn jump(&mut self, insn: &Instruction) {
        self.exit_to(insn.near_branch_target(), Some(insn.ip()));
    }

    /// Jcc rel. `is_last`: the block ends with it.
    pub(super) fn jump_if(&mut self, insn: &Instruction, is_last: bool) {
        self.flags.to_host(self.asm);
        let condition = insn.condition_code() as u8 - 1;
        // iced numbers the conditions in the order of their encoding, from 1.
        let taken = self.asm.label();
        let target = insn.near_branch_target();
        let same_page = self.is_linkable(target);
        if self.chained && target <= insn.ip() {
            // Before the jump and not where it leads, so that a loop is one jump. Whoever leaves here comes back to the
            // jump itself.
            self.poll(insn.ip());
        }
        let flags = self.flags;
        if self.chained && same_page {
            self.asm.align(4, 2);
            self.asm.bytes(&[0x0f, 0x80 | condition]);
            self.link(target);
        } else {
            self.asm.jcc(condition, taken);
            self.asm.set_cold(true);
            self.asm.bind(taken);
            self.leave_to(target);
            self.asm.set_cold(false);
        }
        self.flags = flags;
        if is_last {
            self.exit_to(self.next_rip(insn), None);
        }
    }

    /// LOOP, LOOPE, LOOPNE, JCXZ and their wider forms.
    pub(super) fn jump_counter(&mut self, insn: &Instruction) {
        use Code::*;
        let width = match insn.code() {
            Loop_rel8_16_CX | Loop_rel8_32_CX | Loope_rel8_16_CX | Loope_rel8_32_CX | Loopne_rel8_16_CX
            | Loopne_rel8_32_CX | Jcxz_rel8_16 | Jcxz_rel8_32 => 2,
            Loop_rel8_16_RCX | Loop_rel8_64_RCX | Loope_rel8_16_RCX | Loope_rel8_64_RCX
            | Loopne_rel8_16_RCX | Loopne_rel8_64_RCX | Jrcxz_rel8_16 | Jrcxz_rel8_64 => 8,
            _ => 4,
        };
        self.flags.to_memory(self.asm);
        self.flags.host_lost();
        let is_loop = insn.is_loop() || insn.is_loopcc();
        let (taken, not_taken) = (self.asm.label(), self.asm.label());
        let a = &mut *self.asm;
        a.lea(width == 8, R11, Mem::base(RCX, if is_loop { -1 } else { 0 }));
        match width {
            2 => {
                if is_loop {
                    a.bytes(&[0x66]);
                    a.reg(false, &[0x8b], RCX, R11); // mov cx, r11w
                }
                a.reg(false, &[0x0f, 0xb7], R11, R11);
            }
            4 if is_loop => a.mov32(RCX, R11),
            8 if is_loop => a.mov(RCX, R11),
            _ => {}
        }
        a.reg(true, &[0x85], R11, R11); // test
        let zero_jumps = !is_loop;
        if insn.is_loopcc() {
            a.jcc(cc::E, not_taken);
            let wanted_zero = matches!(
                insn.code(),
                Loope_rel8_16_CX
                    | Loope_rel8_32_CX
                    | Loope_rel8_16_ECX
                    | Loope_rel8_32_ECX
                    | Loope_rel8_64_ECX
                    | Loope_rel8_16_RCX
                    | Loope_rel8_64_RCX
            );
            a.restore_flags();
            a.jcc(if wanted_zero { cc::E } else { cc::NE }, taken);
        } else {
            a.jcc(if zero_jumps { cc::E } else { cc::NE }, taken);
        }
        self.asm.bind(not_taken);
        let flags = self.flags;
        self.exit_to(self.next_rip(insn), None);
        self.flags = flags;
        self.asm.set_cold(true);
        self.asm.bind(taken);
        self.exit_to(insn.near_branch_target(), Some(insn.ip()));
        self.asm.set_cold(false);
    }

    /// Brings the target of an indirect jump or call into r15.
    pub(super) fn indirect_target(&mut self, insn: &Instruction) {
        self.flags.to_memory(self.asm);
        if insn.op0_kind() == OpKind::Register {
            let reg = self.register(insn.op0_register(), ADDR);
            if reg != ADDR {
                self.asm.mov(ADDR, reg);
            }
            return;
        }
        let seg = seg_of(insn.memory_segment());
        let access = Access { kind: Kind::Read, size: 8, seg, aligned: false };
        self.access(insn, access, Address::Operand, false, |e, from| {
            e.site(insn, false);
            e.asm.load(ADDR, from.mem());
        });
    }

    /// JMP r/m64.
    pub(super) fn jump_indirect(&mut self, insn: &Instruction) {
        self.indirect_target(insn);
        self.exit_to_r10(insn);
    }
}

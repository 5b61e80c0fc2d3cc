//! Stack instructions of 64-bit mode. rsp moves last, after everything that can fault.

use iced_x86::{Code, Instruction, OpKind, Register};

use super::access::{Access, Address, seg_of};
use super::emit::Emitter;
use crate::code::asm::{Mem, cc, gpr_offset, gs};
use crate::code::regs::{ADDR, GUEST_RSP, Home, R11, RBP, RSP, home};
use crate::memory::slow::Kind;
use crate::state::Seg;

const PUSH: Access = Access { kind: Kind::Write, size: 8, seg: Seg::Ss, aligned: false };
const POP: Access = Access { kind: Kind::Read, size: 8, seg: Seg::Ss, aligned: false };

/// What is pushed.
#[derive(Clone, Copy)]
pub(super) enum Source {
    Register(Register),
    Immediate(u64),
    /// `scratch[0]` of the state block.
    Scratch,
}

impl Emitter<'_> {
    pub(super) fn push_source(&mut self, insn: &Instruction, source: Source) {
        self.access(insn, PUSH, Address::Based(GUEST_RSP, -8), false, |e, to| {
            let reg = match source {
                Source::Register(register) => e.register(register, R11),
                Source::Immediate(value) => {
                    e.asm.mov_imm(R11, value);
                    R11
                }
                Source::Scratch => {
                    e.asm.load(R11, Mem::Gs(gs!(scratch)));
                    R11
                }
            };
            e.stack_site(insn);
            e.asm.store(to.mem(), reg);
            e.asm.lea(true, GUEST_RSP, Mem::base(GUEST_RSP, -8));
        });
    }

    /// PUSH r64, r/m64, imm.
    pub(super) fn push(&mut self, insn: &Instruction) {
        match insn.op0_kind() {
            OpKind::Register => self.push_source(insn, Source::Register(insn.op0_register())),
            OpKind::Memory => {
                let seg = seg_of(insn.memory_segment());
                let load = Access { kind: Kind::Read, size: 8, seg, aligned: false };
                self.access(insn, load, Address::Operand, false, |e, from| {
                    e.site(insn, false);
                    e.asm.load(ADDR, from.mem());
                    e.asm.store(Mem::Gs(gs!(scratch)), ADDR);
                });
                self.push_source(insn, Source::Scratch);
            }
            _ => self.push_source(insn, Source::Immediate(insn.immediate(0))),
        }
    }

    /// POP r64.
    pub(super) fn pop(&mut self, insn: &Instruction) {
        let register = insn.op0_register();
        self.access(insn, POP, Address::Based(GUEST_RSP, 0), false, |e, from| {
            e.stack_site(insn);
            match home(register.number()) {
                // The popped value wins over the increment.
                Home::Host(GUEST_RSP) => e.asm.load(GUEST_RSP, from.mem()),
                Home::Host(reg) => {
                    e.asm.load(reg, from.mem());
                    e.asm.lea(true, GUEST_RSP, Mem::base(GUEST_RSP, 8));
                }
                Home::State(n) => {
                    e.asm.load(R11, from.mem());
                    e.asm.store(Mem::Gs(gpr_offset(n)), R11);
                    e.asm.lea(true, GUEST_RSP, Mem::base(GUEST_RSP, 8));
                }
            }
        });
    }

    /// LEAVE.
    pub(super) fn leave(&mut self, insn: &Instruction) {
        self.access(insn, POP, Address::Based(RBP, 0), false, |e, from| {
            // The load first: it is what can fault.
            e.stack_site(insn);
            e.asm.load(R11, from.mem());
            e.asm.lea(true, GUEST_RSP, Mem::base(RBP, 8));
            e.asm.mov(RBP, R11);
        });
    }

    /// CALL rel32.
    pub(super) fn call(&mut self, insn: &Instruction) {
        self.push_source(insn, Source::Immediate(insn.next_ip()));
        let target = insn.near_branch_target();
        if !self.pairs_calls() {
            return self.exit_to(target, None);
        }
        self.begin_call(insn, Some(target));
        self.call_to(target);
        self.continuation(insn);
    }

    /// CALL r/m64. The target is read before the return address is pushed.
    pub(super) fn call_indirect(&mut self, insn: &Instruction) {
        self.indirect_target(insn);
        self.asm.store(Mem::Gs(gs!(scratch) + 16), ADDR);
        self.push_source(insn, Source::Immediate(insn.next_ip()));
        self.asm.load(ADDR, Mem::Gs(gs!(scratch) + 16));
        if !self.pairs_calls() {
            return self.exit_to_r10(insn);
        }
        self.begin_call(insn, None);
        let target = self.asm.label();
        self.asm.bytes(&[0xe8]);
        self.asm.rel32(target);
        self.continuation(insn);
        self.asm.set_cold(true);
        self.asm.bind(target);
        self.exit_to_r10(insn);
        self.asm.set_cold(false);
    }

    /// RET, RET imm16.
    pub(super) fn ret(&mut self, insn: &Instruction) {
        let extra = if insn.code() == Code::Retnq_imm16 { i32::from(insn.immediate16()) } else { 0 };
        self.access(insn, POP, Address::Based(GUEST_RSP, 0), false, |e, from| {
            e.stack_site(insn);
            e.asm.load(ADDR, from.mem());
            e.asm.lea(true, GUEST_RSP, Mem::base(GUEST_RSP, 8 + extra));
        });
        if !self.pairs_calls() {
            return self.exit_to_r10(insn);
        }
        self.asm.store_imm(gs!(branch), insn.ip(), R11);
        self.asm.bytes(&[0xc3]);
    }

    /// Whether calls and returns are the host's.
    fn pairs_calls(&self) -> bool {
        self.chained && !self.vm.debug.no_calls
    }

    /// Makes an entry on the call stack ([`crate::code::calls`]) but for the continuation, which the host's call
    /// pushes. A full stack is emptied first; that is also a poll, so that endless recursion can be stopped. `target`:
    /// where the call leads, if that is not in r15.
    fn begin_call(&mut self, insn: &Instruction, target: Option<u64>) {
        let (full, go_on) = (self.asm.label(), self.asm.label());
        let a = &mut *self.asm;
        a.mem(&[], true, &[0x3b], RSP, Mem::Gs(gs!(calls.limit)));
        a.jcc(cc::BE, full);
        a.bind(go_on);
        a.mem(&[], false, &[0xff], 6, Mem::Gs(gs!(jump_key))); // push
        a.set_cold(true);
        a.bind(full);
        a.load(RSP, Mem::Gs(gs!(calls.bottom)));
        a.mem(&[], true, &[0x83], 7, Mem::Gs(0)); // cmp qword gs:[poll], 0
        a.bytes(&[0]);
        a.jcc(cc::NE, go_on);
        match target {
            Some(target) => a.mov_imm(ADDR, target),
            None => a.store_imm(gs!(branch), insn.ip(), R11),
        }
        a.jmp_abs(self.stubs.exit_lookup_r10);
        a.set_cold(false);
    }

    /// Where the host's return leads that belongs to the call before: goes on behind the guest's call if the guest
    /// returned to there.
    fn continuation(&mut self, insn: &Instruction) {
        let next = insn.next_ip();
        let other = self.asm.label();
        let a = &mut *self.asm;
        a.bytes(&[0x41, 0x5b]); // pop r11
        a.mem(&[], true, &[0x3b], R11, Mem::Gs(gs!(jump_key)));
        a.jcc(cc::NE, other);
        match i32::try_from(next as i64) {
            Ok(small) => a.alu_imm(true, 7, ADDR, small),
            Err(_) => {
                a.mov_imm(R11, next);
                a.reg(true, &[0x3b], ADDR, R11);
            }
        }
        a.jcc(cc::NE, other);
        a.set_cold(true);
        a.bind(other);
        a.jmp_abs(self.stubs.other_return);
        a.set_cold(false);
        self.exit_to(next, None);
    }
}

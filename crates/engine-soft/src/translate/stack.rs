//! Stack instructions of 64-bit mode. rsp moves last, after everything that can fault.

use iced_x86::{Code, Instruction, OpKind, Register};

use super::access::{Access, seg_of};
use super::emit::Emitter;
use crate::code::asm::{Mem, gpr_offset, gs};
use crate::code::regs::{GUEST_RSP, Home, R10, R11, RBP, home};
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
        self.flags.to_memory(self.asm);
        self.asm.lea(true, R10, Mem::base(GUEST_RSP, -8));
        self.access(insn, PUSH, false, |e| {
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
            e.asm.store(Mem::base(R10, 0), reg);
            e.asm.lea(true, GUEST_RSP, Mem::base(GUEST_RSP, -8));
        });
    }

    /// PUSH r64, r/m64, imm.
    pub(super) fn push(&mut self, insn: &Instruction) {
        match insn.op0_kind() {
            OpKind::Register => self.push_source(insn, Source::Register(insn.op0_register())),
            OpKind::Memory => {
                self.flags.to_memory(self.asm);
                self.effective_address(insn);
                let seg = seg_of(insn.memory_segment());
                self.add_segment_base(seg);
                let load = Access { kind: Kind::Read, size: 8, seg, aligned: false };
                self.access(insn, load, false, |e| {
                    e.site(insn, false);
                    e.asm.load(R10, Mem::base(R10, 0));
                    e.asm.store(Mem::Gs(gs!(scratch)), R10);
                });
                self.push_source(insn, Source::Scratch);
            }
            _ => self.push_source(insn, Source::Immediate(insn.immediate(0))),
        }
    }

    /// POP r64.
    pub(super) fn pop(&mut self, insn: &Instruction) {
        self.flags.to_memory(self.asm);
        self.asm.mov(R10, GUEST_RSP);
        let register = insn.op0_register();
        self.access(insn, POP, false, |e| {
            e.stack_site(insn);
            match home(register.number()) {
                // The popped value wins over the increment.
                Home::Host(GUEST_RSP) => e.asm.load(GUEST_RSP, Mem::base(R10, 0)),
                Home::Host(reg) => {
                    e.asm.load(reg, Mem::base(R10, 0));
                    e.asm.lea(true, GUEST_RSP, Mem::base(GUEST_RSP, 8));
                }
                Home::State(n) => {
                    e.asm.load(R11, Mem::base(R10, 0));
                    e.asm.store(Mem::Gs(gpr_offset(n)), R11);
                    e.asm.lea(true, GUEST_RSP, Mem::base(GUEST_RSP, 8));
                }
            }
        });
    }

    /// LEAVE.
    pub(super) fn leave(&mut self, insn: &Instruction) {
        self.flags.to_memory(self.asm);
        self.asm.mov(R10, RBP);
        self.access(insn, POP, false, |e| {
            // The load first: it is what can fault.
            e.stack_site(insn);
            e.asm.load(R11, Mem::base(R10, 0));
            e.asm.lea(true, GUEST_RSP, Mem::base(RBP, 8));
            e.asm.mov(RBP, R11);
        });
    }

    /// CALL rel32.
    pub(super) fn call(&mut self, insn: &Instruction) {
        self.push_source(insn, Source::Immediate(insn.next_ip()));
        self.exit_to(insn.near_branch_target(), None);
    }

    /// CALL r/m64. The target is read before the return address is pushed.
    pub(super) fn call_indirect(&mut self, insn: &Instruction) {
        self.indirect_target(insn);
        self.asm.store(Mem::Gs(gs!(scratch) + 16), R10);
        self.push_source(insn, Source::Immediate(insn.next_ip()));
        self.asm.load(R10, Mem::Gs(gs!(scratch) + 16));
        self.exit_to_r10(insn);
    }

    /// RET, RET imm16.
    pub(super) fn ret(&mut self, insn: &Instruction) {
        self.flags.to_memory(self.asm);
        self.asm.mov(R10, GUEST_RSP);
        let extra = if insn.code() == Code::Retnq_imm16 { i32::from(insn.immediate16()) } else { 0 };
        self.access(insn, POP, false, |e| {
            e.stack_site(insn);
            e.asm.load(R10, Mem::base(R10, 0));
            e.asm.lea(true, GUEST_RSP, Mem::base(GUEST_RSP, 8 + extra));
        });
        self.exit_to_r10(insn);
    }
}

//! System instructions that are too frequent for a helper.

use iced_x86::Instruction;

use super::access::seg_of;
use super::copy::number_of;
use super::emit::Emitter;
use super::stack::Source;
use crate::code::asm::{Mem, cc, gpr_offset, gs};
use crate::code::regs::{Home, R10, R11, home};
use crate::state::State;

impl Emitter<'_> {
    /// PUSHFQ. VM and RF read as zero; neither is ever set while translated 64-bit code runs.
    pub(super) fn push_flags(&mut self, insn: &Instruction) {
        self.flags.to_memory(self.asm);
        self.flags.host_lost();
        let a = &mut *self.asm;
        let or_shifted = |a: &mut crate::code::asm::Asm, shift: u8| {
            a.shl(false, R11, shift);
            a.reg(false, &[0x0b], R10, R11);
        };
        a.load_zx(R10, Mem::Gs(gs!(flags)), 2);
        a.mov32(R11, R10);
        a.shr(false, R10, 8);
        a.alu_imm(false, 4, R11, 1);
        or_shifted(a, 11);
        a.load_zx(R11, Mem::Gs(gs!(interrupt_flag)), 1);
        or_shifted(a, 9);
        a.load_zx(R11, Mem::Gs(gs!(direction)), 1);
        or_shifted(a, 10);
        a.alu_imm(false, 1, R10, 2);
        a.mem(&[], true, &[0x0b], R10, Mem::Gs(gs!(rflags_rest)));
        a.store(Mem::Gs(gs!(scratch)), R10);
        self.push_source(insn, Source::Scratch);
    }

    /// MOV r, Sreg.
    pub(super) fn read_segment(&mut self, insn: &Instruction) {
        let seg = seg_of(insn.op1_register());
        let at = std::mem::offset_of!(State, segments)
            + seg as usize * size_of::<berth_cpu::Segment>()
            + std::mem::offset_of!(berth_cpu::Segment, selector);
        self.asm.load_zx(R11, Mem::Gs(crate::code::asm::state_offset(at)), 2);
        let size = insn.op0_register().size();
        match home(number_of(insn.op0_register())) {
            Home::Host(reg) if size == 2 => {
                self.asm.bytes(&[0x66]);
                self.asm.reg(false, &[0x8b], reg, R11);
            }
            Home::Host(reg) => self.asm.mov32(reg, R11),
            Home::State(n) => {
                self.asm.store_sized(Mem::Gs(gpr_offset(n)), R11, if size == 2 { 2 } else { 8 })
            }
        }
    }

    /// After the instruction that follows STI: leaves if an interrupt waits.
    pub(super) fn interrupt_window(&mut self, rip: u64) {
        self.flags.to_memory(self.asm);
        self.flags.host_lost();
        let waits = self.asm.label();
        self.asm.mem(&[], false, &[0x80], 7, Mem::Gs(gs!(interrupt_waiting))); // cmp byte, 0
        self.asm.bytes(&[0]);
        self.asm.jcc(cc::NE, waits);
        self.asm.set_cold(true);
        self.asm.bind(waits);
        self.asm.store_imm(gs!(rip), rip, R11);
        self.asm.jmp_abs(self.stubs.exit_lookup);
        self.asm.set_cold(false);
    }
}

//! System instructions that are too frequent for a helper.

use iced_x86::Instruction;

use super::access::{seg_of, segment_base_offset};
use super::copy::number_of;
use super::emit::Emitter;
use super::stack::Source;
use crate::code::asm::{Mem, cc, gpr_offset, gs};
use crate::code::regs::{ADDR, Home, R11, RAX, RCX, RDX, home};
use crate::cpu::Cpu;
use crate::exec::msr::Msrs;
use crate::mode::Mode;
use crate::state::{Seg, State};
use berth_cpu::bits::{cr4, rflags};

// It is an immediate operand of one byte.
const _: () = assert!(Mode::USER_OK < 0x80);

impl Emitter<'_> {
    /// PUSHFQ. VM and RF read as zero; neither is ever set while translated 64-bit code runs.
    pub(super) fn push_flags(&mut self, insn: &Instruction) {
        self.flags.to_memory(self.asm);
        self.flags.host_lost();
        let a = &mut *self.asm;
        let or_shifted = |a: &mut crate::code::asm::Asm, shift: u8| {
            a.shl(false, R11, shift);
            a.reg(false, &[0x0b], ADDR, R11);
        };
        a.load_zx(ADDR, Mem::Gs(gs!(flags)), 2);
        a.mov32(R11, ADDR);
        a.shr(false, ADDR, 8);
        a.alu_imm(false, 4, R11, 1);
        or_shifted(a, 11);
        a.load_zx(R11, Mem::Gs(gs!(interrupt_flag)), 1);
        or_shifted(a, 9);
        a.load_zx(R11, Mem::Gs(gs!(direction)), 1);
        or_shifted(a, 10);
        a.alu_imm(false, 1, ADDR, 2);
        a.mem(&[], true, &[0x0b], ADDR, Mem::Gs(gs!(rflags_rest)));
        a.store(Mem::Gs(gs!(scratch)), ADDR);
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

    /// PAUSE: a loop of it may wait for a vCPU that has no host CPU.
    pub(super) fn pause(&mut self, insn: &Instruction) {
        self.flags.to_memory(self.asm);
        self.flags.host_lost();
        self.asm.bytes(&[0xf3, 0x90]);
        if self.vm.vcpus == 1 {
            return;
        }
        let go_on = self.asm.label();
        self.asm.mem(&[], true, &[0x83], 5, Mem::Gs(gs!(pauses_left))); // sub qword, imm8
        self.asm.bytes(&[1]);
        self.asm.jcc(cc::NE, go_on);
        self.helper(insn, None);
        self.asm.bind(go_on);
        // The helper may have changed them, and it was not called each time.
        self.flags = super::flags::Flags::MEMORY;
    }

    /// SWAPGS at CPL 0.
    pub(super) fn swap_gs(&mut self) {
        let kernel_base = std::mem::offset_of!(Cpu, msrs) + std::mem::offset_of!(Msrs, kernel_gs_base);
        let kernel_base = Mem::base(R11, kernel_base as i32);
        let base = Mem::Gs(segment_base_offset(Seg::Gs));
        let scratch = Mem::Gs(gs!(scratch));
        let a = &mut *self.asm;
        a.load(ADDR, base);
        a.store(scratch, ADDR);
        a.load(R11, Mem::Gs(gs!(cpu)));
        a.load(ADDR, kernel_base);
        a.store(base, ADDR);
        a.load(ADDR, scratch);
        a.store(kernel_base, ADDR);
    }

    /// RDTSC and RDTSCP.
    pub(super) fn read_tsc(&mut self, insn: &Instruction) {
        let msr = |field: usize| Mem::base(R11, (std::mem::offset_of!(Cpu, msrs) + field) as i32);
        self.flags.to_memory(self.asm);
        self.flags.host_lost();
        let a = &mut *self.asm;
        if insn.mnemonic() == iced_x86::Mnemonic::Rdtscp {
            a.bytes(&[0x0f, 0xae, 0xe8]); // lfence: earlier loads are done
        }
        a.bytes(&[0x0f, 0x31]); // rdtsc
        a.shl(true, RDX, 32);
        a.reg(true, &[0x0b], RAX, RDX); // or
        a.load(R11, Mem::Gs(gs!(cpu)));
        a.mem(&[], true, &[0x03], RAX, msr(std::mem::offset_of!(Msrs, tsc_offset)));
        a.mov(RDX, RAX);
        a.shr(true, RDX, 32);
        a.mov32(RAX, RAX);
        if insn.mnemonic() == iced_x86::Mnemonic::Rdtscp {
            a.load(RCX, msr(std::mem::offset_of!(Msrs, tsc_aux)));
        }
    }

    /// STAC and CLAC at CPL 0 where, with SMAP, they change what the kernel may access, and so the mode. The block ends.
    pub(super) fn set_ac(&mut self, insn: &Instruction, on: bool) {
        self.flags.to_memory(self.asm);
        self.flags.host_lost();
        let (no_smap, done) = (self.asm.label(), self.asm.label());
        let a = &mut *self.asm;
        a.mem(&[], false, &[0xf7], 0, Mem::Gs(gs!(cr4))); // test dword, imm32
        a.bytes(&(cr4::SMAP as u32).to_le_bytes());
        a.jcc(cc::E, no_smap);
        let (op, value) = if on { (1, rflags::AC as u32) } else { (4, !rflags::AC as u32) };
        a.mem(&[], false, &[0x81], op, Mem::Gs(gs!(rflags_rest))); // or, and: dword, imm32
        a.bytes(&value.to_le_bytes());
        for field in [gs!(mode), gs!(jump_key)] {
            a.mem(&[], false, &[0x83], 6, Mem::Gs(field)); // xor dword, imm8
            a.bytes(&[Mode::USER_OK as u8]);
        }
        a.bind(done);
        let next = self.next_rip(insn);
        self.jump_known(next);
        self.asm.set_cold(true);
        self.asm.bind(no_smap);
        self.helper(insn, None);
        self.asm.jmp(done);
        self.asm.set_cold(false);
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

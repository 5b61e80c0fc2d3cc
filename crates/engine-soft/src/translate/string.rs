//! MOVS and STOS, with and without REP, whose bytes lie in one page of the TLB each: the host's own string
//! instruction does the work. Everything else goes to the helper, which works page by page.

use iced_x86::{Instruction, Mnemonic as M, Register};

use super::emit::Emitter;
use super::fetch::chained;
use crate::code::asm::{Label, Mem, cc, gs};
use crate::code::regs::{ADDR, HostReg, R11, RCX, RDI, RSI};
use crate::code::stubs::tlb_table_offset;
use crate::memory::tlb::{TLB_ENTRIES, TlbEntry, TlbTable};
use crate::mode::Mode;

/// Whether the template takes this instruction: 64-bit addresses and no segment base.
pub(super) fn is_inline(insn: &Instruction, mode: Mode) -> bool {
    let string = insn.is_string_instruction();
    let wide = (0..insn.op_count()).all(|i| {
        !matches!(
            insn.op_kind(i),
            iced_x86::OpKind::MemorySegEDI
                | iced_x86::OpKind::MemorySegESI
                | iced_x86::OpKind::MemoryESEDI
                | iced_x86::OpKind::MemorySegDI
                | iced_x86::OpKind::MemorySegSI
                | iced_x86::OpKind::MemoryESDI
        )
    });
    let plain = !matches!(insn.segment_prefix(), Register::FS | Register::GS);
    string && wide && plain && chained(mode) && !mode.has(Mode::ALIGN)
}

impl Emitter<'_> {
    pub(super) fn string(&mut self, insn: &Instruction) {
        if self.vm.debug.no_tlb || !self.chained {
            self.helper(insn, None);
            return;
        }
        let size: u8 = match insn.mnemonic() {
            M::Movsb | M::Stosb => 1,
            M::Movsw | M::Stosw => 2,
            M::Movsd | M::Stosd => 4,
            _ => 8,
        };
        let moves = matches!(insn.mnemonic(), M::Movsb | M::Movsw | M::Movsd | M::Movsq);
        let rep = insn.has_rep_prefix() || insn.has_repne_prefix();
        self.flags.to_memory(self.asm);
        self.flags.host_lost();
        let (helper, done) = (self.asm.label(), self.asm.label());
        self.asm.mem(&[], false, &[0x80], 7, Mem::Gs(gs!(direction))); // cmp byte, 0
        self.asm.bytes(&[0]);
        self.asm.jcc(cc::NE, helper);
        if rep {
            self.asm.alu_imm(true, 7, RCX, 4096);
            self.asm.jcc(cc::A, helper);
        }
        // scratch[0]: host destination; scratch[2] and [3]: RDI and RSI afterwards.
        self.host_range(RDI, true, rep, size, helper);
        self.asm.store(Mem::Gs(gs!(scratch)), ADDR);
        if moves {
            self.host_range(RSI, false, rep, size, helper);
            self.after_string(RSI, rep, size, 24);
        }
        self.after_string(RDI, rep, size, 16);
        if moves {
            self.asm.mov(RSI, ADDR);
        }
        self.asm.load(RDI, Mem::Gs(gs!(scratch)));
        if size == 2 {
            self.asm.bytes(&[0x66]);
        }
        if rep {
            self.asm.bytes(&[0xf3]);
        }
        if size == 8 {
            self.asm.bytes(&[0x48]);
        }
        self.asm.bytes(&[if moves { 0xa4 } else { 0xaa } | u8::from(size > 1)]);
        self.asm.load(RDI, Mem::Gs(gs!(scratch) + 16));
        if moves {
            self.asm.load(RSI, Mem::Gs(gs!(scratch) + 24));
        }
        self.asm.bind(done);
        self.asm.set_cold(true);
        self.asm.bind(helper);
        self.helper(insn, None);
        self.asm.jmp(done);
        self.asm.set_cold(false);
    }

    /// r15 = host address of the bytes at guest address `reg`; to `helper` if they are not all in one page of the
    /// TLB. Clobbers r11.
    fn host_range(&mut self, reg: HostReg, write: bool, rep: bool, size: u8, helper: Label) {
        let table = tlb_table_offset(TlbTable::new(self.key.mode.tlb_class(), write));
        let tag = table + std::mem::offset_of!(TlbEntry, tag) as i32;
        let host = table + std::mem::offset_of!(TlbEntry, host) as i32;
        let a = &mut *self.asm;
        a.mov32(R11, reg);
        a.shr(false, R11, 8);
        a.alu_imm(false, 4, R11, ((TLB_ENTRIES - 1) << 4) as i32);
        a.mov(ADDR, reg);
        a.mem(&[], true, &[0x2b], ADDR, Mem::GsBase(R11, tag));
        a.alu_imm(true, 7, ADDR, 4096);
        a.jcc(cc::AE, helper);
        if rep {
            a.lea(true, ADDR, Mem::Any { base: Some(ADDR), index: Some((RCX, size)), disp: 0 });
        } else {
            a.lea(true, ADDR, Mem::base(ADDR, i32::from(size)));
        }
        a.alu_imm(true, 7, ADDR, 4096);
        a.jcc(cc::A, helper);
        a.mov(ADDR, reg);
        a.mem(&[], true, &[0x2b], ADDR, Mem::GsBase(R11, tag));
        a.mem(&[], true, &[0x03], ADDR, Mem::GsBase(R11, host));
    }

    /// Notes the value of `reg` after the instruction at byte `at` of `scratch`. Clobbers r11.
    fn after_string(&mut self, reg: HostReg, rep: bool, size: u8, at: i32) {
        let mem = if rep {
            Mem::Any { base: Some(reg), index: Some((RCX, size)), disp: 0 }
        } else {
            Mem::base(reg, i32::from(size))
        };
        self.asm.lea(true, R11, mem);
        self.asm.store(Mem::Gs(gs!(scratch) + at), R11);
    }
}

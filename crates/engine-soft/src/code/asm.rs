//! A small assembler for the fixed parts of translated code. Guest instructions themselves are encoded by
//! iced-x86; see `translate/`.

use std::mem::offset_of;

use super::regs::HostReg;
use crate::shared::StateBlock;
use crate::state::State;

/// Offset of a field of the state block from GS:0.
macro_rules! gs {
    ($($field:tt)+) => {
        $crate::code::asm::state_offset(std::mem::offset_of!($crate::state::State, $($field)+))
    };
}
pub(crate) use gs;

/// Offset from GS:0 of what is at `offset` in [`State`].
pub(crate) const fn state_offset(offset: usize) -> i32 {
    (offset_of!(StateBlock, state) + offset) as i32
}

/// Offset from GS:0 of guest register `n`.
pub(crate) const fn gpr_offset(n: usize) -> i32 {
    state_offset(offset_of!(State, gpr) + n * 8)
}

/// A memory operand.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Mem {
    /// `gs:[disp]`
    Gs(i32),
    /// `gs:[reg + disp]`
    GsBase(HostReg, i32),
    /// `[base + index * scale + disp]`, each part optional; scale is 1, 2, 4 or 8.
    Any { base: Option<HostReg>, index: Option<(HostReg, u8)>, disp: i32 },
}

impl Mem {
    pub(crate) const fn base(reg: HostReg, disp: i32) -> Self {
        Mem::Any { base: Some(reg), index: None, disp }
    }
}

/// A place in the code being assembled that is jumped to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Label(usize);

/// Condition codes as in Jcc's opcode.
pub(crate) mod cc {
    pub(crate) const B: u8 = 2;
    pub(crate) const AE: u8 = 3;
    pub(crate) const E: u8 = 4;
    pub(crate) const NE: u8 = 5;
    pub(crate) const BE: u8 = 6;
    pub(crate) const A: u8 = 7;
    pub(crate) const S: u8 = 8;
}

/// Marks a position in the cold section until [`Asm::finish`].
const COLD: u32 = 1 << 31;

/// Code under construction, in two sections: hot code, and what is rarely executed, which comes after it.
/// Positions are byte offsets from the start; those in the cold section are provisional until
/// [`Asm::finish`], after which [`Asm::settled`] translates them.
#[derive(Default)]
pub(crate) struct Asm {
    pub(crate) code: Vec<u8>,
    other: Vec<u8>,
    in_cold: bool,
    hot_len: u32,
    labels: Vec<Option<u32>>,
    /// rel32 fields to fill: their position, and the label.
    fixups: Vec<(u32, Label)>,
    /// rel32 fields that refer to absolute host addresses: position and target.
    pub(crate) calls: Vec<(u32, u64)>,
}

impl Asm {
    pub(crate) fn clear(&mut self) {
        self.code.clear();
        self.other.clear();
        self.in_cold = false;
        self.labels.clear();
        self.fixups.clear();
        self.calls.clear();
    }

    pub(crate) fn pos(&self) -> u32 {
        self.code.len() as u32 | if self.in_cold { COLD } else { 0 }
    }

    /// What follows goes to the cold section, or back to the hot one.
    pub(crate) fn set_cold(&mut self, cold: bool) {
        if cold != self.in_cold {
            std::mem::swap(&mut self.code, &mut self.other);
            self.in_cold = cold;
        }
    }

    /// Whether code goes to the cold section.
    pub(crate) fn is_cold(&self) -> bool {
        self.in_cold
    }

    /// Joins the sections and fills every reference to a label. All labels that are referred to must be bound.
    pub(crate) fn finish(&mut self) {
        self.set_cold(false);
        self.align(8, 0);
        self.hot_len = self.pos();
        let cold = std::mem::take(&mut self.other);
        self.code.extend_from_slice(&cold);
        self.other = cold;
        for (at, label) in std::mem::take(&mut self.fixups) {
            let at = self.settled(at);
            let target = self.label_at(label);
            let rel = target as i32 - (at as i32 + 4);
            self.code[at as usize..at as usize + 4].copy_from_slice(&rel.to_le_bytes());
        }
        for i in 0..self.calls.len() {
            self.calls[i].0 = self.settled(self.calls[i].0);
        }
    }

    /// Where a label is, after [`Self::finish`].
    pub(crate) fn label_at(&self, label: Label) -> u32 {
        self.labels[label.0].map(|p| self.settled(p)).expect("every label is bound before finish")
    }

    /// The final form of a position that was taken while assembling.
    pub(crate) fn settled(&self, pos: u32) -> u32 {
        if pos & COLD != 0 { self.hot_len + (pos & !COLD) } else { pos }
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    fn imm32(&mut self, value: i32) {
        self.bytes(&value.to_le_bytes());
    }

    pub(crate) fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    pub(crate) fn bind(&mut self, label: Label) {
        debug_assert!(self.labels[label.0].is_none());
        self.labels[label.0] = Some(self.pos());
    }

    /// An instruction with a ModRM memory operand. `prefix`: mandatory prefixes (66, F2, F3); `wide`: REX.W.
    pub(crate) fn mem(&mut self, prefix: &[u8], wide: bool, opcode: &[u8], reg: HostReg, mem: Mem) {
        let (gs, base, index) = match mem {
            Mem::Gs(_) => (true, None, None),
            Mem::GsBase(base, _) => (true, Some(base), None),
            Mem::Any { base, index, .. } => (false, base, index),
        };
        if gs {
            self.bytes(&[0x65]);
        }
        self.bytes(prefix);
        let rex = 0x40
            | u8::from(wide) << 3
            | (reg >> 3) << 2
            | index.map_or(0, |(i, _)| i >> 3) << 1
            | base.map_or(0, |b| b >> 3);
        if rex != 0x40 {
            self.bytes(&[rex]);
        }
        self.bytes(opcode);
        self.modrm_mem(reg, mem);
    }

    fn modrm_mem(&mut self, reg: HostReg, mem: Mem) {
        let reg = (reg & 7) << 3;
        let (base, index, disp) = match mem {
            Mem::Gs(disp) => (None, None, disp),
            Mem::GsBase(base, disp) => (Some(base), None, disp),
            Mem::Any { base, index, disp } => (base, index, disp),
        };
        let Some(base) = base else {
            // No base: SIB with base 101 and a 32-bit displacement.
            let index = index.map_or(0x20, |(i, scale)| (i & 7) << 3 | (scale.trailing_zeros() as u8) << 6);
            self.bytes(&[reg | 4, index | 5]);
            self.imm32(disp);
            return;
        };
        let small = i8::try_from(disp).is_ok();
        let mode = match disp {
            0 if base & 7 != 5 => 0,
            _ if small => 0x40,
            _ => 0x80,
        };
        if index.is_some() || base & 7 == 4 {
            let index = index.map_or(0x20, |(i, scale)| (i & 7) << 3 | (scale.trailing_zeros() as u8) << 6);
            self.bytes(&[mode | reg | 4, index | base & 7]);
        } else {
            self.bytes(&[mode | reg | base & 7]);
        }
        match mode {
            0x40 => self.bytes(&[disp as u8]),
            0x80 => self.imm32(disp),
            _ => {}
        }
    }

    /// An instruction with two register operands.
    pub(crate) fn reg(&mut self, wide: bool, opcode: &[u8], reg: HostReg, rm: HostReg) {
        let rex = 0x40 | u8::from(wide) << 3 | (reg >> 3) << 2 | rm >> 3;
        if rex != 0x40 {
            self.bytes(&[rex]);
        }
        self.bytes(opcode);
        self.bytes(&[0xc0 | (reg & 7) << 3 | rm & 7]);
    }

    pub(crate) fn load(&mut self, reg: HostReg, mem: Mem) {
        self.mem(&[], true, &[0x8b], reg, mem);
    }

    pub(crate) fn store(&mut self, mem: Mem, reg: HostReg) {
        self.mem(&[], true, &[0x89], reg, mem);
    }

    /// Loads `size` bytes (1, 2, 4 or 8), zero-extended.
    pub(crate) fn load_zx(&mut self, reg: HostReg, mem: Mem, size: usize) {
        match size {
            1 => self.mem(&[], false, &[0x0f, 0xb6], reg, mem),
            2 => self.mem(&[], false, &[0x0f, 0xb7], reg, mem),
            4 => self.mem(&[], false, &[0x8b], reg, mem),
            _ => self.load(reg, mem),
        }
    }

    /// Stores the low `size` bytes (2, 4 or 8).
    pub(crate) fn store_sized(&mut self, mem: Mem, reg: HostReg, size: usize) {
        match size {
            2 => self.mem(&[0x66], false, &[0x89], reg, mem),
            4 => self.mem(&[], false, &[0x89], reg, mem),
            _ => self.store(mem, reg),
        }
    }

    pub(crate) fn lea(&mut self, wide: bool, reg: HostReg, mem: Mem) {
        self.mem(&[], wide, &[0x8d], reg, mem);
    }

    pub(crate) fn mov(&mut self, to: HostReg, from: HostReg) {
        self.reg(true, &[0x8b], to, from);
    }

    pub(crate) fn mov32(&mut self, to: HostReg, from: HostReg) {
        self.reg(false, &[0x8b], to, from);
    }

    /// `mov reg, value` in the shortest form. Does not touch flags.
    pub(crate) fn mov_imm(&mut self, reg: HostReg, value: u64) {
        if let Ok(small) = u32::try_from(value) {
            if reg >= 8 {
                self.bytes(&[0x41]);
            }
            self.bytes(&[0xb8 | reg & 7]);
            self.bytes(&small.to_le_bytes());
        } else if let Ok(small) = i32::try_from(value as i64) {
            self.bytes(&[0x48 | reg >> 3, 0xc7, 0xc0 | reg & 7]);
            self.imm32(small);
        } else {
            self.bytes(&[0x48 | reg >> 3, 0xb8 | reg & 7]);
            self.bytes(&value.to_le_bytes());
        }
    }

    /// `mov qword gs:[disp], value`, through `scratch` if it does not fit.
    pub(crate) fn store_imm(&mut self, disp: i32, value: u64, scratch: HostReg) {
        if let Ok(small) = i32::try_from(value as i64) {
            self.mem(&[], true, &[0xc7], 0, Mem::Gs(disp));
            self.imm32(small);
        } else {
            self.mov_imm(scratch, value);
            self.store(Mem::Gs(disp), scratch);
        }
    }

    /// `mov byte gs:[disp], value`
    pub(crate) fn store_byte(&mut self, disp: i32, value: u8) {
        self.mem(&[], false, &[0xc6], 0, Mem::Gs(disp));
        self.bytes(&[value]);
    }

    /// `op reg, imm32` of the ALU group (0 add, 1 or, 4 and, 5 sub, 6 xor, 7 cmp).
    pub(crate) fn alu_imm(&mut self, wide: bool, op: u8, reg: HostReg, value: i32) {
        if let Ok(small) = i8::try_from(value) {
            self.reg(wide, &[0x83], op, reg);
            self.bytes(&[small as u8]);
        } else {
            self.reg(wide, &[0x81], op, reg);
            self.imm32(value);
        }
    }

    /// `shr reg, n`
    pub(crate) fn shr(&mut self, wide: bool, reg: HostReg, n: u8) {
        self.reg(wide, &[0xc1], 5, reg);
        self.bytes(&[n]);
    }

    /// `shl reg, n`
    pub(crate) fn shl(&mut self, wide: bool, reg: HostReg, n: u8) {
        self.reg(wide, &[0xc1], 4, reg);
        self.bytes(&[n]);
    }

    pub(crate) fn jcc(&mut self, cc: u8, label: Label) {
        self.bytes(&[0x0f, 0x80 | cc]);
        self.rel32(label);
    }

    pub(crate) fn jmp(&mut self, label: Label) {
        self.bytes(&[0xe9]);
        self.rel32(label);
    }

    /// A rel32 field for `label`.
    pub(crate) fn rel32(&mut self, label: Label) {
        self.fixups.push((self.pos(), label));
        self.imm32(0);
    }

    /// `call` to an absolute host address in the code cache.
    pub(crate) fn call_abs(&mut self, target: u64) {
        self.bytes(&[0xe8]);
        self.calls.push((self.pos(), target));
        self.imm32(0);
    }

    /// `jmp` to an absolute host address in the code cache.
    pub(crate) fn jmp_abs(&mut self, target: u64) {
        self.bytes(&[0xe9]);
        self.calls.push((self.pos(), target));
        self.imm32(0);
    }

    /// NOPs until the position plus `ahead` is a multiple of `align` (at most 8).
    pub(crate) fn align(&mut self, align: u32, ahead: u32) {
        const NOPS: [&[u8]; 8] = [
            &[],
            &[0x90],
            &[0x66, 0x90],
            &[0x0f, 0x1f, 0x00],
            &[0x0f, 0x1f, 0x40, 0x00],
            &[0x0f, 0x1f, 0x44, 0x00, 0x00],
            &[0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00],
            &[0x0f, 0x1f, 0x80, 0x00, 0x00, 0x00, 0x00],
        ];
        let pad = (align - (self.code.len() as u32 + ahead) % align) % align;
        self.bytes(NOPS[pad as usize]);
    }

    /// The head of a block's entry: an aligned NOP of eight bytes that can be replaced in one store.
    pub(crate) fn head(&mut self) -> u32 {
        self.align(8, 0);
        let at = self.pos();
        self.bytes(&[0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00]);
        at
    }

    /// Saves the host's arithmetic flags into the state block. Keeps every register; r11 is clobbered.
    pub(crate) fn save_flags(&mut self) {
        self.mov(super::regs::R11, super::regs::RAX);
        self.bytes(&[0x9f]); // lahf
        self.bytes(&[0x0f, 0x90, 0xc0]); // seto al
        self.mem(&[0x66], false, &[0x89], super::regs::RAX, Mem::Gs(gs!(flags)));
        self.mov(super::regs::RAX, super::regs::R11);
    }

    /// Loads the host's arithmetic flags from the state block. Clobbers r11.
    pub(crate) fn restore_flags(&mut self) {
        self.mov(super::regs::R11, super::regs::RAX);
        self.mem(&[], false, &[0x0f, 0xb7], super::regs::RAX, Mem::Gs(gs!(flags)));
        self.bytes(&[0x04, 0x7f]); // add al, 0x7f: overflows exactly if al was 1
        self.bytes(&[0x9e]); // sahf
        self.mov(super::regs::RAX, super::regs::R11);
    }

    /// The same without clobbering a register.
    pub(crate) fn restore_flags_only(&mut self) {
        self.store(Mem::Gs(gs!(scratch) + 8), super::regs::RAX);
        self.mem(&[], false, &[0x0f, 0xb7], super::regs::RAX, Mem::Gs(gs!(flags)));
        self.bytes(&[0x04, 0x7f]); // add al, 0x7f: overflows exactly if al was 1
        self.bytes(&[0x9e]); // sahf
        self.load(super::regs::RAX, Mem::Gs(gs!(scratch) + 8));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::code::regs::*;
    use iced_x86::{Decoder, DecoderOptions, Formatter, GasFormatter};

    fn text(emit: impl FnOnce(&mut Asm)) -> String {
        let mut asm = Asm::default();
        emit(&mut asm);
        let len = asm.code.len();
        asm.finish();
        let mut decoder = Decoder::with_ip(64, &asm.code[..len], 0, DecoderOptions::NONE);
        let mut formatter = GasFormatter::new();
        let mut lines = Vec::new();
        while decoder.can_decode() {
            let mut line = String::new();
            formatter.format(&decoder.decode(), &mut line);
            lines.push(line);
        }
        lines.join("; ")
    }

    #[test]
    fn memory_operands_in_every_shape() {
        assert_eq!(text(|a| a.load(ADDR, Mem::Gs(0x40))), "mov %gs:0x40,%r15");
        assert_eq!(text(|a| a.load(R11, Mem::GsBase(R11, 0x1234))), "mov %gs:0x1234(%r11),%r11");
        assert_eq!(text(|a| a.lea(true, ADDR, Mem::base(GUEST_RSP, -8))), "lea -8(%r13),%r15");
        assert_eq!(text(|a| a.lea(true, ADDR, Mem::base(R12, 0))), "lea (%r12),%r15");
        assert_eq!(text(|a| a.lea(true, ADDR, Mem::base(RBP, 0))), "lea (%rbp),%r15");
        let all = Mem::Any { base: Some(13), index: Some((ADDR, 8)), disp: 0x1000 };
        assert_eq!(text(|a| a.lea(true, ADDR, all)), "lea 0x1000(%r13,%r15,8),%r15");
        let no_base = Mem::Any { base: None, index: Some((RAX, 4)), disp: -1 };
        assert_eq!(text(|a| a.lea(true, ADDR, no_base)), "lea -1(,%rax,4),%r15");
    }

    #[test]
    fn immediates_take_the_shortest_form() {
        assert_eq!(text(|a| a.mov_imm(R11, 5)), "mov $5,%r11d");
        assert_eq!(text(|a| a.mov_imm(R11, u64::MAX)), "mov $0xFFFFFFFFFFFFFFFF,%r11");
        assert_eq!(text(|a| a.mov_imm(R11, 1 << 40)), "movabs $0x10000000000,%r11");
    }

    #[test]
    fn labels_reach_forwards_and_backwards() {
        let code = text(|a| {
            let (start, end) = (a.label(), a.label());
            a.bind(start);
            a.jcc(cc::AE, end);
            a.jmp(start);
            a.bind(end);
        });
        assert_eq!(code, "jae 0x000000000000000B; jmp 0");
    }
}

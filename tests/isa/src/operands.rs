//! Random operands for an instruction form.

use fastrand::Rng;
use iced_x86::{Code, Instruction, OpCodeOperandKind as O, OpKind, Register as R};

use crate::case::CodeMode;
use crate::layout::{FS_BASE, GS_BASE};
use crate::state::{Risk, Setup, address, integer};

/// Chooses operands.
pub struct Operands<'a> {
    /// Source of randomness.
    pub rng: &'a mut Rng,
    /// The state that the operands fit to.
    pub setup: &'a Setup,
    /// Registers that results should not go to.
    pub keep: &'a [usize],
    /// How often addresses are bad.
    pub risk: Risk,
    /// Memory instead of a register, where both are possible.
    pub memory: bool,
    /// Address that the instruction will be near to: for operands relative to RIP.
    pub near: u64,
}

impl Operands<'_> {
    fn chance(&mut self, percent: u8) -> bool {
        self.rng.u8(..100) < percent
    }

    fn general(&mut self, size: usize) -> R {
        let count = self.setup.mode.registers();
        let mut n = self.rng.usize(..count);
        for _ in 0..8 {
            if !self.keep.contains(&n) {
                break;
            }
            n = self.rng.usize(..count);
        }
        let n32 = n as u32;
        match size {
            1 if n < 4 && !self.keep.contains(&n) && self.chance(35) => R::AH + n32,
            1 if self.setup.mode == CodeMode::Bits32 => R::AL + n32, // AL to BH
            1 if n < 4 => R::AL + n32,
            1 => R::SPL + (n32 - 4),
            2 => R::AX + n32,
            4 => R::EAX + n32,
            _ => R::RAX + n32,
        }
    }

    fn numbered(&mut self, first: R) -> R {
        first + self.rng.u32(..self.setup.mode.registers() as u32)
    }

    /// The operands of `code`, if its kinds of operand are known.
    pub fn choose(&mut self, code: Code) -> Option<Instruction> {
        let info = code.op_code();
        let mut insn = Instruction::default();
        insn.set_code(code);
        for (i, &kind) in info.op_kinds().iter().enumerate() {
            self.operand(&mut insn, i as u32, kind)?;
        }
        let to_memory = insn.op0_kind() == OpKind::Memory;
        if info.can_use_lock_prefix() && to_memory && self.chance(40) {
            insn.set_has_lock_prefix(true);
        }
        if insn.is_string_instruction() {
            if info.can_use_rep_prefix() && self.chance(60) {
                insn.set_has_rep_prefix(true);
            } else if info.can_use_repne_prefix() && self.chance(60) {
                insn.set_has_repne_prefix(true);
            }
        }
        Some(insn)
    }

    fn operand(&mut self, insn: &mut Instruction, i: u32, kind: O) -> Option<()> {
        let register = match kind {
            O::r8_or_mem
            | O::r16_or_mem
            | O::r32_or_mem
            | O::r64_or_mem
            | O::mm_or_mem
            | O::xmm_or_mem
            | O::ymm_or_mem
                if self.memory =>
            {
                return self.memory_operand(insn, i, None);
            }
            O::mem | O::sibmem => return self.memory_operand(insn, i, None),
            O::mem_vsib32x | O::mem_vsib64x => {
                let index = self.numbered(R::XMM0);
                return self.memory_operand(insn, i, Some(index));
            }
            O::mem_vsib32y | O::mem_vsib64y => {
                let index = self.numbered(R::YMM0);
                return self.memory_operand(insn, i, Some(index));
            }
            O::mem_offs => return self.absolute_operand(insn, i),
            O::r8_or_mem | O::r8_reg | O::r8_opcode => self.general(1),
            O::r16_or_mem | O::r16_reg | O::r16_rm | O::r16_opcode => self.general(2),
            O::r32_or_mem | O::r32_reg | O::r32_rm | O::r32_opcode | O::r32_vvvv => self.general(4),
            O::r64_or_mem | O::r64_reg | O::r64_rm | O::r64_opcode | O::r64_vvvv => self.general(8),
            O::r16_reg_mem | O::r32_reg_mem | O::r64_reg_mem => return None,
            O::mm_or_mem | O::mm_reg | O::mm_rm => R::MM0 + self.rng.u32(..8),
            O::xmm_or_mem | O::xmm_reg | O::xmm_rm | O::xmm_vvvv | O::xmm_is4 | O::xmm_is5 => {
                self.numbered(R::XMM0)
            }
            O::ymm_or_mem | O::ymm_reg | O::ymm_rm | O::ymm_vvvv | O::ymm_is4 | O::ymm_is5 => {
                self.numbered(R::YMM0)
            }
            O::seg_reg => R::ES + self.rng.u32(..6),
            O::cr_reg => R::CR0 + [0, 2, 3, 4][self.rng.usize(..4)],
            O::dr_reg => R::DR0 + [0, 1, 2, 3, 6, 7][self.rng.usize(..6)],
            O::es => R::ES,
            O::cs => R::CS,
            O::ss => R::SS,
            O::ds => R::DS,
            O::fs => R::FS,
            O::gs => R::GS,
            O::al => R::AL,
            O::cl => R::CL,
            O::ax => R::AX,
            O::dx => R::DX,
            O::eax => R::EAX,
            O::rax => R::RAX,
            O::st0 => R::ST0,
            O::sti_opcode => R::ST0 + self.rng.u32(..8),
            _ => return self.other_operand(insn, i, kind),
        };
        insn.set_op_kind(i, OpKind::Register);
        insn.set_op_register(i, register);
        Some(())
    }

    fn other_operand(&mut self, insn: &mut Instruction, i: u32, kind: O) -> Option<()> {
        let value = integer(self.rng);
        let byte = if self.chance(50) { value as u8 & 0x3f } else { self.rng.u8(..) };
        match kind {
            O::imm8 => self.immediate(insn, i, OpKind::Immediate8, u64::from(byte)),
            O::imm8_const_1 => self.immediate(insn, i, OpKind::Immediate8, 1),
            O::imm4_m2z => self.immediate(insn, i, OpKind::Immediate8, u64::from(byte & 3)),
            O::imm8sex16 => self.immediate(insn, i, OpKind::Immediate8to16, value as i8 as u64),
            O::imm8sex32 => self.immediate(insn, i, OpKind::Immediate8to32, value as i8 as u64),
            O::imm8sex64 => self.immediate(insn, i, OpKind::Immediate8to64, value as i8 as u64),
            O::imm16 => self.immediate(insn, i, OpKind::Immediate16, value & 0xffff),
            O::imm32 => self.immediate(insn, i, OpKind::Immediate32, value & 0xffff_ffff),
            O::imm32sex64 => self.immediate(insn, i, OpKind::Immediate32to64, value as i32 as u64),
            O::imm64 => self.immediate(insn, i, OpKind::Immediate64, value),
            O::seg_rSI => self.string_operand(
                insn,
                i,
                [OpKind::MemorySegSI, OpKind::MemorySegESI, OpKind::MemorySegRSI],
                true,
            ),
            O::es_rDI => self.string_operand(
                insn,
                i,
                [OpKind::MemoryESDI, OpKind::MemoryESEDI, OpKind::MemoryESRDI],
                false,
            ),
            O::seg_rDI => self.string_operand(
                insn,
                i,
                [OpKind::MemorySegDI, OpKind::MemorySegEDI, OpKind::MemorySegRDI],
                true,
            ),
            O::seg_rBX_al => {
                insn.set_op_kind(i, OpKind::Memory);
                let narrow = self.chance(20);
                let base = match (self.setup.mode, narrow) {
                    (CodeMode::Bits64, false) => R::RBX,
                    (CodeMode::Bits64, true) | (CodeMode::Bits32, false) => R::EBX,
                    (CodeMode::Bits32, true) => R::BX,
                };
                insn.set_memory_base(base);
                insn.set_memory_index(R::AL);
            }
            O::br16_1 | O::br16_2 | O::br32_1 | O::br32_4 | O::br64_1 | O::br64_4 => {
                insn.set_op_kind(
                    i,
                    match kind {
                        O::br16_1 | O::br16_2 => OpKind::NearBranch16,
                        O::br32_1 | O::br32_4 => OpKind::NearBranch32,
                        _ => OpKind::NearBranch64,
                    },
                );
            }
            _ => return None,
        }
        Some(())
    }

    fn immediate(&mut self, insn: &mut Instruction, i: u32, kind: OpKind, value: u64) {
        // ENTER and EXTRQ have two immediates: the second has a place of its own.
        if i > 0
            && kind == OpKind::Immediate8
            && matches!(insn.op_kind(i - 1), OpKind::Immediate8 | OpKind::Immediate16)
            && i as usize == insn.code().op_code().op_kinds().len() - 1
            && insn.op_count() >= 2
        {
            insn.set_op_kind(i, OpKind::Immediate8_2nd);
            insn.set_immediate8_2nd(value as u8);
            return;
        }
        insn.set_op_kind(i, kind);
        match kind {
            OpKind::Immediate64 => insn.set_immediate64(value),
            OpKind::Immediate8to16 => insn.set_immediate8to16(value as i16),
            OpKind::Immediate8to32 => insn.set_immediate8to32(value as i32),
            OpKind::Immediate8to64 => insn.set_immediate8to64(value as i64),
            OpKind::Immediate32to64 => insn.set_immediate32to64(value as i64),
            OpKind::Immediate16 => insn.set_immediate16(value as u16),
            OpKind::Immediate32 => insn.set_immediate32(value as u32),
            _ => insn.set_immediate8(value as u8),
        }
    }

    /// `kinds`: for address sizes 16, 32 and 64.
    fn string_operand(&mut self, insn: &mut Instruction, i: u32, kinds: [OpKind; 3], prefix: bool) {
        // Both operands of MOVS and CMPS have the same address size.
        let earlier = (i > 0).then(|| insn.op_kind(0));
        let size = match earlier {
            Some(OpKind::MemorySegSI | OpKind::MemoryESDI) => 0,
            Some(OpKind::MemorySegESI | OpKind::MemoryESEDI) => 1,
            Some(OpKind::MemorySegRSI | OpKind::MemoryESRDI) => 2,
            _ => match self.setup.mode {
                CodeMode::Bits64 => 2 - usize::from(self.chance(15)),
                CodeMode::Bits32 => 1 - usize::from(self.chance(5)),
            },
        };
        insn.set_op_kind(i, kinds[size]);
        if prefix && self.setup.mode == CodeMode::Bits64 && self.chance(5) {
            insn.set_segment_prefix(R::CS);
        }
    }

    fn absolute_operand(&mut self, insn: &mut Instruction, i: u32) -> Option<()> {
        insn.set_op_kind(i, OpKind::Memory);
        let target = address(self.rng, self.risk);
        let wide = self.setup.mode == CodeMode::Bits64 && !self.chance(10);
        if wide {
            insn.set_memory_displacement64(target);
            insn.set_memory_displ_size(8);
        } else {
            insn.set_memory_displacement64(target & 0xffff_ffff);
            insn.set_memory_displ_size(4);
        }
        Some(())
    }

    /// A memory operand, with the vector register `vector` as its index if there is one.
    fn memory_operand(&mut self, insn: &mut Instruction, i: u32, vector: Option<R>) -> Option<()> {
        insn.set_op_kind(i, OpKind::Memory);
        let mode = self.setup.mode;
        let size = insn.memory_size().size().clamp(1, 64) as i64;
        let delta = match self.rng.u8(..10) {
            0..4 => 0,
            4..8 => self.rng.i64(-4..4) * size,
            _ => self.rng.i64(-64..64),
        };
        // Segment prefix: FS and GS add their base, the others mean nothing in 64-bit mode.
        let (prefix, base) = match (mode, self.rng.u8(..100)) {
            (CodeMode::Bits64, 0..5) => (R::FS, FS_BASE as i64),
            (CodeMode::Bits64, 5..10) => (R::GS, GS_BASE as i64),
            (_, 10..14) => ([R::ES, R::DS, R::SS][self.rng.usize(..3)], 0),
            (CodeMode::Bits64, 14) => (R::CS, 0),
            _ => (R::None, 0),
        };
        insn.set_segment_prefix(prefix);
        let narrow = mode == CodeMode::Bits32 || self.chance(12);
        let first = if narrow { R::EAX } else { R::RAX };
        let shape = if vector.is_some() { 0 } else { self.rng.u8(..100) };
        let index = (self.chance(35) && vector.is_none())
            .then(|| self.setup.small.get(self.rng.usize(..4)).copied())
            .flatten();
        let scale = 1 << self.rng.u32(..4);
        if let Some(index) = index {
            insn.set_memory_index(first + index as u32);
            insn.set_memory_index_scale(scale);
        }
        if let Some(vector) = vector {
            insn.set_memory_index(vector);
            insn.set_memory_index_scale(scale);
        }
        let displacement = if shape < 80 {
            let n = self.setup.pointers.len() + usize::from(shape < 8);
            // One more than there are pointers stands for the stack pointer.
            let (register, bias) = match self.setup.pointers.get(self.rng.usize(..n)) {
                Some(p) => (p.register, i64::from(p.bias)),
                None => (4, 0),
            };
            insn.set_memory_base(first + register as u32);
            bias + delta - base
        } else {
            let target = address(self.rng, self.risk) as i64;
            if shape < 90 && mode == CodeMode::Bits64 {
                insn.set_memory_index(R::None);
                insn.set_memory_base(if narrow { R::EIP } else { R::RIP });
                let target = target - base;
                let distance = target.wrapping_sub(self.near as i64);
                if i32::try_from(distance).is_err() || narrow && u32::try_from(target).is_err() {
                    return None;
                }
                insn.set_memory_displacement64(target as u64);
                insn.set_memory_displ_size(if narrow { 4 } else { 8 });
                return Some(());
            }
            (target + delta).wrapping_sub(base)
        };
        let without_base = insn.memory_base() == R::None;
        let fits = i32::try_from(displacement).is_ok() || narrow && u32::try_from(displacement).is_ok();
        if !fits {
            return None;
        }
        let wide = if narrow { 4 } else { 8 };
        let short = i8::try_from(displacement).is_ok() && !without_base && self.chance(85);
        let none = displacement == 0 && short && self.chance(70);
        insn.set_memory_displacement64(if narrow { displacement as u32 as u64 } else { displacement as u64 });
        insn.set_memory_displ_size(if none {
            0
        } else if short {
            1
        } else {
            wide
        });
        Some(())
    }
}

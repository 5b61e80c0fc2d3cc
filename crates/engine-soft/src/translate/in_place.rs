//! Ordinary instructions on a guest register that lives in the state block: executed on it in place, where loading it into
//! a scratch register and storing it back would take two instructions more.
//!
//! Results of less than 64 bits are not written in place: a load of the whole register right after a store of a part of
//! it waits until the store has left the host's store buffer.

use iced_x86::{ConditionCode, Instruction, Mnemonic, OpKind, Register};

use super::copy::number_of;
use super::emit::Emitter;
use crate::code::asm::{Mem, gpr_offset};
use crate::code::regs::{ADDR, Home, HostReg, home};

/// An operand that the templates here know.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Operand {
    Host(HostReg),
    State(usize),
    Immediate(i32),
}

/// Number in the group of ADD, OR, ADC, SBB, AND, SUB, XOR and CMP.
fn alu_group(mnemonic: Mnemonic) -> Option<u8> {
    use Mnemonic::*;
    [Add, Or, Adc, Sbb, And, Sub, Xor, Cmp].iter().position(|&m| m == mnemonic).map(|n| n as u8)
}

/// Number in the group of rotations and shifts.
fn shift_group(mnemonic: Mnemonic) -> Option<u8> {
    use Mnemonic::*;
    match mnemonic {
        Rol => Some(0),
        Ror => Some(1),
        Shl | Sal => Some(4),
        Shr => Some(5),
        Sar => Some(7),
        _ => None,
    }
}

fn operand(insn: &Instruction, n: u32) -> Option<Operand> {
    match insn.op_kind(n) {
        OpKind::Register if insn.op_register(n).is_gpr() => match home(number_of(insn.op_register(n))) {
            Home::Host(reg) => Some(Operand::Host(reg)),
            Home::State(n) => Some(Operand::State(n)),
        },
        OpKind::Immediate8
        | OpKind::Immediate8to32
        | OpKind::Immediate8to64
        | OpKind::Immediate32
        | OpKind::Immediate32to64 => Some(Operand::Immediate(insn.immediate(n) as i32)),
        _ => None,
    }
}

fn is_wide(register: Register) -> Option<bool> {
    match register.size() {
        8 => Some(true),
        4 => Some(false),
        _ => None,
    }
}

impl Emitter<'_> {
    /// Executes `insn`, which has no memory operand and cannot raise a signal, in place, if there is a template for it; the
    /// host's flags are what it needs. Returns whether there was. Clobbers r15 and r11.
    pub(super) fn in_place(&mut self, insn: &Instruction) -> bool {
        if self.vm.debug.no_in_place || insn.op_count() == 0 {
            return false;
        }
        let before = self.asm.code.len();
        if let Some(window) = self.window {
            window.store_operands(self.asm);
        }
        let done = self.execute_in_place(insn);
        if !done {
            self.asm.code.truncate(before);
        }
        done
    }

    fn execute_in_place(&mut self, insn: &Instruction) -> bool {
        let (Some(first), Some(wide)) = (operand(insn, 0), is_wide(insn.op0_register())) else {
            return false;
        };
        if insn.op_count() == 1 {
            return match first {
                Operand::State(n) if wide => self.unary_in_place(insn.mnemonic(), n),
                _ => false,
            };
        }
        if insn.op_count() != 2 {
            return false;
        }
        let Some(second) = operand(insn, 1) else { return false };
        match (first, second) {
            (Operand::Host(to), Operand::State(from)) => self.with_state_source(insn, wide, to, from),
            (Operand::State(to), from) => {
                let same_size = insn.op1_kind() != OpKind::Register
                    || insn.op1_register().size() == insn.op0_register().size();
                same_size && self.on_state(insn.mnemonic(), wide, to, from)
            }
            _ => false,
        }
    }

    fn unary_in_place(&mut self, mnemonic: Mnemonic, n: usize) -> bool {
        let (opcode, group) = match mnemonic {
            Mnemonic::Inc => (0xff, 0),
            Mnemonic::Dec => (0xff, 1),
            Mnemonic::Not => (0xf7, 2),
            Mnemonic::Neg => (0xf7, 3),
            _ => return false,
        };
        self.asm.mem(&[], true, &[opcode], group, Mem::Gs(gpr_offset(n)));
        true
    }

    /// The second operand is in the state block, the first is not.
    fn with_state_source(&mut self, insn: &Instruction, wide: bool, to: HostReg, from: usize) -> bool {
        use Mnemonic as M;
        let mnemonic = insn.mnemonic();
        let size = insn.op1_register().size();
        let same = size == insn.op0_register().size();
        let condition = insn.condition_code();
        let opcode: &[u8] = match mnemonic {
            // CMOVcc; iced numbers the conditions in the order of their encoding, from 1.
            _ if condition != ConditionCode::None && same => &[0x0f, 0x40 | (condition as u8 - 1)],
            M::Mov if same => &[0x8b],
            M::Test if same => &[0x85],
            M::Imul if same => &[0x0f, 0xaf],
            M::Movzx if size == 1 => &[0x0f, 0xb6],
            M::Movzx if size == 2 => &[0x0f, 0xb7],
            M::Movsx if size == 1 => &[0x0f, 0xbe],
            M::Movsx if size == 2 => &[0x0f, 0xbf],
            M::Movsxd if size == 4 && wide => &[0x63],
            _ => match alu_group(mnemonic) {
                Some(group) if same => &[group << 3 | 3],
                _ => return false,
            },
        };
        self.asm.mem(&[], wide, opcode, to, Mem::Gs(gpr_offset(from)));
        true
    }

    /// The first operand is in the state block.
    fn on_state(&mut self, mnemonic: Mnemonic, wide: bool, to: usize, from: Operand) -> bool {
        let mem = Mem::Gs(gpr_offset(to));
        let only_read = matches!(mnemonic, Mnemonic::Cmp | Mnemonic::Test);
        if matches!(mnemonic, Mnemonic::Xor | Mnemonic::Sub) && from == Operand::State(to) {
            // Zero, whatever it was.
            self.asm.reg(false, &[if mnemonic == Mnemonic::Xor { 0x33 } else { 0x2b }], ADDR, ADDR);
            self.asm.store(mem, ADDR);
            return true;
        }
        if mnemonic == Mnemonic::Mov && !wide {
            let Operand::Host(from) = from else { return false };
            self.asm.mov32(ADDR, from);
            self.asm.store(mem, ADDR);
            return true;
        }
        if !wide && !only_read {
            return false;
        }
        match (mnemonic, from) {
            (Mnemonic::Mov, Operand::Host(from)) => self.asm.store(mem, from),
            (Mnemonic::Mov, Operand::Immediate(value)) => {
                self.asm.mem(&[], true, &[0xc7], 0, mem);
                self.asm.bytes(&value.to_le_bytes());
            }
            (Mnemonic::Test, Operand::Host(from)) => self.asm.mem(&[], wide, &[0x85], from, mem),
            // All flags are those of TEST: neither carry nor overflow is possible.
            (Mnemonic::Test, Operand::State(n)) if n == to => {
                self.asm.mem(&[], wide, &[0x83], 7, mem);
                self.asm.bytes(&[0]);
            }
            (mnemonic, Operand::Host(from)) => match alu_group(mnemonic) {
                Some(group) => self.asm.mem(&[], wide, &[group << 3 | 1], from, mem),
                None => return false,
            },
            (mnemonic, Operand::Immediate(value)) => match (alu_group(mnemonic), shift_group(mnemonic)) {
                (Some(group), _) => match i8::try_from(value) {
                    Ok(small) => {
                        self.asm.mem(&[], wide, &[0x83], group, mem);
                        self.asm.bytes(&[small as u8]);
                    }
                    Err(_) => {
                        self.asm.mem(&[], wide, &[0x81], group, mem);
                        self.asm.bytes(&value.to_le_bytes());
                    }
                },
                (None, Some(group)) => {
                    self.asm.mem(&[], true, &[0xc1], group, mem);
                    self.asm.bytes(&[value as u8]);
                }
                (None, None) => return false,
            },
            _ => return false,
        }
        true
    }
}

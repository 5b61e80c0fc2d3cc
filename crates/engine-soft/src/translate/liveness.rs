//! Flags that nothing reads: where they need not be saved, and how they are computed again after all.
//!
//! ```text
//!   add $8, %rax        sets flags that nobody reads, because …
//!   mov (%rax), %rcx    … (its check destroys the host's flags)
//!   cmp %rdx, %rcx      … this sets all of them
//! ```
//!
//! Only an exception of the load in the middle shows the flags of `add`. So they are not saved before its check, but
//! computed again from the operands where the check has failed, which is rare. The operands are still in their
//! registers, or were stored beside before they were overwritten ([`Window::spill`]): one store instead of the five
//! instructions that saving takes.

use iced_x86::{Instruction, InstructionInfoFactory, InstructionInfoOptions, Mnemonic, OpAccess, OpKind};

use super::class::{Class, has_memory};
use super::copy::{may_raise, needs_alignment, number_of};
use super::flags::Effect;
use crate::code::asm::{Asm, Mem, gpr_offset, gs};
use crate::code::regs::{Home, R11, home};

/// An operand of the instruction that set the flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operand {
    /// Guest register with this number.
    Register(usize),
    Immediate(i32),
    /// In [`crate::state::State::flag_operands`].
    Spilled(usize),
}

/// What is done to the operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Again {
    /// ADD, OR, AND, SUB, XOR or CMP, by the number of its group.
    Alu(u8),
    /// ADD or SUB; the first operand is the result.
    Undo(u8),
    Test,
    /// SHL, SHR or SAR by the number of its group.
    Shift(u8),
}

/// How flags that are nowhere are computed again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Recover {
    again: Again,
    /// 64-bit operands, else 32-bit ones.
    wide: bool,
    first: Operand,
    second: Operand,
}

fn place(operand: Operand) -> Result<u8, Mem> {
    match operand {
        Operand::Register(n) => match home(n) {
            Home::Host(reg) => Ok(reg),
            Home::State(n) => Err(Mem::Gs(gpr_offset(n))),
        },
        Operand::Spilled(n) => Err(Mem::Gs(spilled(n))),
        Operand::Immediate(_) => unreachable!("handled before"),
    }
}

/// Offset from GS:0 of a stored operand.
fn spilled(n: usize) -> i32 {
    gs!(flag_operands) + n as i32 * 8
}

impl Recover {
    /// Makes the host's flags the guest's. Clobbers r11.
    pub(crate) fn emit(self, a: &mut Asm) {
        match place(self.first) {
            Ok(reg) => a.mov(R11, reg),
            Err(mem) => a.load(R11, mem),
        }
        match self.again {
            Again::Alu(op) => self.alu(a, op),
            Again::Undo(op) => {
                self.alu(a, if op == 0 { 5 } else { 0 });
                self.alu(a, op);
            }
            Again::Test => match self.second {
                Operand::Immediate(value) => {
                    a.reg(self.wide, &[0xf7], 0, R11);
                    a.bytes(&value.to_le_bytes());
                }
                second => match place(second) {
                    Ok(reg) => a.reg(self.wide, &[0x85], R11, reg),
                    Err(mem) => a.mem(&[], self.wide, &[0x85], R11, mem),
                },
            },
            Again::Shift(op) => {
                a.reg(self.wide, &[0xc1], op, R11);
                let Operand::Immediate(count) = self.second else { unreachable!("shifts are by immediates") };
                a.bytes(&[count as u8]);
            }
        }
    }

    fn alu(self, a: &mut Asm, op: u8) {
        match self.second {
            Operand::Immediate(value) => a.alu_imm(self.wide, op, R11, value),
            second => match place(second) {
                Ok(reg) => a.reg(self.wide, &[op << 3 | 3], R11, reg),
                Err(mem) => a.mem(&[], self.wide, &[op << 3 | 3], R11, mem),
            },
        }
    }
}

/// Flags of an instruction that are only needed if a later access fails its check.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    pub recover: Recover,
    /// Guest registers to store before the instruction, each with its place.
    pub spill: [Option<(usize, usize)>; 2],
}

impl Window {
    /// Stores the operands. Clobbers r11.
    pub(super) fn store_operands(&self, a: &mut Asm) {
        for (register, n) in self.spill.into_iter().flatten() {
            match home(register) {
                Home::Host(reg) => a.store(Mem::Gs(spilled(n)), reg),
                Home::State(state) => {
                    a.load(R11, Mem::Gs(gpr_offset(state)));
                    a.store(Mem::Gs(spilled(n)), R11);
                }
            }
        }
    }
}

/// For each instruction: whether the arithmetic flags before it are read by nothing but exceptions of memory accesses.
pub(super) fn dead_before(list: &[(Instruction, Class)]) -> Vec<bool> {
    let mut dead = vec![false; list.len()];
    let mut after = false;
    for (i, (insn, class)) in list.iter().enumerate().rev() {
        after = match class {
            Class::Lea | Class::Nop | Class::Push | Class::Pop | Class::Leave => after,
            Class::Copy if may_raise(insn) || needs_alignment(insn) => false,
            Class::Copy => match Effect::of(insn) {
                Effect::None => after,
                Effect::Produce => true,
                Effect::Consume | Effect::Merge => false,
            },
            _ => false,
        };
        dead[i] = after;
    }
    dead
}

/// The window of the instruction at `at`, if its flags need not be saved. `set`: which of two sets of places to store
/// operands in; the window before may still need the other.
pub(super) fn window(
    list: &[(Instruction, Class)],
    at: usize,
    dead: &[bool],
    info: &mut InstructionInfoFactory,
    set: usize,
) -> Option<Window> {
    let insn = &list[at].0;
    if list[at].1 != Class::Copy || Effect::of(insn) != Effect::Produce {
        return None;
    }
    // What reads the flags before they are dead finds them in the host's.
    let mut from = at + 1;
    while !*dead.get(from)? {
        if !leaves_host_flags(&list[from]) {
            return None;
        }
        from += 1;
    }
    let kills = |(i, c): &(Instruction, Class)| *c == Class::Copy && Effect::of(i) == Effect::Produce;
    let end = from + list[from..].iter().position(kills)?;
    let accesses = |(i, c): &(Instruction, Class)| {
        matches!(c, Class::Push | Class::Pop | Class::Leave) || *c == Class::Copy && has_memory(i)
    };
    let last = at + 1 + list[at + 1..=end].iter().rposition(accesses)?;
    let mut changed = 0u32;
    for (i, _) in &list[at + 1..last] {
        for used in info.info_options(i, InstructionInfoOptions::NO_MEMORY_USAGE).used_registers() {
            if used.register().is_gpr() && !matches!(used.access(), OpAccess::Read | OpAccess::CondRead) {
                changed |= 1 << number_of(used.register());
            }
        }
    }
    recover(insn, changed, set * 2)
}

/// Whether the host's flags are still the guest's after it, if they were before, and it changes none.
fn leaves_host_flags((insn, class): &(Instruction, Class)) -> bool {
    match class {
        Class::Lea | Class::Nop | Class::JumpIf => true,
        Class::Copy => !has_memory(insn) && matches!(Effect::of(insn), Effect::None | Effect::Consume),
        _ => false,
    }
}

fn recover(insn: &Instruction, changed: u32, places: usize) -> Option<Window> {
    use Mnemonic as M;
    if insn.op_count() != 2 || insn.op_kind(0) != OpKind::Register || !insn.op0_register().is_gpr() {
        return None;
    }
    let wide = match insn.op0_register().size() {
        8 => true,
        4 => false,
        _ => return None,
    };
    let kept = |n: usize| changed & 1 << n == 0;
    let first = number_of(insn.op0_register());
    let second = match insn.op_kind(1) {
        OpKind::Register if insn.op1_register().is_gpr() => {
            Some(Operand::Register(number_of(insn.op1_register())))
        }
        OpKind::Immediate8
        | OpKind::Immediate8to32
        | OpKind::Immediate8to64
        | OpKind::Immediate32
        | OpKind::Immediate32to64 => Some(Operand::Immediate(insn.immediate(1) as i32)),
        _ => None,
    };
    let mut spill = [None; 2];
    let mut stored = |register: usize, n: usize| {
        spill[n] = Some((register, places + n));
        Operand::Spilled(places + n)
    };
    let (again, first, second) = match insn.mnemonic() {
        M::And | M::Or | M::Xor if kept(first) => {
            (Again::Test, Operand::Register(first), Operand::Register(first))
        }
        mnemonic => {
            let second = second?;
            let group = match mnemonic {
                M::Add => 0,
                M::Or => 1,
                M::And | M::Shl | M::Sal => 4,
                M::Sub | M::Shr => 5,
                M::Xor => 6,
                M::Cmp | M::Test | M::Sar => 7,
                _ => return None,
            };
            let same = second == Operand::Register(first);
            let overwritten = !matches!(mnemonic, M::Cmp | M::Test);
            let mut later = |operand: Operand| match operand {
                Operand::Register(n) if !kept(n) || overwritten && same => stored(n, 1),
                operand => operand,
            };
            match mnemonic {
                M::Shl | M::Sal | M::Shr | M::Sar if !matches!(second, Operand::Immediate(_)) => return None,
                M::Shl | M::Sal | M::Shr | M::Sar => (Again::Shift(group), stored(first, 0), second),
                M::Add | M::Sub if kept(first) && !same && later(second) == second => {
                    (Again::Undo(group), Operand::Register(first), second)
                }
                M::Cmp | M::Test => {
                    let second = later(second);
                    let first = if kept(first) { Operand::Register(first) } else { stored(first, 0) };
                    (if mnemonic == M::Test { Again::Test } else { Again::Alu(group) }, first, second)
                }
                _ => {
                    let second = later(second);
                    (Again::Alu(group), stored(first, 0), second)
                }
            }
        }
    };
    Some(Window { recover: Recover { again, wide, first, second }, spill })
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    fn windows(code: &[u8]) -> Vec<Option<Window>> {
        let mut mode = crate::mode::Mode::default();
        mode.0 |= 2 << 2; // 64-bit code
        let mut list = Vec::new();
        for insn in Decoder::with_ip(64, code, 0, DecoderOptions::NONE).iter() {
            list.push((insn, super::super::class::classify(&insn, mode)));
        }
        let dead = dead_before(&list);
        let mut info = InstructionInfoFactory::new();
        (0..list.len()).map(|at| window(&list, at, &dead, &mut info, 0)).collect()
    }

    #[test]
    fn an_addition_before_a_load_is_undone() {
        // add $8, %rax; mov (%rax), %rcx; cmp %rdx, %rcx
        let found = windows(&[0x48, 0x83, 0xc0, 8, 0x48, 0x8b, 0x08, 0x48, 0x39, 0xd1]);
        let window = found[0].expect("the flags are dead");
        assert_eq!(window.spill, [None; 2]);
        assert_eq!(window.recover.again, Again::Undo(0));
        assert!(found[1].is_none() && found[2].is_none());
    }

    #[test]
    fn an_operand_that_changes_is_stored() {
        // sub %rdx, %rax; mov (%rdi), %rdx; mov (%rsi), %rcx; test %rcx, %rcx
        let found = windows(&[0x48, 0x29, 0xd0, 0x48, 0x8b, 0x17, 0x48, 0x8b, 0x0e, 0x48, 0x85, 0xc9]);
        let window = found[0].expect("the flags are dead");
        assert_eq!(window.spill, [Some((0, 0)), Some((2, 1))]);
        assert_eq!(window.recover.again, Again::Alu(5));
    }

    #[test]
    fn flags_are_dead_behind_the_jump_that_read_them() {
        // cmp %rdx, %rcx; je .+0x20; mov (%rdi), %rdx; test %rdx, %rdx
        let found = windows(&[0x48, 0x39, 0xd1, 0x74, 0x1e, 0x48, 0x8b, 0x17, 0x48, 0x85, 0xd2]);
        let window = found[0].expect("the load comes after their only use");
        assert_eq!(window.spill, [None; 2]);
        assert_eq!(window.recover.again, Again::Alu(7));
    }

    #[test]
    fn flags_that_a_jump_reads_are_not_dead() {
        // cmp %rdx, %rcx; mov (%rdi), %rdx; je .
        assert!(windows(&[0x48, 0x39, 0xd1, 0x48, 0x8b, 0x17, 0x74, 0xfe])[0].is_none());
    }
}

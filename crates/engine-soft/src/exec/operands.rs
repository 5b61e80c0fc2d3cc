//! Operands of an instruction: registers, immediates, and the effective address of the memory operand.

use berth_cpu::bits::gpr;
use iced_x86::{Instruction, OpKind, Register};

use crate::cpu::Cpu;
use crate::fault::{Fault, Guest};
use crate::state::{Seg, State};

/// Index in [`State::gpr`] of the register that `register` is part of.
pub fn index(register: Register) -> usize {
    register.full_register().number() & 15
}

/// The value of a general-purpose register of any size, zero-extended.
pub fn register(state: &State, register: Register) -> u64 {
    let full = state.gpr[index(register)];
    match register.size() {
        1 if is_high_byte(register) => full >> 8 & 0xff,
        1 => full & 0xff,
        2 => full & 0xffff,
        4 => full & 0xffff_ffff,
        _ => full,
    }
}

/// Writes a general-purpose register of any size. Writes of 32 bits clear the upper half (SDM volume 1, 3.4.1.1);
/// smaller ones leave the rest alone.
pub fn set_register(state: &mut State, register: Register, value: u64) {
    let full = &mut state.gpr[index(register)];
    *full = match register.size() {
        1 if is_high_byte(register) => *full & !0xff00 | (value & 0xff) << 8,
        1 => *full & !0xff | value & 0xff,
        2 => *full & !0xffff | value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    };
}

/// Writes `size` (1, 2, 4 or 8) low bytes of general-purpose register number `index` as the register of that
/// size.
pub fn set_part(state: &mut State, index: usize, size: usize, value: u64) {
    let full = &mut state.gpr[index & 15];
    *full = match size {
        1 => *full & !0xff | value & 0xff,
        2 => *full & !0xffff | value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    };
}

fn is_high_byte(register: Register) -> bool {
    matches!(register, Register::AH | Register::CH | Register::DH | Register::BH)
}

/// All bits of a value of `size` bytes.
pub const fn mask(size: usize) -> u64 {
    match size {
        1 => 0xff,
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

/// `value`, a number of `size` bytes, sign-extended.
pub const fn sign_extend(value: u64, size: usize) -> i64 {
    match size {
        1 => value as i8 as i64,
        2 => value as i16 as i64,
        4 => value as i32 as i64,
        _ => value as i64,
    }
}

/// Whether bits 63 to 47 of `address` are all equal (SDM volume 1, 3.3.7.1).
pub const fn is_canonical(address: u64) -> bool {
    ((address as i64) << 16 >> 16) as u64 == address
}

/// The segment register that `register` names.
///
/// # Errors
/// #UD if it is none.
pub fn segment_register(register: Register) -> Guest<Seg> {
    Ok(match register {
        Register::ES => Seg::Es,
        Register::CS => Seg::Cs,
        Register::SS => Seg::Ss,
        Register::DS => Seg::Ds,
        Register::FS => Seg::Fs,
        Register::GS => Seg::Gs,
        _ => return Err(Fault::ud()),
    })
}

/// The segment that the memory operand is accessed through. In 64-bit mode prefixes of the flat segments do not
/// count, and SS stands for what faults with #SS: bases RSP and RBP (SDM volume 1, 3.7.4).
pub fn segment(state: &State, insn: &Instruction) -> Seg {
    let named = segment_register(insn.memory_segment()).unwrap_or(Seg::Ds);
    if !state.is_64bit() || matches!(named, Seg::Fs | Seg::Gs) {
        return named;
    }
    match insn.memory_base() {
        Register::RSP | Register::RBP | Register::ESP | Register::EBP => Seg::Ss,
        _ => Seg::Ds,
    }
}

/// Size of the memory operand's address in bytes: 2, 4 or 8.
pub fn address_size(insn: &Instruction) -> usize {
    let named = [insn.memory_base(), insn.memory_index()];
    if let Some(register) = named.into_iter().find(|r| *r != Register::None && r.is_gpr() || r.is_ip()) {
        return register.size();
    }
    match insn.memory_displ_size() {
        size @ (2 | 4 | 8) => size as usize,
        _ => default_address_size(insn),
    }
}

fn default_address_size(insn: &Instruction) -> usize {
    match insn.code_size() {
        iced_x86::CodeSize::Code16 => 2,
        iced_x86::CodeSize::Code32 => 4,
        _ => 8,
    }
}

/// Offset of the memory operand in its segment: base + index × scale + displacement, cut to the address size.
/// Not for vector indices.
pub fn offset(state: &State, insn: &Instruction) -> u64 {
    let size = address_size(insn);
    let displacement = insn.memory_displacement64();
    let base = insn.memory_base();
    if base.is_ip() {
        // The decoder has already added the instruction pointer.
        return displacement & mask(size);
    }
    let part = |r: Register| if r.is_gpr() { register(state, r) } else { 0 };
    let index = part(insn.memory_index()).wrapping_mul(u64::from(insn.memory_index_scale()));
    part(base).wrapping_add(index).wrapping_add(displacement) & mask(size)
}

/// Size of operand `n` in bytes: of the register, of the memory operand, or 0 where it has none.
pub fn size(insn: &Instruction, n: u32) -> usize {
    match insn.try_op_kind(n) {
        Ok(OpKind::Register) => insn.op_register(n).size(),
        Ok(OpKind::Memory) => insn.memory_size().size(),
        _ => 0,
    }
}

/// Whether operand `n` is a memory operand with an effective address.
pub fn is_memory(insn: &Instruction, n: u32) -> bool {
    matches!(insn.try_op_kind(n), Ok(OpKind::Memory))
}

/// Reads operand `n`: general-purpose register, memory of 1, 2, 4 or 8 bytes, or immediate (sign-extended as the
/// instruction does).
///
/// # Errors
/// What the memory access raises; #UD for operands of another kind.
pub fn read(cpu: &mut Cpu, insn: &Instruction, n: u32) -> Guest<u64> {
    match insn.try_op_kind(n) {
        Ok(OpKind::Register) if insn.op_register(n).is_gpr() => Ok(register(&cpu.s, insn.op_register(n))),
        Ok(OpKind::Memory) => read_memory(cpu, insn, size(insn, n)),
        _ => insn.try_immediate(n).map_err(|_| Fault::ud()),
    }
}

/// Reads `size` (1, 2, 4 or 8) bytes at the memory operand's address, whatever size the operand has.
///
/// # Errors
/// What the access raises.
pub fn read_memory(cpu: &mut Cpu, insn: &Instruction, size: usize) -> Guest<u64> {
    if !matches!(size, 1 | 2 | 4 | 8) {
        return Err(Fault::ud());
    }
    let (seg, offset) = (segment(&cpu.s, insn), offset(&cpu.s, insn));
    cpu.load(seg, offset, size)
}

/// Writes operand `n`: general-purpose register or memory of 1, 2, 4 or 8 bytes.
///
/// # Errors
/// What the memory access raises; #UD for operands of another kind.
pub fn write(cpu: &mut Cpu, insn: &Instruction, n: u32, value: u64) -> Guest<()> {
    match insn.try_op_kind(n) {
        Ok(OpKind::Register) if insn.op_register(n).is_gpr() => {
            set_register(&mut cpu.s, insn.op_register(n), value);
            Ok(())
        }
        Ok(OpKind::Memory) => {
            let size = size(insn, n);
            if !matches!(size, 1 | 2 | 4 | 8) {
                return Err(Fault::ud());
            }
            let (seg, offset) = (segment(&cpu.s, insn), offset(&cpu.s, insn));
            cpu.store(seg, offset, size, value)
        }
        _ => Err(Fault::ud()),
    }
}

/// RAX, RCX, RDX, … by number, cut to `size` bytes.
pub fn part(state: &State, index: usize, size: usize) -> u64 {
    state.gpr[index & 15] & mask(size)
}

/// AL.
pub fn al(state: &State) -> u8 {
    state.gpr[gpr::RAX] as u8
}

//! IN and OUT, and the I/O permission bitmap (SDM volume 1, 19.5; volume 2, IN and OUT).

use berth_cpu::bits::gpr;
use iced_x86::{Instruction, OpKind, Register};

use super::operands;
use crate::code::Flow;
use crate::cpu::Cpu;
use crate::fault::{Fault, Guest};

/// Offset of the I/O map base field in a 32- or 64-bit TSS.
const MAP_BASE: u64 = 0x66;
/// Type of a busy 32- or 64-bit TSS descriptor; an available one has bit 1 clear.
const TSS32_BUSY: u16 = 0xb;

/// Whether the current code may access `size` (1, 2 or 4) ports from `port` on (SDM volume 1, 19.5.2).
///
/// # Errors
/// #GP(0) if not; #PF where the TSS is not mapped.
pub fn check(cpu: &mut Cpu, port: u16, size: usize) -> Guest<()> {
    let free = !cpu.s.is_protected() || !cpu.s.is_v86() && cpu.s.cpl() <= cpu.s.iopl();
    if free {
        return Ok(());
    }
    let tr = cpu.s.tr;
    let limit = u64::from(tr.limit);
    if tr.attr & 0xf | 2 != TSS32_BUSY || limit < MAP_BASE + 1 {
        return Err(Fault::gp(0));
    }
    let map = cpu.sys_load(tr.base.wrapping_add(MAP_BASE), 2)?;
    // Two bytes are always read, even if the bits are in one.
    let at = map + u64::from(port / 8);
    if at + 1 > limit {
        return Err(Fault::gp(0));
    }
    let bits = cpu.sys_load(tr.base.wrapping_add(at), 2)?;
    let wanted = ((1u64 << size) - 1) << (port % 8);
    if bits & wanted != 0 { Err(Fault::gp(0)) } else { Ok(()) }
}

/// The port that operand `n` names: DX or an immediate byte.
fn port(cpu: &Cpu, insn: &Instruction, n: u32) -> u16 {
    match insn.op_kind(n) {
        OpKind::Register => cpu.s.gpr[gpr::RDX] as u16,
        _ => u16::from(insn.immediate8()),
    }
}

/// The accumulator's size in bytes; #UD for anything else.
fn width(register: Register) -> Guest<usize> {
    match register {
        Register::AL => Ok(1),
        Register::AX => Ok(2),
        Register::EAX => Ok(4),
        _ => Err(Fault::ud()),
    }
}

/// IN AL/AX/EAX, imm8/DX.
///
/// # Errors
/// As [`check`].
pub fn input(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    let (register, port) = (insn.op0_register(), port(cpu, insn, 1));
    let size = width(register)?;
    check(cpu, port, size)?;
    let mut data = [0; 4];
    cpu.bus().port_read(port, &mut data[..size]);
    operands::set_register(&mut cpu.s, register, u32::from_le_bytes(data).into());
    Ok(Flow::Next)
}

/// OUT imm8/DX, AL/AX/EAX.
///
/// # Errors
/// As [`check`].
pub fn output(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    let (register, port) = (insn.op1_register(), port(cpu, insn, 0));
    let size = width(register)?;
    check(cpu, port, size)?;
    let data = (cpu.s.gpr[gpr::RAX] as u32).to_le_bytes();
    cpu.bus().port_write(port, &data[..size]);
    Ok(Flow::Next)
}

#[cfg(test)]
#[path = "io_tests.rs"]
mod tests;

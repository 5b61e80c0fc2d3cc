//! PUSH, POP and their relatives in every mode (SDM volume 2; volume 1, chapter 6).

use berth_cpu::bits::{gpr, rflags};
use iced_x86::{Code, Instruction, OpKind};

use super::operands::{self, is_memory};
use super::{frame, segments};
use crate::code::Flow;
use crate::cpu::Cpu;
use crate::fault::{Fault, Guest};
use crate::memory::Access;
use crate::state::Seg;

/// How far the stack pointer moves: the size of what is pushed or popped.
fn slot_size(insn: &Instruction) -> Guest<usize> {
    match insn.stack_pointer_increment().unsigned_abs() {
        size @ (2 | 4 | 8) => Ok(size as usize),
        _ => Err(Fault::ud()),
    }
}

fn segment_operand(insn: &Instruction) -> bool {
    insn.op0_kind() == OpKind::Register && insn.op0_register().is_segment_register()
}

/// PUSH of register, memory, immediate or segment register.
///
/// # Errors
/// What the memory accesses raise.
pub fn push(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    let size = slot_size(insn)?;
    if segment_operand(insn) {
        return segments::push(cpu, insn.op0_register(), size);
    }
    let value = operands::read(cpu, insn, 0)?;
    frame::push(cpu, size, value)?;
    Ok(Flow::Next)
}

/// POP of register, memory or segment register.
///
/// # Errors
/// What the memory accesses raise; as the load of the segment register.
pub fn pop(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    let size = slot_size(insn)?;
    if segment_operand(insn) {
        return segments::pop(cpu, insn.op0_register(), size);
    }
    let value = frame::peek(cpu, 0, size)?;
    let old_rsp = cpu.s.gpr[gpr::RSP];
    // The address of a memory operand, and a popped SP, come after the increment.
    frame::drop_bytes(&mut cpu.s, size as u64);
    let done = if is_memory(insn, 0) {
        let (seg, offset) = (operands::segment(&cpu.s, insn), operands::offset(&cpu.s, insn));
        cpu.store(seg, offset, size, value)
    } else {
        operands::write(cpu, insn, 0, value)
    };
    if let Err(fault) = done {
        cpu.s.gpr[gpr::RSP] = old_rsp;
        return Err(fault);
    }
    Ok(Flow::Next)
}

/// PUSHF, PUSHFD, PUSHFQ. VM and RF read as zero.
///
/// # Errors
/// #GP(0) in virtual-8086 mode with IOPL below 3, and those of the store.
pub fn pushf(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    if cpu.s.is_v86() && cpu.s.iopl() < 3 {
        return Err(Fault::gp(0));
    }
    let flags = cpu.s.rflags() & !(rflags::VM | rflags::RF);
    frame::push(cpu, slot_size(insn)?, flags)?;
    Ok(Flow::Next)
}

/// POPF, POPFD, POPFQ: IF needs CPL ≤ IOPL, IOPL needs CPL 0; VM, VIF and VIP stay; RF is cleared.
///
/// # Errors
/// #GP(0) in virtual-8086 mode with IOPL below 3, and those of the load.
pub fn popf(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    if cpu.s.is_v86() && cpu.s.iopl() < 3 {
        return Err(Fault::gp(0));
    }
    let size = slot_size(insn)?;
    let value = frame::peek(cpu, 0, size)?;
    let mut changed = rflags::ARITH | rflags::TF | rflags::DF | rflags::NT;
    if size > 2 {
        changed |= rflags::AC | rflags::ID | rflags::RF;
    }
    if cpu.s.cpl() <= cpu.s.iopl() {
        changed |= rflags::IF;
    }
    if cpu.s.cpl() == 0 {
        changed |= rflags::IOPL;
    }
    frame::drop_bytes(&mut cpu.s, size as u64);
    let old = cpu.s.rflags();
    cpu.s.set_rflags(old & !changed | value & changed & !rflags::RF);
    let opened = old & rflags::IF == 0 && cpu.s.interrupt_flag != 0;
    let flow = segments::after_mode_change(cpu);
    Ok(if opened { Flow::Leave } else { flow })
}

/// PUSHA and PUSHAD.
///
/// # Errors
/// What the stores raise; nothing was pushed then.
pub fn pusha(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    let size = if insn.code() == Code::Pushaw { 2 } else { 4 };
    let mut values = [0; 8];
    values.copy_from_slice(&cpu.s.gpr[..8]);
    frame::push_all(cpu, size, &values)?;
    Ok(Flow::Next)
}

/// POPA and POPAD: the saved SP is skipped.
///
/// # Errors
/// What the loads raise; no register changed then.
pub fn popa(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    let size = if insn.code() == Code::Popaw { 2 } else { 4 };
    let mut values = [0; 8];
    for (n, value) in values.iter_mut().enumerate() {
        *value = frame::peek(cpu, (n * size) as u64, size)?;
    }
    frame::drop_bytes(&mut cpu.s, 8 * size as u64);
    for (n, value) in values.iter().enumerate() {
        let register = 7 - n;
        if register != gpr::RSP {
            operands::set_part(&mut cpu.s, register, size, *value);
        }
    }
    Ok(Flow::Next)
}

/// ENTER: a stack frame with up to 31 copied frame pointers.
///
/// # Errors
/// What the memory accesses raise; registers did not change then.
pub fn enter(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    let size = match insn.code() {
        Code::Enterw_imm16_imm8 => 2,
        Code::Enterd_imm16_imm8 => 4,
        _ => 8,
    };
    let locals = u64::from(insn.immediate16());
    let level = usize::from(insn.immediate8_2nd() & 31);
    let mask = frame::stack_mask(&cpu.s);
    let rbp = cpu.s.gpr[gpr::RBP];
    let frame_pointer = frame::with_pointer(&cpu.s, frame::pointer(&cpu.s).wrapping_sub(size as u64));

    let top = frame::pointer(&cpu.s);
    // The first push comes before anything is read.
    let first = top.wrapping_sub(size as u64) & mask;
    cpu.require_aligned(Seg::Ss, first, size, Access::Write, size)?;
    cpu.probe_write(Seg::Ss, first, size)?;
    let mut pushed = [0; 32];
    pushed[0] = rbp;
    for n in 1..level {
        let above = rbp.wrapping_sub((n * size) as u64) & mask;
        let mut bytes = cpu.load(Seg::Ss, above, size)?.to_le_bytes();
        // The frame may overlap what has been pushed.
        for (i, byte) in bytes.iter_mut().enumerate().take(size) {
            let below = top.wrapping_sub(above.wrapping_add(i as u64)) & mask;
            if (1..=(n * size) as u64).contains(&below) {
                let slot = (below as usize - 1) / size;
                *byte = pushed[slot].to_le_bytes()[size - 1 - (below as usize - 1) % size];
            }
        }
        pushed[n] = u64::from_le_bytes(bytes) & operands::mask(size);
    }
    let count = if level == 0 { 1 } else { level + 1 };
    if level > 0 {
        pushed[level] = frame_pointer;
    }
    let bottom = frame::pointer(&cpu.s).wrapping_sub((count * size) as u64 + locals) & mask;
    // The stack must be writable at its new end (SDM volume 2, ENTER).
    cpu.require_aligned(Seg::Ss, bottom, size, Access::Write, size)?;
    cpu.probe_write(Seg::Ss, bottom, size)?;
    frame::write_all(cpu, size, &pushed[..count])?;
    // As the CPU does, BP takes as many bits as the operand has; the stack pointer has the stack's size.
    operands::set_part(&mut cpu.s, gpr::RBP, size, frame_pointer);
    frame::set_pointer(&mut cpu.s, bottom);
    Ok(Flow::Next)
}

/// LEAVE.
///
/// # Errors
/// What the load raises.
pub fn leave(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    let size = match insn.code() {
        Code::Leavew => 2,
        Code::Leaved => 4,
        _ => 8,
    };
    let at = cpu.s.gpr[gpr::RBP] & frame::stack_mask(&cpu.s);
    let value = cpu.load(Seg::Ss, at, size)?;
    frame::set_pointer(&mut cpu.s, at.wrapping_add(size as u64));
    operands::set_part(&mut cpu.s, gpr::RBP, size, value);
    Ok(Flow::Next)
}

#[cfg(test)]
#[path = "stack_tests.rs"]
mod tests;

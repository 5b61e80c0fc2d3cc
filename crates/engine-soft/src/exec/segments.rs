//! Loading and storing segment registers (SDM volume 3, 3.4 and 5.6; volume 2, MOV, POP, PUSH, LDS).

use berth_cpu::Segment;
use berth_cpu::bits::vector;
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::descriptor::{self, Descriptor, is_null, rpl};
use super::syscall::is_amd;
use super::{frame, operands};
use crate::code::Flow;
use crate::cpu::Cpu;
use crate::fault::{Fault, Guest};
use crate::state::Seg;

/// Calls [`Cpu::mode_changed`] and says whether translated code can go on.
pub fn after_mode_change(cpu: &mut Cpu) -> Flow {
    let before = cpu.s.mode;
    cpu.mode_changed();
    if cpu.s.mode == before { Flow::Next } else { Flow::Leave }
}

/// A segment as virtual-8086 mode has it (SDM volume 3, 21.2.1).
pub fn v86_segment(selector: u16) -> Segment {
    Segment { attr: 0xf3, ..Segment::real_mode(selector) }
}

/// A null selector in a segment register: unusable, but the DPL stays, because SS's is the CPL.
pub fn null_segment(selector: u16, dpl: u8) -> Segment {
    Segment { selector, attr: u16::from(dpl) << 5, ..Segment::default() }
}

/// What loading `selector` in real mode makes of `old`: limit and attributes stay as they are.
pub fn real_segment(old: &Segment, selector: u16) -> Segment {
    if old.is_unusable() {
        return Segment::real_mode(selector);
    }
    let attr = old.attr & !(3 << 5) | Segment::P | Segment::S;
    Segment { selector, base: u64::from(selector) << 4, limit: old.limit, attr }
}

/// The checks of loading SS with a selector that is not null, for privilege level `cpl`. `exception` is #GP, or
/// #TS for a stack from the TSS (SDM volume 2, MOV and CALL).
///
/// # Errors
/// `exception` with the selector; #SS(selector) if it is not present; #PF.
pub fn check_stack(cpu: &mut Cpu, selector: u16, cpl: u8, exception: u8) -> Guest<Descriptor> {
    let invalid = Fault::with_error(exception, descriptor::error_code(selector));
    let d = descriptor::fetch(cpu, selector, exception)?;
    if rpl(selector) != cpl || !d.is_writable_data() || d.dpl() != cpl {
        return Err(invalid);
    }
    if !d.is_present() {
        return Err(Fault::with_error(vector::SS, d.error()));
    }
    Ok(d)
}

/// The contents of SS after loading `selector` at privilege level `cpl`. `allow_null`: 64-bit mode.
///
/// # Errors
/// #GP(0) for a null selector that is not allowed; else as [`check_stack`].
pub fn stack_segment(cpu: &mut Cpu, selector: u16, cpl: u8, allow_null: bool) -> Guest<Segment> {
    if is_null(selector) {
        return if allow_null && cpl < 3 && rpl(selector) == cpl {
            Ok(null_segment(selector, cpl))
        } else {
            Err(Fault::gp(0))
        };
    }
    let mut d = check_stack(cpu, selector, cpl, vector::GP)?;
    descriptor::mark_accessed(cpu, &mut d)?;
    Ok(d.segment())
}

/// The contents of DS, ES, FS or GS after loading `selector` in protected mode.
fn data_segment(cpu: &mut Cpu, selector: u16) -> Guest<Segment> {
    if is_null(selector) {
        return Ok(null_segment(selector, 0));
    }
    let mut d = descriptor::fetch(cpu, selector, vector::GP)?;
    let level = rpl(selector).max(cpu.s.cpl());
    if !d.is_readable() || !d.is_conforming() && level > d.dpl() {
        return Err(Fault::gp(d.error()));
    }
    if !d.is_present() {
        return Err(Fault::with_error(vector::NP, d.error()));
    }
    descriptor::mark_accessed(cpu, &mut d)?;
    Ok(d.segment())
}

/// The contents of `seg` after loading `selector` in the current mode.
///
/// # Errors
/// #GP, #NP or #SS with the selector; #UD for CS; #PF.
fn loaded(cpu: &mut Cpu, seg: Seg, selector: u16) -> Guest<Segment> {
    if seg == Seg::Cs {
        Err(Fault::ud())
    } else if !cpu.s.is_protected() {
        Ok(real_segment(cpu.s.seg(seg), selector))
    } else if cpu.s.is_v86() {
        Ok(v86_segment(selector))
    } else if seg == Seg::Ss {
        let (cpl, allow_null) = (cpu.s.cpl(), cpu.s.is_64bit());
        stack_segment(cpu, selector, cpl, allow_null)
    } else {
        data_segment(cpu, selector)
    }
}

/// Starts the shadow of MOV SS and POP SS (SDM volume 3, 6.8.3).
fn stack_shadow(cpu: &mut Cpu) -> Flow {
    cpu.s.interrupt_shadow = true;
    cpu.s.shadow_blocks_debug = true;
    Flow::Leave
}

fn commit(cpu: &mut Cpu, seg: Seg, segment: Segment, shadow: bool) -> Flow {
    *cpu.s.seg_mut(seg) = segment;
    let flow = after_mode_change(cpu);
    if seg == Seg::Ss && shadow { stack_shadow(cpu) } else { flow }
}

/// MOV to and from segment registers.
///
/// # Errors
/// As the load of the register or the memory access.
pub fn mov(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    let is_segment =
        |n| matches!(insn.try_op_kind(n), Ok(OpKind::Register)) && insn.op_register(n).is_segment_register();
    if is_segment(0) {
        let seg = operands::segment_register(insn.op_register(0))?;
        let selector = match insn.op1_kind() {
            OpKind::Memory => operands::read_memory(cpu, insn, 2)?,
            _ => operands::read(cpu, insn, 1)?,
        };
        let segment = loaded(cpu, seg, selector as u16)?;
        return Ok(commit(cpu, seg, segment, true));
    }
    if is_segment(1) {
        let selector = u64::from(cpu.s.seg(operands::segment_register(insn.op_register(1))?).selector);
        store_selector(cpu, insn, selector)?;
        return Ok(Flow::Next);
    }
    Err(Fault::ud())
}

/// Stores a selector into operand 0: 16 bits in memory, zero-extended in a register.
///
/// # Errors
/// What the store raises.
pub fn store_selector(cpu: &mut Cpu, insn: &Instruction, selector: u64) -> Guest<()> {
    if operands::is_memory(insn, 0) {
        let (seg, offset) = (operands::segment(&cpu.s, insn), operands::offset(&cpu.s, insn));
        return cpu.store(seg, offset, 2, selector);
    }
    operands::write(cpu, insn, 0, selector)
}

/// PUSH of a segment register. Intel's processors write only the low 16 bits of a 32-bit slot (SDM volume 2,
/// PUSH); AMD's write zeros above.
///
/// # Errors
/// What the store raises.
pub fn push(cpu: &mut Cpu, register: Register, size: usize) -> Guest<Flow> {
    let selector = u64::from(cpu.s.seg(operands::segment_register(register)?).selector);
    let sp = frame::pointer(&cpu.s).wrapping_sub(size as u64) & frame::stack_mask(&cpu.s);
    let written = if size == 4 && !is_amd(cpu) { 2 } else { size };
    cpu.store(Seg::Ss, sp, written, selector)?;
    frame::set_pointer(&mut cpu.s, sp);
    Ok(Flow::Next)
}

/// POP of a segment register.
///
/// # Errors
/// What the load raises; as the load of the register.
pub fn pop(cpu: &mut Cpu, register: Register, size: usize) -> Guest<Flow> {
    let seg = operands::segment_register(register)?;
    let selector = frame::peek(cpu, 0, 2)? as u16;
    let segment = loaded(cpu, seg, selector)?;
    // The pointer moves by the rules of the old SS.
    frame::drop_bytes(&mut cpu.s, size as u64);
    Ok(commit(cpu, seg, segment, true))
}

/// LDS, LES, LFS, LGS, LSS: a far pointer from memory into a segment register and a general one.
///
/// # Errors
/// As the load of the register or the memory access.
pub fn load_far_pointer(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    let seg = match insn.mnemonic() {
        Mnemonic::Lds => Seg::Ds,
        Mnemonic::Les => Seg::Es,
        Mnemonic::Lfs => Seg::Fs,
        Mnemonic::Lgs => Seg::Gs,
        _ => Seg::Ss,
    };
    let size = insn.op0_register().size();
    let (offset, selector) = read_far_pointer(cpu, insn, size)?;
    let segment = loaded(cpu, seg, selector)?;
    operands::set_register(&mut cpu.s, insn.op0_register(), offset);
    Ok(commit(cpu, seg, segment, false))
}

/// Reads a far pointer from the memory operand: an offset of `size` bytes, then the selector.
///
/// # Errors
/// What the access raises; #UD if there is no memory operand.
pub fn read_far_pointer(cpu: &mut Cpu, insn: &Instruction, size: usize) -> Guest<(u64, u16)> {
    if !matches!(size, 2 | 4 | 8) {
        return Err(Fault::ud());
    }
    let (seg, at) = (operands::segment(&cpu.s, insn), operands::offset(&cpu.s, insn));
    let after = at.wrapping_add(size as u64) & operands::mask(operands::address_size(insn));
    let offset = cpu.load(seg, at, size)?;
    let selector = cpu.load(seg, after, 2)?;
    Ok((offset, selector as u16))
}

/// After a return to an outer privilege level: data segments that it may not see become null (SDM volume 3,
/// 5.8.6).
pub fn drop_inner_segments(cpu: &mut Cpu) {
    let cpl = cpu.s.cpl();
    for seg in [Seg::Es, Seg::Fs, Seg::Gs, Seg::Ds] {
        let s = cpu.s.seg_mut(seg);
        let conforming = s.is_code() && s.attr & Segment::TYPE_DC != 0;
        if !s.is_unusable() && s.dpl() < cpl && !conforming {
            *s = null_segment(0, 0);
        }
    }
}

#[cfg(test)]
#[path = "segments_tests.rs"]
mod tests;

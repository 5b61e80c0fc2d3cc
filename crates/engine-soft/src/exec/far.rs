//! Jumps, calls and returns, near and far (SDM volume 2, JMP, CALL, RET; volume 3, 5.8).

use berth_cpu::Segment;
use berth_cpu::bits::vector;
use iced_x86::{Code, Instruction, OpKind};

use super::descriptor::{self, Descriptor, is_null, rpl, system};
use super::frame::{self, MAX_FRAME, NewStack};
use super::gate::{self, TssStack, check_target};
use super::{operands, segments};
use crate::code::Flow;
use crate::cpu::Cpu;
use crate::fault::{Fault, Guest};
use crate::state::Seg;

/// Whether CS:offset transfers go through descriptors.
fn uses_descriptors(cpu: &Cpu) -> bool {
    cpu.s.is_protected() && !cpu.s.is_v86()
}

/// The far pointer operand and its offset's size: memory or immediate; `None` for near operands.
fn far_operand(cpu: &mut Cpu, insn: &Instruction) -> Guest<Option<(u64, u16, usize)>> {
    let size = match insn.code() {
        Code::Jmp_ptr1616 | Code::Jmp_m1616 | Code::Call_ptr1616 | Code::Call_m1616 => 2,
        Code::Jmp_ptr1632 | Code::Jmp_m1632 | Code::Call_ptr1632 | Code::Call_m1632 => 4,
        Code::Jmp_m1664 | Code::Call_m1664 => 8,
        _ => return Ok(None),
    };
    Ok(Some(match insn.op0_kind() {
        OpKind::FarBranch16 => (u64::from(insn.far_branch16()), insn.far_branch_selector(), size),
        OpKind::FarBranch32 => (u64::from(insn.far_branch32()), insn.far_branch_selector(), size),
        _ => {
            let (offset, selector) = segments::read_far_pointer(cpu, insn, size)?;
            (offset, selector, size)
        }
    }))
}

/// Target and operand size of a near jump or call.
fn near_operand(cpu: &mut Cpu, insn: &Instruction) -> Guest<(u64, usize)> {
    Ok(match insn.op0_kind() {
        OpKind::NearBranch16 => (insn.near_branch_target(), 2),
        OpKind::NearBranch32 => (insn.near_branch_target(), 4),
        OpKind::NearBranch64 => (insn.near_branch_target(), 8),
        _ => {
            let size = operands::size(insn, 0);
            (operands::read(cpu, insn, 0)? & operands::mask(size), size)
        }
    })
}

fn check_near(cpu: &Cpu, rip: u64) -> Guest<()> {
    check_target(cpu.s.seg(Seg::Cs), rip, cpu.s.is_long())
}

/// JMP in all its forms.
///
/// # Errors
/// #GP, #NP with selectors, and those of the memory accesses.
pub fn jmp(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    let Some((offset, selector, _)) = far_operand(cpu, insn)? else {
        let (rip, _) = near_operand(cpu, insn)?;
        check_near(cpu, rip)?;
        cpu.s.rip = rip;
        return Ok(Flow::Jump);
    };
    if !uses_descriptors(cpu) {
        let cs = flat_code(cpu, selector);
        check_target(&cs, offset, false)?;
        return Ok(enter(cpu, cs, offset));
    }
    let d = code_or_gate(cpu, selector)?;
    if !d.is_system() {
        let cs = direct_code(cpu, d)?;
        check_target(&cs, offset, cpu.s.is_long())?;
        return Ok(enter(cpu, cs, offset));
    }
    let gate = CallGate::open(cpu, &d)?;
    if gate.target.cpl < cpu.s.cpl() {
        return Err(Fault::gp(u32::from(gate.target.cs.selector & !3)));
    }
    check_target(&gate.target.cs, gate.rip, cpu.s.is_long())?;
    Ok(enter(cpu, gate.target.cs, gate.rip))
}

/// CALL in all its forms.
///
/// # Errors
/// #GP, #NP, #TS, #SS with selectors, and those of the memory accesses.
pub fn call(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    let next = insn.next_ip();
    let Some((offset, selector, size)) = far_operand(cpu, insn)? else {
        let (rip, size) = near_operand(cpu, insn)?;
        check_near(cpu, rip)?;
        frame::push(cpu, size, next)?;
        cpu.s.rip = rip;
        return Ok(Flow::Jump);
    };
    let old_cs = u64::from(cpu.s.seg(Seg::Cs).selector);
    if !uses_descriptors(cpu) {
        let cs = flat_code(cpu, selector);
        check_target(&cs, offset, false)?;
        frame::push_all(cpu, size, &[old_cs, next])?;
        return Ok(enter(cpu, cs, offset));
    }
    let d = code_or_gate(cpu, selector)?;
    if d.is_system() {
        return call_gate(cpu, &d, next);
    }
    let cs = direct_code(cpu, d)?;
    check_target(&cs, offset, cpu.s.is_long())?;
    frame::push_all(cpu, size, &[old_cs, next])?;
    Ok(enter(cpu, cs, offset))
}

/// CS after a far transfer in real or virtual-8086 mode.
fn flat_code(cpu: &Cpu, selector: u16) -> Segment {
    if cpu.s.is_v86() {
        segments::v86_segment(selector)
    } else {
        segments::real_segment(cpu.s.seg(Seg::Cs), selector)
    }
}

fn enter(cpu: &mut Cpu, cs: Segment, rip: u64) -> Flow {
    *cpu.s.seg_mut(Seg::Cs) = cs;
    cpu.s.rip = rip;
    cpu.mode_changed();
    Flow::Jump
}

fn code_or_gate(cpu: &mut Cpu, selector: u16) -> Guest<Descriptor> {
    if is_null(selector) {
        return Err(Fault::gp(0));
    }
    descriptor::fetch(cpu, selector, vector::GP)
}

/// CS after a far jump or call straight to the code segment `d`: the privilege level stays.
fn direct_code(cpu: &mut Cpu, mut d: Descriptor) -> Guest<Segment> {
    let cpl = cpu.s.cpl();
    let allowed = if d.is_conforming() {
        d.dpl() <= cpl
    } else {
        d.is_code() && rpl(d.selector) <= cpl && d.dpl() == cpl
    };
    if !allowed || is_reserved_size(cpu, &d) {
        return Err(Fault::gp(d.error()));
    }
    if !d.is_present() {
        return Err(Fault::with_error(vector::NP, d.error()));
    }
    descriptor::mark_accessed(cpu, &mut d)?;
    Ok(gate::code_segment(&d, cpl))
}

/// L and D both set is reserved in IA-32e mode (SDM volume 3, 5.2.1).
pub fn is_reserved_size(cpu: &Cpu, d: &Descriptor) -> bool {
    cpu.s.is_long() && d.attr() & (Segment::L | Segment::DB) == Segment::L | Segment::DB
}

/// An opened call gate.
struct CallGate {
    target: gate::Target,
    rip: u64,
    /// Size of the values that a call pushes.
    size: usize,
    /// Parameters that a call copies, 0 to 31.
    parameters: usize,
}

impl CallGate {
    /// Checks the gate `d` and the code segment behind it.
    fn open(cpu: &mut Cpu, d: &Descriptor) -> Guest<Self> {
        let long = cpu.s.is_long();
        let size = match d.kind() {
            system::CALL_GATE if long => 8,
            system::CALL_GATE => 4,
            system::CALL_GATE16 if !long => 2,
            system::TASK_GATE | system::TSS_AVAILABLE | system::TSS16_AVAILABLE if !long => {
                tracing::warn!(
                    selector = d.selector,
                    "the guest switches tasks, which Berth does not do: #GP"
                );
                return Err(Fault::gp(d.error()));
            }
            _ => return Err(Fault::gp(d.error())),
        };
        if d.dpl() < cpu.s.cpl().max(rpl(d.selector)) {
            return Err(Fault::gp(d.error()));
        }
        let high = if long { descriptor::fetch_high(cpu, d, vector::GP)? } else { 0 };
        if !d.is_present() {
            return Err(Fault::with_error(vector::NP, d.error()));
        }
        let target = gate::code_behind_gate(cpu, d.gate_selector(), long)?;
        let offset = d.gate_offset() | high << 32;
        let rip = if size == 2 { offset & 0xffff } else { offset };
        let parameters = if long { 0 } else { (d.raw >> 32 & 31) as usize };
        Ok(Self { target, rip, size, parameters })
    }
}

/// CALL through a call gate, with a stack switch to an inner privilege level.
fn call_gate(cpu: &mut Cpu, d: &Descriptor, next: u64) -> Guest<Flow> {
    let gate = CallGate::open(cpu, d)?;
    let (cs, cpl, size) = (gate.target.cs, gate.target.cpl, gate.size);
    let long = cpu.s.is_long();
    let old_cs = u64::from(cpu.s.seg(Seg::Cs).selector);
    check_target(&cs, gate.rip, long)?;
    if cpl == cpu.s.cpl() {
        push_from(cpu, size, &[old_cs, next])?;
        return Ok(enter(cpu, cs, gate.rip));
    }
    let stack = if long {
        let sp = gate::stack_from_tss64(cpu, TssStack::Privilege(cpl))?;
        NewStack { ss: segments::null_segment(u16::from(cpl), cpl), sp, cpl, flat64: true, error: 0 }
    } else {
        gate::stack_from_tss(cpu, cpl)?
    };
    let mut values = [0; MAX_FRAME];
    values[0] = u64::from(cpu.s.seg(Seg::Ss).selector);
    values[1] = cpu.s.gpr[berth_cpu::bits::gpr::RSP];
    for n in 0..gate.parameters {
        // The first parameter is the deepest one.
        values[2 + n] = frame::peek(cpu, ((gate.parameters - 1 - n) * size) as u64, size)?;
    }
    let count = gate.parameters + 4;
    values[count - 2] = old_cs;
    values[count - 1] = next;
    let sp = stack.push_all(cpu, size, &values[..count])?;
    stack.enter(&mut cpu.s, sp);
    Ok(enter(cpu, cs, gate.rip))
}

/// Pushes on the current stack for a gate's handler: in IA-32e mode the handler is 64-bit code, so the stack is
/// used as that does.
fn push_from(cpu: &mut Cpu, size: usize, values: &[u64]) -> Guest<()> {
    if size != 8 || cpu.s.is_64bit() {
        return frame::push_all(cpu, size, values);
    }
    let stack = NewStack {
        ss: *cpu.s.seg(Seg::Ss),
        sp: cpu.s.gpr[berth_cpu::bits::gpr::RSP],
        cpl: cpu.s.cpl(),
        flat64: true,
        error: 0,
    };
    let sp = stack.push_all(cpu, size, values)?;
    stack.enter(&mut cpu.s, sp);
    Ok(())
}

/// Size of what a return pops, from its code.
fn return_size(insn: &Instruction) -> usize {
    match insn.code() {
        Code::Retnw | Code::Retnw_imm16 | Code::Retfw | Code::Retfw_imm16 | Code::Iretw => 2,
        Code::Retnd | Code::Retnd_imm16 | Code::Retfd | Code::Retfd_imm16 | Code::Iretd => 4,
        _ => 8,
    }
}

/// Bytes of parameters that a return drops.
fn dropped_bytes(insn: &Instruction) -> u64 {
    if insn.op_count() == 0 { 0 } else { u64::from(insn.immediate16()) }
}

/// RET, near.
///
/// # Errors
/// #GP(0) for a target outside the code segment, and those of the loads.
pub fn ret_near(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    let size = return_size(insn);
    let rip = frame::peek(cpu, 0, size)?;
    check_near(cpu, rip)?;
    frame::drop_bytes(&mut cpu.s, size as u64 + dropped_bytes(insn));
    cpu.s.rip = rip;
    Ok(Flow::Jump)
}

/// The checks of the code segment that a far return or IRET goes to (SDM volume 2, RET and IRET).
///
/// # Errors
/// #GP(0) for a null selector, #GP(selector), #NP(selector), #PF.
pub fn returned_code(cpu: &mut Cpu, selector: u16) -> Guest<Segment> {
    let mut d = code_or_gate(cpu, selector)?;
    let level = rpl(selector);
    let matches = if d.is_conforming() { d.dpl() <= level } else { d.is_code() && d.dpl() == level };
    if level < cpu.s.cpl() || !matches || is_reserved_size(cpu, &d) {
        return Err(Fault::gp(d.error()));
    }
    if !d.is_present() {
        return Err(Fault::with_error(vector::NP, d.error()));
    }
    descriptor::mark_accessed(cpu, &mut d)?;
    Ok(gate::code_segment(&d, level))
}

/// SS for a return to `cs`, whose RPL is the new privilege level. Null is allowed when 64-bit code follows.
///
/// # Errors
/// As [`segments::stack_segment`].
pub fn returned_stack(cpu: &mut Cpu, selector: u16, cs: &Segment) -> Guest<Segment> {
    let to_64bit = cpu.s.is_long() && cs.attr & Segment::L != 0;
    segments::stack_segment(cpu, selector, rpl(cs.selector), to_64bit)
}

/// RET, far.
///
/// # Errors
/// #GP, #NP, #SS with selectors, and those of the loads.
pub fn ret_far(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    let size = return_size(insn);
    let bytes = size as u64;
    let rip = frame::peek(cpu, 0, size)?;
    let selector = frame::peek(cpu, bytes, 2)? as u16;
    let dropped = 2 * bytes + dropped_bytes(insn);
    if !uses_descriptors(cpu) {
        let cs = flat_code(cpu, selector);
        check_target(&cs, rip, false)?;
        frame::drop_bytes(&mut cpu.s, dropped);
        return Ok(enter(cpu, cs, rip));
    }
    let cs = returned_code(cpu, selector)?;
    let long = cpu.s.is_long();
    if rpl(selector) == cpu.s.cpl() {
        check_target(&cs, rip, long)?;
        frame::drop_bytes(&mut cpu.s, dropped);
        return Ok(enter(cpu, cs, rip));
    }
    let sp = frame::peek(cpu, dropped, size)?;
    let ss_selector = frame::peek(cpu, dropped + bytes, 2)? as u16;
    let ss = returned_stack(cpu, ss_selector, &cs)?;
    check_target(&cs, rip, long)?;
    *cpu.s.seg_mut(Seg::Ss) = ss;
    *cpu.s.seg_mut(Seg::Cs) = cs;
    frame::set_pointer(&mut cpu.s, sp);
    frame::drop_bytes(&mut cpu.s, dropped_bytes(insn));
    segments::drop_inner_segments(cpu);
    Ok(enter(cpu, cs, rip))
}

#[cfg(test)]
#[path = "far_tests.rs"]
mod tests;

//! What call gates and the IDT's gates have in common: the code segment behind the gate and the stack that the
//! TSS holds for it (SDM volume 3, 5.8 and 6.12).

use berth_cpu::Segment;
use berth_cpu::bits::vector;

use super::descriptor::{self, Descriptor, is_null, rpl, system};
use super::frame::NewStack;
use super::operands::is_canonical;
use super::segments;
use crate::cpu::Cpu;
use crate::fault::{Fault, Guest};

/// A code segment that a gate leads to.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Contents of CS, with the new CPL as RPL.
    pub cs: Segment,
    /// The privilege level that it runs at.
    pub cpl: u8,
}

/// The code segment `selector` of a gate. `need_64bit`: IA-32e mode gates lead to 64-bit code only.
///
/// # Errors
/// #GP(0) for a null selector, #GP(selector), #NP(selector), #PF.
pub fn code_behind_gate(cpu: &mut Cpu, selector: u16, need_64bit: bool) -> Guest<Target> {
    if is_null(selector) {
        return Err(Fault::gp(0));
    }
    let mut d = descriptor::fetch(cpu, selector, vector::GP)?;
    let cpl = cpu.s.cpl();
    let wrong_size = need_64bit && d.attr() & (Segment::L | Segment::DB) != Segment::L;
    if !d.is_code() || d.dpl() > cpl || wrong_size {
        return Err(Fault::gp(d.error()));
    }
    if !d.is_present() {
        return Err(Fault::with_error(vector::NP, d.error()));
    }
    descriptor::mark_accessed(cpu, &mut d)?;
    let cpl = if d.is_conforming() { cpl } else { d.dpl() };
    Ok(Target { cs: code_segment(&d, cpl), cpl })
}

/// The contents of CS for `descriptor` at `cpl`.
pub fn code_segment(descriptor: &Descriptor, cpl: u8) -> Segment {
    let selector = descriptor.selector & !3 | u16::from(cpl);
    Segment { selector, ..descriptor.segment() }
}

/// Whether `rip` can be executed in `cs`: inside its limit, or canonical in 64-bit code (`long`: EFER.LMA).
///
/// # Errors
/// #GP(0).
pub fn check_target(cs: &Segment, rip: u64, long: bool) -> Guest<()> {
    let valid =
        if long && cs.attr & Segment::L != 0 { is_canonical(rip) } else { rip <= u64::from(cs.limit) };
    if valid { Ok(()) } else { Err(Fault::gp(0)) }
}

/// The stack for `cpl` (0 to 2) in the current TSS, outside IA-32e mode (SDM volume 2, CALL and INT).
///
/// # Errors
/// #TS with the selector of TSS or stack, #SS(selector) if the stack is not present, #PF.
pub fn stack_from_tss(cpu: &mut Cpu, cpl: u8) -> Guest<NewStack> {
    let tr = cpu.s.tr;
    let outside = Fault::with_error(vector::TS, descriptor::error_code(tr.selector));
    let is_32bit = matches!(tr.attr & 0xf, system::TSS_AVAILABLE | system::TSS_BUSY);
    let (offset, size) = if is_32bit { (u64::from(cpl) * 8 + 4, 4) } else { (u64::from(cpl) * 4 + 2, 2) };
    if tr.is_unusable() || offset + size as u64 + 1 > u64::from(tr.limit) {
        return Err(outside);
    }
    let sp = cpu.sys_load(tr.base.wrapping_add(offset), size)?;
    let selector = cpu.sys_load(tr.base.wrapping_add(offset + size as u64), 2)? as u16;
    if is_null(selector) || rpl(selector) != cpl {
        return Err(Fault::with_error(vector::TS, descriptor::error_code(selector)));
    }
    let mut d = segments::check_stack(cpu, selector, cpl, vector::TS)?;
    descriptor::mark_accessed(cpu, &mut d)?;
    Ok(NewStack { ss: d.segment(), sp, cpl, flat64: false, error: d.error() })
}

/// Which stack pointer of a 64-bit TSS (SDM volume 3, 8.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TssStack {
    /// RSP0 to RSP2.
    Privilege(u8),
    /// IST1 to IST7.
    Interrupt(u8),
}

/// The stack pointer that the 64-bit TSS holds; not aligned yet.
///
/// # Errors
/// #TS(TSS selector) outside its limit, #SS(0) for a non-canonical pointer, #PF.
pub fn stack_from_tss64(cpu: &mut Cpu, which: TssStack) -> Guest<u64> {
    let offset = match which {
        TssStack::Privilege(level) => u64::from(level) * 8 + 4,
        TssStack::Interrupt(ist) => u64::from(ist) * 8 + 28,
    };
    let tr = cpu.s.tr;
    if tr.is_unusable() || offset + 7 > u64::from(tr.limit) {
        return Err(Fault::with_error(vector::TS, descriptor::error_code(tr.selector)));
    }
    let sp = cpu.sys_load(tr.base.wrapping_add(offset), 8)?;
    if is_canonical(sp) { Ok(sp) } else { Err(Fault::with_error(vector::SS, 0)) }
}

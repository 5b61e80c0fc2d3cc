//! Descriptor tables and what reads them for the program: LGDT, LIDT, LLDT, LTR, SGDT, SIDT, SLDT, STR, LAR, LSL,
//! VERR, VERW, ARPL (SDM volume 3, 2.4 and 5.10).

use berth_cpu::bits::{cr4, rflags, vector};
use berth_cpu::{Segment, TableRegister};
use iced_x86::{Code, Instruction, Mnemonic};

use super::descriptor::{self, Descriptor, is_null, rpl, system};
use super::operands::{self, is_canonical};
use super::segments;
use crate::code::Flow;
use crate::cpu::Cpu;
use crate::fault::{Fault, Guest};
use crate::state::{SavedFlags, State};

/// #UD in real and virtual-8086 mode.
fn require_protected(state: &State) -> Guest<()> {
    if state.is_protected() && !state.is_v86() { Ok(()) } else { Err(Fault::ud()) }
}

fn require_cpl0(state: &State) -> Guest<()> {
    if state.cpl() == 0 { Ok(()) } else { Err(Fault::gp(0)) }
}

/// User-mode instruction prevention (SDM volume 3, 2.5, CR4.UMIP).
fn check_umip(state: &State) -> Guest<()> {
    if state.cr4 & cr4::UMIP != 0 && state.cpl() > 0 { Err(Fault::gp(0)) } else { Ok(()) }
}

fn set_zero_flag(state: &mut State, on: bool) {
    let others = state.flags.to_rflags() & !rflags::ZF;
    state.flags = SavedFlags::from_rflags(others | if on { rflags::ZF } else { 0 });
}

/// LLDT.
///
/// # Errors
/// #UD, #GP, #NP(selector), and those of the memory accesses.
pub fn lldt(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    require_protected(&cpu.s)?;
    require_cpl0(&cpu.s)?;
    let selector = read_selector(cpu, insn, 0)?;
    if is_null(selector) {
        cpu.s.ldtr = segments::null_segment(selector, 0);
        return Ok(Flow::Next);
    }
    let d = system_descriptor(cpu, selector, &[system::LDT])?;
    let base = descriptor::system_base(cpu, &d)?;
    cpu.s.ldtr = Segment { base, ..d.segment() };
    Ok(Flow::Next)
}

/// LTR: marks the TSS busy.
///
/// # Errors
/// #UD, #GP, #NP(selector), and those of the memory accesses.
pub fn ltr(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    require_protected(&cpu.s)?;
    require_cpl0(&cpu.s)?;
    let selector = read_selector(cpu, insn, 0)?;
    if is_null(selector) {
        return Err(Fault::gp(0));
    }
    let both = [system::TSS_AVAILABLE, system::TSS16_AVAILABLE];
    let allowed = if cpu.s.is_long() { &both[..1] } else { &both[..] };
    let mut d = system_descriptor(cpu, selector, allowed)?;
    let base = descriptor::system_base(cpu, &d)?;
    d.raw |= 2 << 40;
    cpu.sys_store(d.address.wrapping_add(5), 1, d.raw >> 40 & 0xff)?;
    cpu.s.tr = Segment { base, ..d.segment() };
    Ok(Flow::Next)
}

/// A present descriptor in the GDT with one of the `allowed` system types.
fn system_descriptor(cpu: &mut Cpu, selector: u16, allowed: &[u16]) -> Guest<Descriptor> {
    let invalid = Fault::gp(descriptor::error_code(selector));
    if selector & 4 != 0 {
        return Err(invalid);
    }
    let d = descriptor::fetch(cpu, selector, vector::GP)?;
    if !d.is_system() || !allowed.contains(&d.kind()) {
        return Err(invalid);
    }
    if !d.is_present() {
        return Err(Fault::with_error(vector::NP, d.error()));
    }
    Ok(d)
}

fn read_selector(cpu: &mut Cpu, insn: &Instruction, n: u32) -> Guest<u16> {
    let value = if operands::is_memory(insn, n) {
        operands::read_memory(cpu, insn, 2)?
    } else {
        operands::read(cpu, insn, n)?
    };
    Ok(value as u16)
}

/// SLDT and STR.
///
/// # Errors
/// #UD, #GP(0) under UMIP, and those of the store.
pub fn store_selector(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    require_protected(&cpu.s)?;
    check_umip(&cpu.s)?;
    let table = if insn.mnemonic() == Mnemonic::Str { &cpu.s.tr } else { &cpu.s.ldtr };
    let selector = u64::from(table.selector);
    segments::store_selector(cpu, insn, selector)?;
    Ok(Flow::Next)
}

/// LGDT and LIDT.
///
/// # Errors
/// #GP(0) for CPL above 0 or a non-canonical base, and those of the loads.
pub fn load_table(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    require_cpl0(&cpu.s)?;
    let mut image = [0; 10];
    let len = if cpu.s.is_64bit() { 10 } else { 6 };
    let (seg, offset) = (operands::segment(&cpu.s, insn), operands::offset(&cpu.s, insn));
    cpu.load_bytes(seg, offset, &mut image[..len])?;
    let limit = u16::from_le_bytes([image[0], image[1]]);
    let mut base = u64::from_le_bytes(std::array::from_fn(|i| image[2 + i]));
    if matches!(insn.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16) {
        base &= 0xff_ffff;
    }
    if !is_canonical(base) {
        return Err(Fault::gp(0));
    }
    let table = TableRegister { base, limit };
    if insn.mnemonic() == Mnemonic::Lgdt {
        cpu.s.gdtr = table;
    } else {
        cpu.s.idtr = table;
    }
    Ok(Flow::Next)
}

/// SGDT and SIDT. The whole base is stored whatever the operand size is, as every 32-bit processor does.
///
/// # Errors
/// #GP(0) under UMIP, and those of the store.
pub fn store_table(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    check_umip(&cpu.s)?;
    let table = if insn.mnemonic() == Mnemonic::Sgdt { cpu.s.gdtr } else { cpu.s.idtr };
    let mut image = [0; 10];
    image[..2].copy_from_slice(&table.limit.to_le_bytes());
    image[2..].copy_from_slice(&table.base.to_le_bytes());
    let len = if cpu.s.is_64bit() { 10 } else { 6 };
    let (seg, offset) = (operands::segment(&cpu.s, insn), operands::offset(&cpu.s, insn));
    cpu.store_bytes(seg, offset, &image[..len])?;
    Ok(Flow::Next)
}

/// LAR, LSL, VERR, VERW: ZF says whether the selector can be used, and nothing else faults.
///
/// # Errors
/// #UD outside protected mode, and those of the memory accesses.
pub fn inspect_selector(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    require_protected(&cpu.s)?;
    let mnemonic = insn.mnemonic();
    let operand = if matches!(mnemonic, Mnemonic::Lar | Mnemonic::Lsl) { 1 } else { 0 };
    let selector = read_selector(cpu, insn, operand)?;
    let seen = visible(cpu, selector, mnemonic)?;
    set_zero_flag(&mut cpu.s, seen.is_some());
    match (seen, mnemonic) {
        (Some(d), Mnemonic::Lar) => {
            let rights = d.raw >> 32 & 0x00ff_ff00;
            operands::set_register(&mut cpu.s, insn.op0_register(), rights);
        }
        (Some(d), Mnemonic::Lsl) => {
            operands::set_register(&mut cpu.s, insn.op0_register(), u64::from(d.limit()));
        }
        _ => {}
    }
    Ok(Flow::Next)
}

/// The descriptor, if the program may see it with this instruction (SDM volume 2, LAR, LSL, VERR).
fn visible(cpu: &mut Cpu, selector: u16, mnemonic: Mnemonic) -> Guest<Option<Descriptor>> {
    if is_null(selector) {
        return Ok(None);
    }
    let Some(d) = descriptor::lookup(cpu, selector)? else { return Ok(None) };
    let kind = d.kind();
    let suitable = match mnemonic {
        Mnemonic::Verr => d.is_readable(),
        Mnemonic::Verw => d.is_writable_data(),
        _ if !d.is_system() => true,
        _ => {
            let segment = matches!(kind, system::LDT | system::TSS_AVAILABLE | system::TSS_BUSY)
                || !cpu.s.is_long() && matches!(kind, system::TSS16_AVAILABLE | system::TSS16_BUSY);
            let gate = kind == system::CALL_GATE
                || !cpu.s.is_long() && matches!(kind, system::CALL_GATE16 | system::TASK_GATE);
            segment || gate && mnemonic == Mnemonic::Lar
        }
    };
    let level = rpl(selector).max(cpu.s.cpl());
    let allowed = suitable && (d.is_conforming() || level <= d.dpl());
    Ok(allowed.then_some(d))
}

/// ARPL: raises the RPL of operand 0 to that of operand 1; ZF says whether it did.
///
/// # Errors
/// #UD outside protected mode, and those of the memory accesses.
pub fn arpl(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    require_protected(&cpu.s)?;
    let wanted = operands::read(cpu, insn, 1)? as u16;
    let selector = read_selector(cpu, insn, 0)?;
    let adjust = rpl(selector) < rpl(wanted);
    if adjust {
        let raised = selector & !3 | u16::from(rpl(wanted));
        if operands::is_memory(insn, 0) {
            segments::store_selector(cpu, insn, u64::from(raised))?;
        } else {
            operands::set_part(&mut cpu.s, operands::index(insn.op0_register()), 2, u64::from(raised));
        }
    }
    set_zero_flag(&mut cpu.s, adjust);
    Ok(Flow::Next)
}

#[cfg(test)]
#[path = "tables_tests.rs"]
mod tests;

//! System instructions of few lines each: CPUID, time-stamp counter, TLB and cache control, segment bases, HLT.

use berth_cpu::bits::{cr4, gpr, rflags};
use berth_cpu::cpuid::CpuidContext;
use iced_x86::{Instruction, Mnemonic};

use super::control::require_cpl0;
use super::operands::{self, is_canonical};
use crate::code::Flow;
use crate::cpu::Cpu;
use crate::fault::{Fault, Guest};
use crate::memory::Flush;
use crate::state::Seg;

/// CPUID (SDM volume 2).
///
/// # Errors
/// None; the type is that of every helper.
pub fn cpuid(cpu: &mut Cpu) -> Guest<Flow> {
    let context = CpuidContext {
        apic_id: u32::from(cpu.id.0),
        osxsave: cpu.s.cr4 & cr4::OSXSAVE != 0,
        xcr0: cpu.s.xcr0,
    };
    let (leaf, subleaf) = (cpu.s.gpr[gpr::RAX] as u32, cpu.s.gpr[gpr::RCX] as u32);
    let regs = cpu.vm.cpuid.cpuid(leaf, subleaf, &context);
    cpu.s.gpr[gpr::RAX] = regs.eax.into();
    cpu.s.gpr[gpr::RBX] = regs.ebx.into();
    cpu.s.gpr[gpr::RCX] = regs.ecx.into();
    cpu.s.gpr[gpr::RDX] = regs.edx.into();
    Ok(Flow::Next)
}

fn set_edx_eax(cpu: &mut Cpu, value: u64) {
    cpu.s.gpr[gpr::RAX] = value & 0xffff_ffff;
    cpu.s.gpr[gpr::RDX] = value >> 32;
}

/// RDTSC and RDTSCP (SDM volume 2; volume 3, 17.17).
///
/// # Errors
/// #GP(0) outside CPL 0 with CR4.TSD.
pub fn rdtsc(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    if cpu.s.cr4 & cr4::TSD != 0 && cpu.s.cpl() > 0 {
        return Err(Fault::gp(0));
    }
    if insn.mnemonic() == Mnemonic::Rdtscp {
        cpu.s.gpr[gpr::RCX] = cpu.msrs.tsc_aux;
    }
    let value = cpu.msrs.tsc();
    set_edx_eax(cpu, value);
    Ok(Flow::Next)
}

/// RDPID (SDM volume 2).
///
/// # Errors
/// None; the type is that of every helper.
pub fn rdpid(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    let value = cpu.msrs.tsc_aux;
    operands::set_register(&mut cpu.s, insn.op0_register(), value);
    Ok(Flow::Next)
}

/// RDPMC: there are no counters, so every number is wrong (SDM volume 2).
///
/// # Errors
/// #GP(0), always.
pub fn rdpmc() -> Guest<Flow> {
    Err(Fault::gp(0))
}

/// INVD, WBINVD and WBNOINVD: there is no cache to see, so only the privilege counts (SDM volume 2).
///
/// # Errors
/// #GP(0) outside CPL 0.
pub fn invalidate_caches(cpu: &mut Cpu) -> Guest<Flow> {
    require_cpl0(&cpu.s)?;
    Ok(Flow::Next)
}

/// INVLPG: a non-canonical address does nothing (SDM volume 2).
///
/// # Errors
/// #GP(0) outside CPL 0.
pub fn invlpg(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    require_cpl0(&cpu.s)?;
    let offset = operands::offset(&cpu.s, insn);
    let seg = operands::segment(&cpu.s, insn);
    let lin = if cpu.s.is_64bit() {
        let base = if matches!(seg, Seg::Fs | Seg::Gs) { cpu.s.seg(seg).base } else { 0 };
        base.wrapping_add(offset)
    } else {
        cpu.s.seg(seg).base.wrapping_add(offset) & 0xffff_ffff
    };
    if is_canonical(lin) {
        cpu.flush_tlb(Flush::Page(lin));
    }
    Ok(Flow::Leave)
}

/// INVPCID with its four types (SDM volume 2; volume 3, 4.10.4.1).
///
/// # Errors
/// #GP(0) outside CPL 0, for bad types and descriptors, and what loading the descriptor raises.
pub fn invpcid(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    require_cpl0(&cpu.s)?;
    let kind = operands::register(&cpu.s, insn.op0_register());
    let (seg, offset) = (operands::segment(&cpu.s, insn), operands::offset(&cpu.s, insn));
    let mut descriptor = [0; 16];
    cpu.load_bytes(seg, offset, &mut descriptor)?;
    let descriptor = u128::from_le_bytes(descriptor);
    let (pcid, reserved, lin) =
        ((descriptor & 0xfff) as u16, (descriptor as u64) >> 12, (descriptor >> 64) as u64);
    let pcid_usable = cpu.s.cr4 & cr4::PCIDE != 0 || pcid == 0;
    if reserved != 0 || kind > 3 || kind < 2 && !pcid_usable || kind == 0 && !is_canonical(lin) {
        return Err(Fault::gp(0));
    }
    cpu.flush_tlb(match kind {
        0 => Flush::PcidPage(pcid, lin),
        1 => Flush::Pcid(pcid),
        2 => Flush::AllPcids { keep_global: false },
        _ => Flush::AllPcids { keep_global: true },
    });
    Ok(Flow::Leave)
}

/// HLT (SDM volume 2).
///
/// # Errors
/// #GP(0) outside CPL 0.
pub fn hlt(cpu: &mut Cpu) -> Guest<Flow> {
    require_cpl0(&cpu.s)?;
    Ok(Flow::Halt)
}

/// STAC and CLAC (SDM volume 2).
///
/// # Errors
/// #UD outside CPL 0.
pub fn set_ac(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    if cpu.s.cpl() > 0 {
        return Err(Fault::ud());
    }
    if insn.mnemonic() == Mnemonic::Stac {
        cpu.s.rflags_rest |= rflags::AC;
    } else {
        cpu.s.rflags_rest &= !rflags::AC;
    }
    cpu.mode_changed();
    Ok(Flow::Leave)
}

/// SWAPGS (SDM volume 2).
///
/// # Errors
/// #UD outside 64-bit mode, #GP(0) outside CPL 0.
pub fn swapgs(cpu: &mut Cpu) -> Guest<Flow> {
    if !cpu.s.is_64bit() {
        return Err(Fault::ud());
    }
    require_cpl0(&cpu.s)?;
    let base = cpu.s.seg(Seg::Gs).base;
    cpu.s.seg_mut(Seg::Gs).base = std::mem::replace(&mut cpu.msrs.kernel_gs_base, base);
    Ok(Flow::Next)
}

/// RDFSBASE, RDGSBASE, WRFSBASE and WRGSBASE (SDM volume 2).
///
/// # Errors
/// #UD outside 64-bit mode or without CR4.FSGSBASE, #GP(0) for a non-canonical base.
pub fn segment_base(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    if !cpu.s.is_64bit() || cpu.s.cr4 & cr4::FSGSBASE == 0 {
        return Err(Fault::ud());
    }
    let seg = match insn.mnemonic() {
        Mnemonic::Rdfsbase | Mnemonic::Wrfsbase => Seg::Fs,
        _ => Seg::Gs,
    };
    let register = insn.op0_register();
    if matches!(insn.mnemonic(), Mnemonic::Rdfsbase | Mnemonic::Rdgsbase) {
        let base = cpu.s.seg(seg).base;
        operands::set_register(&mut cpu.s, register, base);
    } else {
        let base = operands::register(&cpu.s, register);
        if !is_canonical(base) {
            return Err(Fault::gp(0));
        }
        cpu.s.seg_mut(seg).base = base;
    }
    Ok(Flow::Next)
}

/// RDMSR (SDM volume 2).
///
/// # Errors
/// #GP(0) outside CPL 0 and for registers that do not exist.
pub fn rdmsr(cpu: &mut Cpu) -> Guest<Flow> {
    require_cpl0(&cpu.s)?;
    let value = super::msr::read(cpu, cpu.s.gpr[gpr::RCX] as u32)?;
    set_edx_eax(cpu, value);
    Ok(Flow::Next)
}

/// WRMSR (SDM volume 2).
///
/// # Errors
/// #GP(0) outside CPL 0, for registers that do not exist and values that they do not take.
pub fn wrmsr(cpu: &mut Cpu) -> Guest<Flow> {
    require_cpl0(&cpu.s)?;
    let value = cpu.s.gpr[gpr::RDX] << 32 | cpu.s.gpr[gpr::RAX] & 0xffff_ffff;
    super::msr::write(cpu, cpu.s.gpr[gpr::RCX] as u32, value)
}

#[cfg(test)]
#[path = "system_tests.rs"]
mod tests;

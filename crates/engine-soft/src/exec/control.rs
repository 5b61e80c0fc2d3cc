//! Control registers, debug registers and XCR0 (SDM volume 3, 2.5, 2.6 and 18.2; volume 2, MOV and XSETBV).

use berth_cpu::bits::{cr0, cr4, efer, gpr, vector, xcr0};
use berth_cpu::cpuid::Feature;
use iced_x86::{Instruction, OpKind, Register};

use super::{fpu, operands};
use crate::code::Flow;
use crate::cpu::Cpu;
use crate::fault::{Fault, Guest};
use crate::memory::Flush;
use crate::state::State;

/// Bit 63 of a value for CR3 with CR4.PCIDE: translations of the new PCID stay.
const CR3_NO_FLUSH: u64 = 1 << 63;
/// The bits of CR3 that name the page table in PAE paging.
const CR3_PAE: u64 = 0xffff_ffe0;
/// Present bit of a paging-structure entry.
const PRESENT: u64 = 1;
/// Reserved low bits of a PAE page-directory-pointer entry (SDM volume 3, table 4-8).
const PDPTE_RESERVED: u64 = 0x1e6;

/// DR6 bits that software may set: B0 to B3, BD, BS, BT.
const DR6_WRITABLE: u64 = 0xe00f;
/// DR6 bits that read as one.
const DR6_ONES: u64 = 0xffff_0ff0;
/// DR6.BD: an instruction accessed a debug register while DR7.GD was set.
const DR6_BD: u64 = 1 << 13;
const DR7_WRITABLE: u64 = 0xffff_23ff;
/// DR7 bit 10 reads as one.
const DR7_ONES: u64 = 1 << 10;
const DR7_GD: u64 = 1 << 13;

/// Fails with #GP(0) unless the current privilege level is 0.
pub(super) fn require_cpl0(state: &State) -> Guest<()> {
    if state.cpl() == 0 { Ok(()) } else { Err(Fault::gp(0)) }
}

/// Whether this MOV has a control or debug register as an operand.
pub fn is_special_move(insn: &Instruction) -> bool {
    let special = |n| {
        insn.op_kind(n) == OpKind::Register && (insn.op_register(n).is_cr() || insn.op_register(n).is_dr())
    };
    insn.op_count() == 2 && (special(0) || special(1))
}

/// MOV to and from control and debug registers.
///
/// # Errors
/// #UD for registers that do not exist, #GP(0) outside CPL 0 and for bad values, #DB for DR7.GD.
pub fn mov(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    let (to, from) = (insn.op0_register(), insn.op1_register());
    let special = if to.is_gpr() { from } else { to };
    let number = special.number();
    if special.is_cr() {
        if !matches!(number, 0 | 2 | 3 | 4 | 8) {
            return Err(Fault::ud());
        }
        require_cpl0(&cpu.s)?;
        if to.is_gpr() {
            read_cr(cpu, number, to)
        } else {
            write_cr(cpu, number, operands::register(&cpu.s, from))
        }
    } else {
        let number = debug_register(cpu, number)?;
        if to.is_gpr() {
            let value = cpu.s.dr[number];
            operands::set_register(&mut cpu.s, to, value);
            Ok(Flow::Next)
        } else {
            write_dr(cpu, number, operands::register(&cpu.s, from))
        }
    }
}

fn read_cr(cpu: &mut Cpu, number: usize, to: Register) -> Guest<Flow> {
    let value = match number {
        0 => cpu.s.cr0,
        2 => cpu.s.cr2,
        3 => cpu.s.cr3,
        4 => cpu.s.cr4,
        _ => u64::from(cpu.apic.cr8() & 0xf),
    };
    operands::set_register(&mut cpu.s, to, value);
    Ok(Flow::Next)
}

fn write_cr(cpu: &mut Cpu, number: usize, value: u64) -> Guest<Flow> {
    match number {
        0 => write_cr0(cpu, value),
        2 => {
            cpu.s.cr2 = value;
            Ok(Flow::Next)
        }
        3 => write_cr3(cpu, value),
        4 => write_cr4(cpu, value),
        _ => {
            let priority = u8::try_from(value).ok().filter(|v| *v < 16).ok_or(Fault::gp(0))?;
            cpu.apic.set_cr8(priority);
            Ok(Flow::Leave)
        }
    }
}

/// Writes CR0 (SDM volume 3, 2.5 and 4.1.2; volume 2, MOV to control registers).
pub(super) fn write_cr0(cpu: &mut Cpu, value: u64) -> Guest<Flow> {
    let old = cpu.s.cr0;
    if value >> 32 != 0 {
        return Err(Fault::gp(0));
    }
    // Other reserved bits are ignored; ET is always set.
    let new = value & cr0::DEFINED | cr0::ET;
    let has = |bits: u64| new & bits == bits;
    if has(cr0::PG) && !has(cr0::PE) || has(cr0::NW) && !has(cr0::CD) {
        return Err(Fault::gp(0));
    }
    let paging_starts = has(cr0::PG) && old & cr0::PG == 0;
    let paging_ends = !has(cr0::PG) && old & cr0::PG != 0;
    let mut new_efer = cpu.s.efer;
    if paging_starts && cpu.s.efer & efer::LME != 0 {
        check_long_mode_entry(&cpu.s)?;
        new_efer |= efer::LMA;
    } else if paging_starts && cpu.s.cr4 & cr4::PAE != 0 {
        check_pdptes(cpu, cpu.s.cr3)?;
    }
    if paging_ends {
        if cpu.s.is_64bit() || cpu.s.cr4 & cr4::PCIDE != 0 {
            return Err(Fault::gp(0));
        }
        new_efer &= !efer::LMA;
    }
    cpu.s.cr0 = new;
    cpu.s.efer = new_efer;
    if (old ^ new) & (cr0::PG | cr0::WP | cr0::PE) != 0 {
        cpu.flush_tlb(Flush::All);
    }
    cpu.mode_changed();
    Ok(Flow::Leave)
}

/// SDM volume 3, 9.8.5 and MOV to CR0: what setting PG with EFER.LME demands.
fn check_long_mode_entry(state: &State) -> Guest<()> {
    let code_is_64bit = state.seg(crate::state::Seg::Cs).attr & berth_cpu::Segment::L != 0;
    // Types 1 and 3 are 16-bit TSSs.
    let tss_is_16bit = matches!(state.tr.attr & 0x1f, 1 | 3);
    if state.cr4 & cr4::PAE == 0 || code_is_64bit || tss_is_16bit {
        return Err(Fault::gp(0));
    }
    Ok(())
}

/// Checks the four page-directory-pointer entries that PAE paging loads from `cr3` (SDM volume 3, 4.4.1).
fn check_pdptes(cpu: &Cpu, cr3: u64) -> Guest<()> {
    let reserved = PDPTE_RESERVED | !cpu.vm.phys_mask;
    for i in 0..4 {
        let mut bytes = [0; 8];
        let at = berth_memory::GuestPhysAddr((cr3 & CR3_PAE) + i * 8);
        // Outside RAM nothing is present: entries of all ones would be reserved.
        cpu.vm.memory.read(at, &mut bytes).map_err(|_| Fault::gp(0))?;
        let entry = u64::from_le_bytes(bytes);
        if entry & PRESENT != 0 && entry & reserved != 0 {
            return Err(Fault::gp(0));
        }
    }
    Ok(())
}

fn uses_pdptes(state: &State) -> bool {
    state.cr0 & cr0::PG != 0 && state.cr4 & cr4::PAE != 0 && !state.is_long()
}

fn write_cr3(cpu: &mut Cpu, value: u64) -> Guest<Flow> {
    let pcid = cpu.s.cr4 & cr4::PCIDE != 0;
    let keep = pcid && value & CR3_NO_FLUSH != 0;
    let value = if pcid { value & !CR3_NO_FLUSH } else { value };
    if cpu.s.is_long() && value & !cpu.vm.phys_mask != 0 {
        return Err(Fault::gp(0));
    }
    if uses_pdptes(&cpu.s) {
        check_pdptes(cpu, value)?;
    }
    cpu.set_cr3(value, keep);
    Ok(Flow::Leave)
}

/// The bits of CR4 that this CPU has.
fn cr4_defined(cpu: &Cpu) -> u64 {
    const ALWAYS: u64 = cr4::TSD
        | cr4::DE
        | cr4::PSE
        | cr4::PAE
        | cr4::MCE
        | cr4::PGE
        | cr4::PCE
        | cr4::OSFXSR
        | cr4::OSXMMEXCPT;
    [
        (Feature::Umip, cr4::UMIP),
        (Feature::Fsgsbase, cr4::FSGSBASE),
        (Feature::Pcid, cr4::PCIDE),
        (Feature::Xsave, cr4::OSXSAVE),
        (Feature::Smep, cr4::SMEP),
        (Feature::Smap, cr4::SMAP),
    ]
    .iter()
    .filter(|(feature, _)| cpu.vm.cpuid.has(*feature))
    .fold(ALWAYS, |bits, (_, bit)| bits | bit)
}

/// Writes CR4 (SDM volume 3, 2.5 and 4.10.4.1).
fn write_cr4(cpu: &mut Cpu, value: u64) -> Guest<Flow> {
    let old = cpu.s.cr4;
    let (set, cleared, changed) = (value & !old, old & !value, value ^ old);
    if value & !cr4_defined(cpu) != 0
        || cleared & cr4::PAE != 0 && cpu.s.is_long()
        || set & cr4::PCIDE != 0 && (!cpu.s.is_long() || cpu.s.cr3 & 0xfff != 0)
    {
        return Err(Fault::gp(0));
    }
    let structure = cr4::PAE | cr4::PSE | cr4::PGE | cr4::SMEP;
    let starts_pdptes = cpu.s.cr0 & cr0::PG != 0 && value & cr4::PAE != 0 && !cpu.s.is_long();
    if starts_pdptes && changed & structure != 0 {
        check_pdptes(cpu, cpu.s.cr3)?;
    }
    cpu.s.cr4 = value;
    if changed & (structure | cr4::SMAP | cr4::PCIDE) != 0 {
        cpu.flush_tlb(Flush::All);
    }
    cpu.mode_changed();
    Ok(Flow::Leave)
}

/// CLTS (SDM volume 2).
///
/// # Errors
/// #GP(0) outside CPL 0.
pub fn clts(cpu: &mut Cpu) -> Guest<Flow> {
    require_cpl0(&cpu.s)?;
    cpu.s.cr0 &= !cr0::TS;
    cpu.mode_changed();
    Ok(Flow::Leave)
}

/// LMSW: sets PE, MP, EM and TS, but does not clear PE (SDM volume 2).
///
/// # Errors
/// #GP(0) outside CPL 0, and what reading the operand raises.
pub fn lmsw(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    require_cpl0(&cpu.s)?;
    let loaded = cr0::PE | cr0::MP | cr0::EM | cr0::TS;
    let word = if operands::is_memory(insn, 0) {
        operands::read_memory(cpu, insn, 2)?
    } else {
        operands::read(cpu, insn, 0)?
    };
    let keep = cpu.s.cr0 & (!loaded | cr0::PE);
    write_cr0(cpu, keep | word & loaded)
}

/// SMSW: 16 bits to memory, as many as fit to a register (SDM volume 2).
///
/// # Errors
/// #GP(0) by UMIP, and what writing the operand raises.
pub fn smsw(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    if cpu.s.cr4 & cr4::UMIP != 0 && cpu.s.cpl() > 0 {
        return Err(Fault::gp(0));
    }
    let value = cpu.s.cr0;
    if operands::is_memory(insn, 0) {
        let (seg, offset) = (operands::segment(&cpu.s, insn), operands::offset(&cpu.s, insn));
        cpu.store(seg, offset, 2, value & 0xffff)?;
    } else {
        operands::set_register(&mut cpu.s, insn.op0_register(), value);
    }
    Ok(Flow::Next)
}

/// The index of debug register `number` after all checks of an access (SDM volume 3, 18.2.2 and 18.2.4).
fn debug_register(cpu: &mut Cpu, number: usize) -> Guest<usize> {
    let number = match number {
        0..=3 | 6 | 7 => number,
        4 | 5 if cpu.s.cr4 & cr4::DE == 0 => number + 2,
        _ => return Err(Fault::ud()),
    };
    require_cpl0(&cpu.s)?;
    if cpu.s.dr[7] & DR7_GD != 0 {
        // The handler must be able to access the registers.
        cpu.s.dr[7] &= !DR7_GD;
        cpu.s.dr[6] |= DR6_BD;
        return Err(Fault::plain(vector::DB));
    }
    Ok(number)
}

fn write_dr(cpu: &mut Cpu, number: usize, value: u64) -> Guest<Flow> {
    if number >= 6 && value >> 32 != 0 {
        return Err(Fault::gp(0));
    }
    cpu.s.dr[number & 7] = match number {
        6 => value & DR6_WRITABLE | DR6_ONES,
        7 => value & DR7_WRITABLE | DR7_ONES,
        _ => value,
    };
    // DR7 decides whether instructions and accesses are watched.
    cpu.mode_changed();
    Ok(Flow::Leave)
}

fn require_xsave(state: &State) -> Guest<()> {
    if state.cr4 & cr4::OSXSAVE == 0 { Err(Fault::ud()) } else { Ok(()) }
}

/// XGETBV of XCR0 and, with ECX 1, of the components that are in use (SDM volume 2).
///
/// # Errors
/// #UD without CR4.OSXSAVE, #GP(0) for other registers.
pub fn xgetbv(cpu: &mut Cpu) -> Guest<Flow> {
    require_xsave(&cpu.s)?;
    let value = match cpu.s.gpr[gpr::RCX] as u32 {
        0 => cpu.s.xcr0,
        1 if cpu.vm.cpuid.has(Feature::Xgetbv1) => cpu.s.xcr0 & fpu::in_use(cpu),
        _ => return Err(Fault::gp(0)),
    };
    cpu.s.gpr[gpr::RAX] = value & 0xffff_ffff;
    cpu.s.gpr[gpr::RDX] = value >> 32;
    Ok(Flow::Next)
}

/// XSETBV of XCR0 (SDM volume 2).
///
/// # Errors
/// #UD without CR4.OSXSAVE, #GP(0) outside CPL 0, for other registers and impossible combinations.
pub fn xsetbv(cpu: &mut Cpu) -> Guest<Flow> {
    require_xsave(&cpu.s)?;
    require_cpl0(&cpu.s)?;
    let value = cpu.s.gpr[gpr::RDX] << 32 | cpu.s.gpr[gpr::RAX] & 0xffff_ffff;
    let known = cpu.s.gpr[gpr::RCX] as u32 == 0 && value & !cpu.vm.cpuid.xcr0_supported() == 0;
    let consistent = value & xcr0::X87 != 0 && (value & xcr0::AVX == 0 || value & xcr0::SSE != 0);
    if !known || !consistent {
        return Err(Fault::gp(0));
    }
    cpu.s.xcr0 = value;
    cpu.mode_changed();
    Ok(Flow::Leave)
}

#[cfg(test)]
#[path = "control_tests.rs"]
mod tests;

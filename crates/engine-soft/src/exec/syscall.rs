//! Fast system calls: SYSCALL, SYSRET, SYSENTER, SYSEXIT (SDM volume 2; AMD64 manual volume 3).
//!
//! The two vendors differ, and guests are shown the host's vendor, so its rules apply: Intel has SYSCALL only in
//! 64-bit mode and checks SYSRET's target before it gives up privilege; AMD has SYSCALL in every protected mode
//! and no SYSENTER in IA-32e mode.

use berth_cpu::Segment;
use berth_cpu::bits::{efer, gpr, rflags};
use berth_cpu::cpuid::Vendor;
use iced_x86::{Code, Instruction};

use super::operands::is_canonical;
use crate::code::Flow;
use crate::cpu::Cpu;
use crate::fault::{Fault, Guest};
use crate::state::Seg;

/// Flags that SYSRET takes from R11.
const SYSRET_FLAGS: u64 = 0x3c_7fd7;

/// Whether the guest is shown an AMD processor.
pub fn is_amd(cpu: &Cpu) -> bool {
    cpu.vm.cpuid.vendor() == Vendor::Amd
}

/// Size of the code segment that a fast system call enters or returns to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Size {
    Bits32,
    Bits64,
}

/// A flat code segment as these instructions load it, without reading a descriptor.
fn flat_code(selector: u16, cpl: u8, size: Size) -> Segment {
    let size = if size == Size::Bits64 { Segment::L } else { Segment::DB };
    flat(selector, cpl, size | Segment::TYPE_CODE)
}

fn flat_stack(selector: u16, cpl: u8) -> Segment {
    flat(selector, cpl, Segment::DB)
}

fn flat(selector: u16, cpl: u8, extra: u16) -> Segment {
    let common = Segment::G | Segment::P | Segment::S | Segment::TYPE_RW | Segment::TYPE_ACCESSED;
    let selector = selector & !3 | u16::from(cpl);
    Segment { selector, base: 0, limit: u32::MAX, attr: common | extra | u16::from(cpl) << 5 }
}

fn set_segments(cpu: &mut Cpu, cs: Segment, ss: Segment) {
    *cpu.s.seg_mut(Seg::Cs) = cs;
    *cpu.s.seg_mut(Seg::Ss) = ss;
    cpu.mode_changed();
}

/// SYSCALL.
///
/// # Errors
/// #UD where it does not exist or EFER.SCE is clear.
pub fn syscall(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    let from_64bit = cpu.s.is_64bit();
    let exists = from_64bit || is_amd(cpu) && cpu.s.is_protected();
    if cpu.s.efer & efer::SCE == 0 || !exists {
        return Err(Fault::ud());
    }
    let star = cpu.msrs.star;
    let selector = (star >> 32) as u16;
    let ss = flat_stack(selector.wrapping_add(8), 0);
    cpu.s.gpr[gpr::RCX] = insn.next_ip();
    if !cpu.s.is_long() {
        let flags = cpu.s.rflags() & !(rflags::VM | rflags::IF | rflags::RF);
        cpu.s.set_rflags(flags);
        cpu.s.rip = star & 0xffff_ffff;
        set_segments(cpu, flat_code(selector, 0, Size::Bits32), ss);
        return Ok(Flow::Jump);
    }
    let flags = cpu.s.rflags() & !rflags::RF;
    cpu.s.gpr[gpr::R11] = flags;
    cpu.s.set_rflags(flags & !(cpu.msrs.fmask & 0xffff_ffff));
    cpu.s.rip = if from_64bit { cpu.msrs.lstar } else { cpu.msrs.cstar };
    set_segments(cpu, flat_code(selector, 0, Size::Bits64), ss);
    Ok(Flow::Jump)
}

/// SYSRET.
///
/// # Errors
/// #UD where it does not exist, #GP(0) above CPL 0 and, with Intel's rules, for a non-canonical target.
pub fn sysret(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    let exists = cpu.s.is_64bit() || is_amd(cpu) && cpu.s.is_protected();
    if cpu.s.efer & efer::SCE == 0 || !exists {
        return Err(Fault::ud());
    }
    if cpu.s.cpl() != 0 {
        return Err(Fault::gp(0));
    }
    let selector = (cpu.msrs.star >> 48) as u16;
    let target = cpu.s.gpr[gpr::RCX];
    let (cs, rip) = if insn.code() == Code::Sysretq {
        if !is_canonical(target) && !is_amd(cpu) {
            return Err(Fault::gp(0));
        }
        (flat_code(selector.wrapping_add(16), 3, Size::Bits64), target)
    } else {
        (flat_code(selector, 3, Size::Bits32), target & 0xffff_ffff)
    };
    let flags =
        if cpu.s.is_long() { cpu.s.gpr[gpr::R11] & SYSRET_FLAGS } else { cpu.s.rflags() | rflags::IF };
    cpu.s.set_rflags(flags);
    cpu.s.rip = rip;
    set_segments(cpu, cs, flat_stack(selector.wrapping_add(8), 3));
    Ok(Flow::Jump)
}

/// The selector in IA32_SYSENTER_CS.
///
/// # Errors
/// #UD where the instructions do not exist, #GP(0) in real mode or for a null selector.
fn sysenter_selector(cpu: &Cpu) -> Guest<u16> {
    if is_amd(cpu) && cpu.s.is_long() {
        return Err(Fault::ud());
    }
    let selector = cpu.msrs.sysenter_cs as u16 & !3;
    if !cpu.s.is_protected() || selector == 0 { Err(Fault::gp(0)) } else { Ok(selector) }
}

/// SYSENTER.
///
/// # Errors
/// #UD with AMD's rules in IA-32e mode, #GP(0) in real mode or without a target.
pub fn sysenter(cpu: &mut Cpu) -> Guest<Flow> {
    let selector = sysenter_selector(cpu)?;
    let flags = cpu.s.rflags() & !(rflags::VM | rflags::IF | rflags::RF);
    cpu.s.set_rflags(flags);
    let (size, mask) = if cpu.s.is_long() { (Size::Bits64, u64::MAX) } else { (Size::Bits32, 0xffff_ffff) };
    cpu.s.gpr[gpr::RSP] = cpu.msrs.sysenter_esp & mask;
    cpu.s.rip = cpu.msrs.sysenter_eip & mask;
    set_segments(cpu, flat_code(selector, 0, size), flat_stack(selector.wrapping_add(8), 0));
    Ok(Flow::Jump)
}

/// SYSEXIT.
///
/// # Errors
/// As [`sysenter`]; #GP(0) above CPL 0 and for non-canonical targets.
pub fn sysexit(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    let selector = sysenter_selector(cpu)?;
    if cpu.s.cpl() != 0 {
        return Err(Fault::gp(0));
    }
    let (rsp, rip) = (cpu.s.gpr[gpr::RCX], cpu.s.gpr[gpr::RDX]);
    if insn.code() == Code::Sysexitq {
        if !is_canonical(rsp) || !is_canonical(rip) {
            return Err(Fault::gp(0));
        }
        cpu.s.gpr[gpr::RSP] = rsp;
        cpu.s.rip = rip;
        let cs = flat_code(selector.wrapping_add(32), 3, Size::Bits64);
        set_segments(cpu, cs, flat_stack(selector.wrapping_add(40), 3));
    } else {
        cpu.s.gpr[gpr::RSP] = rsp & 0xffff_ffff;
        cpu.s.rip = rip & 0xffff_ffff;
        let cs = flat_code(selector.wrapping_add(16), 3, Size::Bits32);
        set_segments(cpu, cs, flat_stack(selector.wrapping_add(24), 3));
    }
    Ok(Flow::Jump)
}

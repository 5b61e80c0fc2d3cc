//! IRET in all its forms (SDM volume 2, IRET; volume 3, 21.2.3 for virtual-8086 mode).

use berth_cpu::bits::{gpr, rflags};
use iced_x86::{Code, Instruction};

use super::descriptor::rpl;
use super::{far, frame, gate, segments};
use crate::code::Flow;
use crate::cpu::Cpu;
use crate::fault::{Fault, Guest};
use crate::state::Seg;

/// Flags that every IRET pops.
const COMMON: u64 = rflags::ARITH | rflags::TF | rflags::DF | rflags::NT;
/// Flags in the upper half that an IRET of 32 or 64 bits pops too.
const WIDE: u64 = rflags::RF | rflags::AC | rflags::ID;

/// IRET, IRETD and IRETQ. It ends the blocking of NMIs even when it faults (SDM volume 3, 6.7.1).
///
/// # Errors
/// #GP, #NP, #SS with selectors, and those of the loads.
pub fn iret(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    let size = match insn.code() {
        Code::Iretw => 2,
        Code::Iretd => 4,
        _ => 8,
    };
    if cpu.s.is_v86() && cpu.s.iopl() < 3 {
        return Err(Fault::gp(0));
    }
    cpu.s.nmi_blocked = false;
    // One that came meanwhile is next.
    cpu.interrupt_check |= cpu.nmi_pending;
    if !cpu.s.is_protected() || cpu.s.is_v86() {
        return flat(cpu, size);
    }
    if cpu.s.rflags_rest & rflags::NT != 0 {
        if !cpu.s.is_long() {
            tracing::warn!("the guest returns from a nested task, which Berth does not do: #GP");
        }
        return Err(Fault::gp(0));
    }
    protected(cpu, size)
}

/// Real-address and virtual-8086 mode.
fn flat(cpu: &mut Cpu, size: usize) -> Guest<Flow> {
    let bytes = size as u64;
    let rip = frame::peek(cpu, 0, size)?;
    let selector = frame::peek(cpu, bytes, 2)? as u16;
    let flags = frame::peek(cpu, 2 * bytes, size)?;
    let v86 = cpu.s.is_v86();
    let cs = if v86 {
        segments::v86_segment(selector)
    } else {
        segments::real_segment(cpu.s.seg(Seg::Cs), selector)
    };
    gate::check_target(&cs, rip, false)?;
    let mut changed = COMMON | rflags::IF;
    if !v86 {
        changed |= rflags::IOPL;
    }
    if size > 2 {
        changed |= WIDE;
    }
    frame::drop_bytes(&mut cpu.s, 3 * bytes);
    *cpu.s.seg_mut(Seg::Cs) = cs;
    Ok(finish(cpu, rip, flags, changed))
}

fn finish(cpu: &mut Cpu, rip: u64, flags: u64, changed: u64) -> Flow {
    cpu.s.rip = rip;
    let merged = cpu.s.rflags() & !changed | flags & changed;
    cpu.s.set_rflags(merged);
    cpu.mode_changed();
    Flow::Jump
}

/// The five values on the stack in 64-bit mode, in one access: IRETQ ends every system call's slow path and every
/// interrupt.
fn frame64(cpu: &mut Cpu) -> Guest<[u64; 5]> {
    let mut bytes = [0; 40];
    let sp = frame::pointer(&cpu.s);
    cpu.load_bytes(Seg::Ss, sp, &mut bytes)?;
    let (values, _) = bytes.as_chunks::<8>();
    Ok(std::array::from_fn(|n| values.get(n).map_or(0, |v| u64::from_le_bytes(*v))))
}

/// Protected and IA-32e mode.
fn protected(cpu: &mut Cpu, size: usize) -> Guest<Flow> {
    let bytes = size as u64;
    let cpl = cpu.s.cpl();
    let is_64bit = cpu.s.is_64bit();
    let whole = if is_64bit && size == 8 { Some(frame64(cpu)?) } else { None };
    let [rip, cs, flags] = match whole {
        Some([rip, cs, flags, ..]) => [rip, cs, flags],
        None => [frame::peek(cpu, 0, size)?, frame::peek(cpu, bytes, 2)?, frame::peek(cpu, 2 * bytes, size)?],
    };
    let selector = cs as u16;
    if flags & rflags::VM != 0 && cpl == 0 && size == 4 && !cpu.s.is_long() {
        return to_v86(cpu, rip, selector, flags);
    }

    // What may change depends on the level that returns, not on that returned to.
    let mut changed = COMMON;
    if size > 2 {
        changed |= WIDE;
    }
    if cpl <= cpu.s.iopl() {
        changed |= rflags::IF;
    }
    if cpl == 0 {
        changed |= rflags::IOPL;
        if size > 2 {
            changed |= rflags::VIF | rflags::VIP;
        }
    }

    let cs = far::returned_code(cpu, selector)?;
    let outer = rpl(selector) > cpl;
    // 64-bit mode pops SS:RSP always.
    if !outer && !is_64bit {
        gate::check_target(&cs, rip, cpu.s.is_long())?;
        frame::drop_bytes(&mut cpu.s, 3 * bytes);
        *cpu.s.seg_mut(Seg::Cs) = cs;
        return Ok(finish(cpu, rip, flags, changed));
    }
    let [sp, ss] = match whole {
        Some([.., sp, ss]) => [sp, ss],
        None => [frame::peek(cpu, 3 * bytes, size)?, frame::peek(cpu, 4 * bytes, 2)?],
    };
    let ss = far::returned_stack(cpu, ss as u16, &cs)?;
    gate::check_target(&cs, rip, cpu.s.is_long())?;
    *cpu.s.seg_mut(Seg::Cs) = cs;
    *cpu.s.seg_mut(Seg::Ss) = ss;
    frame::set_pointer(&mut cpu.s, sp);
    if outer {
        segments::drop_inner_segments(cpu);
    }
    Ok(finish(cpu, rip, flags, changed))
}

/// Return to virtual-8086 mode: SS:ESP and the data segments are on the stack too.
fn to_v86(cpu: &mut Cpu, rip: u64, selector: u16, flags: u64) -> Guest<Flow> {
    let mut words = [0; 6];
    for (n, word) in words.iter_mut().enumerate() {
        *word = frame::peek(cpu, 12 + 4 * n as u64, 4)?;
    }
    let [esp, ss, es, ds, fs, gs] = words;
    let cs = segments::v86_segment(selector);
    gate::check_target(&cs, rip & 0xffff, false)?;
    for (seg, value) in [(Seg::Ss, ss), (Seg::Es, es), (Seg::Ds, ds), (Seg::Fs, fs), (Seg::Gs, gs)] {
        *cpu.s.seg_mut(seg) = segments::v86_segment(value as u16);
    }
    *cpu.s.seg_mut(Seg::Cs) = cs;
    cpu.s.gpr[gpr::RSP] = esp;
    Ok(finish(cpu, rip & 0xffff, flags, u64::MAX))
}

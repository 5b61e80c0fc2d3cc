//! Delivery of exceptions and interrupts (SDM volume 3, chapter 6, and 21.3 for virtual-8086 mode).
//!
//! ```text
//!   Event ──► attempt ──ok──► the handler's first instruction is next
//!                │ fault during delivery
//!                ▼
//!             table 6-5: deliver it instead │ double fault │ triple fault
//! ```
//!
//! An attempt reads and checks everything, then writes the whole frame, then changes registers: when it fails
//! nothing but accessed and dirty bits has changed.

use std::fmt::Write;

use berth_cpu::Segment;
use berth_cpu::bits::{gpr, rflags, vector};
use berth_engine::Exit;
use iced_x86::{Instruction, Mnemonic};

use super::descriptor::{Descriptor, system};
use super::frame::{self, NewStack};
use super::gate::{self, Target, TssStack};
use super::segments;
use crate::code::Flow;
use crate::cpu::Cpu;
use crate::fault::{Fault, Guest};
use crate::state::Seg;

/// Which instruction raised a software interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SoftwareKind {
    /// INT n.
    IntN,
    /// INT3.
    Int3,
    /// INTO.
    Into,
    /// INT1: no check of the gate's DPL, and it counts as an external event in error codes.
    Int1,
}

/// Something that goes through the IDT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// An exception of the instruction at `rip`, or a debug trap after which `rip` comes next. CR2 is set here;
    /// DR6 is set by who found the debug condition.
    Fault(Fault),
    /// A software interrupt; its handler returns to `next_rip`.
    Software {
        /// Vector.
        vector: u8,
        /// Offset in CS of the instruction after it.
        next_rip: u64,
        /// Which instruction.
        kind: SoftwareKind,
    },
    /// An interrupt that the APIC or PIC has acknowledged.
    External(u8),
    /// Non-maskable interrupt.
    Nmi,
}

impl Event {
    fn vector(self) -> u8 {
        match self {
            Self::Fault(fault) => fault.vector,
            Self::Software { vector, .. } | Self::External(vector) => vector,
            Self::Nmi => vector::NMI,
        }
    }

    /// The EXT bit of error codes: whether the event came from outside the program (SDM volume 3, 6.13).
    fn ext(self) -> u32 {
        let program = matches!(self, Self::Software { kind, .. } if kind != SoftwareKind::Int1);
        u32::from(!program)
    }

    /// Whether the gate's DPL must allow the current privilege level.
    fn checks_dpl(self) -> bool {
        matches!(self, Self::Software { kind, .. } if kind != SoftwareKind::Int1)
    }
}

/// A triple fault: the processor shuts down (SDM volume 3, 6.15).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TripleFaultInfo {
    /// The exceptions in their order, for people.
    pub detail: String,
}

/// Classes of SDM volume 3, table 6-4.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

fn class(event: Event) -> Class {
    let Event::Fault(fault) = event else { return Class::Benign };
    match fault.vector {
        vector::DE | vector::TS | vector::NP | vector::SS | vector::GP => Class::Contributory,
        vector::PF => Class::PageFault,
        vector::DF => Class::DoubleFault,
        _ => Class::Benign,
    }
}

/// Delivers `event`: afterwards CS:RIP is its handler's first instruction, or that of the exception that its
/// delivery raised.
///
/// # Errors
/// [`TripleFaultInfo`] when the processor would shut down.
pub fn deliver(cpu: &mut Cpu, event: Event) -> Result<(), TripleFaultInfo> {
    let mut current = event;
    let mut story = String::new();
    // A benign event, then contributory, page fault, double fault: no chain is longer.
    for _ in 0..6 {
        let fault = match attempt(cpu, current) {
            Ok(()) => return Ok(()),
            Err(fault) => fault,
        };
        if fault.vector == vector::PF {
            // Whatever becomes of it (SDM volume 3, 6.15, footnote to interrupt 14).
            cpu.s.cr2 = fault.address;
        }
        describe(&mut story, cpu, current);
        let second = class(Event::Fault(fault));
        current = match (class(current), second) {
            (Class::DoubleFault, _) => {
                describe(&mut story, cpu, Event::Fault(fault));
                break;
            }
            (Class::Contributory, Class::Contributory)
            | (Class::PageFault, Class::Contributory | Class::PageFault) => {
                describe(&mut story, cpu, Event::Fault(fault));
                Event::Fault(Fault::with_error(vector::DF, 0))
            }
            _ => Event::Fault(fault),
        };
    }
    Err(TripleFaultInfo { detail: story })
}

/// Appends one event to the account of a triple fault.
fn describe(story: &mut String, cpu: &Cpu, event: Event) {
    if story.is_empty() {
        let _ = write!(story, "at {:04x}:{:x}: ", cpu.s.seg(Seg::Cs).selector, cpu.s.rip);
    } else if class(event) == Class::DoubleFault {
        story.push_str(": ");
    } else {
        story.push_str(", and during its delivery ");
    }
    let _ = match event {
        Event::Fault(fault) if fault.vector == vector::DF => write!(story, "double fault"),
        Event::Fault(Fault { vector, error, address }) => {
            let _ = write!(story, "exception {vector}");
            match error {
                Some(error) if vector == vector::PF => {
                    write!(story, " (error code {error:#x}, address {address:#x})")
                }
                Some(error) => write!(story, " (error code {error:#x})"),
                None => Ok(()),
            }
        }
        Event::Software { vector, .. } => write!(story, "software interrupt {vector}"),
        Event::External(vector) => write!(story, "interrupt {vector}"),
        Event::Nmi => write!(story, "a non-maskable interrupt"),
    };
}

/// INT n, INT3, INT1 and INTO.
///
/// # Errors
/// #GP(0) for INT n in virtual-8086 mode with IOPL below 3; what delivery raises is delivered here.
pub fn software_interrupt(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    let (vector, kind) = match insn.mnemonic() {
        Mnemonic::Int => (insn.immediate8(), SoftwareKind::IntN),
        Mnemonic::Int3 => (vector::BP, SoftwareKind::Int3),
        Mnemonic::Int1 => (vector::DB, SoftwareKind::Int1),
        _ if cpu.s.rflags() & rflags::OF == 0 => return Ok(Flow::Next),
        _ => (vector::OF, SoftwareKind::Into),
    };
    if kind == SoftwareKind::IntN && cpu.s.is_v86() && cpu.s.iopl() < 3 {
        return Err(Fault::gp(0));
    }
    if let Err(triple) = deliver(cpu, Event::Software { vector, next_rip: insn.next_ip(), kind }) {
        cpu.fatal = Some(Exit::TripleFault { detail: triple.detail });
    }
    Ok(Flow::Jump)
}

/// What one delivery pushes and then puts into RFLAGS.
struct Frame {
    cs: u64,
    rip: u64,
    flags: u64,
    error: Option<u32>,
}

fn attempt(cpu: &mut Cpu, event: Event) -> Guest<()> {
    match event {
        Event::Fault(fault) if fault.vector == vector::PF => cpu.s.cr2 = fault.address,
        Event::Nmi => cpu.s.nmi_blocked = true,
        _ => {}
    }
    let mut frame = Frame {
        cs: u64::from(cpu.s.seg(Seg::Cs).selector),
        rip: cpu.s.rip,
        flags: cpu.s.rflags(),
        error: None,
    };
    match event {
        Event::Fault(fault) => {
            frame.error = fault.error;
            // Faults set RF in the image so that an instruction breakpoint is not hit again at the restart; #DB
            // keeps it as it is (SDM volume 3, 18.3.1.1).
            if fault.vector != vector::DB {
                frame.flags |= rflags::RF;
            }
        }
        Event::Software { next_rip, .. } => frame.rip = next_rip,
        Event::External(_) | Event::Nmi => {}
    }
    let done = if !cpu.s.is_protected() {
        real_mode(cpu, event, frame)
    } else if cpu.s.is_long() {
        long_mode(cpu, event, frame)
    } else {
        protected_mode(cpu, event, frame)
    };
    done.map_err(|mut fault| {
        if matches!(fault.vector, vector::TS..=vector::GP) {
            fault.error = fault.error.map(|e| e | event.ext());
        }
        fault
    })?;
    if event.vector() == vector::DB {
        // General detect is off in the handler (SDM volume 3, 18.2.4).
        cpu.s.dr[7] &= !(1 << 13);
    }
    cpu.s.interrupt_shadow = false;
    cpu.s.shadow_blocks_debug = false;
    cpu.mode_changed();
    Ok(())
}

/// Real-address mode: the interrupt vector table (SDM volume 3, 21.1.4).
fn real_mode(cpu: &mut Cpu, event: Event, frame: Frame) -> Guest<()> {
    let offset = u64::from(event.vector()) * 4;
    if offset + 3 > u64::from(cpu.s.idtr.limit) {
        return Err(Fault::gp(0));
    }
    let entry = cpu.sys_load(cpu.s.idtr.base.wrapping_add(offset), 4)?;
    frame::push_all(cpu, 2, &[frame.flags, frame.cs, frame.rip])?;
    let cs = cpu.s.seg_mut(Seg::Cs);
    *cs = segments::real_segment(cs, (entry >> 16) as u16);
    cpu.s.rip = entry & 0xffff;
    let cleared = rflags::IF | rflags::TF | rflags::AC | rflags::RF;
    let flags = cpu.s.rflags() & !cleared;
    cpu.s.set_rflags(flags);
    Ok(())
}

/// RFLAGS in a handler (SDM volume 2, INT n). An interrupt gate also clears IF.
fn enter_flags(cpu: &mut Cpu, is_interrupt_gate: bool) {
    let mut cleared = rflags::TF | rflags::NT | rflags::RF | rflags::VM;
    if is_interrupt_gate {
        cleared |= rflags::IF;
    }
    let flags = cpu.s.rflags() & !cleared;
    cpu.s.set_rflags(flags);
}

/// Reads the IDT entry of `size` bytes and checks limit, type, DPL and presence.
fn gate(cpu: &mut Cpu, event: Event, size: u64) -> Guest<(Descriptor, u64)> {
    let vector = event.vector();
    // Index, and the IDT bit.
    let error = u32::from(vector) * 8 + 2;
    let offset = u64::from(vector) * size;
    if offset + size - 1 > u64::from(cpu.s.idtr.limit) {
        return Err(Fault::gp(error));
    }
    let address = cpu.s.idtr.base.wrapping_add(offset);
    let raw = cpu.sys_load(address, 8)?;
    let high = if size == 16 { cpu.sys_load(address.wrapping_add(8), 8)? } else { 0 };
    let gate = Descriptor { address, raw, selector: 0 };
    let known = match gate.kind() {
        system::INTERRUPT_GATE | system::TRAP_GATE => true,
        system::INTERRUPT_GATE16 | system::TRAP_GATE16 | system::TASK_GATE => size == 8,
        _ => false,
    };
    if !gate.is_system() || !known || event.checks_dpl() && gate.dpl() < cpu.s.cpl() {
        return Err(Fault::gp(error));
    }
    if !gate.is_present() {
        return Err(Fault::with_error(vector::NP, error));
    }
    Ok((gate, high))
}

/// 64-bit and compatibility mode (SDM volume 3, 6.14).
fn long_mode(cpu: &mut Cpu, event: Event, frame: Frame) -> Guest<()> {
    let (gate, high) = gate(cpu, event, 16)?;
    let Target { cs, cpl } = gate::code_behind_gate(cpu, gate.gate_selector(), true)?;
    let rip = gate.gate_offset() | high << 32;
    gate::check_target(&cs, rip, true)?;

    let old_cpl = cpu.s.cpl();
    let ist = (gate.raw >> 32 & 7) as u8;
    let sp = if ist != 0 {
        gate::stack_from_tss64(cpu, TssStack::Interrupt(ist))?
    } else if cpl < old_cpl {
        gate::stack_from_tss64(cpu, TssStack::Privilege(cpl))?
    } else {
        cpu.s.gpr[gpr::RSP]
    };
    let old_ss = *cpu.s.seg(Seg::Ss);
    let ss = if cpl < old_cpl { segments::null_segment(u16::from(cpl), cpl) } else { old_ss };
    let stack = NewStack { ss, sp: sp & !0xf, cpl, flat64: true, error: 0 };
    let values = [
        u64::from(old_ss.selector),
        cpu.s.gpr[gpr::RSP],
        frame.flags,
        frame.cs,
        frame.rip,
        u64::from(frame.error.unwrap_or(0)),
    ];
    let count = if frame.error.is_some() { 6 } else { 5 };
    let sp = stack.push_all(cpu, 8, &values[..count])?;

    stack.enter(&mut cpu.s, sp);
    enter(cpu, cs, rip, gate.kind());
    Ok(())
}

fn enter(cpu: &mut Cpu, cs: Segment, rip: u64, gate_kind: u16) {
    *cpu.s.seg_mut(Seg::Cs) = cs;
    cpu.s.rip = rip;
    enter_flags(cpu, matches!(gate_kind, system::INTERRUPT_GATE | system::INTERRUPT_GATE16));
}

/// Protected and virtual-8086 mode without IA-32e (SDM volume 3, 6.12).
fn protected_mode(cpu: &mut Cpu, event: Event, frame: Frame) -> Guest<()> {
    let (gate, _) = gate(cpu, event, 8)?;
    if gate.kind() == system::TASK_GATE {
        tracing::warn!(vector = event.vector(), "the guest uses a task gate, which Berth does not have: #GP");
        return Err(Fault::gp(u32::from(gate.gate_selector() & !3)));
    }
    let is_32bit = matches!(gate.kind(), system::INTERRUPT_GATE | system::TRAP_GATE);
    let size = if is_32bit { 4 } else { 2 };
    let Target { cs, cpl } = gate::code_behind_gate(cpu, gate.gate_selector(), false)?;
    let rip = if is_32bit { gate.gate_offset() } else { gate.gate_offset() & 0xffff };

    if cpu.s.is_v86() && cpl != 0 {
        return Err(Fault::gp(u32::from(cs.selector & !3)));
    }
    if cpl < cpu.s.cpl() {
        to_inner_level(cpu, &frame, cs, cpl, rip, size)?;
    } else {
        gate::check_target(&cs, rip, false)?;
        let values = [frame.flags, frame.cs, frame.rip, u64::from(frame.error.unwrap_or(0))];
        let count = if frame.error.is_some() { 4 } else { 3 };
        frame::push_all(cpu, size, &values[..count])?;
    }
    enter(cpu, cs, rip, gate.kind());
    Ok(())
}

/// Switches to the stack of `cpl` and pushes the frame there, from virtual-8086 mode with its segment registers.
fn to_inner_level(cpu: &mut Cpu, frame: &Frame, cs: Segment, cpl: u8, rip: u64, size: usize) -> Guest<()> {
    let stack = gate::stack_from_tss(cpu, cpl)?;
    gate::check_target(&cs, rip, false)?;
    let v86 = cpu.s.is_v86();
    let selector = |seg: Seg| u64::from(cpu.s.seg(seg).selector);
    let values = [
        selector(Seg::Gs),
        selector(Seg::Fs),
        selector(Seg::Ds),
        selector(Seg::Es),
        selector(Seg::Ss),
        cpu.s.gpr[gpr::RSP],
        frame.flags,
        frame.cs,
        frame.rip,
        u64::from(frame.error.unwrap_or(0)),
    ];
    let first = if v86 { 0 } else { 4 };
    let end = if frame.error.is_some() { 10 } else { 9 };
    let sp = stack.push_all(cpu, size, &values[first..end])?;
    if v86 {
        for seg in [Seg::Gs, Seg::Fs, Seg::Ds, Seg::Es] {
            *cpu.s.seg_mut(seg) = segments::null_segment(0, 0);
        }
    }
    stack.enter(&mut cpu.s, sp);
    Ok(())
}

#[cfg(test)]
#[path = "deliver_tests.rs"]
mod tests;

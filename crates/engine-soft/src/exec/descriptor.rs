//! Segment descriptors: fetch from GDT and LDT, their fields, the accessed bit (SDM volume 3, 3.4.5 and 3.5).

use berth_cpu::Segment;
use berth_cpu::bits::vector;

use super::operands::is_canonical;
use crate::cpu::Cpu;
use crate::fault::{Fault, Guest};

/// Types of system descriptors (SDM volume 3, table 3-2).
#[allow(missing_docs)]
pub mod system {
    pub const TSS16_AVAILABLE: u16 = 1;
    pub const LDT: u16 = 2;
    pub const TSS16_BUSY: u16 = 3;
    pub const CALL_GATE16: u16 = 4;
    pub const TASK_GATE: u16 = 5;
    pub const INTERRUPT_GATE16: u16 = 6;
    pub const TRAP_GATE16: u16 = 7;
    pub const TSS_AVAILABLE: u16 = 9;
    pub const TSS_BUSY: u16 = 11;
    pub const CALL_GATE: u16 = 12;
    pub const INTERRUPT_GATE: u16 = 14;
    pub const TRAP_GATE: u16 = 15;
}

/// Requested privilege level of a selector.
pub const fn rpl(selector: u16) -> u8 {
    (selector & 3) as u8
}

/// Whether `selector` is null: index 0 of the GDT with any RPL.
pub const fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

/// A selector as the error code of an exception: without its RPL.
pub const fn error_code(selector: u16) -> u32 {
    (selector & !3) as u32
}

/// An 8-byte descriptor and where it came from.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    /// The descriptor's own linear address.
    pub address: u64,
    /// Its 8 bytes.
    pub raw: u64,
    /// The selector that named it.
    pub selector: u16,
}

impl Descriptor {
    /// The error code that names it.
    pub fn error(&self) -> u32 {
        error_code(self.selector)
    }
    /// Base address, 32 bits.
    pub fn base(&self) -> u64 {
        self.raw >> 16 & 0xff_ffff | self.raw >> 32 & 0xff00_0000
    }
    /// Last valid offset in bytes.
    pub fn limit(&self) -> u32 {
        let limit = (self.raw & 0xffff | self.raw >> 32 & 0xf_0000) as u32;
        if self.attr() & Segment::G != 0 { limit << 12 | 0xfff } else { limit }
    }
    /// Access rights as in [`Segment::attr`].
    pub fn attr(&self) -> u16 {
        (self.raw >> 40) as u16 & 0xf0ff
    }
    /// The four type bits.
    pub fn kind(&self) -> u16 {
        self.attr() & 0xf
    }
    /// As the hidden part of a segment register, with `selector` as it is.
    pub fn segment(&self) -> Segment {
        Segment { base: self.base(), limit: self.limit(), attr: self.attr(), selector: self.selector }
    }
    /// Descriptor privilege level.
    pub fn dpl(&self) -> u8 {
        (self.raw >> 45 & 3) as u8
    }
    /// Whether it is present.
    pub fn is_present(&self) -> bool {
        self.attr() & Segment::P != 0
    }
    /// Whether it is a system descriptor or gate.
    pub fn is_system(&self) -> bool {
        self.attr() & Segment::S == 0
    }
    /// Whether it is a code segment.
    pub fn is_code(&self) -> bool {
        self.segment().is_code()
    }
    /// Whether it is a conforming code segment.
    pub fn is_conforming(&self) -> bool {
        self.is_code() && self.attr() & Segment::TYPE_DC != 0
    }
    /// Whether it is a writable data segment.
    pub fn is_writable_data(&self) -> bool {
        !self.is_system() && self.segment().is_writable()
    }
    /// Whether it is a data segment or readable code.
    pub fn is_readable(&self) -> bool {
        !self.is_system() && self.segment().is_readable()
    }
    /// Target offset, if it is a gate with a 32-bit offset.
    pub fn gate_offset(&self) -> u64 {
        self.raw & 0xffff | self.raw >> 32 & 0xffff_0000
    }
    /// Target selector, if it is a gate.
    pub fn gate_selector(&self) -> u16 {
        (self.raw >> 16) as u16
    }
}

/// Where `selector`'s descriptor is, if `len` bytes of it are inside its table.
fn address(cpu: &Cpu, selector: u16, len: u64) -> Option<u64> {
    let offset = u64::from(selector & !7);
    let (base, limit) = if selector & 4 == 0 {
        (cpu.s.gdtr.base, u64::from(cpu.s.gdtr.limit))
    } else if cpu.s.ldtr.is_unusable() {
        return None;
    } else {
        (cpu.s.ldtr.base, u64::from(cpu.s.ldtr.limit))
    };
    (offset + len - 1 <= limit).then(|| base.wrapping_add(offset))
}

/// The descriptor that `selector` names, or `None` if it is outside its table. A null selector is not special
/// here.
///
/// # Errors
/// #PF when the table is not mapped.
pub fn lookup(cpu: &mut Cpu, selector: u16) -> Guest<Option<Descriptor>> {
    let Some(address) = address(cpu, selector, 8) else { return Ok(None) };
    let raw = cpu.sys_load(address, 8)?;
    Ok(Some(Descriptor { address, raw, selector }))
}

/// [`lookup`], where a selector outside its table is an exception with the selector as error code.
///
/// # Errors
/// `exception` (#GP or #TS) with the selector; #PF.
pub fn fetch(cpu: &mut Cpu, selector: u16, exception: u8) -> Guest<Descriptor> {
    lookup(cpu, selector)?.ok_or(Fault::with_error(exception, error_code(selector)))
}

/// The second 8 bytes of a 16-byte descriptor (64-bit mode: LDT, TSS, call gate).
///
/// # Errors
/// `exception` with the selector when they are outside the table or their type field is not zero; #PF.
pub fn fetch_high(cpu: &mut Cpu, low: &Descriptor, exception: u8) -> Guest<u64> {
    let invalid = Fault::with_error(exception, low.error());
    address(cpu, low.selector, 16).ok_or(invalid)?;
    let high = cpu.sys_load(low.address.wrapping_add(8), 8)?;
    if high >> 40 & 0x1f == 0 { Ok(high) } else { Err(invalid) }
}

/// Base address of an LDT or TSS descriptor: 64 bits wide in IA-32e mode.
///
/// # Errors
/// As [`fetch_high`]; #GP(selector) for a non-canonical base.
pub fn system_base(cpu: &mut Cpu, low: &Descriptor) -> Guest<u64> {
    if !cpu.s.is_long() {
        return Ok(low.base());
    }
    let base = low.base() | fetch_high(cpu, low, vector::GP)? << 32;
    if is_canonical(base) { Ok(base) } else { Err(Fault::gp(low.error())) }
}

/// Sets the accessed bit of a code or data descriptor in its table, if it is not set, and in `descriptor`.
///
/// # Errors
/// #PF when the table cannot be written.
pub fn mark_accessed(cpu: &mut Cpu, descriptor: &mut Descriptor) -> Guest<()> {
    let accessed = u64::from(Segment::TYPE_ACCESSED) << 40;
    if descriptor.raw & accessed == 0 {
        descriptor.raw |= accessed;
        cpu.sys_store(descriptor.address.wrapping_add(5), 1, descriptor.raw >> 40 & 0xff)?;
    }
    Ok(())
}

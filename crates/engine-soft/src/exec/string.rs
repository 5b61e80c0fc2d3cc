//! String instructions (SDM volume 2, MOVS, STOS, LODS, CMPS, SCAS, INS, OUTS, REP).
//!
//! A repeated instruction advances in chunks. A chunk is as many elements as lie in one page at each side; the
//! host's own instruction does it, so that overlap and flags come out as on hardware. Where there is no host
//! page (MMIO, page crossings, code pages, segment limits), a chunk is one element. After each chunk RCX, RSI and
//! RDI are committed: a fault in the next one, or an interrupt, leaves the state of an instruction that has come
//! that far.

use std::arch::asm;

use berth_cpu::bits::{gpr, rflags};
use iced_x86::{Instruction, OpKind};

use super::{io, operands};
use crate::code::Flow;
use crate::cpu::Cpu;
use crate::fault::{Fault, Guest};
use crate::memory::Access;
use crate::mode::Mode;
use crate::state::{SavedFlags, Seg, State};

/// What an instruction's encoding and prefixes say.
#[derive(Clone, Copy, Debug)]
struct Shape {
    /// Bytes of one element: 1, 2, 4 or 8.
    width: usize,
    /// Bytes of the index registers and the counter: 2, 4 or 8.
    address_size: usize,
    /// Segment of the source.
    source: Seg,
    /// Any REP prefix.
    repeated: bool,
    /// For CMPS and SCAS: goes on while ZF has this value.
    while_zero: bool,
    /// DF.
    backward: bool,
}

/// A piece of memory that one host instruction can work on.
#[derive(Clone, Copy, Debug)]
struct Span {
    /// The first element, at the highest address if backward.
    host: *mut u8,
    /// Elements, at least 1.
    count: u64,
}

/// Elements that a chunk has done, and whether the comparison ends the repetition.
struct Chunk {
    done: u64,
    ends: bool,
}

impl Shape {
    fn of(state: &State, insn: &Instruction) -> Guest<Self> {
        if !insn.is_string_instruction() {
            return Err(Fault::ud());
        }
        let address_size = insn.op_kinds().find_map(|kind| match kind {
            OpKind::MemorySegSI | OpKind::MemoryESDI => Some(2),
            OpKind::MemorySegESI | OpKind::MemoryESEDI => Some(4),
            OpKind::MemorySegRSI | OpKind::MemoryESRDI => Some(8),
            _ => None,
        });
        let named = operands::segment_register(insn.memory_segment()).unwrap_or(Seg::Ds);
        let flat = state.is_64bit() && !matches!(named, Seg::Fs | Seg::Gs);
        let width = insn.memory_size().size();
        match (address_size, width) {
            (Some(address_size), 1 | 2 | 4 | 8) => Ok(Self {
                width,
                address_size,
                source: if flat { Seg::Ds } else { named },
                repeated: insn.has_rep_prefix() || insn.has_repne_prefix(),
                while_zero: !insn.has_repne_prefix(),
                backward: state.direction != 0,
            }),
            _ => Err(Fault::ud()),
        }
    }

    fn mask(&self) -> u64 {
        operands::mask(self.address_size)
    }

    fn remaining(&self, state: &State) -> u64 {
        if self.repeated { state.gpr[gpr::RCX] & self.mask() } else { 1 }
    }

    fn offset(&self, state: &State, index: usize) -> u64 {
        operands::part(state, index, self.address_size)
    }

    /// Moves index register `index` over `count` elements.
    fn advance(&self, state: &mut State, index: usize, count: u64) {
        let bytes = count.wrapping_mul(self.width as u64);
        let old = state.gpr[index];
        let new = if self.backward { old.wrapping_sub(bytes) } else { old.wrapping_add(bytes) };
        operands::set_part(state, index, self.address_size, new);
    }

    /// At most `limit` elements from `offset` on in `seg` that are in one page with a host address. `None`: take
    /// one element through [`Cpu::load`] and [`Cpu::store`].
    fn span(&self, cpu: &mut Cpu, seg: Seg, offset: u64, limit: u64, access: Access) -> Guest<Option<Span>> {
        let width = self.width as u64;
        if cpu.s.mode.has(Mode::ALIGN) {
            return Ok(None);
        }
        let lin = cpu.linear(seg, offset, self.width, access)?;
        let in_page = lin & 0xfff;
        let last = self.mask() - offset;
        let (in_page, in_segment) = if !self.backward {
            // `last` is one less than the bytes up to the wrap of the address size.
            ((4096 - in_page) / width, (last / width).saturating_add(u64::from(last % width == width - 1)))
        } else if in_page + width <= 4096 {
            (in_page / width + 1, if last >= width - 1 { offset / width + 1 } else { 0 })
        } else {
            (0, 0)
        };
        let count = limit.min(in_page).min(in_segment);
        if count == 0 {
            return Ok(None);
        }
        let lowest = if self.backward { offset - (count - 1) * width } else { offset };
        if cpu.linear(seg, lowest, (count * width) as usize, access).is_err() {
            return Ok(None);
        }
        let page = cpu.page_pointer(lin, access)?;
        Ok(page.map(|host| Span { host, count }))
    }

    /// Runs `chunk` until the counter is zero, a comparison ends it, or something waits for the vCPU. `indices`
    /// are the index registers that advance.
    fn repeat(
        &self,
        cpu: &mut Cpu,
        indices: &[usize],
        chunk: impl Fn(&mut Cpu, u64) -> Guest<Chunk>,
    ) -> Guest<Flow> {
        // Each iteration can trap: RFLAGS.TF, data breakpoints.
        let watched = cpu.s.mode.has(Mode::WATCHED);
        loop {
            let remaining = self.remaining(&cpu.s);
            if remaining == 0 {
                return Ok(Flow::Next);
            }
            let Chunk { done, ends } = chunk(cpu, if watched { 1 } else { remaining })?;
            for &index in indices {
                self.advance(&mut cpu.s, index, done);
            }
            if !self.repeated {
                return Ok(Flow::Next);
            }
            operands::set_part(&mut cpu.s, gpr::RCX, self.address_size, remaining - done);
            if ends || done == remaining {
                return Ok(Flow::Next);
            }
            if watched || cpu.should_leave() {
                return Ok(Flow::Jump);
            }
        }
    }
}

/// MOVS.
///
/// # Errors
/// What the accesses raise; done elements stay done.
pub fn movs(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    let shape = Shape::of(&cpu.s, insn)?;
    shape.repeat(cpu, &[gpr::RSI, gpr::RDI], |cpu, limit| {
        let (si, di) = (shape.offset(&cpu.s, gpr::RSI), shape.offset(&cpu.s, gpr::RDI));
        if limit > 1
            && let Some(from) = shape.span(cpu, shape.source, si, limit, Access::Read)?
            && let Some(to) = shape.span(cpu, Seg::Es, di, from.count, Access::Write)?
        {
            // SAFETY: both spans are guest RAM of at least `to.count` elements in the direction of DF.
            unsafe { host_movs(shape.width, shape.backward, to.host, from.host, to.count) };
            return Ok(Chunk { done: to.count, ends: false });
        }
        let value = cpu.load(shape.source, si, shape.width)?;
        cpu.store(Seg::Es, di, shape.width, value)?;
        Ok(Chunk { done: 1, ends: false })
    })
}

/// STOS.
///
/// # Errors
/// What the stores raise; done elements stay done.
pub fn stos(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    let shape = Shape::of(&cpu.s, insn)?;
    shape.repeat(cpu, &[gpr::RDI], |cpu, limit| {
        let di = shape.offset(&cpu.s, gpr::RDI);
        let value = cpu.s.gpr[gpr::RAX];
        if limit > 1
            && let Some(to) = shape.span(cpu, Seg::Es, di, limit, Access::Write)?
        {
            // SAFETY: the span is guest RAM of `to.count` elements in the direction of DF.
            unsafe { host_stos(shape.width, shape.backward, to.host, value, to.count) };
            return Ok(Chunk { done: to.count, ends: false });
        }
        cpu.store(Seg::Es, di, shape.width, value)?;
        Ok(Chunk { done: 1, ends: false })
    })
}

/// LODS.
///
/// # Errors
/// What the loads raise; done elements stay done.
pub fn lods(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    let shape = Shape::of(&cpu.s, insn)?;
    shape.repeat(cpu, &[gpr::RSI], |cpu, _| {
        let si = shape.offset(&cpu.s, gpr::RSI);
        let value = cpu.load(shape.source, si, shape.width)?;
        operands::set_part(&mut cpu.s, gpr::RAX, shape.width, value);
        Ok(Chunk { done: 1, ends: false })
    })
}

/// What a host CMPS or SCAS leaves: elements compared, and the flags of the last comparison.
struct Compared {
    done: u64,
    flags: SavedFlags,
}

impl Compared {
    fn commit(self, cpu: &mut Cpu, shape: &Shape) -> Chunk {
        cpu.s.flags = self.flags;
        let zero = self.flags.to_rflags() & rflags::ZF != 0;
        Chunk { done: self.done, ends: zero != shape.while_zero }
    }
}

/// CMPS.
///
/// # Errors
/// What the loads raise; done elements stay done.
pub fn cmps(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    let shape = Shape::of(&cpu.s, insn)?;
    shape.repeat(cpu, &[gpr::RSI, gpr::RDI], |cpu, limit| {
        let (si, di) = (shape.offset(&cpu.s, gpr::RSI), shape.offset(&cpu.s, gpr::RDI));
        if limit > 1
            && let Some(left) = shape.span(cpu, shape.source, si, limit, Access::Read)?
            && let Some(right) = shape.span(cpu, Seg::Es, di, left.count, Access::Read)?
        {
            // SAFETY: both spans are guest RAM of at least `right.count` elements in the direction of DF.
            let compared = unsafe { host_cmps(&shape, left.host, right.host, right.count) };
            return Ok(compared.commit(cpu, &shape));
        }
        let left = cpu.load(shape.source, si, shape.width)?.to_le_bytes();
        let right = cpu.load(Seg::Es, di, shape.width)?.to_le_bytes();
        // SAFETY: one element of at most 8 bytes in each buffer.
        let compared = unsafe { host_cmps(&shape, left.as_ptr(), right.as_ptr(), 1) };
        Ok(compared.commit(cpu, &shape))
    })
}

/// SCAS.
///
/// # Errors
/// What the loads raise; done elements stay done.
pub fn scas(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    let shape = Shape::of(&cpu.s, insn)?;
    shape.repeat(cpu, &[gpr::RDI], |cpu, limit| {
        let di = shape.offset(&cpu.s, gpr::RDI);
        let wanted = cpu.s.gpr[gpr::RAX];
        if limit > 1
            && let Some(span) = shape.span(cpu, Seg::Es, di, limit, Access::Read)?
        {
            // SAFETY: the span is guest RAM of `span.count` elements in the direction of DF.
            let compared = unsafe { host_scas(&shape, wanted, span.host, span.count) };
            return Ok(compared.commit(cpu, &shape));
        }
        let element = cpu.load(Seg::Es, di, shape.width)?.to_le_bytes();
        // SAFETY: one element of at most 8 bytes in the buffer.
        let compared = unsafe { host_scas(&shape, wanted, element.as_ptr(), 1) };
        Ok(compared.commit(cpu, &shape))
    })
}

/// INS. The destination is checked before the port is read, because reading can change the device.
///
/// # Errors
/// #GP(0) without permission for the port; what the stores raise.
pub fn ins(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    let shape = Shape::of(&cpu.s, insn)?;
    let port = cpu.s.gpr[gpr::RDX] as u16;
    io::check(cpu, port, shape.width)?;
    shape.repeat(cpu, &[gpr::RDI], |cpu, _| {
        let di = shape.offset(&cpu.s, gpr::RDI);
        cpu.probe_write(Seg::Es, di, shape.width)?;
        let mut data = [0; 8];
        cpu.bus().port_read(port, &mut data[..shape.width]);
        cpu.store(Seg::Es, di, shape.width, u64::from_le_bytes(data))?;
        Ok(Chunk { done: 1, ends: false })
    })
}

/// OUTS.
///
/// # Errors
/// #GP(0) without permission for the port; what the loads raise.
pub fn outs(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    let shape = Shape::of(&cpu.s, insn)?;
    let port = cpu.s.gpr[gpr::RDX] as u16;
    io::check(cpu, port, shape.width)?;
    shape.repeat(cpu, &[gpr::RSI], |cpu, _| {
        let si = shape.offset(&cpu.s, gpr::RSI);
        let data = cpu.load(shape.source, si, shape.width)?.to_le_bytes();
        cpu.bus().port_write(port, &data[..shape.width]);
        Ok(Chunk { done: 1, ends: false })
    })
}

/// Runs one repeated host instruction (and more after it) with DF set around it if `$backward`. DF is clear before and after.
macro_rules! host_string {
    ($backward:expr, [$($insn:literal),*], $($operands:tt)*) => {
        if $backward {
            asm!("std", $($insn,)* "cld", $($operands)*)
        } else {
            asm!($($insn,)* $($operands)*)
        }
    };
}

/// The host's REP MOVS.
///
/// # Safety
/// `count` elements of `width` bytes must be readable from `from` on and writable from `to` on, towards lower
/// addresses if `backward`.
unsafe fn host_movs(width: usize, backward: bool, to: *mut u8, from: *const u8, count: u64) {
    macro_rules! run {
        ($insn:literal) => {
            // SAFETY: the caller's promise; the direction flag is clear again afterwards.
            unsafe {
                host_string!(backward, [$insn], inout("rcx") count => _, inout("rsi") from => _,
                    inout("rdi") to => _, options(nostack))
            }
        };
    }
    match width {
        1 => run!("rep movsb"),
        2 => run!("rep movsw"),
        4 => run!("rep movsd"),
        _ => run!("rep movsq"),
    }
}

/// The host's REP STOS.
///
/// # Safety
/// `count` elements of `width` bytes must be writable from `to` on, towards lower addresses if `backward`.
unsafe fn host_stos(width: usize, backward: bool, to: *mut u8, value: u64, count: u64) {
    macro_rules! run {
        ($insn:literal) => {
            // SAFETY: the caller's promise; the direction flag is clear again afterwards.
            unsafe {
                host_string!(backward, [$insn], inout("rcx") count => _, inout("rdi") to => _, in("rax") value,
                    options(nostack))
            }
        };
    }
    match width {
        1 => run!("rep stosb"),
        2 => run!("rep stosw"),
        4 => run!("rep stosd"),
        _ => run!("rep stosq"),
    }
}

/// The host's REPE or REPNE CMPS.
///
/// # Safety
/// `count` (at least 1) elements must be readable from `left` and `right` on, towards lower addresses if
/// backward.
unsafe fn host_cmps(shape: &Shape, left: *const u8, right: *const u8, count: u64) -> Compared {
    let (rest, ax): (u64, u16);
    macro_rules! run {
        ($insn:literal) => {
            // SAFETY: the caller's promise; the direction flag is clear again afterwards.
            unsafe {
                host_string!(shape.backward, [$insn, "lahf", "seto al"], inout("rcx") count => rest,
                    inout("rsi") left => _, inout("rdi") right => _, out("ax") ax, options(nostack, readonly))
            }
        };
    }
    match (shape.width, shape.while_zero) {
        (1, true) => run!("repe cmpsb"),
        (2, true) => run!("repe cmpsw"),
        (4, true) => run!("repe cmpsd"),
        (_, true) => run!("repe cmpsq"),
        (1, false) => run!("repne cmpsb"),
        (2, false) => run!("repne cmpsw"),
        (4, false) => run!("repne cmpsd"),
        (_, false) => run!("repne cmpsq"),
    }
    Compared { done: count - rest, flags: SavedFlags(ax) }
}

/// The host's REPE or REPNE SCAS.
///
/// # Safety
/// `count` (at least 1) elements must be readable from `at` on, towards lower addresses if backward.
unsafe fn host_scas(shape: &Shape, wanted: u64, at: *const u8, count: u64) -> Compared {
    let (rest, rax): (u64, u64);
    macro_rules! run {
        ($insn:literal) => {
            // SAFETY: the caller's promise; the direction flag is clear again afterwards.
            unsafe {
                host_string!(shape.backward, [$insn, "lahf", "seto al"], inout("rcx") count => rest,
                    inout("rdi") at => _, inout("rax") wanted => rax, options(nostack, readonly))
            }
        };
    }
    match (shape.width, shape.while_zero) {
        (1, true) => run!("repe scasb"),
        (2, true) => run!("repe scasw"),
        (4, true) => run!("repe scasd"),
        (_, true) => run!("repe scasq"),
        (1, false) => run!("repne scasb"),
        (2, false) => run!("repne scasw"),
        (4, false) => run!("repne scasd"),
        (_, false) => run!("repne scasq"),
    }
    Compared { done: count - rest, flags: SavedFlags(rax as u16) }
}

#[cfg(test)]
#[path = "string_tests.rs"]
mod tests;

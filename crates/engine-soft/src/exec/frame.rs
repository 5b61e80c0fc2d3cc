//! The stack: several values are pushed together or not at all.
//!
//! [`push_all`] uses the current stack as instructions do; [`NewStack`] is the stack that a change of privilege
//! switches to, before SS:RSP hold it.

use berth_cpu::Segment;
use berth_cpu::bits::{gpr, vector};

use super::operands::is_canonical;
use crate::cpu::Cpu;
use crate::fault::{Fault, Guest};
use crate::mode::Mode;
use crate::state::{Seg, State};

/// Most values in one frame: SS, SP, 31 parameters, CS, IP.
pub const MAX_FRAME: usize = 35;

/// Which bits of RSP address the stack: 64-bit mode uses all, else SS.B chooses between ESP and SP (SDM volume 1,
/// 6.2.3).
pub fn stack_mask(state: &State) -> u64 {
    if state.is_64bit() { u64::MAX } else { mask_of(state.seg(Seg::Ss)) }
}

/// Mask of the stack pointer outside 64-bit mode.
pub fn mask_of(ss: &Segment) -> u64 {
    if ss.attr & Segment::DB != 0 { 0xffff_ffff } else { 0xffff }
}

/// The stack pointer's value in the current mode.
pub fn pointer(state: &State) -> u64 {
    state.gpr[gpr::RSP] & stack_mask(state)
}

/// RSP with `value` as stack pointer: a 16-bit stack has only SP.
pub fn with_pointer(state: &State, value: u64) -> u64 {
    merge(state.gpr[gpr::RSP], value, stack_mask(state))
}

fn merge(rsp: u64, value: u64, mask: u64) -> u64 {
    let kept = if mask == 0xffff { rsp & !mask } else { 0 };
    kept | value & mask
}

/// Sets the stack pointer.
pub fn set_pointer(state: &mut State, value: u64) {
    state.gpr[gpr::RSP] = with_pointer(state, value);
}

/// Pushes one value of `size` (2, 4 or 8) bytes.
///
/// # Errors
/// What the store raises; nothing changed then.
pub fn push(cpu: &mut Cpu, size: usize, value: u64) -> Guest<()> {
    let sp = pointer(&cpu.s).wrapping_sub(size as u64) & stack_mask(&cpu.s);
    cpu.store(Seg::Ss, sp, size, value)?;
    set_pointer(&mut cpu.s, sp);
    Ok(())
}

/// Loads `size` bytes, `above` bytes above the stack pointer, and pops nothing.
///
/// # Errors
/// What the load raises.
pub fn peek(cpu: &mut Cpu, above: u64, size: usize) -> Guest<u64> {
    let sp = pointer(&cpu.s).wrapping_add(above) & stack_mask(&cpu.s);
    cpu.load(Seg::Ss, sp, size)
}

/// Moves the stack pointer up by `bytes`.
pub fn drop_bytes(state: &mut State, bytes: u64) {
    let sp = pointer(state).wrapping_add(bytes);
    set_pointer(state, sp);
}

/// Writes `values` of `size` bytes below the stack pointer, the first one highest, and returns the new stack
/// pointer without setting it.
///
/// # Errors
/// What the first failing push raises; nothing was written then.
pub fn write_all(cpu: &mut Cpu, size: usize, values: &[u64]) -> Guest<u64> {
    let mask = stack_mask(&cpu.s);
    let sp = pointer(&cpu.s);
    let total = (values.len() * size) as u64;
    let low = sp.wrapping_sub(total) & mask;
    let wraps = low > low.wrapping_add(total - 1) & mask;
    let crosses = low & 0xfff > low.wrapping_add(total - 1) & 0xfff;
    if wraps || crosses || cpu.s.mode.has(Mode::ALIGN) || values.len() > MAX_FRAME {
        // One by one from the top, as the CPU does, so that the first fault is the right one.
        let slots = || (1..=values.len() as u64).map(|n| sp.wrapping_sub(n * size as u64) & mask);
        for slot in slots() {
            if cpu.s.mode.has(Mode::ALIGN) && slot & (size as u64 - 1) != 0 {
                return Err(Fault::with_error(vector::AC, 0));
            }
            cpu.probe_write(Seg::Ss, slot, size)?;
        }
        for (slot, value) in slots().zip(values) {
            cpu.store(Seg::Ss, slot, size, *value)?;
        }
        return Ok(low);
    }
    let mut bytes = [0; MAX_FRAME * 8];
    cpu.store_bytes(Seg::Ss, low, image(&mut bytes, size, values))?;
    Ok(low)
}

/// [`write_all`], and the stack pointer is set.
///
/// # Errors
/// As [`write_all`].
pub fn push_all(cpu: &mut Cpu, size: usize, values: &[u64]) -> Guest<()> {
    let sp = write_all(cpu, size, values)?;
    set_pointer(&mut cpu.s, sp);
    Ok(())
}

/// The frame as bytes in memory order.
fn image<'a>(bytes: &'a mut [u8; MAX_FRAME * 8], size: usize, values: &[u64]) -> &'a [u8] {
    let slots = bytes.chunks_exact_mut(size);
    for (slot, value) in slots.zip(values.iter().rev()) {
        slot.copy_from_slice(&value.to_le_bytes()[..size]);
    }
    &bytes[..values.len() * size]
}

/// A stack that is about to become the current one.
#[derive(Clone, Copy, Debug)]
pub struct NewStack {
    /// Contents of SS.
    pub ss: Segment,
    /// Stack pointer before anything is pushed.
    pub sp: u64,
    /// Privilege level that uses it.
    pub cpl: u8,
    /// 64-bit mode: no segmentation, and all bits of `sp` count.
    pub flat64: bool,
    /// Error code of #SS for this stack: 0, or the selector for a stack from the TSS.
    pub error: u32,
}

impl NewStack {
    fn mask(&self) -> u64 {
        if self.flat64 { u64::MAX } else { mask_of(&self.ss) }
    }

    /// Linear address of `len` bytes at stack pointer `sp`, after the checks of limit and canonicality.
    fn linear(&self, sp: u64, len: u64) -> Guest<u64> {
        let violation = Fault::with_error(vector::SS, self.error);
        if self.flat64 {
            let valid = is_canonical(sp) && is_canonical(sp.wrapping_add(len - 1));
            return if valid { Ok(sp) } else { Err(violation) };
        }
        let limit = u64::from(self.ss.limit);
        let last = sp + len - 1;
        let valid =
            if self.ss.is_expand_down() { sp > limit && last <= mask_of(&self.ss) } else { last <= limit };
        if valid { Ok(self.ss.base.wrapping_add(sp) & 0xffff_ffff) } else { Err(violation) }
    }

    /// Pushes `values` of `size` bytes, the first one highest, and returns the new stack pointer.
    ///
    /// # Errors
    /// #SS for the limit or a non-canonical address, #PF; nothing was written then.
    pub fn push_all(&self, cpu: &mut Cpu, size: usize, values: &[u64]) -> Guest<u64> {
        let mask = self.mask();
        let slot = |n: usize| self.sp.wrapping_sub(((n + 1) * size) as u64) & mask;
        for n in 0..values.len() {
            let lin = self.linear(slot(n), size as u64)?;
            // In a flat stack the slots are contiguous: probing the first one in each page is enough.
            if !self.flat64 || n == 0 || n + 1 == values.len() || lin & 0xfff > 0x1000 - 2 * size as u64 {
                cpu.probe_write_as(self.cpl, lin, size)?;
            }
        }
        for (n, value) in values.iter().enumerate() {
            let lin = self.linear(slot(n), size as u64)?;
            cpu.store_as(self.cpl, lin, size, *value)?;
        }
        Ok(self.sp.wrapping_sub((values.len() * size) as u64) & mask)
    }

    /// Makes it the current stack with stack pointer `sp`. The caller calls [`Cpu::mode_changed`].
    pub fn enter(&self, state: &mut State, sp: u64) {
        state.gpr[gpr::RSP] = merge(state.gpr[gpr::RSP], sp, self.mask());
        *state.seg_mut(Seg::Ss) = self.ss;
    }
}

//! Decimal arithmetic, SALC, XLAT, BOUND, CLI and STI (SDM volume 2).

use berth_cpu::bits::{gpr, rflags, vector};
use iced_x86::{Instruction, Mnemonic, OpKind};

use super::operands::{self, al, mask};
use crate::code::Flow;
use crate::cpu::Cpu;
use crate::fault::{Fault, Guest};
use crate::state::{SavedFlags, State};

/// AAA, AAS, AAD, AAM, DAA, DAS. Flags that the SDM leaves undefined follow the result, or are cleared.
///
/// # Errors
/// #DE for AAM with 0.
pub fn decimal(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    let ax = cpu.s.gpr[gpr::RAX] as u16;
    let flags = cpu.s.flags.to_rflags();
    let (carry, adjust) = (flags & rflags::CF != 0, flags & rflags::AF != 0);
    let (ax, cf, af) = match insn.mnemonic() {
        Mnemonic::Aaa => ascii(ax, adjust, |ax| ax.wrapping_add(0x106)),
        Mnemonic::Aas => ascii(ax, adjust, |ax| ax.wrapping_sub(0x106)),
        Mnemonic::Aad => {
            let al = ((ax >> 8) as u8).wrapping_mul(insn.immediate8()).wrapping_add(ax as u8);
            (u16::from(al), false, false)
        }
        Mnemonic::Aam => {
            let base = u16::from(insn.immediate8());
            let al = ax & 0xff;
            let (Some(high), Some(low)) = (al.checked_div(base), al.checked_rem(base)) else {
                return Err(Fault::plain(vector::DE));
            };
            (high << 8 | low, false, false)
        }
        mnemonic => packed(ax, carry, adjust, mnemonic == Mnemonic::Das),
    };
    operands::set_part(&mut cpu.s, gpr::RAX, 2, u64::from(ax));
    set_result_flags(&mut cpu.s, ax as u8, cf, af);
    Ok(Flow::Next)
}

fn ascii(ax: u16, adjust: bool, correct: impl Fn(u16) -> u16) -> (u16, bool, bool) {
    let needed = ax & 0xf > 9 || adjust;
    let ax = if needed { correct(ax) } else { ax };
    (ax & 0xff0f, needed, needed)
}

fn packed(ax: u16, carry: bool, adjust: bool, subtract: bool) -> (u16, bool, bool) {
    let old = ax as u8;
    let low = old & 0xf > 9 || adjust;
    let high = old > 0x99 || carry;
    let correction = if low { 6 } else { 0 } + if high { 0x60 } else { 0 };
    let al = if subtract { old.wrapping_sub(correction) } else { old.wrapping_add(correction) };
    // DAS: a borrow from the low digit counts even if the high digit needs no correction.
    let borrow = subtract && low && old < 6;
    (ax & 0xff00 | u16::from(al), high || borrow, low)
}

/// SF, ZF and PF from `result`; OF clear.
fn set_result_flags(state: &mut State, result: u8, cf: bool, af: bool) {
    let bit = |on: bool, flag: u64| if on { flag } else { 0 };
    state.flags = SavedFlags::from_rflags(
        bit(cf, rflags::CF)
            | bit(af, rflags::AF)
            | bit(result == 0, rflags::ZF)
            | bit(result & 0x80 != 0, rflags::SF)
            | bit(result.count_ones().is_multiple_of(2), rflags::PF),
    );
}

/// SALC: AL becomes 0 or 0xff as CF is.
///
/// # Errors
/// None; the result type is that of every helper.
pub fn salc(cpu: &mut Cpu) -> Guest<Flow> {
    let value = if cpu.s.flags.to_rflags() & rflags::CF != 0 { 0xff } else { 0 };
    operands::set_part(&mut cpu.s, gpr::RAX, 1, value);
    Ok(Flow::Next)
}

/// XLAT: AL = [BX + AL], with the address size's BX.
///
/// # Errors
/// What the load raises.
pub fn xlat(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    let size = operands::address_size(insn);
    let offset = cpu.s.gpr[gpr::RBX].wrapping_add(u64::from(al(&cpu.s))) & mask(size);
    let seg = operands::segment(&cpu.s, insn);
    let value = cpu.load(seg, offset, 1)?;
    operands::set_part(&mut cpu.s, gpr::RAX, 1, value);
    Ok(Flow::Next)
}

/// BOUND.
///
/// # Errors
/// #BR outside the bounds, #UD without a memory operand, and those of the loads.
pub fn bound(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    let size = insn.op0_register().size();
    if insn.op1_kind() != OpKind::Memory || !matches!(size, 2 | 4) {
        return Err(Fault::ud());
    }
    let (seg, offset) = (operands::segment(&cpu.s, insn), operands::offset(&cpu.s, insn));
    let after = offset.wrapping_add(size as u64) & mask(operands::address_size(insn));
    let signed = |value| operands::sign_extend(value, size);
    let lower = signed(cpu.load(seg, offset, size)?);
    let upper = signed(cpu.load(seg, after, size)?);
    let index = signed(operands::read(cpu, insn, 0)?);
    if (lower..=upper).contains(&index) { Ok(Flow::Next) } else { Err(Fault::plain(vector::BR)) }
}

/// Whether CPL ≤ IOPL; in virtual-8086 mode IOPL must be 3. (VME and PVI are not offered to guests.)
fn check_io_privilege(state: &State) -> Guest<()> {
    if state.cpl() <= state.iopl() { Ok(()) } else { Err(Fault::gp(0)) }
}

/// CLI.
///
/// # Errors
/// #GP(0) with CPL above IOPL.
pub fn cli(cpu: &mut Cpu) -> Guest<Flow> {
    check_io_privilege(&cpu.s)?;
    cpu.s.interrupt_flag = 0;
    Ok(Flow::Next)
}

/// STI: interrupts are possible after the next instruction, if they were off (SDM volume 2, STI).
///
/// # Errors
/// #GP(0) with CPL above IOPL.
pub fn sti(cpu: &mut Cpu) -> Guest<Flow> {
    check_io_privilege(&cpu.s)?;
    if cpu.s.interrupt_flag != 0 {
        return Ok(Flow::Next);
    }
    cpu.s.interrupt_flag = 1;
    cpu.s.interrupt_shadow = true;
    Ok(Flow::Leave)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_decimal_corrections_are_those_of_the_manual() {
        // SDM volume 2, DAA and DAS: the examples.
        assert_eq!(packed(0x00ae, false, false, false), (0x0014, true, true));
        assert_eq!(packed(0x002e, false, false, false), (0x0034, false, true));
        assert_eq!(packed(0x00ee, true, true, true), (0x0088, true, true));
        assert_eq!(packed(0x0003, false, true, true), (0x00fd, true, true));
    }

    #[test]
    fn ascii_corrections_carry_into_ah() {
        assert_eq!(ascii(0x000a, false, |ax| ax.wrapping_add(0x106)), (0x0100, true, true));
        assert_eq!(ascii(0x0105, false, |ax| ax.wrapping_add(0x106)), (0x0105, false, false));
    }
}

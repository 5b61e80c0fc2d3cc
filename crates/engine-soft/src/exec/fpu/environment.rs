//! FNSTENV, FLDENV, FNSAVE and FRSTOR (SDM volume 1, 8.1.10 and 8.1.11).

use berth_cpu::bits::vector;
use iced_x86::{Instruction, Mnemonic};

use super::require_x87;
use super::x87::X87;
use crate::code::Flow;
use crate::cpu::Cpu;
use crate::exec::operands;
use crate::fault::{Fault, Guest};
use crate::memory::Access;

/// Bytes of an environment for 32-bit and 16-bit operand size.
const ENVIRONMENT_32: usize = 28;
const ENVIRONMENT_16: usize = 14;
/// Bytes of the eight registers after it.
const REGISTERS: usize = 80;

/// Bytes of the environment and of the whole image that `insn` has in memory.
fn sizes(insn: &Instruction) -> Guest<(usize, usize)> {
    match operands::size(insn, 0) {
        size @ (ENVIRONMENT_32 | ENVIRONMENT_16) => Ok((size, size)),
        size if size == ENVIRONMENT_32 + REGISTERS => Ok((ENVIRONMENT_32, size)),
        size if size == ENVIRONMENT_16 + REGISTERS => Ok((ENVIRONMENT_16, size)),
        _ => Err(Fault::ud()),
    }
}

/// Bytes of each of an environment's seven words: the operand size.
fn word_size(environment: usize) -> usize {
    environment / 7
}

/// The image of `x87`. Unused upper halves are ones, addresses and opcode zero.
fn image(x87: &X87, environment: usize) -> [u8; ENVIRONMENT_32 + REGISTERS] {
    let mut image = [0; ENVIRONMENT_32 + REGISTERS];
    let words = [x87.fcw, x87.fsw, x87.full_tags()];
    let step = word_size(environment);
    for (slot, word) in image.chunks_exact_mut(step).zip(words) {
        slot.fill(0xff);
        slot[..2].copy_from_slice(&word.to_le_bytes());
    }
    if environment == ENVIRONMENT_32 {
        // The upper half of the operand selector's word.
        image[26..28].fill(0xff);
    }
    for (slot, st) in image[environment..].chunks_exact_mut(10).zip(&x87.st) {
        slot.copy_from_slice(st);
    }
    image
}

/// FNSTENV and FNSAVE; the former then masks all exceptions, the latter initializes the x87.
///
/// # Errors
/// #NM, #AC, and what writing memory raises.
pub fn store_environment(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    require_x87(&cpu.s)?;
    let (environment, total) = sizes(insn)?;
    let mut x87 = X87::host();
    if matches!(insn.mnemonic(), Mnemonic::Fstenv | Mnemonic::Fsave) {
        require_no_exception(&x87)?;
    }
    let (seg, offset) = (operands::segment(&cpu.s, insn), operands::offset(&cpu.s, insn));
    cpu.require_aligned(seg, offset, total, Access::Write, word_size(environment))?;
    cpu.store_bytes(seg, offset, &image(&x87, environment)[..total])?;
    if total == environment {
        x87.mask_exceptions();
    } else {
        // FNINIT leaves the data registers alone, but ST(0) is physical register 0 again.
        let top = x87.top();
        x87.st.rotate_right(top);
        x87 = X87 { st: x87.st, ..X87::default() };
    }
    x87.load();
    Ok(Flow::Next)
}

fn require_no_exception(x87: &X87) -> Guest<()> {
    if x87.exception_waits() { Err(Fault::plain(vector::MF)) } else { Ok(()) }
}

/// FLDENV and FRSTOR.
///
/// # Errors
/// #NM, #MF for an exception that waits, #AC, and what reading memory raises.
pub fn load_environment(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    require_x87(&cpu.s)?;
    let (environment, total) = sizes(insn)?;
    let mut x87 = X87::host();
    require_no_exception(&x87)?;
    let mut image = [0; ENVIRONMENT_32 + REGISTERS];
    let (seg, offset) = (operands::segment(&cpu.s, insn), operands::offset(&cpu.s, insn));
    cpu.require_aligned(seg, offset, total, Access::Read, word_size(environment))?;
    cpu.load_bytes(seg, offset, &mut image[..total])?;
    parse(&mut x87, &image[..total], environment);
    x87.load();
    Ok(Flow::Next)
}

/// Changes `x87` to what `image` says: an environment, perhaps followed by registers.
fn parse(x87: &mut X87, image: &[u8], environment: usize) {
    let (environment, registers) = image.split_at(environment.min(image.len()));
    let step = word_size(environment.len());
    let word = |n: usize| u16::from_le_bytes([environment[n * step], environment[n * step + 1]]);
    if registers.is_empty() {
        // The registers stay where they are, but which one is ST(0) may change.
        let old_top = x87.top();
        x87.fsw = word(1);
        let new_top = x87.top();
        x87.st.rotate_right(old_top);
        x87.st.rotate_left(new_top);
    } else {
        x87.fsw = word(1);
        for (st, slot) in x87.st.iter_mut().zip(registers.chunks_exact(10)) {
            st.copy_from_slice(slot);
        }
    }
    x87.fcw = word(0);
    x87.set_full_tags(word(2));
    x87.update_summary();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> X87 {
        let mut x87 = X87 { fcw: 0x37e, fsw: 0x3000, ftw: 0b0100_0000, ..X87::default() };
        x87.st[0] = [1, 2, 3, 4, 5, 6, 7, 0x88, 0x12, 0x40];
        x87
    }

    #[test]
    fn images_of_both_sizes_give_the_state_back() {
        for environment in [ENVIRONMENT_16, ENVIRONMENT_32] {
            let image = image(&sample(), environment);
            let mut back = X87::default();
            parse(&mut back, &image[..environment + REGISTERS], environment);
            assert_eq!(back, sample(), "{environment}");
        }
    }

    #[test]
    fn environments_are_laid_out_as_in_the_manual() {
        let long = image(&sample(), ENVIRONMENT_32);
        assert_eq!(long[..12], [0x7e, 3, 0xff, 0xff, 0, 0x30, 0xff, 0xff, 0xff, 0xcf, 0xff, 0xff]);
        assert!(long[12..26].iter().all(|&b| b == 0));
        let short = image(&sample(), ENVIRONMENT_16);
        assert_eq!(short[..6], [0x7e, 3, 0, 0x30, 0xff, 0xcf]);
        assert!(short[6..14].iter().all(|&b| b == 0));
        assert_eq!(short[14], 1);
    }

    /// What the host's own FNSAVE writes for `x87`, with 32-bit operand size.
    fn native_fnsave(x87: &X87) -> [u8; ENVIRONMENT_32 + REGISTERS] {
        let mut image = [0; ENVIRONMENT_32 + REGISTERS];
        let keep = X87::host();
        x87.load();
        // SAFETY: FNSAVE writes the 108 bytes of `image` and initializes the x87, which is restored below.
        unsafe { std::arch::asm!("fnsave [{}]", in(reg) &raw mut image, options(nostack)) };
        keep.load();
        image
    }

    #[test]
    fn images_are_what_the_host_writes() {
        let kinds: [[u8; 10]; 6] = [
            [0; 10],                                 // zero
            [0, 0, 0, 0, 0, 0, 0, 0x80, 0, 0x80],    // pseudo-denormal
            [1, 0, 0, 0, 0, 0, 0, 0, 0, 0],          // denormal
            [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x7f], // infinity
            [0, 0, 0, 0, 0, 0, 0, 0x40, 0xff, 0x3f], // unnormal
            [9, 8, 7, 6, 5, 4, 3, 0x82, 1, 0xc0],    // normal
        ];
        for top in 0..8 {
            let mut x87 = X87 { fcw: 0x37f, fsw: top << 11 | 0x4502, ftw: 0b1101_1011, ..X87::default() };
            for (st, kind) in x87.st.iter_mut().zip(kinds.iter().cycle()) {
                *st = *kind;
            }
            let mut native = native_fnsave(&x87);
            // Addresses, selectors and opcode.
            native[12..26].fill(0);
            assert_eq!(image(&x87, ENVIRONMENT_32), native, "TOP {top}");
        }
    }

    #[test]
    fn loading_an_environment_moves_no_register() {
        let mut x87 = sample();
        let new_top = X87 { fsw: 0x3800, ..sample() };
        parse(&mut x87, &image(&new_top, ENVIRONMENT_32)[..ENVIRONMENT_32], ENVIRONMENT_32);
        // Physical register 6 was ST(0) with TOP 6; with TOP 7 it is ST(7).
        assert_eq!(x87.st[7], sample().st[0]);
        assert_eq!(x87.mmx(6), sample().mmx(6));
    }
}

//! FXSAVE and FXRSTOR (SDM volume 1, 10.5; volume 2).

use berth_cpu::bits::cr0;
use iced_x86::Instruction;

use super::x87::{self, X87};
use super::{require_clear, vector_registers};
use crate::code::Flow;
use crate::cpu::Cpu;
use crate::exec::operands;
use crate::fault::{Fault, Guest};
use crate::memory::Access;
use crate::state::{Seg, State};

/// Bytes that the instructions access.
const AREA: usize = 512;
/// Offset of XMM0 in the area, and size of a register.
pub(super) const XMM: usize = 160;
pub(super) const XMM_SIZE: usize = 16;

/// The memory operand of `len` bytes, which must have the given alignment.
pub(super) fn aligned_operand(
    cpu: &Cpu,
    insn: &Instruction,
    len: usize,
    alignment: u64,
    access: Access,
) -> Guest<(Seg, u64)> {
    let (seg, offset) = (operands::segment(&cpu.s, insn), operands::offset(&cpu.s, insn));
    let lin = cpu.linear(seg, offset, len, access)?;
    if lin % alignment != 0 { Err(Fault::gp(0)) } else { Ok((seg, offset)) }
}

/// The memory operand of FXSAVE and FXRSTOR. Where RFLAGS.AC is checked, #AC comes before #GP for what is not even
/// aligned to 4 bytes (measured on AMD's Zen 5; SDM volume 2 leaves it to the implementation).
fn operand(cpu: &mut Cpu, insn: &Instruction, access: Access) -> Guest<(Seg, u64)> {
    let (seg, offset) = (operands::segment(&cpu.s, insn), operands::offset(&cpu.s, insn));
    cpu.require_aligned(seg, offset, AREA, access, 4)?;
    aligned_operand(cpu, insn, AREA, 16, access)
}

/// FXSAVE and FXSAVE64. Bytes 416 to 511 are not written.
///
/// # Errors
/// #NM, #AC or #GP(0) for a misaligned operand, and what writing memory raises.
pub fn fxsave(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    require_clear(&cpu.s, cr0::EM | cr0::TS)?;
    let (seg, offset) = operand(cpu, insn, Access::Write)?;
    cpu.probe_write(seg, offset, AREA)?;
    let mut image = [0; AREA];
    X87::host().write(&mut image);
    write_mxcsr(&cpu.s, &mut image);
    let end = write_xmm(&cpu.s, &mut image);
    cpu.store_bytes(seg, offset, &image[..end])?;
    Ok(Flow::Next)
}

/// FXRSTOR and FXRSTOR64.
///
/// # Errors
/// #NM, #AC or #GP(0) for a misaligned operand, #GP(0) for reserved bits in MXCSR, and what reading memory raises.
pub fn fxrstor(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    require_clear(&cpu.s, cr0::EM | cr0::TS)?;
    let (seg, offset) = operand(cpu, insn, Access::Read)?;
    let mut image = [0; AREA];
    cpu.load_bytes(seg, offset, &mut image)?;
    let mxcsr = read_mxcsr(&image)?;
    X87::parse(&image).load();
    cpu.s.mxcsr = mxcsr;
    read_xmm(&mut cpu.s, &image);
    Ok(Flow::Next)
}

/// MXCSR and its mask into bytes 24 to 31.
pub(super) fn write_mxcsr(state: &State, image: &mut [u8; AREA]) {
    image[24..28].copy_from_slice(&state.mxcsr.to_le_bytes());
    image[28..32].copy_from_slice(&x87::mxcsr_mask().to_le_bytes());
}

/// MXCSR from bytes 24 to 27.
///
/// # Errors
/// #GP(0) for reserved bits.
pub(super) fn read_mxcsr(image: &[u8; AREA]) -> Guest<u32> {
    let value = u32::from_le_bytes([image[24], image[25], image[26], image[27]]);
    if value & !x87::mxcsr_mask() != 0 { Err(Fault::gp(0)) } else { Ok(value) }
}

/// The XMM registers of the current mode into the image; returns the offset after the last.
pub(super) fn write_xmm(state: &State, image: &mut [u8; AREA]) -> usize {
    let count = vector_registers(state);
    for (slot, register) in image[XMM..].chunks_exact_mut(XMM_SIZE).zip(&state.ymm[..count]) {
        slot.copy_from_slice(&register[..XMM_SIZE]);
    }
    XMM + count * XMM_SIZE
}

/// The XMM registers of the current mode from the image.
pub(super) fn read_xmm(state: &mut State, image: &[u8; AREA]) {
    let count = vector_registers(state);
    for (register, slot) in state.ymm[..count].iter_mut().zip(image[XMM..].chunks_exact(XMM_SIZE)) {
        register[..XMM_SIZE].copy_from_slice(slot);
    }
}

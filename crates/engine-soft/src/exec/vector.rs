//! Vector instructions whose memory accesses depend on a mask: gathers and masked moves (SDM volume 2).

use berth_cpu::bits::{gpr, rflags, vector};
use iced_x86::{Instruction, Mnemonic as M, OpKind};

use super::fpu::require_x87;
use super::fpu::x87::X87;
use super::operands;
use crate::code::Flow;
use crate::cpu::Cpu;
use crate::fault::{Fault, Guest};
use crate::memory::Access;
use crate::mode::Mode;
use crate::state::{Seg, State};

const YMM_SIZE: usize = 32;

fn require_avx(state: &State) -> Guest<()> {
    if !state.mode.has(Mode::AVX) || state.is_v86() {
        return Err(Fault::ud());
    }
    require_task_not_switched(state)
}

fn require_sse(state: &State) -> Guest<()> {
    if !state.mode.has(Mode::SSE) {
        return Err(Fault::ud());
    }
    require_task_not_switched(state)
}

fn require_task_not_switched(state: &State) -> Guest<()> {
    if state.mode.has(Mode::TASK_SWITCHED) { Err(Fault::plain(vector::NM)) } else { Ok(()) }
}

/// Number of the vector register that is operand `n`.
fn register(insn: &Instruction, n: u32) -> usize {
    insn.op_register(n).number() & 15
}

fn element(register: &[u8; YMM_SIZE], size: usize, i: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes[..size].copy_from_slice(&register[i * size..(i + 1) * size]);
    u64::from_le_bytes(bytes)
}

fn set_element(register: &mut [u8; YMM_SIZE], size: usize, i: usize, value: u64) {
    register[i * size..(i + 1) * size].copy_from_slice(&value.to_le_bytes()[..size]);
}

/// Whether the most significant bit of element `i` is set.
fn is_selected(mask: &[u8; YMM_SIZE], size: usize, i: usize) -> bool {
    mask[(i + 1) * size - 1] & 0x80 != 0
}

/// The AVX2 gathers. An element that faults leaves those before it done, with their masks cleared, so that the
/// instruction can go on after the handler.
///
/// # Errors
/// #UD, #NM, and what reading an element raises.
pub fn gather(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    require_avx(&cpu.s)?;
    let (index_size, size) = match insn.mnemonic() {
        M::Vpgatherdd | M::Vgatherdps => (4, 4),
        M::Vpgatherdq | M::Vgatherdpd => (4, 8),
        M::Vpgatherqd | M::Vgatherqps => (8, 4),
        M::Vpgatherqq | M::Vgatherqpd => (8, 8),
        _ => return Err(Fault::ud()),
    };
    let (to, mask) = (register(insn, 0), register(insn, 2));
    let index = insn.memory_index();
    let index_number = index.number() & 15;
    if to == mask || to == index_number || mask == index_number {
        return Err(Fault::ud());
    }
    let (to_len, index_len) = (insn.op_register(0).size(), index.size());
    let count = (to_len / size).min(index_len / index_size);
    let (seg, base) = (operands::segment(&cpu.s, insn), operands::offset(&cpu.s, insn));
    let address_mask = operands::mask(operands::address_size(insn));
    let indices = cpu.s.ymm[index_number];
    let mut gathered = false;
    for i in 0..count {
        if is_selected(&cpu.s.ymm[mask], size, i) {
            let index = operands::sign_extend(element(&indices, index_size, i), index_size) as u64;
            let scaled = index.wrapping_mul(u64::from(insn.memory_index_scale()));
            // Elements are not checked for alignment (measured on AMD's Zen 3).
            let mut bytes = [0; 8];
            let loaded = cpu.load_bytes(seg, base.wrapping_add(scaled) & address_mask, &mut bytes[..size]);
            loaded.map_err(|fault| if gathered { trap_or(cpu, fault) } else { fault })?;
            gathered = true;
            let value = u64::from_le_bytes(bytes);
            set_element(&mut cpu.s.ymm[to], size, i, value);
        }
        set_element(&mut cpu.s.ymm[mask], size, i, 0);
    }
    cpu.s.ymm[mask] = [0; YMM_SIZE];
    cpu.s.ymm[to][count * size..].fill(0);
    Ok(Flow::Next)
}

/// What a gather raises whose element faults after others were gathered: a single step or data breakpoint of those
/// comes in place of the fault, with RF set, and the instruction goes on after it (SDM volume 2, VPGATHERDD).
fn trap_or(cpu: &mut Cpu, fault: Fault) -> Fault {
    let Some(trap) = cpu.debug_condition(cpu.s.rflags_rest & rflags::TF != 0) else { return fault };
    cpu.s.rflags_rest |= rflags::RF;
    trap
}

/// VMASKMOVPS, VMASKMOVPD, VPMASKMOVD and VPMASKMOVQ in both directions. Elements that the mask leaves out are
/// not accessed.
///
/// # Errors
/// #UD, #NM, and what accessing an element raises.
pub fn masked_move(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    require_avx(&cpu.s)?;
    let size = match insn.mnemonic() {
        M::Vmaskmovps | M::Vpmaskmovd => 4,
        M::Vmaskmovpd | M::Vpmaskmovq => 8,
        _ => return Err(Fault::ud()),
    };
    let mask = cpu.s.ymm[register(insn, 1)];
    let count = insn.op_register(1).size() / size;
    let (seg, offset) = (operands::segment(&cpu.s, insn), operands::offset(&cpu.s, insn));
    let at = within_access(cpu, offset);
    let at = |i: usize| at(i * size);
    let selected: Vec<usize> = (0..count).filter(|&i| is_selected(&mask, size, i)).collect();
    if operands::is_memory(insn, 0) {
        let from = cpu.s.ymm[register(insn, 2)];
        for &i in &selected {
            cpu.probe_write(seg, at(i), size)?;
        }
        for &i in &selected {
            cpu.store_bytes(seg, at(i), &from[i * size..(i + 1) * size])?;
        }
    } else {
        let mut to = [0; YMM_SIZE];
        for &i in &selected {
            cpu.load_bytes(seg, at(i), &mut to[i * size..(i + 1) * size])?;
        }
        cpu.s.ymm[register(insn, 0)] = to;
    }
    Ok(Flow::Next)
}

/// MASKMOVDQU and its VEX form: stores selected bytes of an XMM register at rDI.
///
/// # Errors
/// #UD, #NM, #AC, and what writing a selected byte raises.
pub fn maskmovdqu(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    if insn.mnemonic() == M::Vmaskmovdqu {
        require_avx(&cpu.s)?
    } else {
        require_sse(&cpu.s)?
    }
    let (from, mask) = (cpu.s.ymm[register(insn, 1)], cpu.s.ymm[register(insn, 2)]);
    store_bytes(cpu, insn, &from[..16], &mask[..16])?;
    Ok(Flow::Next)
}

/// MASKMOVQ: stores selected bytes of an MMX register at rDI.
///
/// # Errors
/// #UD for CR0.EM, #NM, #MF for an x87 exception that waits, #AC, and what writing a selected byte raises.
pub fn maskmovq(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    if cpu.s.cr0 & berth_cpu::bits::cr0::EM != 0 {
        return Err(Fault::ud());
    }
    require_x87(&cpu.s)?;
    let mut x87 = X87::host();
    if x87.exception_waits() {
        return Err(Fault::plain(vector::MF));
    }
    let mmx = |n| x87.mmx(insn.op_register(n).number() & 7).to_le_bytes();
    let (data, mask) = (mmx(1), mmx(2));
    // Also when the store faults (seen on AMD's Zen 5).
    x87.enter_mmx();
    x87.load();
    store_bytes(cpu, insn, &data, &mask)?;
    Ok(Flow::Next)
}

/// Stores the bytes whose mask byte has its top bit set, all or none.
fn store_bytes(cpu: &mut Cpu, insn: &Instruction, data: &[u8], mask: &[u8]) -> Guest<()> {
    let (seg, offset) = string_destination(cpu, insn);
    let at = within_access(cpu, offset);
    // Whatever the mask selects (measured on AMD's Zen 5).
    cpu.require_aligned(seg, offset, 1, Access::Write, 8)?;
    let selected = || mask.iter().enumerate().filter(|(_, m)| **m & 0x80 != 0).map(|(i, _)| i);
    for i in selected() {
        cpu.probe_write(seg, at(i), 1)?;
    }
    for i in selected() {
        cpu.store_bytes(seg, at(i), &data[i..=i])?;
    }
    Ok(())
}

/// Offsets of the bytes of one access at `offset`: the address size cuts only its beginning, so that with 32-bit
/// addresses in 64-bit code it can go on beyond 4 GiB.
fn within_access(cpu: &Cpu, offset: u64) -> impl Fn(usize) -> u64 + use<> {
    let mask = if cpu.s.is_64bit() { u64::MAX } else { 0xffff_ffff };
    move |byte| offset.wrapping_add(byte as u64) & mask
}

/// Where rDI points: segment (DS unless overridden) and offset.
fn string_destination(cpu: &Cpu, insn: &Instruction) -> (Seg, u64) {
    let address_mask = match insn.op0_kind() {
        OpKind::MemorySegDI => 0xffff,
        OpKind::MemorySegEDI => 0xffff_ffff,
        _ => u64::MAX,
    };
    (operands::segment(&cpu.s, insn), cpu.s.gpr[gpr::RDI] & address_mask)
}

#[cfg(test)]
#[path = "vector_tests.rs"]
mod tests;

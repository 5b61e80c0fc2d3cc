//! XSAVE, XSAVEOPT, XSAVEC and XRSTOR (SDM volume 1, chapter 13).
//!
//! ```text
//!   0 ── x87 ── 24 MXCSR 32 ── ST ── 160 ── XMM ── 416 … 512 ── header ── 576 ── upper YMM ── 832
//! ```
//!
//! AVX is the only extended component, so that it is at offset 576 in the standard and the compacted form.

use berth_cpu::bits::{cr0, cr4, gpr, xcr0};
use berth_cpu::cpuid::Feature;
use iced_x86::{Instruction, Mnemonic};

use super::legacy::{XMM, aligned_operand, read_mxcsr, read_xmm, write_mxcsr, write_xmm};
use super::x87::X87;
use super::{MXCSR_RESET, components_in_use, require_clear, vector_registers};
use crate::code::Flow;
use crate::cpu::Cpu;
use crate::fault::{Fault, Guest};
use crate::memory::Access;
use crate::state::{Seg, State};

const LEGACY: usize = 512;
const HEADER: usize = 64;
const YMM: usize = LEGACY + HEADER;
const YMM_LEN: usize = 256;
/// Bit 63 of XCOMP_BV: the area has the compacted form.
const COMPACTED: u64 = 1 << 63;

/// Which saving instruction.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Xsave,
    Xsaveopt,
    Xsavec,
}

/// #UD and #NM as for all these instructions, then the components that they work on: EDX:EAX and XCR0.
fn requested(cpu: &Cpu) -> Guest<u64> {
    if cpu.s.cr4 & cr4::OSXSAVE == 0 {
        return Err(Fault::ud());
    }
    require_clear(&cpu.s, cr0::TS)?;
    let mask = cpu.s.gpr[gpr::RDX] << 32 | cpu.s.gpr[gpr::RAX] & 0xffff_ffff;
    Ok(mask & cpu.s.xcr0)
}

fn area_len(components: u64) -> usize {
    if components & xcr0::AVX != 0 { YMM + YMM_LEN } else { YMM }
}

/// XSAVE, XSAVEOPT and XSAVEC, with and without REX.W.
///
/// # Errors
/// #UD, #NM, #GP(0) for a misaligned operand, and what writing memory raises.
pub fn xsave(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    let form = match insn.mnemonic() {
        Mnemonic::Xsaveopt | Mnemonic::Xsaveopt64 => Form::Xsaveopt,
        Mnemonic::Xsavec | Mnemonic::Xsavec64 => Form::Xsavec,
        _ => Form::Xsave,
    };
    let requested = requested(cpu)?;
    let len = area_len(requested);
    let (seg, offset) = aligned_operand(cpu, insn, len, 64, Access::Write)?;
    cpu.probe_write(seg, offset, len)?;
    let x87 = X87::host();
    let used = requested & components_in_use(&cpu.s, &x87);
    match form {
        Form::Xsave | Form::Xsaveopt => {
            let old = cpu.load(seg, offset + LEGACY as u64, 8)?;
            let save = if form == Form::Xsave { requested } else { used };
            let mxcsr = requested & (xcr0::SSE | xcr0::AVX) != 0;
            store_components(cpu, (seg, offset), &x87, save, mxcsr)?;
            cpu.store(seg, offset + LEGACY as u64, 8, old & !requested | used)?;
        }
        Form::Xsavec => {
            // MXCSR counts as part of SSE here.
            let mxcsr_used = requested & xcr0::SSE != 0 && cpu.s.mxcsr != MXCSR_RESET;
            let used = used | if mxcsr_used { xcr0::SSE } else { 0 };
            store_components(cpu, (seg, offset), &x87, used, used & xcr0::SSE != 0)?;
            let mut header = [0; 16];
            header[..8].copy_from_slice(&used.to_le_bytes());
            header[8..].copy_from_slice(&(requested | COMPACTED).to_le_bytes());
            cpu.store_bytes(seg, offset + LEGACY as u64, &header)?;
        }
    }
    Ok(Flow::Next)
}

/// Writes the components of `save`, and MXCSR with its mask. All pages have been probed.
fn store_components(cpu: &mut Cpu, at: (Seg, u64), x87: &X87, save: u64, mxcsr: bool) -> Guest<()> {
    let (seg, offset) = at;
    let mut image = [0; LEGACY];
    x87.write(&mut image);
    write_mxcsr(&cpu.s, &mut image);
    let xmm_end = write_xmm(&cpu.s, &mut image);
    let mut put = |on: bool, from: usize, to: usize| {
        if on { cpu.store_bytes(seg, offset + from as u64, &image[from..to]) } else { Ok(()) }
    };
    put(save & xcr0::X87 != 0, 0, 24)?;
    put(mxcsr, 24, 32)?;
    put(save & xcr0::X87 != 0, 32, XMM)?;
    put(save & xcr0::SSE != 0, XMM, xmm_end)?;
    if save & xcr0::AVX != 0 {
        let count = vector_registers(&cpu.s);
        let upper: Vec<u8> = cpu.s.ymm[..count].iter().flat_map(|r| r[16..].iter().copied()).collect();
        cpu.store_bytes(seg, offset + YMM as u64, &upper)?;
    }
    Ok(())
}

/// What the header of an XSAVE area says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    /// Components that are in the area; the others have their initial configuration.
    present: u64,
    compacted: bool,
}

/// Checks a header (SDM volume 1, 13.8.1 and 13.8.2).
///
/// # Errors
/// #GP(0) for reserved bits and components that XCR0 does not have.
fn check_header(header: &[u8; HEADER], enabled: u64, compaction: bool) -> Guest<Header> {
    let quad = |n: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&header[n * 8..n * 8 + 8]);
        u64::from_le_bytes(bytes)
    };
    let (present, layout) = (quad(0), quad(1));
    let compacted = layout & COMPACTED != 0;
    let good = if compacted {
        let format = layout & !COMPACTED;
        compaction && format & !enabled == 0 && present & !format == 0 && header[16..].iter().all(|&b| b == 0)
    } else {
        layout == 0 && quad(2) == 0 && present & !enabled == 0
    };
    if good { Ok(Header { present, compacted }) } else { Err(Fault::gp(0)) }
}

/// XRSTOR and XRSTOR64, both forms.
///
/// # Errors
/// #UD, #NM, #GP(0) for a misaligned operand, a bad header or reserved bits in MXCSR, and what reading memory
/// raises.
pub fn xrstor(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    let requested = requested(cpu)?;
    let (seg, offset) = aligned_operand(cpu, insn, YMM, 64, Access::Read)?;
    let mut header_bytes = [0; HEADER];
    cpu.load_bytes(seg, offset + LEGACY as u64, &mut header_bytes)?;
    let header = check_header(&header_bytes, cpu.s.xcr0, cpu.vm.cpuid.has(Feature::Xsavec))?;
    let load = requested & header.present;

    // Everything is read before anything is changed.
    let mxcsr_from_memory =
        if header.compacted { load & xcr0::SSE != 0 } else { requested & (xcr0::SSE | xcr0::AVX) != 0 };
    let mut image = [0; LEGACY];
    if load & (xcr0::X87 | xcr0::SSE) != 0 || mxcsr_from_memory {
        cpu.load_bytes(seg, offset, &mut image)?;
    }
    let mxcsr = if mxcsr_from_memory {
        read_mxcsr(&image)?
    } else if header.compacted && requested & xcr0::SSE != 0 {
        MXCSR_RESET
    } else {
        cpu.s.mxcsr
    };
    let mut upper = [0; YMM_LEN];
    if load & xcr0::AVX != 0 {
        let len = vector_registers(&cpu.s) * 16;
        cpu.load_bytes(seg, offset + YMM as u64, &mut upper[..len])?;
    }

    cpu.s.mxcsr = mxcsr;
    if requested & xcr0::X87 != 0 {
        let x87 = if load & xcr0::X87 != 0 { X87::parse(&image) } else { X87::default() };
        x87.load();
    }
    if requested & xcr0::SSE != 0 {
        if load & xcr0::SSE == 0 {
            image[XMM..].fill(0);
        }
        read_xmm(&mut cpu.s, &image);
    }
    if requested & xcr0::AVX != 0 {
        // Zero where the component is not in the area.
        set_upper(&mut cpu.s, &upper);
    }
    Ok(Flow::Next)
}

fn set_upper(state: &mut State, upper: &[u8; YMM_LEN]) {
    let count = vector_registers(state);
    for (register, part) in state.ymm[..count].iter_mut().zip(upper.chunks_exact(16)) {
        register[16..].copy_from_slice(part);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(present: u64, layout: u64) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(&present.to_le_bytes());
        bytes[8..16].copy_from_slice(&layout.to_le_bytes());
        bytes
    }

    #[test]
    fn standard_headers() {
        let good = check_header(&header(7, 0), 7, true);
        assert_eq!(good, Ok(Header { present: 7, compacted: false }));
        assert!(check_header(&header(7, 0), 3, true).is_err(), "AVX is not in XCR0");
        assert!(check_header(&header(1, 2), 7, true).is_err(), "XCOMP_BV must be 0");
        let mut reserved = header(1, 0);
        reserved[23] = 1;
        assert!(check_header(&reserved, 7, true).is_err());
        reserved[23] = 0;
        reserved[24] = 1;
        assert!(check_header(&reserved, 7, true).is_ok(), "bytes from 24 on are not looked at");
    }

    #[test]
    fn compacted_headers() {
        let good = check_header(&header(1, COMPACTED | 7), 7, true);
        assert_eq!(good, Ok(Header { present: 1, compacted: true }));
        assert!(check_header(&header(4, COMPACTED | 3), 7, true).is_err(), "not part of the layout");
        assert!(check_header(&header(1, COMPACTED | 7), 3, true).is_err(), "layout beyond XCR0");
        assert!(check_header(&header(1, COMPACTED | 7), 7, false).is_err(), "no XSAVEC on this CPU");
        let mut reserved = header(1, COMPACTED | 7);
        reserved[63] = 1;
        assert!(check_header(&reserved, 7, true).is_err());
    }
}

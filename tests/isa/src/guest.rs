//! The guest that the soft engine runs cases in: page tables, descriptors, and handlers that report exceptions.
//!
//! A case runs at CPL 3 with the selectors, control registers and page permissions that Linux gives a program.
//! The handler of vector `n` writes to port `n`, on which the bus stops the vCPU; it touches no register but RSP.

use berth_cpu::bits::{cr0, cr4, efer, xcr0};
use berth_cpu::{CpuState, Segment, TableRegister};
use berth_memory::{GuestMemory, GuestPhysAddr, MemoryError};

use crate::case::{Case, CodeMode};
use crate::layout::{self, AREAS, selector};

/// Guest RAM in bytes.
pub const RAM: u64 = 8 << 20;
/// Guest physical address of the areas, one after another.
pub const AREAS_PHYS: u64 = 0x20_0000;

/// Linear address of guest physical 0 for the guest's kernel.
const KERNEL: u64 = 0xffff_8000_0000_0000;
const GDT: u64 = 0x8000;
const TSS: u64 = 0x8800;
const IDT: u64 = 0x9000;
const HANDLERS: u64 = 0xa000;
const HANDLER_LEN: u64 = 8;
const KERNEL_STACK_END: u64 = 0xd000;
const KERNEL_END: u64 = 0xd000;
const TABLES: u64 = 0x10_0000;

const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const USER: u64 = 4;
const NO_EXECUTE: u64 = 1 << 63;
const KERNEL_CODE: u16 = 0x10;
const TSS_SELECTOR: u16 = 0x40;

/// Four-level page tables in guest memory (SDM volume 3, 4.5).
struct Tables<'a> {
    memory: &'a GuestMemory,
    next: u64,
}

impl Tables<'_> {
    fn word(&self, at: u64) -> Result<u64, MemoryError> {
        let mut bytes = [0; 8];
        self.memory.read(GuestPhysAddr(at), &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn map(&mut self, linear: u64, physical: u64, rights: u64) -> Result<(), MemoryError> {
        let mut table = TABLES;
        for shift in [39, 30, 21] {
            let at = table + (linear >> shift & 511) * 8;
            let mut entry = self.word(at)?;
            if entry == 0 {
                entry = self.next | PRESENT | WRITE | USER;
                self.next += 4096;
                self.memory.write(GuestPhysAddr(at), &entry.to_le_bytes())?;
            }
            table = entry & !0xfff;
        }
        let at = table + (linear >> 12 & 511) * 8;
        self.memory.write(GuestPhysAddr(at), &(physical | rights | PRESENT).to_le_bytes())
    }
}

/// Fills guest memory with everything but the cases.
///
/// # Errors
/// [`MemoryError`] when `memory` is smaller than [`RAM`].
pub fn build(memory: &GuestMemory) -> Result<(), MemoryError> {
    let mut tables = Tables { memory, next: TABLES + 4096 };
    let mut physical = AREAS_PHYS;
    for area in AREAS {
        let write = if area.write { WRITE } else { 0 };
        let no_execute = if area.execute { 0 } else { NO_EXECUTE };
        for page in (0..area.len).step_by(4096) {
            tables.map(area.start + page, physical, USER | write | no_execute)?;
            physical += 4096;
        }
    }
    for page in (GDT..KERNEL_END).step_by(4096) {
        tables.map(KERNEL + page, page, WRITE)?;
    }

    let tss_base = KERNEL + TSS;
    let gdt: [u64; 10] = [
        0,
        0,
        0x00af_9b00_0000_ffff, // 0x10: kernel code
        0x00cf_9300_0000_ffff, // 0x18: kernel data
        0x00cf_fb00_0000_ffff, // 0x20: 32-bit code
        0x00cf_f300_0000_ffff, // 0x28: data
        0x00af_fb00_0000_ffff, // 0x30: 64-bit code
        0,
        0x0000_8b00_0000_0067 | (tss_base & 0xff_ffff) << 16 | (tss_base >> 24 & 0xff) << 56,
        tss_base >> 32,
    ];
    for (i, entry) in gdt.iter().enumerate() {
        memory.write(GuestPhysAddr(GDT + i as u64 * 8), &entry.to_le_bytes())?;
    }
    memory.write(GuestPhysAddr(TSS + 4), &(KERNEL + KERNEL_STACK_END).to_le_bytes())?;
    // The I/O permission bitmap would begin behind the limit: no port is allowed.
    memory.write(GuestPhysAddr(TSS + 102), &0x68_u16.to_le_bytes())?;
    for vector in 0..256_u64 {
        let handler = KERNEL + HANDLERS + vector * HANDLER_LEN;
        // OUT imm8, AL; then once more, in case the vCPU runs on.
        memory.write(GuestPhysAddr(HANDLERS + vector * HANDLER_LEN), &[0xe6, vector as u8, 0xeb, 0xfc])?;
        // INT3 and INTO may be raised by programs.
        let dpl = if matches!(vector, 3 | 4) { 3 } else { 0 };
        let low = handler & 0xffff
            | u64::from(KERNEL_CODE) << 16
            | (0x8e00 | dpl << 13) << 32
            | (handler >> 16 & 0xffff) << 48;
        memory.write(GuestPhysAddr(IDT + vector * 16), &low.to_le_bytes())?;
        memory.write(GuestPhysAddr(IDT + vector * 16 + 8), &(handler >> 32).to_le_bytes())?;
    }
    Ok(())
}

/// The state in which `case` starts. `base`: a state of the vCPU that MSRs are taken from.
pub fn initial_state(case: &Case, base: &CpuState) -> CpuState {
    let data = Segment { base: 0, limit: u32::MAX, attr: 0xc0f3, selector: selector::DATA };
    let null = |base| Segment { base, ..Segment::default() };
    let cs = match case.mode {
        CodeMode::Bits64 => Segment { attr: 0xa0fb, selector: selector::CODE64, ..data },
        CodeMode::Bits32 => Segment { attr: 0xc0fb, selector: selector::CODE32, ..data },
    };
    CpuState {
        gpr: case.gpr,
        rip: case.start(),
        rflags: case.rflags,
        cs,
        ss: data,
        ds: data,
        es: data,
        fs: null(layout::FS_BASE),
        gs: null(layout::GS_BASE),
        ldtr: null(0),
        tr: Segment { base: KERNEL + TSS, limit: 0x67, attr: 0x8b, selector: TSS_SELECTOR },
        gdtr: TableRegister { base: KERNEL + GDT, limit: 0x4f },
        idtr: TableRegister { base: KERNEL + IDT, limit: 0xfff },
        cr0: cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG,
        cr2: 0,
        cr3: TABLES,
        cr4: cr4::DE
            | cr4::PAE
            | cr4::MCE
            | cr4::PGE
            | cr4::OSFXSR
            | cr4::OSXMMEXCPT
            | cr4::UMIP
            | cr4::FSGSBASE
            | cr4::OSXSAVE
            | cr4::SMEP
            | cr4::SMAP,
        efer: efer::SCE | efer::LME | efer::LMA | efer::NXE,
        dr: base.dr,
        xcr0: xcr0::X87 | xcr0::SSE | xcr0::AVX,
        fpu: case.fpu.clone(),
        msrs: base.msrs.clone(),
        ..CpuState::reset()
    }
}

/// What the CPU pushed for an exception (SDM volume 3, figure 6-9).
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    /// 0 if the exception has none.
    pub error: u32,
    /// Where the handler would return to.
    pub rip: u64,
    /// RFLAGS of the program.
    pub rflags: u64,
    /// RSP of the program.
    pub rsp: u64,
}

/// Reads the exception frame at the kernel's `rsp`.
///
/// # Errors
/// [`MemoryError`] if there is no frame.
pub fn frame(memory: &GuestMemory, vector: u8, rsp: u64) -> Result<Frame, MemoryError> {
    let has_error = matches!(vector, 8 | 10..=14 | 17);
    let mut words = [0_u64; 6];
    let start = if has_error { rsp } else { rsp.wrapping_sub(8) };
    for (i, word) in words.iter_mut().enumerate() {
        let mut bytes = [0; 8];
        memory.read(GuestPhysAddr(start.wrapping_sub(KERNEL).wrapping_add(i as u64 * 8)), &mut bytes)?;
        *word = u64::from_le_bytes(bytes);
    }
    let error = if has_error { words[0] as u32 } else { 0 };
    Ok(Frame { error, rip: words[1], rflags: words[3], rsp: words[4] })
}

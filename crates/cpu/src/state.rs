//! The engine-neutral state of one vCPU: read from one engine, written into another, or kept in a snapshot.

use crate::apic::ApicState;
use crate::bits::{cr0, cr4, efer, rflags};

/// A segment register with its hidden part (SDM volume 3, 3.4.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Segment {
    /// Base address.
    pub base: u64,
    /// Last valid offset in bytes (granularity already applied).
    pub limit: u32,
    /// Access rights as bits 8 to 23 of the descriptor's second dword, with the limit bits zero: type (0-3),
    /// S (4), DPL (5-6), P (7), AVL (12), L (13), D/B (14), G (15). Zero means unusable (a null selector).
    pub attr: u16,
    /// The visible selector.
    pub selector: u16,
}

#[allow(missing_docs)]
impl Segment {
    pub const TYPE_ACCESSED: u16 = 1;
    /// Data: writable. Code: readable.
    pub const TYPE_RW: u16 = 1 << 1;
    /// Data: expand-down. Code: conforming.
    pub const TYPE_DC: u16 = 1 << 2;
    pub const TYPE_CODE: u16 = 1 << 3;
    pub const S: u16 = 1 << 4;
    pub const P: u16 = 1 << 7;
    pub const L: u16 = 1 << 13;
    pub const DB: u16 = 1 << 14;
    pub const G: u16 = 1 << 15;

    /// A real-mode segment: base is the selector times 16, limit 64 KiB, read/write data.
    pub fn real_mode(selector: u16) -> Self {
        Self { selector, base: u64::from(selector) << 4, limit: 0xffff, attr: 0x93 }
    }
    /// Descriptor privilege level, 0 to 3.
    pub fn dpl(&self) -> u8 {
        (self.attr >> 5 & 3) as u8
    }
    /// Whether a null selector was loaded, or nothing yet.
    pub fn is_unusable(&self) -> bool {
        self.attr & Self::P == 0
    }
    /// Whether this is a code segment.
    pub fn is_code(&self) -> bool {
        self.attr & (Self::S | Self::TYPE_CODE) == Self::S | Self::TYPE_CODE
    }
    /// Whether data can be written through this segment.
    pub fn is_writable(&self) -> bool {
        self.attr & (Self::TYPE_CODE | Self::TYPE_RW) == Self::TYPE_RW
    }
    /// Whether data can be read through this segment.
    pub fn is_readable(&self) -> bool {
        self.attr & Self::TYPE_CODE == 0 || self.attr & Self::TYPE_RW != 0
    }
    /// Whether this is an expand-down data segment.
    pub fn is_expand_down(&self) -> bool {
        self.attr & (Self::TYPE_CODE | Self::TYPE_DC) == Self::TYPE_DC
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct TableRegister {
    /// Linear base address.
    pub base: u64,
    /// Last valid offset in bytes.
    pub limit: u16,
}

/// What a vCPU does when it is started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MpState {
    /// Executes instructions.
    #[default]
    Runnable,
    /// Waits for an interrupt after HLT.
    Halted,
    /// Waits for a start-up IPI (SDM volume 3, 9.4).
    WaitForSipi,
}

/// Bytes of an XSAVE area in standard form for x87, SSE and AVX (SDM volume 1, 13.4).
pub const XSAVE_AREA_SIZE: usize = 512 + 64 + 256;

/// x87, SSE and AVX state in XSAVE's standard form.
#[derive(Clone, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct XsaveArea(pub [u8; XSAVE_AREA_SIZE]);

impl Default for XsaveArea {
    /// The state after reset: FCW 0x37f, MXCSR 0x1f80, all registers empty or zero.
    fn default() -> Self {
        let mut area = [0; XSAVE_AREA_SIZE];
        area[0..2].copy_from_slice(&0x037f_u16.to_le_bytes());
        area[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
        Self(area)
    }
}

/// An exception that was raised and not delivered yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PendingException {
    /// Vector, 0 to 31. For a page fault CR2 is set already, for a debug exception DR6.
    pub vector: u8,
    /// Error code, for the vectors that push one.
    pub error: Option<u32>,
}

/// Events that were taken and not delivered yet: the next thing that the vCPU does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PendingEvents {
    /// An exception.
    pub exception: Option<PendingException>,
    /// Vector of an interrupt that was acknowledged: it is in service at the local APIC or the PIC.
    pub interrupt: Option<u8>,
    /// A non-maskable interrupt, which may have to wait until NMIs are not blocked any more.
    pub nmi: bool,
}

/// A combination of registers that no CPU can be in; the text says which.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadCpuState(&'static str);

/// All architectural state of one vCPU.
#[derive(Clone, Debug, Default, PartialEq)]
#[allow(missing_docs)]
pub struct CpuState {
    /// General-purpose registers in encoding order; see [`crate::bits::gpr`].
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub es: Segment,
    pub cs: Segment,
    pub ss: Segment,
    pub ds: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ldtr: Segment,
    pub tr: Segment,
    pub gdtr: TableRegister,
    pub idtr: TableRegister,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    /// DR0 to DR3, DR6, DR7 at their own index.
    pub dr: [u64; 8],
    pub xcr0: u64,
    pub fpu: XsaveArea,
    /// Model-specific registers that are not fields of their own: number and value. An engine sets those that it
    /// has; it refuses the state only if one that [`crate::msr::is_essential`] does not take its value, unless 0.
    pub msrs: Vec<(u32, u64)>,
    /// The local APIC; `None` leaves it as it is.
    pub apic: Option<Box<ApicState>>,
    pub pending: PendingEvents,
    pub mp_state: MpState,
    /// The instruction boundary at `rip` is in the shadow of STI or MOV SS.
    pub interrupt_shadow: bool,
    /// NMIs are blocked until IRET.
    pub nmi_blocked: bool,
}

impl CpuState {
    /// The state after power-up or RESET (SDM volume 3, table 10-1): real mode at F000:FFF0.
    pub fn reset() -> Self {
        let data = Segment::real_mode(0);
        Self {
            rip: 0xfff0,
            rflags: rflags::ONE,
            cs: Segment { selector: 0xf000, base: 0xffff_0000, limit: 0xffff, attr: 0x9b },
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            ldtr: Segment { attr: 0x82, limit: 0xffff, ..Segment::default() },
            tr: Segment { attr: 0x8b, limit: 0xffff, ..Segment::default() },
            gdtr: TableRegister { base: 0, limit: 0xffff },
            idtr: TableRegister { base: 0, limit: 0xffff },
            cr0: cr0::CD | cr0::NW | cr0::ET,
            dr: [0, 0, 0, 0, 0, 0, 0xffff_0ff0, 0x400],
            xcr0: crate::bits::xcr0::X87,
            ..Self::default()
        }
    }

    /// Refuses combinations that no CPU can be in, and that engines rely on (SDM volume 3, 2.5, 4.1 and 5.1).
    ///
    /// # Errors
    /// [`BadCpuState`] names the first.
    pub fn check(&self) -> Result<(), BadCpuState> {
        let bad = |what| Err(BadCpuState(what));
        if self.cr0 & cr0::PG != 0 && self.cr0 & cr0::PE == 0 {
            return bad("CR0.PG is set without CR0.PE");
        }
        if self.efer & efer::LMA != 0 && (self.cr0 & cr0::PG == 0 || self.cr4 & cr4::PAE == 0) {
            return bad("EFER.LMA is set without paging or CR4.PAE");
        }
        if self.rflags & rflags::ONE == 0 {
            return bad("bit 1 of RFLAGS is clear");
        }
        if self.efer & efer::LMA == 0 && self.rip > u64::from(u32::MAX) {
            return bad("RIP has more than 32 bits outside of long mode");
        }
        Ok(())
    }

    /// The state after INIT and a start-up IPI with `vector`: real mode at `vector`00:0000.
    pub fn after_sipi(vector: u8) -> Self {
        let mut state = Self::reset();
        state.cs = Segment { attr: 0x9b, ..Segment::real_mode(u16::from(vector) << 8) };
        state.rip = 0;
        state
    }
}

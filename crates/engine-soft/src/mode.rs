//! The mode word: everything besides addresses that the translation of a guest instruction depends on.

use berth_cpu::Segment;
use berth_cpu::bits::{cr0, cr4, rflags, xcr0};

use crate::state::{Seg, State};

/// Default operand and address size of the code segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodeSize {
    /// 16-bit: real, virtual-8086 and 16-bit protected mode.
    Bits16,
    /// 32-bit protected and compatibility mode.
    Bits32,
    /// 64-bit mode.
    Bits64,
}

/// Which of a vCPU's software TLBs an access goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum TlbClass {
    /// CPL 3.
    User,
    /// CPL 0 to 2, user pages forbidden (SMAP on, RFLAGS.AC clear).
    Kernel,
    /// CPL 0 to 2, user pages allowed.
    KernelUser,
}

/// Packed so that it is cheap to compare; part of every block's key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Mode(pub u32);

#[allow(missing_docs)]
impl Mode {
    const SIZE_SHIFT: u32 = 2;
    pub const STACK32: u32 = 1 << 4;
    /// Segments are not flat: every access goes through the segment checks (never set in 64-bit mode).
    pub const SEGMENTED: u32 = 1 << 5;
    /// User pages may be accessed from CPL 0 to 2.
    pub const USER_OK: u32 = 1 << 6;
    /// Each instruction is watched: RFLAGS.TF, or breakpoints in DR7. Blocks hold one instruction and data
    /// accesses take the slow path.
    pub const WATCHED: u32 = 1 << 7;
    /// Data alignment is checked (#AC).
    pub const ALIGN: u32 = 1 << 8;
    /// x87 and MMX raise #NM (CR0.EM or TS).
    pub const FPU_OFF: u32 = 1 << 9;
    /// SSE works: CR4.OSFXSR, not CR0.EM. TS is in `TASK_SWITCHED`.
    pub const SSE: u32 = 1 << 10;
    /// AVX works: CR4.OSXSAVE and XCR0 has SSE and AVX.
    pub const AVX: u32 = 1 << 11;
    pub const TASK_SWITCHED: u32 = 1 << 12;
    /// WAIT raises #NM: CR0.MP and TS.
    pub const WAIT_NM: u32 = 1 << 13;
    pub const PROTECTED: u32 = 1 << 14;
    pub const V86: u32 = 1 << 15;
    /// RDTSC is privileged here: CR4.TSD and CPL above 0.
    pub const NO_TSC: u32 = 1 << 16;
    /// EFER.LMA.
    pub const LONG: u32 = 1 << 17;
    /// One instruction per block, without any optimisation: used for interrupt shadows and exclusive steps.
    pub const SINGLE: u32 = 1 << 18;

    /// The mode that `state` is in.
    pub fn of(state: &State) -> Self {
        let cpl = state.cpl();
        let cs = state.seg(Seg::Cs);
        let size = if state.is_64bit() {
            CodeSize::Bits64
        } else if cs.attr & Segment::DB != 0 {
            CodeSize::Bits32
        } else {
            CodeSize::Bits16
        };
        let mut bits = u32::from(cpl) | (size as u32) << Self::SIZE_SHIFT;
        let mut set = |bit: u32, on: bool| bits |= if on { bit } else { 0 };
        set(Self::STACK32, size != CodeSize::Bits64 && state.seg(Seg::Ss).attr & Segment::DB != 0);
        set(Self::SEGMENTED, size != CodeSize::Bits64 && !flat(state));
        let ac = state.rflags_rest & rflags::AC != 0;
        set(Self::USER_OK, cpl < 3 && (state.cr4 & cr4::SMAP == 0 || ac));
        set(Self::WATCHED, state.rflags_rest & rflags::TF != 0 || state.dr[7] & 0xff != 0);
        set(Self::ALIGN, cpl == 3 && ac && state.cr0 & cr0::AM != 0);
        set(Self::FPU_OFF, state.cr0 & (cr0::EM | cr0::TS) != 0);
        let sse = state.cr4 & cr4::OSFXSR != 0 && state.cr0 & cr0::EM == 0;
        set(Self::SSE, sse);
        let both = xcr0::SSE | xcr0::AVX;
        set(Self::AVX, state.cr4 & cr4::OSXSAVE != 0 && state.xcr0 & both == both && state.is_protected());
        set(Self::TASK_SWITCHED, state.cr0 & cr0::TS != 0);
        set(Self::WAIT_NM, state.cr0 & (cr0::MP | cr0::TS) == cr0::MP | cr0::TS);
        set(Self::PROTECTED, state.is_protected());
        set(Self::V86, state.is_v86());
        set(Self::NO_TSC, cpl > 0 && state.cr4 & cr4::TSD != 0);
        set(Self::LONG, state.is_long());
        Self(bits)
    }

    pub const fn has(self, bit: u32) -> bool {
        self.0 & bit != 0
    }
    pub const fn cpl(self) -> u8 {
        (self.0 & 3) as u8
    }
    pub const fn code_size(self) -> CodeSize {
        match self.0 >> Self::SIZE_SHIFT & 3 {
            0 => CodeSize::Bits16,
            1 => CodeSize::Bits32,
            _ => CodeSize::Bits64,
        }
    }
    pub const fn is_64bit(self) -> bool {
        matches!(self.code_size(), CodeSize::Bits64)
    }
    /// 16, 32 or 64.
    pub const fn bitness(self) -> u32 {
        match self.code_size() {
            CodeSize::Bits16 => 16,
            CodeSize::Bits32 => 32,
            CodeSize::Bits64 => 64,
        }
    }
    pub const fn tlb_class(self) -> TlbClass {
        if self.cpl() == 3 {
            TlbClass::User
        } else if self.has(Self::USER_OK) {
            TlbClass::KernelUser
        } else {
            TlbClass::Kernel
        }
    }
}

/// Whether CS, DS, ES and SS all have base 0 and no limit, and allow what plain code does with them.
fn flat(state: &State) -> bool {
    let open = |s: &Segment| s.base == 0 && s.limit == u32::MAX && !s.is_expand_down() && !s.is_unusable();
    let data = |s: &Segment| open(s) && s.is_writable();
    state.is_protected()
        && !state.is_v86()
        && open(state.seg(Seg::Cs))
        && [Seg::Ds, Seg::Es, Seg::Ss].iter().all(|&s| data(state.seg(s)))
}

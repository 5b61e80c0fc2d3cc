//! The modes that a guest can start in, and the CPU state for each.

use berth_cpu::bits::{cr0, cr4, efer, gpr, rflags, xcr0};
use berth_cpu::{CpuState, Segment, TableRegister};

use crate::layout::{GDT, GDT_ENTRIES, IDT, STACK, TSS, selector};
use crate::paging::Paging;

/// A mode of operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Real-address mode.
    Real,
    /// Protected mode with 16-bit code and data segments.
    Protected16,
    /// Protected mode with 32-bit segments, without paging.
    Protected32,
    /// The same with two-level page tables.
    Paged32,
    /// The same with three-level page tables.
    Pae,
    /// 64-bit mode.
    Long,
}

impl Mode {
    /// Default operand size of code in it: 16, 32 or 64.
    pub fn bitness(self) -> u32 {
        match self {
            Self::Real | Self::Protected16 => 16,
            Self::Protected32 | Self::Paged32 | Self::Pae => 32,
            Self::Long => 64,
        }
    }

    /// Format of its page tables.
    pub fn paging(self) -> Option<Paging> {
        match self {
            Self::Real | Self::Protected16 | Self::Protected32 => None,
            Self::Paged32 => Some(Paging::TwoLevel),
            Self::Pae => Some(Paging::Pae),
            Self::Long => Some(Paging::FourLevel),
        }
    }

    /// Selector of level 0 code.
    pub fn code_selector(self) -> u16 {
        match self {
            Self::Real => 0,
            Self::Protected16 => selector::CODE16,
            Self::Protected32 | Self::Paged32 | Self::Pae => selector::CODE32,
            Self::Long => selector::CODE64,
        }
    }

    /// Selectors of code and data at a privilege level, 0 or 3.
    fn selectors(self, cpl: u16) -> (u16, u16) {
        match (self, cpl) {
            (Self::Protected16, _) => (selector::CODE16, selector::DATA16),
            (_, 0) => (self.code_selector(), selector::DATA),
            (Self::Long, _) => (selector::USER_CODE64 | 3, selector::USER_DATA | 3),
            _ => (selector::USER_CODE32 | 3, selector::USER_DATA | 3),
        }
    }

    /// The state that a guest starts with; `root` is the page table.
    pub fn state(self, cpl: u8, root: u64) -> CpuState {
        let mut s = CpuState::reset();
        s.cr0 = cr0::ET | cr0::NE | cr0::MP;
        s.cr4 = cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
        s.xcr0 = xcr0::X87 | xcr0::SSE | xcr0::AVX;
        s.rflags = rflags::ONE;
        s.gpr[gpr::RSP] = STACK;
        if self == Self::Real {
            s.cs = Segment { attr: 0x9b, ..Segment::real_mode(0) };
            s.idtr = TableRegister { base: 0, limit: 0x3ff };
            return s;
        }
        s.cr0 |= cr0::PE;
        s.gdtr = TableRegister { base: GDT, limit: (GDT_ENTRIES * 8 - 1) as u16 };
        s.idtr = TableRegister { base: IDT, limit: 0xfff };
        s.tr = Segment { base: TSS, limit: 0xfff, attr: 0x8b, selector: selector::TSS };
        s.ldtr = Segment::default();
        let (code, data) = self.selectors(u16::from(cpl));
        s.cs = segment(code);
        for seg in [&mut s.ds, &mut s.es, &mut s.ss, &mut s.fs, &mut s.gs] {
            *seg = segment(data);
        }
        if let Some(paging) = self.paging() {
            s.cr0 |= cr0::PG | cr0::WP;
            s.cr3 = root;
            s.cr4 |= match paging {
                Paging::TwoLevel => cr4::PSE,
                Paging::Pae | Paging::FourLevel => cr4::PAE,
            };
            s.efer |= efer::NXE;
        }
        if self == Self::Long {
            s.efer |= efer::LME | efer::LMA | efer::SCE;
        }
        s
    }
}

/// The descriptors of the GDT, by selector.
pub fn descriptor_of(selector: u16) -> u64 {
    match selector & !3 {
        selector::CODE64 => 0x00af_9b00_0000_ffff,
        selector::DATA => 0x00cf_9300_0000_ffff,
        selector::USER_CODE32 => 0x00cf_fb00_0000_ffff,
        selector::USER_DATA => 0x00cf_f300_0000_ffff,
        selector::USER_CODE64 => 0x00af_fb00_0000_ffff,
        selector::CODE32 => 0x00cf_9b00_0000_ffff,
        selector::CODE16 => 0x0000_9b00_0000_ffff,
        selector::DATA16 => 0x0000_9300_0000_ffff,
        _ => 0,
    }
}

/// A segment register with a selector of the kit loaded.
pub fn segment(selector: u16) -> Segment {
    loaded(selector, descriptor_of(selector))
}

/// A segment register after `descriptor` was loaded into it (SDM volume 3, 3.4.5).
pub fn loaded(selector: u16, descriptor: u64) -> Segment {
    let limit = (descriptor & 0xffff | descriptor >> 32 & 0xf_0000) as u32;
    let attr = (descriptor >> 40) as u16 & 0xf0ff;
    let base = descriptor >> 16 & 0xff_ffff | descriptor >> 32 & 0xff00_0000;
    let limit = if attr & Segment::G != 0 { limit << 12 | 0xfff } else { limit };
    Segment { base, limit, attr, selector }
}

/// A code or data descriptor (SDM volume 3, 3.4.5): `attr` as in [`Segment::attr`], `limit` in the unit that its
/// G bit says.
pub fn descriptor(base: u64, limit: u64, attr: u16) -> u64 {
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | u64::from(attr) << 40
        | (limit >> 16 & 0xf) << 48
        | (base >> 24 & 0xff) << 56
}

//! The model-specific registers: one line each (SDM volume 4; AMD64 APM volume 2, appendix A).

use berth_cpu::cpuid::{Feature as F, Vendor};
use berth_cpu::msr as n;

use super::msr::{self, Msrs};
use super::{operands::is_canonical, pv};
use crate::cpu::Cpu;
use crate::fault::Guest;

/// For which CPUs a register exists.
#[derive(Clone, Copy, Debug)]
pub(super) enum Exists {
    /// All.
    Always,
    /// Intel's and those that follow it.
    Intel,
    /// AMD's and Hygon's.
    Amd,
    /// Those that show the feature in CPUID.
    With(F),
}

impl Exists {
    pub(super) fn on(self, model: &berth_cpu::cpuid::CpuidModel) -> bool {
        match self {
            Self::Always => true,
            Self::Intel => model.vendor() != Vendor::Amd,
            Self::Amd => model.vendor() == Vendor::Amd,
            Self::With(feature) => model.has(feature),
        }
    }
}

/// What reads and writes do.
pub(super) enum Kind {
    /// Reads as a constant; writes raise #GP(0).
    Constant(u64),
    /// Reads as a constant; writes are dropped.
    Quiet(u64),
    /// A value of its own, in [`Msrs`]; what it takes, and whether it is part of snapshots, which all are.
    Field(fn(&mut Msrs) -> &mut u64, Check),
    /// A value kept with others of its kind: reset value and what it takes.
    Stored(u64, Check),
    /// Has effects.
    Special { read: fn(&mut Cpu) -> Guest<u64>, write: fn(&mut Cpu, u64) -> Guest<()> },
}

/// Which values a register takes; others raise #GP(0).
#[derive(Clone, Copy, Debug)]
pub(super) enum Check {
    /// Every value.
    Any,
    /// Canonical addresses.
    Canonical,
    /// Values without bits outside the mask.
    Mask(u64),
    /// Eight memory types for PAT: 0, 1, 4, 5, 6 or 7 each (SDM volume 3, 12.12.2).
    PatTypes,
    /// Eight memory types for fixed-range MTRRs: 0, 1, 4, 5 or 6 each (SDM volume 3, 12.11).
    MtrrTypes,
    /// Base of a variable-range MTRR: type in bits 0 to 7, address from bit 12 on.
    MtrrBase,
    /// IA32_MTRR_DEF_TYPE: default type in bits 0 to 7, enable bits 10 and 11.
    MtrrDefault,
}

impl Check {
    /// Whether `value` is allowed, for physical addresses within `phys_mask`.
    pub(super) fn allows(self, value: u64, phys_mask: u64) -> bool {
        let each = |types: &[u8]| value.to_le_bytes().iter().all(|b| types.contains(b));
        let mtrr_type = [0, 1, 4, 5, 6].contains(&(value as u8));
        match self {
            Self::Any => true,
            Self::Canonical => is_canonical(value),
            Self::Mask(mask) => value & !mask == 0,
            Self::PatTypes => each(&[0, 1, 4, 5, 6, 7]),
            Self::MtrrTypes => each(&[0, 1, 4, 5, 6]),
            Self::MtrrBase => mtrr_type && value & !(phys_mask & !0xf00) == 0,
            Self::MtrrDefault => mtrr_type && value & !0xcff == 0,
        }
    }
}

/// One register.
pub(super) struct Entry {
    pub(super) number: u32,
    pub(super) exists: Exists,
    pub(super) kind: Kind,
}

const fn entry(number: u32, exists: Exists, kind: Kind) -> Entry {
    Entry { number, exists, kind }
}

use Check::{Any, Canonical, Mask, MtrrBase, MtrrDefault, MtrrTypes, PatTypes};
use Exists::{Always, Amd, Intel, With};
use Kind::{Constant, Field, Quiet, Special, Stored};

const LOW32: Check = Mask(0xffff_ffff);
/// A mask register of a variable-range MTRR: valid bit and address; the width is checked as 46 bits.
const MTRR_MASK: Check = Mask(0x3fff_ffff_f800);
/// Fast strings on; no branch trace store, no PEBS.
const MISC_ENABLE: u64 = 1 << 0 | 1 << 11 | 1 << 12;
const MISC_ENABLE_WRITABLE: u64 = MISC_ENABLE | 1 << 3 | 1 << 7 | 1 << 16 | 1 << 18 | 1 << 22 | 1 << 34;
/// What the CPU has after reset (SDM volume 3, table 12-12).
const PAT_RESET: u64 = 0x0007_0406_0007_0406;
/// 8 variable ranges, fixed ranges, write combining.
const MTRR_CAP: u64 = 0x508;
/// Enabled, everything write-back: what firmware leaves behind on a PC. There is no firmware here to do it.
const MTRR_DEFAULT: u64 = 1 << 11 | 6;
/// IBRS and STIBP: they can be set and change nothing.
const SPEC_CTRL: Check = Mask(0b11);
/// The time-stamp counter counts at the P0 frequency.
const HWCR_TSC_FREQ_SEL: u64 = 1 << 24;
const HWCR_WRITABLE: Check = Mask(HWCR_TSC_FREQ_SEL | 1 << 3 | 1 << 6 | 1 << 8 | 1 << 18 | 1 << 25 | 1 << 30);
/// LFENCE serializes.
const DE_CFG: u64 = 1 << 1;
/// Microcode revisions: of the kind that other hypervisors report.
const MICROCODE_INTEL: u64 = 1 << 32;
const MICROCODE_AMD: u64 = 0x0100_0065;
/// Locked, with nothing enabled.
const FEATURE_CONTROL: u64 = 1;

/// IA32_ARCH_CAPABILITIES (SDM volume 4, table 2-2): this CPU has none of these bugs, and enhanced IBRS.
const ARCH_CAPABILITIES: u64 = {
    const RDCL_NO: u64 = 1 << 0;
    const IBRS_ALL: u64 = 1 << 1;
    const SKIP_L1DFL_VMENTRY: u64 = 1 << 3;
    const SSB_NO: u64 = 1 << 4;
    const MDS_NO: u64 = 1 << 5;
    const PSCHANGE_MC_NO: u64 = 1 << 6;
    const TAA_NO: u64 = 1 << 8;
    const SBDR_SSDP_NO: u64 = 1 << 13;
    const FBSDP_NO: u64 = 1 << 14;
    const PSDP_NO: u64 = 1 << 15;
    const BHI_NO: u64 = 1 << 20;
    const PBRSB_NO: u64 = 1 << 24;
    const GDS_NO: u64 = 1 << 26;
    const RFDS_NO: u64 = 1 << 27;
    const ITS_NO: u64 = 1 << 62;
    RDCL_NO
        | IBRS_ALL
        | SKIP_L1DFL_VMENTRY
        | SSB_NO
        | MDS_NO
        | PSCHANGE_MC_NO
        | TAA_NO
        | SBDR_SSDP_NO
        | FBSDP_NO
        | PSDP_NO
        | BHI_NO
        | PBRSB_NO
        | GDS_NO
        | RFDS_NO
        | ITS_NO
};

fn seg_base<const SEG: usize>(cpu: &mut Cpu) -> Guest<u64> {
    Ok(cpu.s.segments[SEG].base)
}
fn set_seg_base<const SEG: usize>(cpu: &mut Cpu, value: u64) -> Guest<()> {
    msr::require(is_canonical(value))?;
    cpu.s.segments[SEG].base = value;
    Ok(())
}
const FS: usize = crate::state::Seg::Fs as usize;
const GS: usize = crate::state::Seg::Gs as usize;

/// Every register, in ascending order. Those of the local APIC are not here: [`super::msr`] passes them on.
#[rustfmt::skip]
pub(super) static TABLE: &[Entry] = &[
    // IA32_P5_MC_ADDR and IA32_P5_MC_TYPE: no machine check ever happened.
    entry(0x0, Always, Quiet(0)),
    entry(0x1, Always, Quiet(0)),
    entry(n::IA32_TSC, Always, Special { read: msr::read_tsc, write: msr::write_tsc }),
    entry(n::KVM_WALL_CLOCK, Always, Special { read: pv::read_wall_clock, write: pv::write_wall_clock }),
    entry(n::KVM_SYSTEM_TIME, Always, Special { read: pv::read_system_time, write: pv::write_system_time }),
    entry(n::IA32_PLATFORM_ID, Intel, Constant(0)),
    entry(n::IA32_FEATURE_CONTROL, Intel, Constant(FEATURE_CONTROL)),
    entry(n::IA32_TSC_ADJUST, With(F::TscAdjust), Special { read: msr::read_tsc_adjust, write: msr::write_tsc_adjust }),
    entry(n::IA32_SPEC_CTRL, Always, Field(|m| &mut m.spec_ctrl, SPEC_CTRL)),
    entry(n::IA32_PRED_CMD, Always, Special { read: msr::no_read, write: msr::write_pred_cmd }),
    entry(0x79, Always, Quiet(0)), // IA32_BIOS_UPDT_TRIG
    entry(n::IA32_BIOS_SIGN_ID, Intel, Quiet(MICROCODE_INTEL)),
    entry(n::IA32_BIOS_SIGN_ID, Amd, Quiet(MICROCODE_AMD)),
    entry(0xce, Intel, Constant(0)), // MSR_PLATFORM_INFO
    entry(n::IA32_MTRRCAP, Always, Constant(MTRR_CAP)),
    entry(n::IA32_ARCH_CAPABILITIES, With(F::ArchCapabilities), Constant(ARCH_CAPABILITIES)),
    entry(0x140, Intel, Stored(0, Mask(0))), // MISC_FEATURES_ENABLES
    entry(n::IA32_SYSENTER_CS, Always, Field(|m| &mut m.sysenter_cs, LOW32)),
    entry(n::IA32_SYSENTER_ESP, Always, Field(|m| &mut m.sysenter_esp, Canonical)),
    entry(n::IA32_SYSENTER_EIP, Always, Field(|m| &mut m.sysenter_eip, Canonical)),
    // No banks.
    entry(n::IA32_MCG_CAP, Always, Constant(0)),
    entry(n::IA32_MCG_STATUS, Always, Stored(0, Mask(0b111))),
    entry(n::IA32_MISC_ENABLE, Always, Stored(MISC_ENABLE, Mask(MISC_ENABLE_WRITABLE))),
    // LBR and BTF can be set and do nothing.
    entry(n::IA32_DEBUGCTL, Always, Stored(0, Mask(0b11))),
    // LASTBRANCHFROMIP to LASTINTTOIP.
    entry(0x1db, Always, Constant(0)),
    entry(0x1dc, Always, Constant(0)),
    entry(0x1dd, Always, Constant(0)),
    entry(0x1de, Always, Constant(0)),
    // Variable-range MTRRs: base and mask.
    entry(0x200, Always, Stored(0, MtrrBase)),
    entry(0x201, Always, Stored(0, MTRR_MASK)),
    entry(0x202, Always, Stored(0, MtrrBase)),
    entry(0x203, Always, Stored(0, MTRR_MASK)),
    entry(0x204, Always, Stored(0, MtrrBase)),
    entry(0x205, Always, Stored(0, MTRR_MASK)),
    entry(0x206, Always, Stored(0, MtrrBase)),
    entry(0x207, Always, Stored(0, MTRR_MASK)),
    entry(0x208, Always, Stored(0, MtrrBase)),
    entry(0x209, Always, Stored(0, MTRR_MASK)),
    entry(0x20a, Always, Stored(0, MtrrBase)),
    entry(0x20b, Always, Stored(0, MTRR_MASK)),
    entry(0x20c, Always, Stored(0, MtrrBase)),
    entry(0x20d, Always, Stored(0, MTRR_MASK)),
    entry(0x20e, Always, Stored(0, MtrrBase)),
    entry(0x20f, Always, Stored(0, MTRR_MASK)),
    // Fixed-range MTRRs: one of 64 KiB, two of 16 KiB, eight of 4 KiB pieces.
    entry(0x250, Always, Stored(0, MtrrTypes)),
    entry(0x258, Always, Stored(0, MtrrTypes)),
    entry(0x259, Always, Stored(0, MtrrTypes)),
    entry(0x268, Always, Stored(0, MtrrTypes)),
    entry(0x269, Always, Stored(0, MtrrTypes)),
    entry(0x26a, Always, Stored(0, MtrrTypes)),
    entry(0x26b, Always, Stored(0, MtrrTypes)),
    entry(0x26c, Always, Stored(0, MtrrTypes)),
    entry(0x26d, Always, Stored(0, MtrrTypes)),
    entry(0x26e, Always, Stored(0, MtrrTypes)),
    entry(0x26f, Always, Stored(0, MtrrTypes)),
    entry(n::IA32_PAT, Always, Stored(PAT_RESET, PatTypes)),
    entry(n::IA32_MTRR_DEF_TYPE, Always, Stored(MTRR_DEFAULT, MtrrDefault)),
    // KVM's paravirtual interface.
    entry(n::KVM_WALL_CLOCK_NEW, Always, Special { read: pv::read_wall_clock, write: pv::write_wall_clock }),
    entry(n::KVM_SYSTEM_TIME_NEW, Always, Special { read: pv::read_system_time, write: pv::write_system_time }),
    entry(n::KVM_STEAL_TIME, Always, Special { read: pv::read_steal_time, write: pv::write_steal_time }),
    entry(n::KVM_PV_EOI_EN, Always, Special { read: pv::read_eoi, write: pv::write_eoi }),
    entry(n::IA32_EFER, Always, Special { read: msr::read_efer, write: msr::write_efer }),
    entry(n::IA32_STAR, Always, Field(|m| &mut m.star, Any)),
    entry(n::IA32_LSTAR, Always, Field(|m| &mut m.lstar, Canonical)),
    entry(n::IA32_CSTAR, Always, Field(|m| &mut m.cstar, Canonical)),
    entry(n::IA32_FMASK, Always, Field(|m| &mut m.fmask, LOW32)),
    entry(n::IA32_FS_BASE, Always, Special { read: seg_base::<FS>, write: set_seg_base::<FS> }),
    entry(n::IA32_GS_BASE, Always, Special { read: seg_base::<GS>, write: set_seg_base::<GS> }),
    entry(n::IA32_KERNEL_GS_BASE, Always, Field(|m| &mut m.kernel_gs_base, Canonical)),
    entry(n::IA32_TSC_AUX, Always, Field(|m| &mut m.tsc_aux, LOW32)),
    // AMD: what its kernels' start-up code reads, adjusts and writes back. Nothing of it has an effect here.
    entry(0xc001_0010, Amd, Quiet(0)),                                  // SYSCFG
    entry(0xc001_0015, Amd, Stored(HWCR_TSC_FREQ_SEL, HWCR_WRITABLE)),  // HWCR
    entry(0xc001_001f, Amd, Stored(0, Any)),                            // NB_CFG
    entry(0xc001_0055, Amd, Quiet(0)),                                  // INT_PENDING
    entry(0xc001_0058, Amd, Quiet(0)),                                  // MMIO_CONF_BASE
    entry(0xc001_1020, Amd, Quiet(0)),                                  // LS_CFG
    entry(0xc001_1021, Amd, Quiet(0)),                                  // IC_CFG
    entry(0xc001_1022, Amd, Quiet(0)),                                  // DC_CFG
    entry(0xc001_1023, Amd, Quiet(0)),                                  // TW_CFG
    entry(0xc001_1029, Amd, Quiet(DE_CFG)),                             // DE_CFG
    entry(0xc001_102a, Amd, Quiet(0)),                                  // BU_CFG2
    entry(0xc001_102c, Amd, Quiet(0)),                                  // EX_CFG
    entry(0xc001_102e, Amd, Quiet(0)),                                  // BP_CFG
];

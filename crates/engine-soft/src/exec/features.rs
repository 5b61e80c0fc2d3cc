//! Which instructions the guest's CPU has.
//!
//! The decoder names the CPUID features that each instruction needs. The set of those that the guest sees is
//! computed once a VM, as bits at the decoder's own numbers, so that a check costs a few loads.

use berth_cpu::cpuid::{self, CpuidModel, EngineFeatures, Feature as F};
use iced_x86::{CpuidFeature as C, Instruction, Mnemonic as M};

/// Frequency of the APIC timer's input clock in Hz.
pub const BUS_HZ: u64 = 1_000_000_000;

/// What every x86-64 CPU has, whatever CPUID says.
const ALWAYS: &[C] = &[
    C::INTEL8086,
    C::INTEL186,
    C::INTEL286,
    C::INTEL386,
    C::INTEL486,
    C::X64,
    C::CPUID,
    C::FPU287,
    C::FPU387,
    C::PAUSE,
    C::MULTIBYTENOP,
    C::RDPMC,
];

/// Which feature of the CPU model stands for which of the decoder's.
const MAP: &[(C, F)] = &[
    (C::ADX, F::Adx),
    (C::AES, F::Aes),
    (C::AVX, F::Avx),
    (C::AVX2, F::Avx2),
    (C::BMI1, F::Bmi1),
    (C::BMI2, F::Bmi2),
    (C::CLFLUSHOPT, F::Clflushopt),
    (C::CLFSH, F::Clflush),
    (C::CLWB, F::Clwb),
    (C::CMOV, F::Cmov),
    (C::CMPXCHG16B, F::Cmpxchg16b),
    (C::CX8, F::Cmpxchg8b),
    (C::F16C, F::F16c),
    (C::FMA, F::Fma),
    (C::FPU, F::Fpu),
    (C::FSGSBASE, F::Fsgsbase),
    (C::FXSR, F::Fxsr),
    (C::GFNI, F::Gfni),
    (C::INVPCID, F::Invpcid),
    (C::LZCNT, F::Lzcnt),
    (C::MMX, F::Mmx),
    (C::MOVBE, F::Movbe),
    (C::MSR, F::Msr),
    (C::PCLMULQDQ, F::Pclmulqdq),
    (C::POPCNT, F::Popcnt),
    (C::PREFETCHW, F::Prefetchw),
    (C::RDPID, F::Rdpid),
    (C::RDRAND, F::Rdrand),
    (C::RDSEED, F::Rdseed),
    (C::RDTSCP, F::Rdtscp),
    (C::SEP, F::Sysenter),
    (C::SHA, F::Sha),
    (C::SMAP, F::Smap),
    (C::SSE, F::Sse),
    (C::SSE2, F::Sse2),
    (C::SSE3, F::Sse3),
    (C::SSE4_1, F::Sse41),
    (C::SSE4_2, F::Sse42),
    (C::SSSE3, F::Ssse3),
    (C::SYSCALL, F::Syscall),
    (C::TSC, F::Tsc),
    (C::VAES, F::Vaes),
    (C::VPCLMULQDQ, F::Vpclmulqdq),
    (C::XSAVE, F::Xsave),
    (C::XSAVEC, F::Xsavec),
    (C::XSAVEOPT, F::Xsaveopt),
];

/// A set of the decoder's CPUID features.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FeatureSet([u64; 4]);

impl FeatureSet {
    /// What the guest may use on a CPU of this model.
    pub fn of(model: &CpuidModel) -> Self {
        let mut set = Self::default();
        let shown = MAP.iter().filter(|(_, feature)| model.has(*feature)).map(|(c, _)| *c);
        ALWAYS.iter().copied().chain(shown).for_each(|c| set.insert(c));
        set
    }

    fn insert(&mut self, feature: C) {
        let n = feature as usize;
        self.0[n / 64 % 4] |= 1 << (n % 64);
    }

    /// Whether `feature` is in the set.
    pub fn contains(&self, feature: C) -> bool {
        let n = feature as usize;
        self.0[n / 64 % 4] >> (n % 64) & 1 != 0
    }

    /// Whether all of `features` are in the set.
    pub fn contains_all(&self, features: &[C]) -> bool {
        features.iter().all(|&f| self.contains(f))
    }

    /// Whether the guest's CPU has this instruction. If not it raises #UD.
    pub fn allows(&self, insn: &Instruction) -> bool {
        self.contains_all(insn.cpuid_features()) || degrades(insn)
    }
}

/// Instructions that a CPU without their feature executes as something else, instead of raising #UD.
fn degrades(insn: &Instruction) -> bool {
    is_reserved_nop(insn)
        || match insn.mnemonic() {
            // Without the feature the prefix is ignored: BSR, BSF, WBINVD. The host's CPU does the same.
            M::Lzcnt | M::Tzcnt | M::Wbnoinvd => true,
            // The way to the hypervisor, whichever vendor's.
            M::Vmcall | M::Vmmcall => true,
            _ => false,
        }
}

/// Instructions of features that guests never see, in the space of reserved NOPs (SDM volume 2, table A-3): they
/// do nothing, and do not access their memory operand.
pub fn is_reserved_nop(insn: &Instruction) -> bool {
    matches!(
        insn.mnemonic(),
        M::Endbr32
            | M::Endbr64
            | M::Rdsspd
            | M::Rdsspq
            | M::Cldemote
            | M::Prefetchw
            | M::Prefetchwt1
            | M::Prefetchit0
            | M::Prefetchit1
            | M::Bndcl
            | M::Bndcn
            | M::Bndcu
            | M::Bndmk
            | M::Bndmov
            | M::Bndldx
            | M::Bndstx
    )
}

/// The CPU model for a VM on the soft engine, made from this host.
pub fn host_model(vcpus: u8, tsc_hz: u64) -> CpuidModel {
    CpuidModel::new(&cpuid::host, EngineFeatures::Soft, vcpus, tsc_hz, BUS_HZ)
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_cpu::cpuid::CpuidRegs;
    use iced_x86::Decoder;

    fn bare() -> CpuidModel {
        let host = |leaf: u32, _| CpuidRegs {
            eax: u32::from(leaf == 0),
            edx: u32::from(leaf == 1),
            ..CpuidRegs::default()
        };
        CpuidModel::new(&host, EngineFeatures::Soft, 1, 1_000_000_000, BUS_HZ)
    }

    fn rich() -> CpuidModel {
        let host = |leaf: u32, _| CpuidRegs {
            eax: if leaf & 0x7fff_ffff == 0 { leaf | 0x20 } else { u32::MAX },
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
        };
        CpuidModel::new(&host, EngineFeatures::Soft, 1, 1_000_000_000, BUS_HZ)
    }

    fn allowed(model: &CpuidModel, insn: &Instruction) -> bool {
        FeatureSet::of(model).allows(insn)
    }

    fn decode(bytes: &[u8]) -> Instruction {
        Decoder::new(64, bytes, 0).decode()
    }

    #[test]
    fn avx2_is_allowed_only_where_the_model_has_it() {
        let vpaddd = decode(&[0xc5, 0xfd, 0xfe, 0xc1]);
        assert!(allowed(&rich(), &vpaddd));
        assert!(!allowed(&bare(), &vpaddd));
    }

    #[test]
    fn avx512_is_never_allowed() {
        // vaddps zmm0, zmm1, zmm2; vaesenc ymm0, ymm1, ymm16 (EVEX).
        assert!(!allowed(&rich(), &decode(&[0x62, 0xf1, 0x74, 0x48, 0x58, 0xc2])));
        assert!(!allowed(&rich(), &decode(&[0x62, 0xb2, 0x75, 0x28, 0xdc, 0xc0])));
    }

    #[test]
    fn vmx_svm_and_monitor_do_not_exist_but_hypercalls_do() {
        for bytes in [&[0x0f, 0x01, 0xc2][..], &[0x0f, 0x01, 0xd8], &[0x0f, 0x01, 0xc8]] {
            assert!(!allowed(&rich(), &decode(bytes)), "{bytes:x?}");
        }
        assert!(allowed(&rich(), &decode(&[0x0f, 0x01, 0xc1])));
        assert!(allowed(&rich(), &decode(&[0x0f, 0x01, 0xd9])));
    }

    #[test]
    fn branch_markers_are_nops() {
        let endbr64 = decode(&[0xf3, 0x0f, 0x1e, 0xfa]);
        assert!(is_reserved_nop(&endbr64) && allowed(&bare(), &endbr64));
    }

    #[test]
    fn plain_instructions_need_nothing() {
        for bytes in [&[0x48, 0x01, 0xd8][..], &[0xf3, 0x90], &[0x0f, 0xa2], &[0x0f, 0x0b]] {
            assert!(allowed(&bare(), &decode(bytes)), "{bytes:x?}");
        }
    }
}

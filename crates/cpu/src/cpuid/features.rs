//! The feature bits of CPUID: one line a bit (SDM volume 2, CPUID; AMD64 APM volume 3, appendix E).

use super::Vendor;

/// Output register of CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Who provides a feature to guests of the soft engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provider {
    /// The host's CPU: translated code uses its instructions, so the host must have them.
    Host,
    /// The engine itself, on any host.
    Engine,
}

/// Which guests may see a feature: those whose vendor defines the bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendors {
    /// Every vendor has it.
    All,
    /// Only AMD and Hygon.
    Amd,
    /// Only Intel and those who follow it.
    Intel,
}

impl Vendors {
    fn includes(self, vendor: Vendor) -> bool {
        match self {
            Self::All => true,
            Self::Amd => vendor == Vendor::Amd,
            Self::Intel => vendor != Vendor::Amd,
        }
    }
}

/// One feature bit.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The feature.
    pub feature: Feature,
    /// Its name in lower case, as /proc/cpuinfo has it where Linux knows it.
    pub name: &'static str,
    /// CPUID leaf.
    pub leaf: u32,
    /// CPUID subleaf.
    pub subleaf: u32,
    /// Output register.
    pub register: Register,
    /// Bit in the register, 0 to 31.
    pub bit: u32,
    /// Who provides it.
    pub provider: Provider,
    /// Whose guests see it.
    pub vendors: Vendors,
}

macro_rules! features {
    ($($feature:ident $name:literal, $leaf:literal, $subleaf:literal, $register:ident, $bit:literal,
       $provider:ident, $vendors:ident;)*) => {
        /// A feature of the guest's CPU that CPUID reports.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(missing_docs)]
        #[repr(u8)]
        pub enum Feature { $($feature),* }

        /// Every feature that guests may see, in the order of CPUID.
        pub const FEATURES: &[Entry] = &[$(Entry {
            feature: Feature::$feature, name: $name, leaf: $leaf, subleaf: $subleaf,
            register: Register::$register, bit: $bit,
            provider: Provider::$provider, vendors: Vendors::$vendors,
        }),*];
    };
}

features! {
    Sse3            "pni",               0x1, 0, Ecx, 0, Host, All;
    Pclmulqdq       "pclmulqdq",         0x1, 0, Ecx, 1, Host, All;
    Ssse3           "ssse3",             0x1, 0, Ecx, 9, Host, All;
    Fma             "fma",               0x1, 0, Ecx, 12, Host, All;
    Cmpxchg16b      "cx16",              0x1, 0, Ecx, 13, Host, All;
    Pcid            "pcid",              0x1, 0, Ecx, 17, Engine, All;
    Sse41           "sse4_1",            0x1, 0, Ecx, 19, Host, All;
    Sse42           "sse4_2",            0x1, 0, Ecx, 20, Host, All;
    X2apic          "x2apic",            0x1, 0, Ecx, 21, Engine, All;
    Movbe           "movbe",             0x1, 0, Ecx, 22, Host, All;
    Popcnt          "popcnt",            0x1, 0, Ecx, 23, Host, All;
    TscDeadline     "tsc_deadline_timer", 0x1, 0, Ecx, 24, Engine, All;
    Aes             "aes",               0x1, 0, Ecx, 25, Host, All;
    Xsave           "xsave",             0x1, 0, Ecx, 26, Engine, All;
    Avx             "avx",               0x1, 0, Ecx, 28, Host, All;
    F16c            "f16c",              0x1, 0, Ecx, 29, Host, All;
    Rdrand          "rdrand",            0x1, 0, Ecx, 30, Host, All;
    Hypervisor      "hypervisor",        0x1, 0, Ecx, 31, Engine, All;

    Fpu             "fpu",               0x1, 0, Edx, 0, Host, All;
    De              "de",                0x1, 0, Edx, 2, Engine, All;
    Pse             "pse",               0x1, 0, Edx, 3, Engine, All;
    Tsc             "tsc",               0x1, 0, Edx, 4, Host, All;
    Msr             "msr",               0x1, 0, Edx, 5, Engine, All;
    Pae             "pae",               0x1, 0, Edx, 6, Engine, All;
    Mce             "mce",               0x1, 0, Edx, 7, Engine, All;
    Cmpxchg8b       "cx8",               0x1, 0, Edx, 8, Host, All;
    Apic            "apic",              0x1, 0, Edx, 9, Engine, All;
    Sysenter        "sep",               0x1, 0, Edx, 11, Engine, All;
    Mtrr            "mtrr",              0x1, 0, Edx, 12, Engine, All;
    Pge             "pge",               0x1, 0, Edx, 13, Engine, All;
    Mca             "mca",               0x1, 0, Edx, 14, Engine, All;
    Cmov            "cmov",              0x1, 0, Edx, 15, Host, All;
    Pat             "pat",               0x1, 0, Edx, 16, Engine, All;
    Pse36           "pse36",             0x1, 0, Edx, 17, Engine, All;
    Clflush         "clflush",           0x1, 0, Edx, 19, Host, All;
    Mmx             "mmx",               0x1, 0, Edx, 23, Host, All;
    Fxsr            "fxsr",              0x1, 0, Edx, 24, Engine, All;
    Sse             "sse",               0x1, 0, Edx, 25, Host, All;
    Sse2            "sse2",              0x1, 0, Edx, 26, Host, All;

    // The APIC timer never stops.
    Arat            "arat",              0x6, 0, Eax, 2, Engine, All;

    Fsgsbase        "fsgsbase",          0x7, 0, Ebx, 0, Engine, All;
    TscAdjust       "tsc_adjust",        0x7, 0, Ebx, 1, Engine, All;
    Bmi1            "bmi1",              0x7, 0, Ebx, 3, Host, All;
    Avx2            "avx2",              0x7, 0, Ebx, 5, Host, All;
    Smep            "smep",              0x7, 0, Ebx, 7, Engine, All;
    Bmi2            "bmi2",              0x7, 0, Ebx, 8, Host, All;
    Erms            "erms",              0x7, 0, Ebx, 9, Engine, All;
    Invpcid         "invpcid",           0x7, 0, Ebx, 10, Engine, All;
    // FCS and FDS are always saved as zero.
    ZeroFcsFds      "zero_fcs_fds",      0x7, 0, Ebx, 13, Engine, All;
    Rdseed          "rdseed",            0x7, 0, Ebx, 18, Host, All;
    Adx             "adx",               0x7, 0, Ebx, 19, Host, All;
    Smap            "smap",              0x7, 0, Ebx, 20, Engine, All;
    Clflushopt      "clflushopt",        0x7, 0, Ebx, 23, Host, All;
    Clwb            "clwb",              0x7, 0, Ebx, 24, Host, All;
    Sha             "sha_ni",            0x7, 0, Ebx, 29, Host, All;
    Umip            "umip",              0x7, 0, Ecx, 2, Engine, All;
    Gfni            "gfni",              0x7, 0, Ecx, 8, Host, All;
    Vaes            "vaes",              0x7, 0, Ecx, 9, Host, All;
    Vpclmulqdq      "vpclmulqdq",        0x7, 0, Ecx, 10, Host, All;
    Rdpid           "rdpid",             0x7, 0, Ecx, 22, Engine, All;
    Fsrm            "fsrm",              0x7, 0, Edx, 4, Engine, All;
    // IBRS and IBPB: the MSRs exist and do nothing, because translated code needs neither.
    SpecCtrl        "spec_ctrl",         0x7, 0, Edx, 26, Engine, Intel;
    ArchCapabilities "arch_capabilities", 0x7, 0, Edx, 29, Engine, Intel;

    Xsaveopt        "xsaveopt",          0xd, 1, Eax, 0, Engine, All;
    Xsavec          "xsavec",            0xd, 1, Eax, 1, Engine, All;
    Xgetbv1         "xgetbv1",           0xd, 1, Eax, 2, Engine, All;

    Lahf            "lahf_lm",           0x8000_0001, 0, Ecx, 0, Host, All;
    Lzcnt           "abm",               0x8000_0001, 0, Ecx, 5, Host, All;
    Prefetchw       "3dnowprefetch",     0x8000_0001, 0, Ecx, 8, Host, All;
    Topoext         "topoext",           0x8000_0001, 0, Ecx, 22, Host, Amd;
    Syscall         "syscall",           0x8000_0001, 0, Edx, 11, Engine, All;
    Nx              "nx",                0x8000_0001, 0, Edx, 20, Engine, All;
    MmxExt          "mmxext",            0x8000_0001, 0, Edx, 22, Host, Amd;
    Page1Gb         "pdpe1gb",           0x8000_0001, 0, Edx, 26, Engine, All;
    Rdtscp          "rdtscp",            0x8000_0001, 0, Edx, 27, Engine, All;
    LongMode        "lm",                0x8000_0001, 0, Edx, 29, Engine, All;

    InvariantTsc    "constant_tsc",      0x8000_0007, 0, Edx, 8, Host, All;

    // FXSAVE, XSAVE and the like always save FIP, FDP and FOP (as zero).
    XsaveErPtr      "xsaveerptr",        0x8000_0008, 0, Ebx, 2, Engine, Amd;
    AmdIbpb         "ibpb",              0x8000_0008, 0, Ebx, 12, Engine, Amd;
    AmdIbrs         "ibrs",              0x8000_0008, 0, Ebx, 14, Engine, Amd;
    // CPU bugs that guests of a translator cannot meet.
    AmdSsbNo        "amd_ssb_no",        0x8000_0008, 0, Ebx, 26, Engine, Amd;
    BtcNo           "btc_no",            0x8000_0008, 0, Ebx, 29, Engine, Amd;

    NullSelClrBase  "null_sel_clr_base", 0x8000_0021, 0, Eax, 6, Engine, Amd;
    AutoIbrs        "autoibrs",          0x8000_0021, 0, Eax, 8, Engine, Amd;
    SrsoNo          "srso_no",           0x8000_0021, 0, Eax, 29, Engine, Amd;
    SrsoUserKernelNo "srso_user_kernel_no", 0x8000_0021, 0, Eax, 30, Engine, Amd;
    TsaSqNo         "tsa_sq_no",         0x8000_0021, 0, Ecx, 1, Engine, Amd;
    TsaL1No         "tsa_l1_no",         0x8000_0021, 0, Ecx, 2, Engine, Amd;
}

/// What cannot work without the feature before it: a host that reports one without the other is not believed.
const NEEDS: &[(Feature, &[Feature])] = &[
    (Feature::Fxsr, &[Feature::Sse]),
    (Feature::Sse, &[Feature::Sse2]),
    (Feature::Sse2, &[Feature::Sse3, Feature::Aes, Feature::Pclmulqdq, Feature::Sha, Feature::Gfni]),
    (Feature::Sse3, &[Feature::Ssse3]),
    (Feature::Ssse3, &[Feature::Sse41]),
    (Feature::Sse41, &[Feature::Sse42]),
    (Feature::Xsave, &[Feature::Avx, Feature::Xsaveopt, Feature::Xsavec, Feature::Xgetbv1]),
    (
        Feature::Avx,
        &[
            Feature::Avx2,
            Feature::Fma,
            Feature::F16c,
            Feature::Vaes,
            Feature::Vpclmulqdq,
            Feature::Bmi1,
            Feature::Bmi2,
        ],
    ),
];

/// A set of [`Feature`]s.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FeatureSet(u128);

impl FeatureSet {
    /// Whether `feature` is in the set.
    pub const fn contains(self, feature: Feature) -> bool {
        self.0 >> feature as u8 & 1 != 0
    }
    /// Adds `feature`.
    pub const fn insert(&mut self, feature: Feature) {
        self.0 |= 1 << feature as u8;
    }
    /// Takes `feature` out.
    pub const fn remove(&mut self, feature: Feature) {
        self.0 &= !(1 << feature as u8);
    }
    /// The features in the order of [`FEATURES`].
    pub fn iter(self) -> impl Iterator<Item = &'static Entry> {
        FEATURES.iter().filter(move |e| self.contains(e.feature))
    }

    /// Those that `vendor`'s guests see when the host has `host_has` and the engine provides its own if
    /// `engine_provides`.
    pub(super) fn select(vendor: Vendor, engine_provides: bool, host_has: impl Fn(&Entry) -> bool) -> Self {
        let mut set = Self::default();
        for entry in FEATURES.iter().filter(|e| e.vendors.includes(vendor)) {
            if host_has(entry) || engine_provides && entry.provider == Provider::Engine {
                set.insert(entry.feature);
            }
        }
        for (base, dependents) in NEEDS {
            if !set.contains(*base) {
                dependents.iter().for_each(|&d| set.remove(d));
            }
        }
        set
    }
}

const _: () = assert!(FEATURES.len() <= 128, "a FeatureSet has 128 bits");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_bit_is_in_the_table_twice() {
        for (i, a) in FEATURES.iter().enumerate() {
            assert_eq!(a.feature as usize, i, "{}", a.name);
            assert!(a.bit < 32, "{}", a.name);
            for b in &FEATURES[i + 1..] {
                let place = |e: &Entry| (e.leaf, e.subleaf, e.register as u8, e.bit);
                assert_ne!(place(a), place(b), "{} and {}", a.name, b.name);
            }
        }
    }

    #[test]
    fn features_without_their_base_are_dropped() {
        let set = FeatureSet::select(Vendor::Intel, false, |e| e.feature != Feature::Ssse3);
        assert!(set.contains(Feature::Sse3) && set.contains(Feature::Avx2));
        assert!(!set.contains(Feature::Sse41) && !set.contains(Feature::Sse42));
    }

    #[test]
    fn engine_features_need_no_host() {
        let set = FeatureSet::select(Vendor::Intel, true, |_| false);
        assert!(set.contains(Feature::X2apic) && set.contains(Feature::Smap));
        assert!(!set.contains(Feature::Cmov) && !set.contains(Feature::AutoIbrs));
    }
}

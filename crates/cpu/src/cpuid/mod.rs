//! The CPU model that guests see through CPUID: what the host has *and* the engine can execute, never more.
//!
//! ```text
//!   host CPUID ──┐
//!   features.rs ─┴─► FeatureSet ──► leaves.rs ──► CpuidModel ──cpuid(leaf, subleaf, context)──► guest
//! ```
//!
//! What an engine implements by itself (system features such as x2APIC, SMAP or PCID) does not depend on the
//! host. Vendor, family, model and stepping are the host's, so that software picks code for the CPU that really
//! executes it. CPU bugs are reported as absent where the vendor has a bit for that: guests of a translator
//! cannot meet them, and their workarounds cost time.

mod features;
mod leaves;
#[cfg(test)]
mod tests;

pub use features::{Entry, FEATURES, Feature, FeatureSet, Provider, Register, Vendors};

use crate::bits::xcr0;

/// Output of one CPUID instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct CpuidRegs {
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

impl CpuidRegs {
    /// The register `register`.
    pub const fn get(&self, register: Register) -> u32 {
        match register {
            Register::Eax => self.eax,
            Register::Ebx => self.ebx,
            Register::Ecx => self.ecx,
            Register::Edx => self.edx,
        }
    }
    fn get_mut(&mut self, register: Register) -> &mut u32 {
        match register {
            Register::Eax => &mut self.eax,
            Register::Ebx => &mut self.ebx,
            Register::Ecx => &mut self.ecx,
            Register::Edx => &mut self.edx,
        }
    }
}

/// MAXPHYADDR of the soft engine's CPUs: its page walker does not depend on the host's address width.
pub const SOFT_PHYSICAL_BITS: u8 = 46;

/// Who made the CPU, as far as the model depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// GenuineIntel.
    Intel,
    /// AuthenticAMD and HygonGenuine.
    Amd,
    /// Anyone else; treated like Intel.
    Other,
}

impl Vendor {
    /// From the output of CPUID leaf 0.
    fn of(leaf0: CpuidRegs) -> Self {
        let text: Vec<u8> = [leaf0.ebx, leaf0.edx, leaf0.ecx].iter().flat_map(|r| r.to_le_bytes()).collect();
        match text.as_slice() {
            b"GenuineIntel" => Self::Intel,
            b"AuthenticAMD" | b"HygonGenuine" => Self::Amd,
            _ => Self::Other,
        }
    }
}

/// What an engine adds to the host's features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineFeatures {
    /// The soft engine provides every [`Provider::Engine`] feature by itself.
    Soft,
    /// The "host" that the model is made from already answers for engine and CPU together.
    Hardware,
}

/// The state of a vCPU that CPUID's output depends on.
#[derive(Clone, Copy, Debug)]
pub struct CpuidContext {
    /// Its APIC ID.
    pub apic_id: u32,
    /// CR4.OSXSAVE.
    pub osxsave: bool,
    /// XCR0.
    pub xcr0: u64,
}

/// The guest's CPU model. The same for all vCPUs of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuidModel {
    vendor: Vendor,
    features: FeatureSet,
    physical_bits: u8,
    max_basic: u32,
    max_extended: u32,
    /// Leaf, subleaf, output; constant parts only.
    leaves: Vec<(u32, u32, CpuidRegs)>,
}

impl CpuidModel {
    /// The model for a VM of `vcpus` (1 to 255) vCPUs on a host whose CPUID is `host` (leaf, subleaf). `tsc_hz`
    /// is the frequency of the guest's time-stamp counter, `bus_hz` the APIC timer's input clock.
    pub fn new(
        host: &dyn Fn(u32, u32) -> CpuidRegs,
        engine: EngineFeatures,
        vcpus: u8,
        tsc_hz: u64,
        bus_hz: u64,
    ) -> Self {
        leaves::build(host, engine, vcpus.max(1), tsc_hz, bus_hz)
    }

    /// Who made the CPU.
    pub fn vendor(&self) -> Vendor {
        self.vendor
    }

    /// Every feature that the guest sees.
    pub fn features(&self) -> FeatureSet {
        self.features
    }

    /// Whether the guest sees `feature`.
    pub fn has(&self, feature: Feature) -> bool {
        self.features.contains(feature)
    }

    /// MAXPHYADDR: bits of a guest physical address.
    pub fn physical_bits(&self) -> u8 {
        self.physical_bits
    }

    /// The state components that XCR0 may enable.
    pub fn xcr0_supported(&self) -> u64 {
        let avx = if self.has(Feature::Avx) { xcr0::AVX } else { 0 };
        xcr0::X87 | xcr0::SSE | avx
    }

    /// What CPUID with EAX = `leaf` and ECX = `subleaf` gives.
    pub fn cpuid(&self, leaf: u32, subleaf: u32, context: &CpuidContext) -> CpuidRegs {
        let leaf = self.known_leaf(leaf);
        let mut regs = self.constant(leaf, subleaf);
        match leaf {
            0x1 => {
                regs.ebx |= context.apic_id << 24;
                regs.ecx |= u32::from(context.osxsave) << 27;
            }
            0xb | 0x1f => {
                regs.ecx |= subleaf & 0xff;
                regs.edx = context.apic_id;
            }
            0xd if subleaf <= 1 && self.has(Feature::Xsave) => regs.ebx = xsave_size(context.xcr0),
            0x8000_001e if self.has(Feature::Topoext) => {
                regs.eax = context.apic_id;
                regs.ebx |= context.apic_id & 0xff;
            }
            _ => {}
        }
        regs
    }

    /// Every leaf that is not all zeros, for an engine that answers CPUID from a table: leaf, subleaf where the
    /// output depends on it, and the output as [`Self::cpuid`] gives it.
    pub fn entries<'a>(
        &'a self,
        context: &'a CpuidContext,
    ) -> impl Iterator<Item = (u32, Option<u32>, CpuidRegs)> + 'a {
        self.leaves.iter().map(move |&(leaf, subleaf, _)| {
            let indexed = leaves::HAS_SUBLEAVES.contains(&leaf).then_some(subleaf);
            (leaf, indexed, self.cpuid(leaf, subleaf, context))
        })
    }

    /// Intel's CPUs answer leaves that they do not have as the highest basic leaf, AMD's as zeros.
    fn known_leaf(&self, leaf: u32) -> u32 {
        let known = match leaf >> 28 {
            0 => leaf <= self.max_basic,
            4 => return leaf,
            8 => leaf <= self.max_extended,
            _ => false,
        };
        if known || self.vendor == Vendor::Amd { leaf } else { self.max_basic }
    }

    fn constant(&self, leaf: u32, subleaf: u32) -> CpuidRegs {
        let of_leaf = || self.leaves.iter().filter(|(l, _, _)| *l == leaf);
        // Leaves without subleaves ignore ECX.
        let subleaf = if leaves::HAS_SUBLEAVES.contains(&leaf) { subleaf } else { 0 };
        of_leaf().find(|(_, s, _)| *s == subleaf).map(|(_, _, regs)| *regs).unwrap_or_default()
    }
}

/// Size in bytes of an XSAVE area for the components in `enabled`: x87 and SSE always count (SDM volume 1, 13.2).
/// The standard and the compacted form have the same size, because AVX is the only extended component.
fn xsave_size(enabled: u64) -> u32 {
    let avx = if enabled & xcr0::AVX != 0 { 256 } else { 0 };
    512 + 64 + avx
}

/// Executes CPUID on the host.
pub fn host(leaf: u32, subleaf: u32) -> CpuidRegs {
    let r = std::arch::x86_64::__cpuid_count(leaf, subleaf);
    CpuidRegs { eax: r.eax, ebx: r.ebx, ecx: r.ecx, edx: r.edx }
}

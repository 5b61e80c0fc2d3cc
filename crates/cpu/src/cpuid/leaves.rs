//! Fills the leaves of the guest's CPUID that are not feature bits: identity, topology, caches, frequencies and the
//! KVM paravirtual interface.

use super::features::FeatureSet;
use super::{CpuidModel, CpuidRegs, EngineFeatures, Entry, Feature, Register, SOFT_PHYSICAL_BITS, Vendor};

/// Leaves whose output depends on ECX.
pub(super) const HAS_SUBLEAVES: &[u32] = &[0x4, 0x7, 0xb, 0xd, 0x1f, 0x8000_001d];

const MAX_BASIC: u32 = 0x1f;
const MAX_EXTENDED_INTEL: u32 = 0x8000_0008;
const MAX_EXTENDED_AMD: u32 = 0x8000_0021;
/// Where a hypervisor announces itself.
const HYPERVISOR_BASE: u32 = 0x4000_0000;
/// "KVMKVMKVM" and three zero bytes in EBX, ECX, EDX.
const KVM_SIGNATURE: [u32; 3] = [0x4b4d_564b, 0x564b_4d56, 0x0000_004d];
const LINEAR_BITS: u32 = 48;
/// Most cache descriptions that are taken over from the host's leaf 4 or 0x8000001d.
const MAX_CACHES: u32 = 8;
const FALLBACK_BRAND: &[u8] = b"Berth virtual x86-64 CPU";

/// Bits of KVM's feature leaf (Documentation/virt/kvm/x86/cpuid.rst).
mod kvm {
    pub const CLOCKSOURCE: u32 = 1 << 0;
    pub const NOP_IO_DELAY: u32 = 1 << 1;
    pub const CLOCKSOURCE2: u32 = 1 << 3;
    pub const STEAL_TIME: u32 = 1 << 5;
    pub const PV_EOI: u32 = 1 << 6;
    pub const PV_UNHALT: u32 = 1 << 7;
    pub const PV_TLB_FLUSH: u32 = 1 << 9;
    pub const PV_SEND_IPI: u32 = 1 << 11;
    pub const PV_SCHED_YIELD: u32 = 1 << 13;
    pub const CLOCKSOURCE_STABLE: u32 = 1 << 24;
    /// What the soft engine implements.
    pub const ALL: u32 = CLOCKSOURCE
        | NOP_IO_DELAY
        | CLOCKSOURCE2
        | STEAL_TIME
        | PV_EOI
        | PV_UNHALT
        | PV_TLB_FLUSH
        | PV_SEND_IPI
        | PV_SCHED_YIELD
        | CLOCKSOURCE_STABLE;
}

struct Builder<'a> {
    host: &'a dyn Fn(u32, u32) -> CpuidRegs,
    vendor: Vendor,
    features: FeatureSet,
    vcpus: u32,
    leaves: Vec<(u32, u32, CpuidRegs)>,
}

pub(super) fn build(
    host: &dyn Fn(u32, u32) -> CpuidRegs,
    engine: EngineFeatures,
    vcpus: u8,
    tsc_hz: u64,
    bus_hz: u64,
) -> CpuidModel {
    let vendor = Vendor::of(host(0, 0));
    let features = select_features(host, engine, vendor);
    let mut builder = Builder { host, vendor, features, vcpus: u32::from(vcpus), leaves: Vec::new() };
    let max_extended = if vendor == Vendor::Amd { MAX_EXTENDED_AMD } else { MAX_EXTENDED_INTEL };
    let physical_bits = match engine {
        EngineFeatures::Soft => u32::from(SOFT_PHYSICAL_BITS),
        EngineFeatures::Hardware => builder.host(0x8000_0008, 0).eax & 0xff,
    };
    builder.identity(max_extended);
    builder.caches();
    builder.topology();
    builder.xsave();
    builder.frequencies(tsc_hz, bus_hz);
    builder.address_sizes(physical_bits);
    let paravirtual = match engine {
        EngineFeatures::Soft => kvm::ALL,
        EngineFeatures::Hardware => kvm::ALL & host(HYPERVISOR_BASE + 1, 0).eax,
    };
    builder.hypervisor(paravirtual, tsc_hz, bus_hz);
    builder.feature_bits();
    CpuidModel {
        vendor,
        features,
        physical_bits: physical_bits as u8,
        max_basic: MAX_BASIC,
        max_extended,
        leaves: builder.leaves,
    }
}

/// The host's output for a leaf, zero for leaves beyond its last one.
fn host_leaf(host: &dyn Fn(u32, u32) -> CpuidRegs, leaf: u32, subleaf: u32) -> CpuidRegs {
    if host(leaf & 0x8000_0000, 0).eax < leaf { CpuidRegs::default() } else { host(leaf, subleaf) }
}

fn select_features(
    host: &dyn Fn(u32, u32) -> CpuidRegs,
    engine: EngineFeatures,
    vendor: Vendor,
) -> FeatureSet {
    let host_has = |e: &Entry| host_leaf(host, e.leaf, e.subleaf).get(e.register) >> e.bit & 1 != 0;
    let mut features = FeatureSet::select(vendor, engine == EngineFeatures::Soft, host_has);
    // AVX works in this process only if the host's operating system enabled it.
    const HOST_OSXSAVE: u32 = 1 << 27;
    if engine == EngineFeatures::Soft && host_leaf(host, 1, 0).ecx & HOST_OSXSAVE == 0 {
        use Feature::{Avx, Avx2, F16c, Fma, Vaes, Vpclmulqdq};
        [Avx, Avx2, Fma, F16c, Vaes, Vpclmulqdq].into_iter().for_each(|f| features.remove(f));
    }
    features
}

/// Bits that number `count` things, `count` at least 1.
fn bits_for(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

impl Builder<'_> {
    fn host(&self, leaf: u32, subleaf: u32) -> CpuidRegs {
        host_leaf(self.host, leaf, subleaf)
    }

    fn put(&mut self, leaf: u32, subleaf: u32, eax: u32, ebx: u32, ecx: u32, edx: u32) {
        self.leaves.push((leaf, subleaf, CpuidRegs { eax, ebx, ecx, edx }));
    }

    fn is_amd(&self) -> bool {
        self.vendor == Vendor::Amd
    }

    /// Maximum leaves, vendor, family, model and stepping, brand (SDM volume 2, tables 3-8 and 3-9).
    fn identity(&mut self, max_extended: u32) {
        let leaf0 = self.host(0, 0);
        self.put(0, 0, MAX_BASIC, leaf0.ebx, leaf0.ecx, leaf0.edx);

        let signature = self.host(1, 0).eax;
        // Brand index 0; CLFLUSH line in units of 8 bytes; how many APIC IDs the package may use.
        let ids = self.vcpus.next_power_of_two();
        let multi_core = u32::from(self.vcpus > 1);
        let clflush = self.host(1, 0).ebx & 0xff00;
        self.put(1, 0, signature, clflush | ids.min(255) << 16, 0, multi_core << 28);

        if self.is_amd() {
            self.put(0x8000_0000, 0, max_extended, leaf0.ebx, leaf0.ecx, leaf0.edx);
            // CmpLegacy: leaf 1's HTT bit means cores. The low bits of EDX repeat leaf 1's.
            const REPEATED: u32 = 0x0183_f3ff;
            let edx = self.feature_word(1, 0, Register::Edx) & REPEATED;
            self.put(0x8000_0001, 0, signature, 0, multi_core << 1, edx);
        } else {
            // No cache descriptors here: leaf 4 has them.
            self.put(2, 0, 0x00ff_ff01, 0, 0, 0);
            self.put(0x8000_0000, 0, max_extended, 0, 0, 0);
        }
        self.brand();
    }

    fn brand(&mut self) {
        let mut text: Vec<u8> = (0x8000_0002..=0x8000_0004)
            .map(|leaf| self.host(leaf, 0))
            .flat_map(|r| [r.eax, r.ebx, r.ecx, r.edx])
            .flat_map(u32::to_le_bytes)
            .collect();
        if text.iter().all(|&b| matches!(b, 0 | b' ')) {
            text = FALLBACK_BRAND.to_vec();
        }
        // 48 bytes with the zero at the end.
        text.resize(47, 0);
        text.push(0);
        for (leaf, part) in (0x8000_0002..).zip(text.chunks_exact(16)) {
            let mut words =
                part.chunks_exact(4).map(|w| w.iter().rev().fold(0, |n, &b| n << 8 | u32::from(b)));
            let mut next = || words.next().unwrap_or(0);
            let (eax, ebx, ecx, edx) = (next(), next(), next(), next());
            self.put(leaf, 0, eax, ebx, ecx, edx);
        }
    }

    /// The host's caches, shared among the guest's vCPUs as by the cores of one socket: the last level by all.
    fn caches(&mut self) {
        let leaf = match (self.is_amd(), self.features.contains(Feature::Topoext)) {
            (false, _) => 0x4,
            (true, true) => 0x8000_001d,
            (true, false) => 0,
        };
        for subleaf in 0..MAX_CACHES {
            let cache = self.host(leaf, subleaf);
            if leaf == 0 || cache.eax & 0x1f == 0 {
                break;
            }
            const SHARING: u32 = 0xfff << 14;
            const CORES: u32 = 0x3f << 26;
            let level = cache.eax >> 5 & 7;
            let ids = self.vcpus.next_power_of_two();
            let sharing = if level >= 3 { ids - 1 } else { 0 };
            let cores = if self.is_amd() { 0 } else { (ids - 1).min(0x3f) };
            let eax = cache.eax & !(SHARING | CORES) | sharing << 14 | cores << 26;
            self.put(leaf, subleaf, eax, cache.ebx, cache.ecx, cache.edx);
        }
        if self.is_amd() {
            let l1 = self.host(0x8000_0005, 0);
            self.put(0x8000_0005, 0, l1.eax, l1.ebx, l1.ecx, l1.edx);
        }
        let l2 = self.host(0x8000_0006, 0);
        let (eax, ebx, edx) = if self.is_amd() { (l2.eax, l2.ebx, l2.edx) } else { (0, 0, 0) };
        self.put(0x8000_0006, 0, eax, ebx, l2.ecx, edx);
    }

    /// Every vCPU is a core of one socket, with one thread (SDM volume 3, 9.9).
    fn topology(&mut self) {
        const SMT: u32 = 1 << 8;
        const CORE: u32 = 2 << 8;
        for leaf in [0xb, 0x1f] {
            self.put(leaf, 0, 0, 1, SMT, 0);
            self.put(leaf, 1, bits_for(self.vcpus), self.vcpus, CORE, 0);
        }
        if self.features.contains(Feature::Topoext) {
            self.put(0x8000_001e, 0, 0, 0, 0, 0);
        }
    }

    /// XCR0's components: x87, SSE and AVX (SDM volume 1, 13.2). EBX of subleaves 0 and 1 depends on the vCPU.
    fn xsave(&mut self) {
        if !self.features.contains(Feature::Xsave) {
            return;
        }
        let avx = self.features.contains(Feature::Avx);
        let components = if avx { 7 } else { 3 };
        self.put(0xd, 0, components, 0, super::xsave_size(components.into()), 0);
        self.put(0xd, 1, 0, 0, 0, 0);
        if avx {
            self.put(0xd, 2, 256, 576, 0, 0);
        }
    }

    /// TSC = crystal × EBX ÷ EAX, where the crystal is the APIC timer's clock (SDM volume 3, 19.7.3).
    fn frequencies(&mut self, tsc_hz: u64, bus_hz: u64) {
        let khz = |hz: u64| u32::try_from(hz / 1000).unwrap_or(u32::MAX);
        if let Ok(crystal) = u32::try_from(bus_hz) {
            self.put(0x15, 0, khz(bus_hz), khz(tsc_hz), crystal, 0);
        }
        let mhz = (khz(tsc_hz) / 1000) & 0xffff;
        self.put(0x16, 0, mhz, mhz, 100, 0);
    }

    fn address_sizes(&mut self, physical_bits: u32) {
        let cores = if self.is_amd() { bits_for(self.vcpus) << 12 | (self.vcpus - 1) } else { 0 };
        self.put(0x8000_0008, 0, LINEAR_BITS << 8 | physical_bits, 0, cores, 0);
    }

    /// KVM's leaves, and the frequencies in kHz at 0x40000010 as VMware defined them.
    fn hypervisor(&mut self, paravirtual: u32, tsc_hz: u64, bus_hz: u64) {
        const TIMING: u32 = HYPERVISOR_BASE + 0x10;
        let [ebx, ecx, edx] = KVM_SIGNATURE;
        self.put(HYPERVISOR_BASE, 0, TIMING, ebx, ecx, edx);
        self.put(HYPERVISOR_BASE + 1, 0, paravirtual, 0, 0, 0);
        let khz = |hz: u64| u32::try_from(hz / 1000).unwrap_or(0);
        self.put(TIMING, 0, khz(tsc_hz), khz(bus_hz), 0, 0);
    }

    /// The bits of one output register that the feature table gives.
    fn feature_word(&self, leaf: u32, subleaf: u32, register: Register) -> u32 {
        self.features
            .iter()
            .filter(|e| (e.leaf, e.subleaf, e.register) == (leaf, subleaf, register))
            .fold(0, |word, e| word | 1 << e.bit)
    }

    fn feature_bits(&mut self) {
        for entry in self.features.iter() {
            let at = self.leaves.iter().position(|(l, s, _)| (*l, *s) == (entry.leaf, entry.subleaf));
            let at = at.unwrap_or_else(|| {
                self.leaves.push((entry.leaf, entry.subleaf, CpuidRegs::default()));
                self.leaves.len() - 1
            });
            *self.leaves[at].2.get_mut(entry.register) |= 1 << entry.bit;
        }
    }
}

//! What CPUID says to guests: what KVM supports (KVM_GET_SUPPORTED_CPUID, api.rst 4.46), cut down by the same model
//! that the soft engine has.

use berth_cpu::VcpuId;
use berth_cpu::cpuid::{CpuidContext, CpuidModel, CpuidRegs, EngineFeatures};
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

/// Input clock of KVM's LAPIC timer in hertz: one count is a nanosecond.
const BUS_HZ: u64 = 1_000_000_000;
/// Leaf 1, ECX: TSC-deadline timer.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: x2APIC.
const X2APIC: u32 = 1 << 21;

/// What KVM supports on this host, with the two bits that it reports elsewhere or only sometimes: both come with its
/// local APIC.
pub fn supported(kvm: &Kvm) -> Result<CpuId, kvm_ioctls::Error> {
    let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    for entry in cpuid.as_mut_slice().iter_mut().filter(|e| e.function == 1) {
        entry.ecx |= X2APIC | if deadline { TSC_DEADLINE } else { 0 };
    }
    Ok(cpuid)
}

/// The model for a VM of `vcpus` whose TSC runs at `tsc_hz`.
pub fn model(supported: &CpuId, vcpus: u8, tsc_hz: u64) -> CpuidModel {
    let entries = supported.as_slice();
    let lookup = |leaf: u32, subleaf: u32| {
        let indexed = |e: &kvm_cpuid_entry2| e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
        let found = entries.iter().find(|e| e.function == leaf && (!indexed(e) || e.index == subleaf));
        found.map_or_else(CpuidRegs::default, |e| CpuidRegs {
            eax: e.eax,
            ebx: e.ebx,
            ecx: e.ecx,
            edx: e.edx,
        })
    };
    CpuidModel::new(&lookup, EngineFeatures::Hardware, vcpus, tsc_hz, BUS_HZ)
}

/// The model as vCPU `id` sees it, for KVM_SET_CPUID2. KVM itself follows CR4.OSXSAVE and XCR0.
pub fn entries(model: &CpuidModel, id: VcpuId) -> Result<CpuId, vmm_sys_util::fam::Error> {
    let context = CpuidContext { apic_id: id.0.into(), osxsave: false, xcr0: model.xcr0_supported() };
    let entries: Vec<_> = model
        .entries(&context)
        .map(|(leaf, subleaf, regs)| kvm_cpuid_entry2 {
            function: leaf,
            index: subleaf.unwrap_or(0),
            flags: if subleaf.is_some() { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
            eax: regs.eax,
            ebx: regs.ebx,
            ecx: regs.ecx,
            edx: regs.edx,
            padding: [0; 3],
        })
        .collect();
    CpuId::from_entries(&entries)
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_cpu::cpuid::Feature;

    fn host(entries: &[(u32, [u32; 4])]) -> CpuId {
        let entry = |&(function, [eax, ebx, ecx, edx]): &(u32, [u32; 4])| kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..kvm_cpuid_entry2::default()
        };
        CpuId::from_entries(&entries.iter().map(entry).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn nothing_that_kvm_does_not_support_is_shown() {
        let host = host(&[
            (0, [0xd, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
            (1, [0x0009_06ea, 0x0800, X2APIC | 1, 7 << 24]),
            (0x4000_0001, [1 << 3 | 1 << 5, 0, 0, 0]),
        ]);
        let model = model(&host, 2, 2_000_000_000);
        assert!(model.has(Feature::X2apic) && model.has(Feature::Sse3));
        assert!(!model.has(Feature::TscDeadline) && !model.has(Feature::Smap) && !model.has(Feature::Avx));
        let shown = entries(&model, VcpuId(1)).unwrap();
        let leaf = |n: u32| *shown.as_slice().iter().find(|e| e.function == n).unwrap();
        assert_eq!(leaf(1).ebx >> 24, 1);
        assert_eq!(leaf(0x4000_0001).eax, 1 << 3 | 1 << 5);
        assert_eq!(leaf(0xb).edx, 1);
    }
}

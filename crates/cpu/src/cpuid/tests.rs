//! The model on two synthetic hosts and on this one.

use super::*;

const BSP: CpuidContext = CpuidContext { apic_id: 0, osxsave: false, xcr0: 1 };

fn regs(eax: u32, ebx: u32, ecx: u32, edx: u32) -> CpuidRegs {
    CpuidRegs { eax, ebx, ecx, edx }
}

/// A host that reports every feature bit there is, defined or not.
fn generous(vendor: [u32; 3], leaf: u32, subleaf: u32) -> CpuidRegs {
    let [ebx, edx, ecx] = vendor;
    match (leaf, subleaf) {
        (0, _) => regs(0x20, ebx, ecx, edx),
        (1, _) => regs(0x0009_06ea, 0x0310_0800, u32::MAX, u32::MAX),
        (4 | 0x8000_001d, 0) => regs(0xfc1c_0121, 0x01c0_003f, 63, 0),
        (4 | 0x8000_001d, 1) => regs(0xfc1f_c163, 0x03c0_003f, 8191, 6),
        (4 | 0x8000_001d, _) => regs(0, 0, 0, 0),
        (0x8000_0000, _) => regs(0x8000_0028, 0, 0, 0),
        (0x8000_0002..=0x8000_0004, _) => regs(0x4141_4141, 0x4242_4242, 0x4343_4343, 0x4444_4444),
        (0x8000_0008, _) => regs(0x0000_3934, u32::MAX, u32::MAX, 0),
        _ => regs(u32::MAX, u32::MAX, u32::MAX, u32::MAX),
    }
}

const INTEL: [u32; 3] = [0x756e_6547, 0x4965_6e69, 0x6c65_746e];
const AMD: [u32; 3] = [0x6874_7541, 0x6974_6e65, 0x444d_4163];

fn model(vendor: [u32; 3], vcpus: u8) -> CpuidModel {
    let host = move |l, s| generous(vendor, l, s);
    CpuidModel::new(&host, EngineFeatures::Soft, vcpus, 2_445_000_000, 1_000_000_000)
}

#[test]
fn intel_guest_sees_exactly_these_features() {
    let m = model(INTEL, 1);
    assert_eq!(m.vendor(), Vendor::Intel);
    assert_eq!(m.cpuid(0, 0, &BSP), regs(0x1f, INTEL[0], INTEL[2], INTEL[1]));
    assert_eq!(m.cpuid(1, 0, &BSP), regs(0x0009_06ea, 0x0001_0800, 0xf7fa_3203, 0x078b_fbfd));
    assert_eq!(m.cpuid(7, 0, &BSP), regs(0, 0x219c_27ab, 0x0040_0704, 0x2400_0010));
    assert_eq!(m.cpuid(7, 1, &BSP), CpuidRegs::default());
    assert_eq!(m.cpuid(0x8000_0001, 0, &BSP), regs(0, 0, 0x0000_0121, 0x2c10_0800));
    assert_eq!(m.cpuid(0x8000_0007, 0, &BSP), regs(0, 0, 0, 0x100));
    assert_eq!(m.cpuid(0x8000_0008, 0, &BSP), regs(0x302e, 0, 0, 0));
}

#[test]
fn amd_guest_sees_exactly_these_features() {
    let m = model(AMD, 4);
    assert_eq!(m.vendor(), Vendor::Amd);
    assert_eq!(m.cpuid(1, 0, &BSP), regs(0x0009_06ea, 0x0004_0800, 0xf7fa_3203, 0x178b_fbfd));
    assert_eq!(m.cpuid(7, 0, &BSP), regs(0, 0x219c_27ab, 0x0040_0704, 0x0000_0010));
    assert_eq!(m.cpuid(0x8000_0001, 0, &BSP), regs(0x0009_06ea, 0, 0x0040_0123, 0x2dd3_fbfd));
    assert_eq!(m.cpuid(0x8000_0008, 0, &BSP), regs(0x302e, 0x2400_5004, 0x2003, 0));
    assert_eq!(m.cpuid(0x8000_0021, 0, &BSP), regs(0x6000_0140, 0, 6, 0));
    assert_eq!(m.cpuid(0x8000_001e, 0, &CpuidContext { apic_id: 3, ..BSP }), regs(3, 3, 0, 0));
}

#[test]
fn a_bare_host_still_gives_system_features() {
    let host = |l: u32, _| if l == 0 { regs(1, INTEL[0], INTEL[2], INTEL[1]) } else { CpuidRegs::default() };
    let m = CpuidModel::new(&host, EngineFeatures::Soft, 1, 1_000_000_000, 1_000_000_000);
    assert!(m.has(Feature::Smap) && !m.has(Feature::Avx) && !m.has(Feature::Cmov));
    assert_eq!(m.xcr0_supported(), 3);
    let brand = m.cpuid(0x8000_0002, 0, &BSP);
    assert_eq!(&brand.eax.to_le_bytes(), b"Bert");
    let none = CpuidModel::new(&host, EngineFeatures::Hardware, 1, 1_000_000_000, 1_000_000_000);
    assert!(!none.has(Feature::Smap));
}

#[test]
fn avx_needs_the_hosts_operating_system() {
    let host = |l, s| {
        let mut r = generous(INTEL, l, s);
        r.ecx &= if l == 1 { !(1 << 27) } else { u32::MAX };
        r
    };
    let m = CpuidModel::new(&host, EngineFeatures::Soft, 1, 1_000_000_000, 1_000_000_000);
    assert!(m.has(Feature::Sse42) && !m.has(Feature::Avx) && !m.has(Feature::Avx2));
    assert_eq!(m.cpuid(0xd, 2, &BSP), CpuidRegs::default());
}

#[test]
fn vcpus_are_cores_of_one_socket() {
    let m = model(INTEL, 6);
    let third = CpuidContext { apic_id: 3, ..BSP };
    assert_eq!(m.cpuid(1, 0, &third).ebx >> 24, 3);
    assert_eq!(m.cpuid(1, 0, &third).edx >> 28 & 1, 1);
    assert_eq!(m.cpuid(0xb, 0, &third), regs(0, 1, 0x100, 3));
    assert_eq!(m.cpuid(0xb, 1, &third), regs(3, 6, 0x201, 3));
    assert_eq!(m.cpuid(0xb, 2, &third), regs(0, 0, 2, 3));
    // L1 is private, L3 shared by all 8 APIC IDs of the package.
    assert_eq!(m.cpuid(4, 0, &third).eax, 0x1c00_0121);
    assert_eq!(m.cpuid(4, 1, &third).eax, 0x1c01_c163);
    assert_eq!(m.cpuid(4, 2, &third).eax, 0);
}

#[test]
fn xsave_leaf_follows_xcr0_and_cr4() {
    let m = model(INTEL, 1);
    let on = CpuidContext { osxsave: true, xcr0: 7, ..BSP };
    assert_eq!(m.cpuid(1, 0, &on).ecx >> 27 & 1, 1);
    assert_eq!(m.cpuid(0xd, 0, &BSP), regs(7, 576, 832, 0));
    assert_eq!(m.cpuid(0xd, 0, &on), regs(7, 832, 832, 0));
    assert_eq!(m.cpuid(0xd, 1, &on), regs(7, 832, 0, 0));
    assert_eq!(m.cpuid(0xd, 2, &on), regs(256, 576, 0, 0));
}

#[test]
fn frequencies_multiply_out() {
    let m = model(INTEL, 1);
    let r = m.cpuid(0x15, 0, &BSP);
    assert_eq!(u64::from(r.ecx) * u64::from(r.ebx) / u64::from(r.eax), 2_445_000_000);
    assert_eq!(m.cpuid(0x16, 0, &BSP).eax, 2445);
    assert_eq!(m.cpuid(0x4000_0010, 0, &BSP), regs(2_445_000, 1_000_000, 0, 0));
}

#[test]
fn kvm_is_announced() {
    let m = model(AMD, 1);
    let r = m.cpuid(0x4000_0000, 0, &BSP);
    let text: Vec<u8> = [r.ebx, r.ecx, r.edx].iter().flat_map(|w| w.to_le_bytes()).collect();
    assert_eq!(&text, b"KVMKVMKVM\0\0\0");
    assert_eq!(m.cpuid(0x4000_0001, 0, &BSP).eax, 0x0100_2aeb);
}

#[test]
fn unknown_leaves_answer_as_the_vendor_does() {
    let intel = model(INTEL, 2);
    assert_eq!(intel.cpuid(0x8000_0030, 1, &BSP), intel.cpuid(0x1f, 1, &BSP));
    assert_eq!(intel.cpuid(0x20, 0, &BSP), intel.cpuid(0x1f, 0, &BSP));
    assert_eq!(intel.cpuid(0x4000_0005, 0, &BSP), CpuidRegs::default());
    assert_eq!(model(AMD, 2).cpuid(0x8000_0030, 0, &BSP), CpuidRegs::default());
}

#[test]
fn this_host_gives_no_feature_that_it_lacks() {
    let m = CpuidModel::new(&host, EngineFeatures::Soft, 1, 1_000_000_000, 1_000_000_000);
    for entry in m.features().iter().filter(|e| e.provider == Provider::Host) {
        let word = host(entry.leaf, entry.subleaf).get(entry.register);
        assert_ne!(word >> entry.bit & 1, 0, "{}", entry.name);
    }
}

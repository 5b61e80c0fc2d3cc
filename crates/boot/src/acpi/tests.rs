//! The tables as an operating system finds them: from the RSDP on, with checksums, and through `iasl`.

use std::process::Command;

use super::*;

fn written(vcpus: u8) -> GuestMemory {
    let memory = GuestMemory::new(1 << 20).unwrap();
    assert_eq!(write(&memory, &Platform { vcpus }).unwrap(), ACPI);
    memory
}

fn read(memory: &GuestMemory, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read(GuestPhysAddr(at), &mut bytes).unwrap();
    bytes
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum: u8, b| sum.wrapping_add(*b))
}

/// A table with its own length, checksum checked.
fn table(memory: &GuestMemory, at: u64) -> Vec<u8> {
    let len = u32_at(&read(memory, at, 8), 4) as usize;
    let table = read(memory, at, len);
    if &table[..4] != b"FACS" {
        assert_eq!(sum(&table), 0, "checksum of {:?}", String::from_utf8_lossy(&table[..4]));
    }
    table
}

/// All tables that can be reached from the RSDP, with their signatures.
fn tables(memory: &GuestMemory) -> Vec<(String, Vec<u8>)> {
    let rsdp = read(memory, ACPI.0, 36);
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
    let xsdt = table(memory, u64_at(&rsdp, 24));
    let mut found: Vec<Vec<u8>> = xsdt[36..].chunks(8).map(|e| table(memory, u64_at(e, 0))).collect();
    let fadt = found.iter().find(|t| &t[..4] == b"FACP").unwrap().clone();
    found.push(table(memory, u64_at(&fadt, 140)));
    found.push(table(memory, u32_at(&fadt, 36).into()));
    found.push(xsdt);
    found.into_iter().map(|t| (String::from_utf8(t[..4].to_vec()).unwrap(), t)).collect()
}

#[test]
fn all_tables_are_reachable_and_sum_to_zero() {
    for vcpus in [1, 64] {
        let names: Vec<String> = tables(&written(vcpus)).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["FACP", "APIC", "MCFG", "DSDT", "FACS", "XSDT"]);
    }
}

#[test]
fn the_madt_names_every_vcpu_once() {
    let tables = tables(&written(5));
    let madt = &tables.iter().find(|(name, _)| name == "APIC").unwrap().1;
    let (mut at, mut ids) = (44, Vec::new());
    while at < madt.len() {
        if madt[at] == 0 {
            assert_eq!(u32_at(madt, at + 4), 1, "enabled");
            ids.push(madt[at + 3]);
        }
        at += usize::from(madt[at + 1]);
    }
    assert_eq!(at, madt.len());
    assert_eq!(ids, [0, 1, 2, 3, 4]);
}

#[test]
fn the_fadt_has_the_shared_ports() {
    let tables = tables(&written(1));
    let fadt = &tables.iter().find(|(name, _)| name == "FACP").unwrap().1;
    assert_eq!(u32_at(fadt, 56), 0x600);
    assert_eq!(u32_at(fadt, 64), 0x604);
    assert_eq!(u32_at(fadt, 76), 0x608);
    assert_eq!(u32_at(fadt, 80), 0x620);
    assert_eq!((fadt[116], u64_at(fadt, 120), fadt[128]), (1, 0xcf9, 6));
    assert_eq!(u32_at(fadt, 112) & (1 << 4), 0, "the power button is there");
    assert_ne!(u32_at(fadt, 112) & (1 << 10), 0, "the reset register is there");
}

#[test]
fn iasl_decompiles_and_recompiles_every_table() {
    if Command::new("iasl").arg("-v").output().is_err() {
        eprintln!("skipped: iasl (Debian package acpica-tools) is not installed");
        return;
    }
    let dir = std::env::temp_dir().join(format!("berth-acpi-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    for (name, table) in tables(&written(64)) {
        std::fs::write(dir.join(format!("{name}.aml")), table).unwrap();
        let decompiled = iasl(&dir, &["-d", &format!("{name}.aml")]);
        assert!(!decompiled.to_lowercase().contains("error"), "{name}:\n{decompiled}");
        let compiled = iasl(&dir, &["-p", "again", &format!("{name}.dsl")]);
        assert!(compiled.contains(" 0 Errors"), "{name}:\n{compiled}");
        assert!(!compiled.contains("Warning "), "{name}:\n{compiled}");
    }
    std::fs::remove_dir_all(dir).unwrap();
}

fn iasl(dir: &std::path::Path, arguments: &[&str]) -> String {
    let output = Command::new("iasl").current_dir(dir).args(arguments).output().unwrap();
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

//! Whole loads of small kernels that are built here, and of what is left of them when they are damaged.

use std::io::Cursor;

use berth_cpu::bits::{cr0, efer, gpr};

use super::*;
use low_memory::{ACPI, BOOT_INFO, BOOT_TABLES};

const MIB: u64 = 1 << 20;
/// Code that stands for a kernel.
const CODE: &[u8] = b"\xf4the kernel's code";
const LOAD_AT: u64 = 2 * MIB;

fn put(file: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    let end = offset + bytes.len();
    file.resize(file.len().max(end), 0);
    file[offset..end].copy_from_slice(bytes);
}

/// A multiboot header with `flags`; `addresses` only count with flag 16.
fn multiboot_header(flags: u32, addresses: [u32; 5]) -> Vec<u8> {
    let magic = 0x1bad_b002_u32;
    let checksum = 0_u32.wrapping_sub(magic).wrapping_sub(flags);
    [magic, flags, checksum].into_iter().chain(addresses).flat_map(u32::to_le_bytes).collect()
}

fn pvh_note(entry: u32) -> Vec<u8> {
    let mut note: Vec<u8> = [4_u32, 4, 18].into_iter().flat_map(u32::to_le_bytes).collect();
    note.extend_from_slice(b"Xen\0");
    note.extend_from_slice(&entry.to_le_bytes());
    note
}

/// An ELF64 file with one segment at [`LOAD_AT`] that begins with `contents`, and `note` in a note segment.
fn elf64(contents: &[u8], note: &[u8]) -> Vec<u8> {
    let mut f = b"\x7fELF\x02\x01\x01".to_vec();
    put(&mut f, 16, &2_u16.to_le_bytes());
    put(&mut f, 18, &62_u16.to_le_bytes());
    put(&mut f, 20, &1_u32.to_le_bytes());
    put(&mut f, 24, &LOAD_AT.to_le_bytes());
    put(&mut f, 32, &64_u64.to_le_bytes());
    put(&mut f, 52, &[64, 0, 56, 0, 2, 0, 64, 0]);
    put(&mut f, 62, &[0, 0]);
    let mut header = |at: usize, kind: u32, offset: u64, file_len: u64, memory_len: u64| {
        put(&mut f, at, &kind.to_le_bytes());
        put(&mut f, at + 4, &7_u32.to_le_bytes());
        for (i, value) in [offset, LOAD_AT, LOAD_AT, file_len, memory_len, 4].into_iter().enumerate() {
            put(&mut f, at + 8 + i * 8, &value.to_le_bytes());
        }
    };
    header(64, 1, 0x200, contents.len() as u64, contents.len() as u64 + 5000);
    header(120, 4, 0x180, note.len() as u64, 0);
    put(&mut f, 0x180, note);
    put(&mut f, 0x200, contents);
    f
}

/// The same as ELF32, without notes; linked 3 GiB above where it is loaded.
fn elf32(contents: &[u8]) -> Vec<u8> {
    let mut f = b"\x7fELF\x01\x01\x01".to_vec();
    put(&mut f, 16, &[2, 0, 3, 0, 1, 0, 0, 0]);
    let linked = LOAD_AT as u32 + 0xc000_0000;
    put(&mut f, 24, &(linked + 0x20).to_le_bytes());
    put(&mut f, 28, &52_u32.to_le_bytes());
    put(&mut f, 40, &[52, 0, 32, 0, 1, 0, 40, 0, 0, 0, 0, 0]);
    let len = contents.len() as u32;
    let words = [1, 0x100, linked, LOAD_AT as u32, len, len + 5000, 7, 4];
    put(&mut f, 52, &words.map(u32::to_le_bytes).concat());
    put(&mut f, 0x100, contents);
    f
}

/// A bzImage with one setup sector and a protected-mode part of 2 KiB that wants 1 MiB at [`LOAD_AT`].
fn bzimage() -> Vec<u8> {
    let mut f = vec![0; 1024 + 2048];
    put(&mut f, 0x1f1, &[1]);
    put(&mut f, 0x1f4, &(2048_u32 / 16).to_le_bytes());
    put(&mut f, 0x1fe, &0xaa55_u16.to_le_bytes());
    put(&mut f, 0x200, &[0xeb, 0x6a]);
    put(&mut f, 0x202, b"HdrS");
    put(&mut f, 0x206, &0x020f_u16.to_le_bytes());
    put(&mut f, 0x211, &[1]);
    put(&mut f, 0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(&mut f, 0x236, &3_u16.to_le_bytes());
    put(&mut f, 0x238, &255_u32.to_le_bytes());
    put(&mut f, 0x258, &LOAD_AT.to_le_bytes());
    put(&mut f, 0x260, &(MIB as u32).to_le_bytes());
    put(&mut f, 1024 + 0x200, CODE);
    f
}

fn boot_in(
    memory: &GuestMemory,
    kernel: &[u8],
    initrd: Option<&[u8]>,
    cmdline: &str,
) -> Result<Booted, BootError> {
    let mut kernel = Cursor::new(kernel);
    let mut initrd = initrd.map(Cursor::new);
    let initrd = initrd.as_mut().map(|i| (i as &mut dyn Source, "initrd.img"));
    let images = Images { kernel: &mut kernel, kernel_name: "vmlinuz", initrd };
    load_from(memory, images, cmdline, &Platform { vcpus: 2 })
}

fn boot(kernel: &[u8], initrd: Option<&[u8]>) -> (GuestMemory, Booted) {
    let memory = GuestMemory::new(8 * MIB).unwrap();
    let booted = boot_in(&memory, kernel, initrd, "console=ttyS0").unwrap();
    (memory, booted)
}

fn refusal(kernel: &[u8], initrd: Option<&[u8]>) -> String {
    let memory = GuestMemory::new(8 * MIB).unwrap();
    boot_in(&memory, kernel, initrd, "").unwrap_err().to_string()
}

fn bytes(memory: &GuestMemory, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read(GuestPhysAddr(at), &mut bytes).unwrap();
    bytes
}

fn word(memory: &GuestMemory, at: u64) -> u32 {
    u32::from_le_bytes(bytes(memory, at, 4).try_into().unwrap())
}

fn string(memory: &GuestMemory, at: u32) -> String {
    let bytes = bytes(memory, at.into(), 64);
    String::from_utf8(bytes.split(|&b| b == 0).next().unwrap().to_vec()).unwrap()
}

#[test]
fn a_bzimage_starts_in_long_mode_with_its_zero_page() {
    let (memory, booted) = boot(&bzimage(), Some(b"the initrd"));
    assert_eq!(booted.protocol, Protocol::LinuxBzImage);
    assert_eq!(booted.state.rip, LOAD_AT + 0x200);
    assert_eq!(bytes(&memory, booted.state.rip, CODE.len()), CODE);
    assert_ne!(booted.state.efer & efer::LMA, 0);
    let zero_page = booted.state.gpr[gpr::RSI];
    assert_eq!(bytes(&memory, zero_page + 0x202, 4), b"HdrS");
    assert_eq!(bytes(&memory, zero_page + 0x1e8, 1), [4], "E820 entries");
    assert_eq!(string(&memory, word(&memory, zero_page + 0x228)), "console=ttyS0");
    assert_eq!(string(&memory, word(&memory, zero_page + 0x218)), "the initrd");
    assert_eq!(word(&memory, zero_page + 0x21c), 10);
    assert_eq!(u64::from(word(&memory, zero_page + 0x70)), ACPI.0);
}

#[test]
fn a_pvh_kernel_gets_its_start_info() {
    let kernel = elf64(CODE, &pvh_note(LOAD_AT as u32 + 1));
    let (memory, booted) = boot(&kernel, Some(b"the initrd"));
    assert_eq!(booted.protocol, Protocol::Pvh);
    assert_eq!(booted.state.rip, LOAD_AT + 1);
    assert_eq!(booted.state.cr0 & (cr0::PE | cr0::PG), cr0::PE);
    let info = booted.state.gpr[gpr::RBX];
    assert_eq!(word(&memory, info), 0x336e_c578);
    assert_eq!(word(&memory, info + 12), 1, "modules");
    let module = u64::from(word(&memory, info + 16));
    assert_eq!(string(&memory, word(&memory, module)), "the initrd");
    assert_eq!(string(&memory, word(&memory, info + 24)), "console=ttyS0");
    assert_eq!(word(&memory, info + 32), ACPI.0 as u32);
    assert_eq!(word(&memory, info + 48), 4, "memory map entries");
}

#[test]
fn multiboot_kernels_get_their_information() {
    let contents = [multiboot_header(3, [0; 5]), CODE.to_vec()].concat();
    for (kernel, entry) in [(elf32(&contents), LOAD_AT + 0x20), (elf64(&contents, &[]), LOAD_AT)] {
        let (memory, booted) = boot(&kernel, Some(b"the module"));
        assert_eq!(booted.protocol, Protocol::Multiboot1);
        assert_eq!(booted.state.rip, entry);
        assert_eq!(booted.state.gpr[gpr::RAX], 0x2bad_b002);
        let info = booted.state.gpr[gpr::RBX];
        assert_eq!(word(&memory, info + 4), 639);
        assert_eq!(word(&memory, info + 8), 7 << 10);
        assert_eq!(string(&memory, word(&memory, info + 16)), "vmlinuz console=ttyS0");
        assert_eq!(word(&memory, info + 20), 1);
        let module = u64::from(word(&memory, info + 24));
        assert_eq!(string(&memory, word(&memory, module)), "the module");
        assert_eq!(word(&memory, module + 4) - word(&memory, module), 10);
        assert_eq!(string(&memory, word(&memory, module + 8)), "initrd.img");
        assert_eq!(word(&memory, info + 44), 4 * 24);
        assert_eq!(word(&memory, u64::from(word(&memory, info + 48))), 20);
    }
}

#[test]
fn a_multiboot_header_may_say_where_to_load() {
    let start = LOAD_AT as u32;
    let mut kernel = multiboot_header(1 << 16, [start + 16, start, 0, start + 0x4000, start + 64]);
    kernel.splice(0..0, [0x90; 16]);
    put(&mut kernel, 64, CODE);
    let (memory, booted) = boot(&kernel, None);
    assert_eq!(booted.state.rip, LOAD_AT + 64);
    assert_eq!(bytes(&memory, booted.state.rip, CODE.len()), CODE);
}

#[test]
fn a_second_load_clears_what_the_guest_left() {
    let kernel = elf64(CODE, &pvh_note(LOAD_AT as u32));
    let memory = GuestMemory::new(8 * MIB).unwrap();
    for start in [LOAD_AT, BOOT_INFO.0, BOOT_TABLES.0] {
        memory.write(GuestPhysAddr(start), &[0xaa; 4096]).unwrap();
    }
    boot_in(&memory, &kernel, None, "").unwrap();
    let bss = bytes(&memory, LOAD_AT + CODE.len() as u64, 5000);
    assert!(bss.iter().all(|&b| b == 0));
}

#[test]
fn what_is_no_kernel_is_refused_by_name() {
    assert!(refusal(b"", None).contains("is empty"));
    assert!(refusal(b"#!/bin/sh\n", None).contains("not a bzImage"));
    assert!(refusal(&elf64(CODE, &[]), None).contains("without a PVH note"));
    assert!(refusal(b"\x7fELF", None).contains("truncated"));
    assert!(refusal(&elf64(CODE, &pvh_note(0x1000)), None).contains("entry address"));
    let required = [multiboot_header(1 << 5, [0; 5]), CODE.to_vec()].concat();
    assert!(refusal(&elf32(&required), None).contains("0x20"));
    let mut old = bzimage();
    put(&mut old, 0x206, &0x0208_u16.to_le_bytes());
    assert!(refusal(&old, None).contains("2.08"));
    let mut narrow = bzimage();
    put(&mut narrow, 0x236, &[0]);
    assert!(refusal(&narrow, None).contains("64-bit"));
}

#[test]
fn what_does_not_fit_says_how_much_would() {
    let mut large = bzimage();
    put(&mut large, 0x260, &(64 * MIB as u32).to_le_bytes());
    let message = refusal(&large, None);
    assert!(message.contains("66 MiB") && message.contains("8 MiB"), "{message}");
    let message = refusal(&bzimage(), Some(&vec![1; 7 << 20]));
    assert!(message.contains("initrd of 7 MiB") && message.contains("10 MiB"), "{message}");
    let memory = GuestMemory::new(8 * MIB).unwrap();
    let message = boot_in(&memory, &bzimage(), None, &"x".repeat(256)).unwrap_err().to_string();
    assert!(message.contains("256 bytes") && message.contains("at most 255"), "{message}");
}

#[test]
fn files_that_are_none_are_refused() {
    let memory = GuestMemory::new(8 * MIB).unwrap();
    let load = |kernel: &str| {
        let source = BootSource { kernel: kernel.into(), initrd: None, cmdline: String::new() };
        load(&memory, &source, &Platform { vcpus: 1 }).unwrap_err().to_string()
    };
    assert!(
        load("/nonexistent/vmlinuz").contains("kernel /nonexistent/vmlinuz: cannot be read: No such file")
    );
    assert!(load("/").contains("not a regular file"));
    assert!(load("/dev/zero").contains("not a regular file"));
}

fn kernels() -> [Vec<u8>; 4] {
    let contents = [multiboot_header(3, [0; 5]), CODE.to_vec()].concat();
    [bzimage(), elf64(CODE, &pvh_note(LOAD_AT as u32)), elf32(&contents), elf64(&contents, &[])]
}

#[test]
fn no_truncated_kernel_boots() {
    let memory = GuestMemory::new(8 * MIB).unwrap();
    for kernel in kernels() {
        boot_in(&memory, &kernel, None, "").unwrap();
        for len in 0..kernel.len() {
            let result = boot_in(&memory, &kernel[..len], None, "");
            assert!(result.is_err(), "{len} of {} bytes booted", kernel.len());
        }
    }
}

#[test]
fn damaged_kernels_do_not_panic() {
    let memory = GuestMemory::new(8 * MIB).unwrap();
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    for kernel in kernels() {
        let mut refused = 0;
        for _ in 0..3000 {
            let mut damaged = kernel.clone();
            for _ in 0..1 + next() % 4 {
                // Headers are at the beginning; extreme values are the interesting ones.
                let at = next() as usize % damaged.len().min(0x280);
                damaged[at] = [0, 1, 0x7f, 0x80, 0xff, next() as u8][next() as usize % 6];
            }
            refused += u32::from(boot_in(&memory, &damaged, Some(b"initrd"), "x").is_err());
        }
        assert!(refused > 0);
    }
}

//! Guests of a few instructions. Not every test program uses all of them.
#![allow(dead_code)]

use std::path::PathBuf;
use std::process::Command;

/// mov al, 0x10; out 0xf4, al; again: hlt; jmp again
pub const EXITS: &[u8] = &[0xb0, 0x10, 0xe6, 0xf4, 0xf4, 0xeb, 0xfd];

/// cli; again: hlt; jmp again
pub const SLEEPS: &[u8] = &[0xfa, 0xf4, 0xeb, 0xfd];
/// Waits for a byte of the serial port, sends it back, and exits through port 0xf4 with 0 after a `Q`.
pub const ECHOES: &[u8] = &[
    0xba, 0xfd, 0x03, 0x00, 0x00, // again: mov edx, 0x3fd
    0xec, // in al, dx
    0xa8, 0x01, // test al, 1
    0x74, 0xf6, // jz again
    0xb2, 0xf8, // mov dl, 0xf8
    0xec, // in al, dx
    0xee, // out dx, al
    0x3c, b'Q', // cmp al, 'Q'
    0x75, 0xee, // jne again
    0x31, 0xc0, // xor eax, eax
    0xe6, 0xf4, // out 0xf4, al
    0xf4, 0xeb, 0xfd, // hlt; jmp hlt
];

/// A multiboot kernel (Multiboot Specification 0.6.96, 3.1) that is loaded at 1 MiB and starts with `code`.
pub fn kernel(directory: &tempfile::TempDir, code: &[u8]) -> PathBuf {
    const FLAGS: u32 = 1 << 16;
    const MAGIC: u32 = 0x1bad_b002;
    let base = 0x10_0000;
    let header = [MAGIC, FLAGS, 0u32.wrapping_sub(MAGIC + FLAGS), base, base, 0, 0, base + 32];
    let mut image: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
    image.extend(code);
    image.resize(4096, 0);
    let path = directory.path().join("kernel");
    std::fs::write(&path, image).unwrap();
    path
}

/// `berth run` of that kernel, with the port for its exit code.
pub fn berth(code: &[u8], directory: &tempfile::TempDir) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_berth"));
    command.args(["run", "--memory", "16M", "--name", "test", "--debug-exit", "--no-reboot", "--kernel"]);
    // A runtime directory of its own: tests use the same name at once.
    command.arg(kernel(directory, code)).env("XDG_RUNTIME_DIR", directory.path());
    command
}

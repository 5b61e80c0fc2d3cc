//! Guests of a few instructions.

use std::path::PathBuf;
use std::process::Command;

/// mov al, 0x10; out 0xf4, al; again: hlt; jmp again
pub const EXITS: &[u8] = &[0xb0, 0x10, 0xe6, 0xf4, 0xf4, 0xeb, 0xfd];

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
    command.arg(kernel(directory, code));
    command
}

//! Guests of a few instructions. Not every test program uses all of them.
#![allow(dead_code)]

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

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

/// A Linux kernel to its loader (Linux's Documentation/arch/x86/boot.rst): 64-bit code that starts with paging on.
pub fn bz_image(directory: &tempfile::TempDir, code: &[u8]) -> PathBuf {
    const PAGES: u32 = 0x1000;
    let mut image = vec![0; 0x400 + PAGES as usize];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]); // setup_sects
    put(0x1f4, &(PAGES / 16).to_le_bytes()); // syssize
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x66]); // boot_flag, jump
    put(0x202, b"HdrS");
    put(0x206, &[0x0f, 0x02]); // version
    put(0x211, &[1]); // loadflags: LOADED_HIGH
    put(0x214, &0x10_0000_u32.to_le_bytes()); // code32_start
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes()); // initrd_addr_max
    put(0x230, &0x10_0000_u32.to_le_bytes()); // kernel_alignment
    put(0x234, &[1]); // relocatable_kernel
    put(0x236, &[1]); // xloadflags: XLF_KERNEL_64
    put(0x238, &[255]); // cmdline_size
    put(0x258, &0x10_0000_u64.to_le_bytes()); // pref_address
    put(0x260, &(16 * PAGES).to_le_bytes()); // init_size
    put(0x600, code); // the 64-bit entry
    let path = directory.path().join("bzImage");
    std::fs::write(&path, image).unwrap();
    path
}

/// `berth run` of the multiboot kernel, with the port for its exit code.
pub fn berth(code: &[u8], directory: &tempfile::TempDir) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_berth"));
    command.args(["run", "--memory", "16M", "--name", "test", "--debug-exit", "--no-reboot", "--kernel"]);
    // A runtime directory of its own: tests use the same name at once.
    command.arg(kernel(directory, code)).env("XDG_RUNTIME_DIR", directory.path());
    command
}

/// A user with VMs of their own.
pub struct User {
    /// Everything of theirs is in it.
    pub directory: tempfile::TempDir,
}

impl User {
    pub fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_berth"));
        command.args(arguments).env("XDG_RUNTIME_DIR", self.directory.path());
        command.env("XDG_DATA_HOME", self.directory.path().join("data")).stdin(Stdio::null());
        command
    }

    pub fn berth(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// What the command prints; it must succeed.
    pub fn ok(&self, arguments: &[&str]) -> String {
        let output = self.berth(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// The complaint of a command that must fail with this exit code.
    pub fn fails(&self, code: i32, arguments: &[&str]) -> String {
        let output = self.berth(arguments);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        said
    }

    /// Starts a VM of 16 MiB in the background.
    pub fn start(&self, name: &str, code: &[u8]) {
        self.start_with(name, code, &["--memory", "16M"]);
    }

    /// Starts a VM in the background with more options.
    pub fn start_with(&self, name: &str, code: &[u8], options: &[&str]) {
        let kernel = kernel(&self.directory, code);
        let arguments = ["run", "-d", "--engine", "soft", "--debug-exit", "--name", name, "--kernel"];
        let printed = self.ok(&[&arguments[..], &[kernel.to_str().unwrap()], options].concat());
        assert_eq!(printed, format!("{name}\n"));
    }

    pub fn json(&self, arguments: &[&str]) -> serde_json::Value {
        serde_json::from_str(&self.ok(arguments)).unwrap()
    }

    pub fn state(&self, name: &str) -> String {
        let all = self.json(&["ps", "--all", "--json"]);
        let vm = all.as_array().unwrap().iter().find(|vm| vm["name"] == name);
        vm.map_or_else(String::new, |vm| vm["state"].as_str().unwrap().to_owned())
    }

    pub fn home(&self, name: &str) -> PathBuf {
        self.directory.path().join("berth").join(name)
    }

    /// Nothing of VMs may be left.
    pub fn assert_clean(&self) {
        let left: Vec<_> =
            std::fs::read_dir(self.directory.path().join("berth")).unwrap().flatten().collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

impl Drop for User {
    fn drop(&mut self) {
        for vm in std::fs::read_dir(self.directory.path().join("berth")).into_iter().flatten().flatten() {
            self.berth(&["kill", vm.file_name().to_str().unwrap()]);
        }
    }
}

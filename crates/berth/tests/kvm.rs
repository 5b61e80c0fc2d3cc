//! `--engine kvm` from the command line, on whatever /dev/kvm this host has.

use std::path::Path;
use std::process::{Command, Output};

use berth_host::{Cpu, Kvm, KvmKind};

mod common;

/// int3, with what is left of the page as zeroes.
const BREAKS: &[u8] = &[0xcc];

fn host() -> Kvm {
    let root = Path::new("/");
    Kvm::probe(root, Cpu::virtualization(root).virtualizes())
}

/// Runs `code` on the kvm engine.
fn run(code: &[u8]) -> (Output, String) {
    let directory = tempfile::tempdir().unwrap();
    let output = common::berth(code, &directory).args(["--engine", "kvm"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output, said)
}

#[test]
fn a_guest_runs_or_the_reason_is_told() {
    let host = host();
    let (output, said) = run(common::EXITS);
    if let Some(problem) = host.problem {
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(&problem), "{said}");
        println!("skipped: a guest under kvm, because {problem}");
        return;
    }
    assert_eq!(output.status.code(), Some(0x21), "{said}");
    let warnings = said.lines().filter(|line| line.contains("warning")).count();
    assert_eq!(warnings, usize::from(host.kind == Some(KvmKind::PageTables)), "{said}");
}

#[test]
fn what_the_kernel_cannot_emulate_ends_the_vm_with_an_account() {
    let host = host();
    if host.problem.is_some() || host.kind != Some(KvmKind::PageTables) {
        println!("skipped: the /dev/kvm here does not emulate guests");
        return;
    }
    let (output, said) = run(BREAKS);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("cannot emulate an instruction of the guest: cc") && said.contains("RIP"),
        "{said}"
    );
}

/// A VM in the background that is killed when the test ends.
struct Sleeper {
    directory: tempfile::TempDir,
}

impl Sleeper {
    fn start(engine: &str) -> Self {
        let sleeper = Self { directory: tempfile::tempdir().unwrap() };
        let kernel = common::bz_image(&sleeper.directory, common::SLEEPS);
        let output = sleeper
            .berth(&["run", "-d", "--engine", engine, "--memory", "32M", "--name", "test", "--kernel"])
            .arg(kernel)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        sleeper
    }

    fn berth(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_berth"));
        command.args(arguments).env("XDG_RUNTIME_DIR", self.directory.path());
        command.env("XDG_DATA_HOME", self.directory.path().join("data"));
        command
    }

    /// The way of `address` in the page tables that the guest was started with, without what differs between two
    /// processes.
    fn explain(&self, address: &str) -> serde_json::Value {
        let output = self.berth(&["explain", "test", address, "--json"]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        let mut way: serde_json::Value =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {said}"));
        way.as_object_mut().unwrap().remove("host");
        way
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.berth(&["kill", "test"]).output();
    }
}

#[test]
fn an_address_is_explained_as_on_the_soft_engine() {
    if let Some(problem) = host().problem {
        println!("skipped: a guest under kvm, because {problem}");
        return;
    }
    let [soft, kvm] = ["soft", "kvm"].map(Sleeper::start);
    for address in ["0x100200", "0x1fffff8", "0xffff800000000000", "0x1000000000000"] {
        assert_eq!(soft.explain(address), kvm.explain(address), "{address}");
    }
    // That of the code, to the end.
    assert_eq!(kvm.explain("0x100200")["physical"], "0x100200");
}

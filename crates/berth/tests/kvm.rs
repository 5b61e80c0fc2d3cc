//! `--engine kvm` from the command line, on whatever /dev/kvm this host has.

use std::path::Path;
use std::process::Output;

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

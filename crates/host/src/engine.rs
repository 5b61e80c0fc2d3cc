//! Which engine `--engine auto` takes, and why.

use serde::Serialize;

use crate::cpu::Cpu;
use crate::kvm::{Kvm, KvmKind};

/// An engine by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EngineName {
    /// The CPU's virtualization through /dev/kvm.
    Kvm,
    /// Berth's own translator.
    Soft,
}

/// A choice and its reason.
#[derive(Clone, Debug, Serialize)]
pub struct EngineChoice {
    /// What `auto` takes.
    pub engine: EngineName,
    /// Why, for people.
    pub reason: String,
    /// The host could run the `kvm` engine: vmx or svm, and a /dev/kvm that creates a VM.
    pub kvm_possible: bool,
}

impl EngineChoice {
    /// What `auto` takes on such a host. The `kvm` engine does not exist yet, so it is always `soft`; where
    /// `kvm` would be better the reason says so.
    pub fn automatic(cpu: &Cpu, kvm: &Kvm) -> Self {
        let (kvm_possible, reason) = match (cpu.vmx || cpu.svm, kvm.creates_vm) {
            (true, true) => {
                let flag = if cpu.vmx { "vmx" } else { "svm" };
                (
                    true,
                    format!(
                        "this host could run kvm ({flag}, /dev/kvm), but Berth's kvm engine is not there yet"
                    ),
                )
            }
            (true, false) => (
                false,
                format!("the CPU can virtualize, but {}", kvm.problem.as_deref().unwrap_or("KVM fails")),
            ),
            (false, true) if kvm.kind == Some(KvmKind::PageTables) => (
                false,
                "/dev/kvm is here without vmx or svm: such a KVM emulates guest kernels, slowly".to_owned(),
            ),
            (false, _) => (false, "the CPU shows neither vmx nor svm".to_owned()),
        };
        Self { engine: EngineName::Soft, reason, kvm_possible }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(vmx: bool, creates_vm: bool) -> EngineChoice {
        let kind = creates_vm.then_some(if vmx { KvmKind::Hardware } else { KvmKind::PageTables });
        let problem = (!creates_vm).then(|| "there is no /dev/kvm".to_owned());
        let kvm = Kvm { creates_vm, kind, problem, ..Kvm::default() };
        EngineChoice::automatic(&Cpu { vmx, ..Cpu::default() }, &kvm)
    }

    #[test]
    fn kvm_needs_both_the_cpu_and_the_device() {
        assert!(choose(true, true).kvm_possible);
        assert!(choose(true, true).reason.contains("not there yet"));
        assert!(!choose(true, false).kvm_possible);
        assert!(choose(true, false).reason.contains("there is no /dev/kvm"));
        assert!(!choose(false, true).kvm_possible);
        assert!(choose(false, true).reason.contains("emulates"));
        assert!(choose(false, false).reason.contains("neither vmx nor svm"));
    }
}

//! Which engine `--engine auto` takes, and why.

use std::path::Path;

use serde::Serialize;

use crate::cpu::Cpu;
use crate::kvm::Kvm;

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
}

impl EngineChoice {
    /// What `auto` takes on such a host: `kvm` only where the CPU shows vmx or svm and /dev/kvm creates a VM. A KVM
    /// without either flag emulates the kernels of guests, slower than the soft engine.
    pub fn automatic(cpu: &Cpu, kvm: &Kvm) -> Self {
        let flag = match (cpu.vmx, cpu.svm) {
            (true, _) => Some("vmx"),
            (_, true) => Some("svm"),
            _ => None,
        };
        let (engine, reason) = match (flag, &kvm.problem) {
            (Some(flag), None) => (EngineName::Kvm, format!("the CPU has {flag}, and /dev/kvm creates a VM")),
            (Some(_), Some(problem)) => (EngineName::Soft, format!("kvm is not possible: {problem}")),
            (None, None) => {
                let why = "no vmx or svm flag: the /dev/kvm that is here emulates guest kernels, slowly";
                (EngineName::Soft, why.to_owned())
            }
            (None, Some(_)) => (EngineName::Soft, "no vmx or svm flag".to_owned()),
        };
        Self { engine, reason }
    }

    /// What `auto` takes on this host. Looks at nothing but CPU and `/dev/kvm`.
    pub fn of_this_host() -> Self {
        let root = Path::new("/");
        let cpu = Cpu::virtualization(root);
        Self::automatic(&cpu, &Kvm::probe(root, cpu.virtualizes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(vmx: bool, svm: bool, problem: Option<&str>) -> EngineChoice {
        let kvm = Kvm { problem: problem.map(str::to_owned), ..Kvm::default() };
        EngineChoice::automatic(&Cpu { vmx, svm, ..Cpu::default() }, &kvm)
    }

    #[test]
    fn kvm_needs_both_the_cpu_and_the_device() {
        for (vmx, svm, flag) in [(true, false, "vmx"), (false, true, "svm")] {
            let choice = choose(vmx, svm, None);
            assert_eq!(choice.engine, EngineName::Kvm);
            assert!(choice.reason.contains(flag));
        }
        for problem in ["permission denied on /dev/kvm: add yourself to the group kvm", "/dev/kvm is busy"] {
            let choice = choose(true, false, Some(problem));
            assert_eq!(choice.engine, EngineName::Soft);
            assert!(choice.reason.contains(problem), "{}", choice.reason);
        }
        for problem in [None, Some("there is no /dev/kvm")] {
            let choice = choose(false, false, problem);
            assert_eq!(choice.engine, EngineName::Soft);
            assert!(choice.reason.contains("no vmx or svm flag"), "{}", choice.reason);
        }
    }
}

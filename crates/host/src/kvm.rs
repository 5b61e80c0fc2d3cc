//! `/dev/kvm`: whether it can be used, and what is behind it.

use std::path::Path;

use berth_engine_kvm::device::{Device, Refusal};
use serde::Serialize;

/// What `/dev/kvm` is good for.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Kvm {
    /// The device exists.
    pub present: bool,
    /// It can be opened for reading and writing.
    pub opens: bool,
    /// Version of its interface; 12 since 2007.
    pub api_version: Option<i32>,
    /// A VM could be created, as a trial.
    pub creates_vm: bool,
    /// What executes the guests.
    pub kind: Option<KvmKind>,
    /// Why the kvm engine cannot use it, for people.
    pub problem: Option<String>,
}

/// What executes the guests of a `/dev/kvm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum KvmKind {
    /// The CPU's own virtualization.
    Hardware,
    /// No vmx or svm: a KVM of a nested host that only isolates guests by page tables, and emulates the kernels
    /// of guests that are not prepared for it.
    PageTables,
}

impl Kvm {
    /// Tries `dev/kvm` below `root`; `hardware` is whether the CPU shows vmx or svm.
    pub fn probe(root: &Path, hardware: bool) -> Self {
        let path = root.join("dev/kvm");
        let mut kvm = Self { present: path.exists(), ..Self::default() };
        if let Err(refusal) = kvm.try_out(&path) {
            kvm.problem = Some(refusal.to_string());
        }
        if kvm.creates_vm {
            kvm.kind = Some(if hardware { KvmKind::Hardware } else { KvmKind::PageTables });
        }
        kvm
    }

    fn try_out(&mut self, path: &Path) -> Result<(), Refusal> {
        let device = Device::open(path).inspect_err(|refusal| {
            self.opens = matches!(refusal, Refusal::NotKvm | Refusal::Version(_));
        })?;
        self.opens = true;
        self.api_version = Some(device.api_version());
        device.create_vm()?;
        self.creates_vm = true;
        device.check()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_no_kvm_opens_and_is_refused() {
        let root = tempfile::tempdir().unwrap();
        assert!(Kvm::probe(root.path(), true).problem.unwrap().contains("there is no /dev/kvm"));
        std::fs::create_dir(root.path().join("dev")).unwrap();
        std::fs::write(root.path().join("dev/kvm"), "").unwrap();
        let kvm = Kvm::probe(root.path(), true);
        assert!(kvm.present && kvm.opens && !kvm.creates_vm);
        assert!(kvm.problem.unwrap().contains("does not answer as KVM"));
    }

    #[test]
    fn the_hosts_own_device_is_described_without_contradiction() {
        let kvm = Kvm::probe(Path::new("/"), false);
        assert!(kvm.creates_vm || kvm.problem.is_some());
        assert!(kvm.opens || kvm.api_version.is_none());
        assert_eq!(kvm.kind, kvm.creates_vm.then_some(KvmKind::PageTables));
    }
}

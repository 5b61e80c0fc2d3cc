//! What the kvm engine cannot do on some hosts, by case and with the reason.

use std::path::Path;

use berth_host::{Cpu, Kvm, KvmKind};

/// What executes the cases of the kvm engine.
pub enum KvmHost {
    /// Nothing, for this reason.
    None(String),
    /// The CPU's virtualization: every case runs.
    Hardware,
    /// A KVM without vmx and svm, which emulates kernels: all but those in [`PAGE_TABLES`] run.
    PageTables,
}

/// Cases that a page-table-based KVM cannot run, and why.
pub const PAGE_TABLES: &[(&str, &str)] = &[];

/// Cases about the soft engine's own ways, which have no meaning for KVM.
pub const SOFT_ONLY: &[(&str, &str)] = &[];

impl KvmHost {
    /// Looks at this host.
    pub fn look() -> Self {
        let root = Path::new("/");
        let kvm = Kvm::probe(root, Cpu::virtualization(root).virtualizes());
        match (kvm.problem, kvm.kind) {
            (Some(problem), _) => Self::None(problem),
            (None, Some(KvmKind::PageTables)) => Self::PageTables,
            (None, _) => Self::Hardware,
        }
    }

    /// Why the case at `place` (`FILE::CASE`) does not run on the kvm engine, if so.
    pub fn skips(&self, place: &str) -> Option<&str> {
        let reason_in =
            |table: &[(&str, &'static str)]| table.iter().find(|(p, _)| *p == place).map(|(_, r)| *r);
        match self {
            Self::None(problem) => Some(problem),
            Self::Hardware => reason_in(SOFT_ONLY),
            Self::PageTables => reason_in(SOFT_ONLY).or_else(|| reason_in(PAGE_TABLES)),
        }
    }
}

/// Whether the CPU has virtualization of its own.
pub fn kvm_is_hardware() -> bool {
    Cpu::virtualization(Path::new("/")).virtualizes()
}

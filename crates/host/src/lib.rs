//! What this host has that matters to virtual machines, and which engine follows from it.
//!
//! Everything that [`Host`] reports is read from `/proc`, `/sys` and `/dev` below a root that tests replace, except
//! for what only a system call tells. None of it fails: what a host does not say is `None`, because containers and old
//! kernels hide much, and a report with a gap is better than none.
//!
//! [`CpuGroup`] is the one thing here that changes something.

mod activity;
mod cgroup;
mod cpu;
mod cpu_group;
mod engine;
mod kvm;
mod memory;
mod pressure;
mod read;
mod userfault;

use std::path::Path;

use serde::Serialize;

pub use activity::{CpuTimes, Load};
pub use cgroup::{Cgroup, CgroupVersion};
pub use cpu::{Cpu, Tsc};
pub use cpu_group::{CpuGroup, CpuGroupError, DEFAULT_WEIGHT};
pub use engine::{EngineChoice, EngineName};
pub use kvm::{Kvm, KvmKind};
pub use memory::{HugePages, HugetlbPool, Ksm, Memory, Swap, SwapArea};
pub use pressure::{Pressure, PressureSome};
pub use userfault::Userfaultfd;

/// Everything that `berth host` reports.
#[derive(Clone, Debug, Serialize)]
pub struct Host {
    /// The CPUs.
    pub cpu: Cpu,
    /// `/dev/kvm`.
    pub kvm: Kvm,
    /// RAM.
    pub memory: Memory,
    /// Huge pages, transparent and reserved.
    pub huge_pages: HugePages,
    /// Kernel same-page merging; `None` where the kernel has none.
    pub ksm: Option<Ksm>,
    /// Swap.
    pub swap: Swap,
    /// Pressure stall information; `None` where the kernel has none or hides it.
    pub pressure: Option<Pressure>,
    /// Handling of page faults in user space.
    pub userfaultfd: Userfaultfd,
    /// Control groups of this process.
    pub cgroups: Vec<Cgroup>,
    /// What `--engine auto` takes.
    pub engine: EngineChoice,
}

impl Host {
    /// Looks at this host.
    pub fn probe() -> Self {
        Self::probe_below(Path::new("/"))
    }

    /// As [`Self::probe`] with another directory as the root of all files. System calls still ask the real host.
    pub fn probe_below(root: &Path) -> Self {
        let cpu = Cpu::read(root);
        let kvm = Kvm::probe(root, cpu.virtualizes());
        let engine = EngineChoice::automatic(&cpu, &kvm);
        Self {
            cpu,
            kvm,
            memory: Memory::read(root),
            huge_pages: HugePages::read(root),
            ksm: Ksm::read(root),
            swap: Swap::read(root),
            pressure: Pressure::read(root),
            userfaultfd: Userfaultfd::probe(root),
            cgroups: cgroup::read(root),
            engine,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn an_empty_root_gives_a_report_with_gaps() {
        let root = tempfile::tempdir().unwrap();
        let host = Host::probe_below(root.path());
        assert_eq!(host.cpu.model, None);
        assert!(!host.kvm.present);
        assert!(host.ksm.is_none() && host.pressure.is_none() && host.cgroups.is_empty());
        assert_eq!(host.engine.engine, EngineName::Soft);
    }

    #[test]
    fn files_below_the_root_are_what_counts() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write(
            "proc/cpuinfo",
            "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: Sample\nflags\t\t: svm\n",
        );
        write("proc/meminfo", "MemTotal: 2048 kB\nMemAvailable: 1024 kB\n");
        write("sys/kernel/mm/ksm/run", "1\n");
        // A file where the device should be: it opens, and is no KVM.
        write("dev/kvm", "");

        let host = Host::probe_below(root.path());
        assert_eq!(host.cpu.model.as_deref(), Some("Sample"));
        assert_eq!(host.memory.total, Some(2 << 20));
        assert!(host.ksm.unwrap().running);
        assert!(host.kvm.present && !host.kvm.creates_vm && host.kvm.problem.is_some());
    }

    #[test]
    fn this_host_can_be_described_as_json() {
        let json = serde_json::to_value(Host::probe()).unwrap();
        assert_eq!(json["engine"]["engine"], "soft");
        assert!(json["memory"]["total"].as_u64().unwrap() > 0);
    }
}

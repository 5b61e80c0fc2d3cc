//! What a machine is made from.

use std::fmt;
use std::path::PathBuf;

use berth_cpu::MAX_VCPUS;

use crate::options::{DeviceOptions, MemoryOptions};

/// Which engine executes the guest's instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineKind {
    /// Berth's translator: works on every x86-64 Linux host.
    #[default]
    Soft,
    /// /dev/kvm.
    Kvm,
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Soft => "soft",
            Self::Kvm => "kvm",
        })
    }
}

/// The description of one machine.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// Name of the VM; its threads are named after it.
    pub name: String,
    /// Who executes instructions.
    pub engine: EngineKind,
    /// Number of vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// Size of RAM, a multiple of 4096 from 1 MiB to [`berth_memory::layout::MAX_RAM`], and how the host keeps it.
    pub memory: MemoryOptions,
    /// The kernel: see [`berth_boot`] for the formats.
    pub kernel: PathBuf,
    /// The initrd, if any.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// Whether there is a port that ends the VM with a code (for tests).
    pub debug_exit: bool,
    /// Whether a reset by the guest ends the VM instead of starting it again.
    pub no_reboot: bool,
    /// Bound on the soft engine's translated code in bytes, for all vCPUs together.
    pub code_cache_bytes: u64,
    /// Where the cold store's file is made, if it is to have one.
    pub store_dir: Option<PathBuf>,
    /// Disks, network and other devices that not every VM has.
    pub devices: DeviceOptions,
}

/// A number of vCPUs that cannot be.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{vcpus} vCPUs are not possible: from 1 to {MAX_VCPUS} can be")]
pub struct BadVcpuCount {
    /// What was asked for.
    pub vcpus: u8,
}

impl MachineConfig {
    /// Refuses what no machine can be. Memory and files are checked by those who use them.
    pub(crate) fn check(&self) -> Result<(), BadVcpuCount> {
        match self.vcpus {
            1..=MAX_VCPUS => Ok(()),
            vcpus => Err(BadVcpuCount { vcpus }),
        }
    }
}

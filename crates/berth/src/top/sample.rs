//! One look at all VMs and at the host.

use std::path::{Path, PathBuf};
use std::time::Duration;

use berth_api::types::{VmState, VmStats};
use berth_api::{VmDirectory, Vms, ask_all};
use berth_host::{CpuTimes, Load, Memory, Pressure};

use super::TopError;

/// How long a VM has to answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// What there was at one time.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// The VMs that live, by name.
    pub vms: Vec<VmSample>,
    /// The host.
    pub host: HostSample,
}

/// A VM.
#[derive(Clone, Debug)]
pub struct VmSample {
    /// Its name.
    pub name: String,
    /// Its process on the host.
    pub pid: Option<u32>,
    /// How it is.
    pub state: VmState,
    /// What it uses; none if it does not answer.
    pub stats: Option<VmStats>,
}

/// The host.
#[derive(Clone, Debug, Default)]
pub struct HostSample {
    /// Load averages.
    pub load: Option<Load>,
    /// Pressure.
    pub pressure: Option<Pressure>,
    /// Memory.
    pub memory: Memory,
    /// Time of each CPU, by number.
    pub cpus: Vec<CpuTimes>,
}

impl Sample {
    /// Takes one; at most as long as a VM has to answer.
    ///
    /// # Errors
    /// [`TopError`].
    pub fn take() -> Result<Self, TopError> {
        let alive: Vec<VmDirectory> = Vms::open()?.all().into_iter().filter(VmDirectory::is_alive).collect();
        // All at once: one that hangs does not hold the others up.
        let sockets: Vec<PathBuf> = alive.iter().map(VmDirectory::api_socket).collect();
        let answers = ask_all::<VmStats>(&sockets, "/stats", PATIENCE)?;
        let vms = alive.iter().zip(answers).map(|(vm, answer)| VmSample::new(vm, answer.ok())).collect();
        Ok(Self { vms, host: HostSample::take(Path::new("/")) })
    }
}

impl VmSample {
    fn new(vm: &VmDirectory, stats: Option<VmStats>) -> Self {
        // One that does not listen yet has only begun.
        let silent = if vm.api_socket().exists() { VmState::Unresponsive } else { VmState::Starting };
        let state = stats.as_ref().map_or(silent, |s| s.state);
        Self { name: vm.name().to_owned(), pid: vm.pid(), state, stats }
    }
}

impl HostSample {
    fn take(root: &Path) -> Self {
        Self {
            load: Load::read(root),
            pressure: Pressure::read(root),
            memory: Memory::read(root),
            cpus: CpuTimes::read(root),
        }
    }
}

//! What the policy is told. Sizes in bytes, times in seconds.

use serde::{Deserialize, Serialize};

/// All that is seen at one time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Seen {
    /// When, from any beginning on.
    pub now: f64,
    /// The host.
    pub host: Host,
    /// The VMs.
    pub vms: Vec<Vm>,
}

/// The host's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Host {
    /// What all VMs together may cost.
    pub budget: u64,
    /// What the host has.
    pub total: u64,
    /// What programs could get without swapping, where the host says so.
    pub available: Option<u64>,
    /// Share of the last ten seconds in which some task waited for memory, in percent, where the host says so.
    pub pressure: Option<f64>,
}

/// Where in its life a VM is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Its vCPUs run.
    #[default]
    Running,
    /// It was frozen because its memory was wanted.
    Frozen,
    /// It stands still because its owner wants that, or it starts or ends: nothing is done with it.
    Other,
}

/// A VM.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Vm {
    /// Its name.
    pub name: String,
    /// Where in its life it is.
    pub state: State,
    /// Who gives way first: lower numbers do.
    pub priority: u16,
    /// What its guest has.
    pub size: u64,
    /// Guest memory that is resident.
    pub resident: u64,
    /// Guest memory that is in the cold store.
    pub stored: u64,
    /// What it costs besides guest memory, the cold store included.
    pub overhead: u64,
    /// Guest memory that stays resident.
    pub reserve: u64,
    /// Of the overhead: what the cold store has in memory.
    pub store_memory: u64,
    /// Whether the cold store may have a file.
    pub has_file: bool,
    /// Pages that came back from the store, a second.
    pub refaults: f64,
    /// How long half of them took at most.
    pub refault_time: f64,
    /// Host CPUs that it used lately.
    pub cpus: f64,
    /// The balloon, if it has one.
    pub balloon: Option<Balloon>,
    /// Of a frozen VM: what was resident before.
    pub before_freeze: u64,
    /// Of a frozen VM: how long it has been seen frozen.
    pub frozen_for: Option<f64>,
    /// How long ago it went on after it was frozen, if it was seen.
    pub thawed_for: Option<f64>,
    /// What it was asked for and has not answered yet: bytes that it is expected to give.
    pub awaited: Option<u64>,
}

impl Vm {
    /// What the VM costs the host.
    pub fn cost(&self) -> u64 {
        self.resident + self.overhead
    }

    /// What may be taken from it.
    pub fn above_reserve(&self) -> u64 {
        self.resident.saturating_sub(self.reserve)
    }

    /// Share of the time in which its vCPUs wait for pages from the store: 1.0 is one vCPU all the time.
    pub fn stall(&self) -> f64 {
        self.refaults * self.refault_time
    }
}

/// A memory balloon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Balloon {
    /// What the guest was asked to give back.
    pub target: u64,
    /// What it has given back.
    pub actual: u64,
    /// What the guest could do without, if it says so.
    pub available: Option<u64>,
    /// What of the target others than a keeper asked for; `None`: a keeper asked for nothing.
    pub others: Option<u64>,
}

//! What a VM uses.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::VmState;

/// What a VM uses, counted since its process started.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmStats {
    /// Where in its life it is.
    pub state: VmState,
    /// When this was measured, in seconds since 1970.
    pub at: f64,
    /// Seconds since the process started.
    pub uptime_seconds: f64,
    /// CPU time of all threads of the process, in seconds.
    pub cpu_seconds: f64,
    /// The vCPUs, by number.
    pub vcpus: Vec<VcpuStats>,
    /// The process's memory.
    pub memory: MemoryStats,
    /// The memory balloon, if there is one.
    #[serde(default)]
    pub balloon: Option<BalloonStats>,
    /// The disks, in the guest's order.
    pub disks: Vec<DiskStats>,
    /// The network interfaces.
    pub nets: Vec<NetStats>,
}

/// A vCPU and its thread.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VcpuStats {
    /// Its number, from 0.
    pub id: u8,
    /// Its thread.
    #[serde(flatten)]
    pub thread: ThreadStats,
}

/// A thread, as the host's scheduler sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ThreadStats {
    /// Its number on the host.
    pub tid: u32,
    /// Its name.
    pub name: String,
    /// Its state, as `ps` shows it: `R` runs or wants to, `S` sleeps, `D` waits for the host, and others (proc(5)).
    #[schema(max_length = 1)]
    pub state: String,
    /// The host CPU that it ran on last.
    pub host_cpu: u32,
    /// CPU time in seconds.
    pub cpu_seconds: f64,
    /// Time in seconds that it waited for a host CPU although it wanted to run: the guest's steal time. 0 where the
    /// kernel does not count it.
    pub run_queue_wait_seconds: f64,
}

/// Memory of the VM's process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MemoryStats {
    /// What the guest was promised, in bytes.
    pub size_bytes: u64,
    /// What of the process is in the host's memory, in bytes: guest memory that was touched, and Berth itself.
    pub resident_bytes: u64,
    /// What of it is in the host's swap, in bytes.
    pub swapped_bytes: u64,
}

/// The memory balloon.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BalloonStats {
    /// What the guest was asked to give back, in bytes.
    pub target_bytes: u64,
    /// What it has given back, in bytes.
    pub actual_bytes: u64,
    /// What it has reported as free, in bytes, since the start.
    pub reported_bytes: u64,
    /// Memory that the guest does not use, in bytes, if it says so.
    #[serde(default)]
    pub guest_free_bytes: Option<u64>,
    /// Memory that the guest could have without swapping, in bytes, if it says so.
    #[serde(default)]
    pub guest_available_bytes: Option<u64>,
}

/// A disk, since the VM started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskStats {
    /// Its name in this API.
    pub id: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Reads that were done.
    pub reads: u64,
    /// Bytes that were read.
    pub read_bytes: u64,
    /// Writes that were done.
    pub writes: u64,
    /// Bytes that were written.
    pub written_bytes: u64,
    /// Requests to write out what is cached.
    pub flushes: u64,
    /// Requests that failed.
    pub errors: u64,
}

/// A network interface, since the VM started. Received is what the guest received.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NetStats {
    /// Its name in this API.
    pub id: String,
    /// Packets to the guest.
    pub received_packets: u64,
    /// Bytes to the guest.
    pub received_bytes: u64,
    /// Packets from the guest.
    pub sent_packets: u64,
    /// Bytes from the guest.
    pub sent_bytes: u64,
}

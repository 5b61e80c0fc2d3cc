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

/// What the engine counted since the VM's process started: the ground to explain its speed from. Which counters there
/// are may change with every version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EngineStats {
    /// The engine.
    pub engine: String,
    /// In an order for people. Empty with an engine that counts nothing.
    pub counters: Vec<EngineCounter>,
}

/// One of the engine's counters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EngineCounter {
    /// Group and member, with a dot between them; with the unit at the end if it has one.
    pub name: String,
    /// Its value.
    pub value: u64,
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
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MemoryStats {
    /// What the guest was promised, in bytes.
    pub size_bytes: u64,
    /// What of the process is in the host's memory, in bytes: guest memory that was touched, and Berth itself.
    pub resident_bytes: u64,
    /// What of it is in the host's swap, in bytes.
    pub swapped_bytes: u64,
    /// The guest's memory by state, where the host tells what is resident.
    #[serde(default)]
    pub guest: Option<GuestMemoryStats>,
    /// What the VM costs besides the guest's memory, in bytes: Berth's code and tables, translated code, the cold store,
    /// page tables.
    #[serde(default)]
    pub overhead_bytes: u64,
    /// What of the guest's memory stays resident once it was used, in bytes.
    #[serde(default)]
    pub reserve_bytes: u64,
    /// What of the guest's memory is to be resident at most, in bytes.
    #[serde(default)]
    pub limit_bytes: Option<u64>,
    /// Who keeps memory when there is not enough for all: those with a lower number give way first.
    #[serde(default)]
    pub priority: u16,
    /// Of a frozen VM: what of the guest's memory was resident before, in bytes.
    #[serde(default)]
    pub before_freeze_bytes: Option<u64>,
    /// The cold store, if it has begun.
    #[serde(default)]
    pub store: Option<StoreStats>,
}

/// The guest's memory by state, in bytes. The sum is what the guest was promised.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestMemoryStats {
    /// Never written by the guest.
    pub untouched_bytes: u64,
    /// In memory of its own.
    pub resident_bytes: u64,
    /// The same page as a file's or another VM's, until it is written.
    pub shared_bytes: u64,
    /// In the cold store, or in the host's swap.
    pub stored_bytes: u64,
    /// Given back by the guest, through the balloon or as free.
    pub released_bytes: u64,
}

/// The cold store of a VM: pages that are not in use, compressed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct StoreStats {
    /// Pages of 4096 bytes in it.
    pub pages: u64,
    /// Those that are all zeros, which cost nothing.
    pub zero_pages: u64,
    /// Different contents of the others; each is kept once.
    pub distinct_pages: u64,
    /// What these take in memory, in bytes.
    pub memory_bytes: u64,
    /// What these take in the store's file, in bytes.
    #[serde(default)]
    pub file_bytes: u64,
    /// Whether it may have a file (`--store-dir`).
    #[serde(default)]
    pub can_have_file: bool,
    /// Pages that were put into it, since the start.
    pub evicted_pages: u64,
    /// Pages that came back because somebody touched them, since the start.
    pub refaults: u64,
    /// How long half of these took at most, in seconds.
    pub latency_p50_seconds: f64,
    /// How long 99 of 100 took at most, in seconds.
    pub latency_p99_seconds: f64,
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
    /// Memory that the guest did not use, in bytes, when it was asked last, if it says so. Each look asks it anew.
    #[serde(default)]
    pub guest_free_bytes: Option<u64>,
    /// Memory that the guest could have had without swapping, in bytes, likewise.
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

//! What a VM is.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Where in its life a VM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum VmState {
    /// Its machine is being made: files are looked up, memory and devices are set up.
    Starting,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs, devices and clock stand still.
    Paused,
    /// As paused, and its memory is in the cold store because it was wanted elsewhere. It goes on when it is used.
    Frozen,
    /// Its machine has ended; the process is about to.
    Ended,
    /// Its process is gone and said nothing: killed, or crashed. Only programs that read the VM's directory see this.
    Killed,
    /// Its process is there and does not answer. Only clients see this.
    Unresponsive,
}

impl fmt::Display for VmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Frozen => "frozen",
            Self::Ended => "ended",
            Self::Killed => "killed",
            Self::Unresponsive => "unresponsive",
        })
    }
}

/// What a VM was made as. It does not change, except for the sizes of disks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmDescription {
    /// Its name.
    pub name: String,
    /// Its process on the host.
    pub pid: u32,
    /// When the process started, in seconds since 1970.
    pub started_at: f64,
    /// Version of Berth.
    pub version: String,
    /// What executes the guest: `soft` or `kvm`.
    pub engine: String,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Size of the guest's memory in bytes.
    pub memory_bytes: u64,
    /// What of the guest's memory was to stay in the host's memory at the start, in bytes.
    #[serde(default)]
    pub reserve_bytes: u64,
    /// The image that it started from, if it did.
    #[serde(default)]
    pub image: Option<String>,
    /// The kernel's file.
    pub kernel: String,
    /// The kernel's command line.
    pub cmdline: String,
    /// What its console is.
    pub console: ConsoleKind,
    /// Whether it was started with `berth run -d`.
    pub detached: bool,
    /// Its disks, in the guest's order.
    pub disks: Vec<DiskInfo>,
    /// Its network interfaces.
    pub nets: Vec<NetInfo>,
    /// Its sockets between host and guest.
    #[serde(default)]
    pub vsock: Option<VsockInfo>,
    /// Whether it has a memory balloon.
    pub balloon: bool,
    /// The Unix socket of this API.
    #[schema(value_type = String)]
    pub api_socket: PathBuf,
}

/// What a VM is, and how it is doing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmInfo {
    /// Where in its life it is.
    pub state: VmState,
    /// How it ended, if it did and that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ending: Option<Ending>,
    /// What it was made as.
    #[serde(flatten)]
    pub description: VmDescription,
}

/// How a VM ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Ending {
    /// When, in seconds since 1970.
    pub at: f64,
    /// The exit code of its process.
    pub exit_code: u8,
    /// What happened, for people; several lines if the guest or the engine could not go on.
    pub reason: String,
}

/// What the VM's console is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ConsoleKind {
    /// The serial port, `ttyS0`.
    Serial,
    /// A virtio console, `hvc0`.
    Virtio,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskInfo {
    /// Its name in this API.
    pub id: String,
    /// The image's file.
    pub path: String,
    /// Whether the guest can only read it.
    pub read_only: bool,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NetInfo {
    /// Its name in this API.
    pub id: String,
    /// What it is connected to: `user`, `tap NAME`, `bridge NAME` or `socket PATH`.
    pub backend: String,
    /// Ports of the host that lead to ports of the guest, such as `tcp:8080:80`.
    pub forwards: Vec<String>,
}

/// Sockets between host and guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VsockInfo {
    /// The guest's context identifier.
    pub cid: u32,
    /// The Unix socket at which host programs reach the guest's ports.
    #[schema(value_type = String)]
    pub path: PathBuf,
}

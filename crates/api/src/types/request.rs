//! What requests say, and the answer to those that cannot be met.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Body of `POST /stop`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct StopRequest {
    /// Seconds until a guest that is not off by then is ended; 0 ends it at once. [default: 10]
    #[schema(minimum = 0, maximum = 86400, default = 10)]
    pub timeout_seconds: u32,
}

impl StopRequest {
    /// Longest time to wait, in seconds: a day.
    pub const MAX_TIMEOUT: u32 = 86_400;
}

impl Default for StopRequest {
    fn default() -> Self {
        Self { timeout_seconds: 10 }
    }
}

/// Body of `PUT /balloon`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BalloonRequest {
    /// Memory that the guest is asked to give back in all, in bytes; rounded down to pages. More than its memory counts
    /// as all of it.
    #[schema(minimum = 0, maximum = 1125899906842624u64)]
    pub target_bytes: u64,
}

impl BalloonRequest {
    /// Largest target in bytes: more than any VM has.
    pub const MAX_TARGET: u64 = 1 << 50;
}

/// Body of `POST /reclaim`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ReclaimRequest {
    /// Memory to take at most, in bytes, up to 2^50.
    #[schema(minimum = 0, maximum = 1125899906842624u64)]
    pub bytes: u64,
    /// Only what the guest does not use for so many seconds, which the request waits; 0: whatever is coldest. [default: 5]
    #[schema(minimum = 0, maximum = 60, default = 5)]
    #[serde(default = "default_idle")]
    pub idle_seconds: u32,
}

impl ReclaimRequest {
    /// Most to take, in bytes: more than any VM has.
    pub const MAX_BYTES: u64 = 1 << 50;
    /// Longest time to watch, in seconds: the request waits for it.
    pub const MAX_IDLE: u32 = 60;
}

/// Body of `PUT /memory`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MemoryRequest {
    /// What of the guest's memory stays in the host's memory, in bytes, once it was used. Without it this stays as it is.
    #[schema(minimum = 0, maximum = 1125899906842624u64)]
    pub reserve_bytes: Option<u64>,
    /// What is in the host's memory at most, in bytes: colder pages go to the cold store; 0: as much as the guest uses.
    /// Without it this stays as it is.
    #[schema(minimum = 0, maximum = 1125899906842624u64)]
    pub limit_bytes: Option<u64>,
    /// Who keeps memory when there is not enough for all: those with a lower number give way first. Without it this stays
    /// as it is.
    #[schema(minimum = 0, maximum = 1000)]
    pub priority: Option<u16>,
}

impl MemoryRequest {
    /// Most that a reserve or limit can be, in bytes: more than any VM has.
    pub const MAX_BYTES: u64 = 1 << 50;
}

/// Body of `POST /store/file`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StoreFileRequest {
    /// How much of what the cold store has in memory is to move, in bytes, up to 2^50.
    #[schema(minimum = 0, maximum = 1125899906842624u64)]
    pub bytes: u64,
}

/// Answer to `POST /store/file`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Moved {
    /// What went to the file, in compressed bytes.
    pub bytes: u64,
}

/// Answer to `POST /freeze`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FreezeAnswer {
    /// Guest memory that went to the cold store, in bytes.
    pub bytes: u64,
    /// What of the cold store went to its file, in compressed bytes.
    pub file_bytes: u64,
}

fn default_idle() -> u32 {
    5
}

/// Answer to `POST /reclaim`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Reclaimed {
    /// Guest memory that went to the cold store, in bytes.
    pub bytes: u64,
    /// What of it was all zeros, in bytes.
    pub zero_bytes: u64,
}

/// Body of `PUT /disks/{id}/size`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskSizeRequest {
    /// The disk's new size in bytes: not less than it has, and a multiple of 512.
    #[schema(minimum = 512, maximum = 1152921504606846976u64, multiple_of = 512)]
    pub size_bytes: u64,
}

/// Body of `PUT /cpu`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CpuRequest {
    /// How much CPU time compared with other VMs when there is not enough for all; 100 is usual. Without it the weight
    /// stays.
    #[schema(minimum = 1, maximum = 10000)]
    pub weight: Option<u32>,
    /// Most CPU time, in host CPUs, of all threads of the VM together; 0: as much as there is. Without it the limit stays.
    #[schema(minimum = 0, maximum = 4096)]
    pub limit: Option<f64>,
}

impl DiskSizeRequest {
    /// What sizes are multiples of, in bytes.
    pub const SECTOR: u64 = 512;
    /// Largest size in bytes: more than any host can hold.
    pub const MAX_SIZE: u64 = 1 << 60;
}

/// Body of `PUT /console/size`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ConsoleSize {
    /// Columns of the terminal.
    #[schema(minimum = 1, maximum = 65535)]
    pub columns: u16,
    /// Rows of the terminal.
    #[schema(minimum = 1, maximum = 65535)]
    pub rows: u16,
}

/// What kind of thing is wrong with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request makes no sense: its body, a parameter.
    BadRequest,
    /// Who asks may not.
    Forbidden,
    /// There is no such route, device or the like.
    NotFound,
    /// The route does not have this method.
    MethodNotAllowed,
    /// It cannot be done in the state that the VM is in.
    WrongState,
    /// The VM cannot do it: it has no such device, or the guest does not take part.
    NotPossible,
    /// The request must ask for an upgrade of its connection.
    UpgradeRequired,
    /// The body is not JSON, or too large.
    BadBody,
    /// The host refused something, or Berth has a fault.
    Internal,
    /// A code of a newer server.
    #[serde(other)]
    Other,
}

/// The body of every answer that is an error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ApiError {
    /// For programs.
    pub code: ErrorCode,
    /// For people: one line.
    pub message: String,
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

//! What goes over the socket, as JSON.
//!
//! Names of fields end with their unit where they have one: `_bytes`, `_seconds`. Times are seconds since 1970.

mod event;
mod info;
mod look;
mod request;
mod stats;

pub use berth_explain::{Explanation, MemoryMap};
pub use event::{Event, EventKind};
pub use info::{ConsoleKind, DiskInfo, Ending, NetInfo, VmDescription, VmInfo, VmState, VsockInfo};
pub use look::{ExplainQuery, MapQuery};
pub use request::{
    ApiError, BalloonRequest, ConsoleSize, CpuRequest, DiskSizeRequest, ErrorCode, FreezeAnswer,
    MemoryRequest, Moved, ReclaimRequest, Reclaimed, StopRequest, StoreFileRequest,
};
pub use stats::{
    BalloonStats, DiskStats, EngineCounter, EngineStats, GuestMemoryStats, MemoryStats, NetStats, StoreStats,
    ThreadStats, VcpuStats, VmStats,
};

//! Puts a machine together and runs it.
//!
//! ```text
//!   MachineConfig ──► Machine ──┬── GuestMemory ◄── berth_boot::load
//!                               ├── Board: bus and devices
//!                               ├── Engine ──► one Vcpu a thread NAME/vcpuN
//!                               └── supervisor thread NAME/machine: start, reset, end
//! ```
//! Order of calls: [`Machine::new`], [`Machine::start`], [`Machine::wait`]; [`Machine::control`] at any time. What
//! happens in between is described in the module `supervisor`.
//!
//! Nothing here depends on which engine runs, except [`MachineConfig::engine`] that chooses it.

mod account;
mod board;
mod config;
mod control;
mod cpu_time;
#[cfg(test)]
mod engine_tests;
mod event;
mod freeze;
mod look;
mod machine;
mod notice;
pub mod options;
mod reclaim;
mod status;
mod supervisor;
#[cfg(test)]
mod tests;
mod vcpu_thread;
mod virtio;

pub use berth_devices::virtio::balloon::{BalloonStatus, Statistics};
pub use berth_devices::virtio::block::{BlockCounters, BlockError, BlockOperation};
pub use berth_devices::virtio::net::NetCounters;
pub use board::BoardError;
pub use config::{BadVcpuCount, EngineKind, MachineConfig};
pub use control::{BalloonControl, MachineControl};
pub use cpu_time::CpuTimeError;
pub use freeze::{FreezeError, Frozen};
pub use look::LookError;
pub use machine::{Machine, MachineError};
pub use notice::{Notice, Notices, Recorded};
pub use reclaim::{MemoryShare, ReclaimError};
pub use status::MachineState;
pub use virtio::{DiskResizeError, VirtioError};

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest powered off.
    PoweredOff,
    /// The guest reset itself, and [`MachineConfig::no_reboot`] is set.
    Reset,
    /// The guest wrote the debug-exit port: the exit code that it wants.
    DebugExit(i32),
    /// [`MachineControl::stop`] was called.
    Stopped,
    /// The guest or the engine cannot go on. For people: several lines, with the state of the vCPU.
    Failed(String),
}

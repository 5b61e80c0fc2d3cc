//! What the supervisor is told.

use std::sync::mpsc::Sender;

use berth_cpu::{CpuState, VcpuId};
use berth_devices::power::PowerEvent;

/// Called when what was asked for is done; dropped when the machine ends before.
pub type Done = Box<dyn FnOnce() + Send>;

/// Something happened.
pub enum Event {
    /// The guest asked for something through a device.
    Power(PowerEvent),
    /// The owner wants the VM to end.
    Stop,
    /// The owner pressed the reset button.
    Reset,
    /// The owner wants the VM to stand still.
    Pause(Done),
    /// The owner wants the VM to go on.
    Resume(Done),
    /// The VM is to stand still because its memory is wanted, if it runs.
    Freeze(Done),
    /// A VM that stands still because its memory was wanted is to go on.
    Thaw(Done),
    /// Somebody wants to know the state of a vCPU.
    Look {
        /// Which.
        vcpu: VcpuId,
        /// Where the state goes; dropped when there is none.
        reply: Sender<Box<CpuState>>,
    },
    /// A vCPU does not run any more.
    VcpuParked {
        /// Which.
        id: VcpuId,
        /// Why.
        parked: Parked,
    },
}

/// Why a vCPU does not run any more.
pub enum Parked {
    /// It was asked to stop, and can go on.
    Stopped,
    /// It cannot go on: for people, with an account of its state.
    Failed(String),
    /// Its thread panicked and is gone.
    Panicked,
}

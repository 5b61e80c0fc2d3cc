//! What happens to a VM.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Ending, VmState};

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Its number, from 1; one more than that of the event before.
    pub id: u64,
    /// When, in seconds since 1970.
    pub at: f64,
    /// What.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum EventKind {
    /// The VM is in another state.
    State {
        /// Which.
        state: VmState,
    },
    /// The VM was reset, and boots again.
    Reset {
        /// Whether the guest asked for it, and not the owner.
        by_guest: bool,
    },
    /// The guest's kernel says that it has panicked.
    GuestPanic {
        /// Whether it says that it writes a dump and restarts.
        crash_loaded: bool,
    },
    /// The balloon has another size, or is asked to.
    Balloon {
        /// What the guest was asked to give back, in bytes.
        target_bytes: u64,
        /// What it has given back, in bytes.
        actual_bytes: u64,
    },
    /// A device could not do what the guest asked for.
    IoError {
        /// The device.
        device: String,
        /// What went wrong, for people.
        message: String,
    },
    /// Events were lost, because nobody read them in time.
    Missed {
        /// How many.
        count: u64,
    },
    /// The VM has ended: the last event.
    Ended(Ending),
}

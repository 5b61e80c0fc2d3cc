//! Time for devices: the VM's clock, the TSC, and one thread a VM that calls devices back at their deadlines.

mod clock;
mod queue;
mod tsc;

pub use clock::{Clock, NANOS_PER_SEC, Nanos};
pub(crate) use clock::{nanos, ticks};
pub use queue::{Timer, TimerError, Timers};
pub use tsc::{TscClock, read_tsc, tsc_hz};

/// Shortest period of a periodic timer that the host serves, in nanoseconds: a guest that programs less gets
/// interrupts at this distance, so that it cannot keep the timer thread busy.
pub const MIN_PERIOD: Nanos = 100_000;

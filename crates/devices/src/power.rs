//! What the guest asks of the machine as a whole, or tells of itself.

use std::sync::Arc;

/// A request that ends or restarts the VM, or news of its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerEvent {
    /// ACPI soft off (S5).
    PowerOff,
    /// Reset of the whole machine.
    Reset,
    /// The debug-exit port was written; the process is to end with this code.
    DebugExit(u8),
    /// The guest's kernel has panicked. The machine goes on: what follows is for the guest to do.
    GuestPanic {
        /// Another kernel in it writes a dump.
        crash_loaded: bool,
    },
}

/// Where devices send [`PowerEvent`]s. Called on the vCPU's thread that made the access, with the lock of no
/// device held; must return soon.
#[derive(Clone)]
pub struct PowerSink(Arc<dyn Fn(PowerEvent) + Send + Sync>);

impl PowerSink {
    /// A sink that calls `receive` for each event.
    pub fn new(receive: impl Fn(PowerEvent) + Send + Sync + 'static) -> Self {
        Self(Arc::new(receive))
    }
    /// Hands `event` to the receiver.
    pub fn send(&self, event: PowerEvent) {
        (self.0)(event);
    }
}

impl std::fmt::Debug for PowerSink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PowerSink")
    }
}

#[cfg(test)]
pub(crate) fn recorder() -> (PowerSink, Arc<parking_lot::Mutex<Vec<PowerEvent>>>) {
    let events = Arc::new(parking_lot::Mutex::new(Vec::new()));
    let record = events.clone();
    (PowerSink::new(move |event| record.lock().push(event)), events)
}

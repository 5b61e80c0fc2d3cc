//! What other threads may do with a running machine.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use crate::board::Board;
use crate::event::Event;

/// A handle to a machine. Cheap to clone; after the machine's end it does nothing.
#[derive(Clone)]
pub struct MachineControl {
    events: Sender<Event>,
    board: Arc<Board>,
}

impl MachineControl {
    pub(crate) fn new(events: Sender<Event>, board: Arc<Board>) -> Self {
        Self { events, board }
    }

    /// Gives input to the serial console; returns how many bytes it took. It takes less than all when the guest
    /// does not read fast enough: [`Self::wait_for_console_room`] before the rest.
    pub fn console_input(&self, bytes: &[u8]) -> usize {
        self.board.console_input(bytes)
    }

    /// Waits until the serial console takes input, at most `timeout`; returns whether it does.
    pub fn wait_for_console_room(&self, timeout: Duration) -> bool {
        self.board.wait_for_console_room(timeout)
    }

    /// Presses the ACPI power button: asks the guest to power off.
    pub fn power_button(&self) {
        self.board.power_button();
    }

    /// Whether the guest has enabled the power button: otherwise it is not worth while to wait for it.
    pub fn hears_power_button(&self) -> bool {
        self.board.hears_power_button()
    }

    /// Ends the machine at once; [`crate::Machine::wait`] returns [`crate::Outcome::Stopped`].
    pub fn stop(&self) {
        self.send(Event::Stop);
    }

    /// Presses the reset button: starts the kernel again, whatever the guest does.
    pub fn reset(&self) {
        self.send(Event::Reset);
    }

    fn send(&self, event: Event) {
        // The receiver is gone when the machine has ended: then there is nothing to do.
        let _ = self.events.send(event);
    }
}

//! Interrupts as devices see them: lines and messages, whoever has the controllers.
//!
//! ```text
//!   device ──IrqLine──┐
//!                     ├──► Interrupts ──┬──► InterruptChips (the controllers are devices)
//!   device ───MSI─────┘                 └──► EngineInterrupts ──► the engine's own controllers
//! ```

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use berth_engine::{InterruptSink, MessageEvent};
use parking_lot::Mutex;

/// Interrupts that devices can have lines to: 0 to 23 without the PIC's cascade.
pub const IRQS: u8 = 24;
/// The PIC's input that its slave drives: no line of a device.
const CASCADE_IRQ: u8 = 2;

/// There is no such interrupt for a device.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("interrupt {irq} is not available to devices: 0, 1 and 3 to 23 are")]
pub struct IrqError {
    /// What was asked for.
    pub irq: u8,
}

/// The interrupt controllers of a machine. Called from any thread.
pub trait InterruptController: Send + Sync {
    /// One more line asserts `irq` (0 to 23), or one less.
    fn change_line(&self, irq: u8, asserted: bool);
    /// Delivers a message signalled interrupt: a write of `data` to `address` by a device (SDM volume 3, 11.11).
    /// Returns whether a local APIC took it.
    fn deliver_msi(&self, address: u64, data: u32) -> bool;
    /// As [`berth_engine::MessageInterrupts::message_event`].
    fn message_event(&self) -> Option<Box<dyn MessageEvent>>;
    /// Back to the state after RESET. Lines stay as devices drive them. No vCPU may be running.
    fn reset(&self);
}

/// The way to a machine's interrupt controllers. Cheap to clone.
#[derive(Clone)]
pub struct Interrupts(Arc<dyn InterruptController>);

impl Interrupts {
    /// The way to these controllers.
    pub fn new(controller: Arc<dyn InterruptController>) -> Self {
        Self(controller)
    }

    /// A new line for a device to interrupt `irq` with: 0 to 15 are the ISA interrupts, at the PIC's inputs and
    /// the IOAPIC's pins of the same number (except 0, which has pin 2); 16 to 23 are the IOAPIC's other pins.
    /// An interrupt is asserted while any of its lines is.
    ///
    /// # Errors
    /// [`IrqError`] for 2, which is the PIC's cascade, and beyond 23.
    pub fn line(&self, irq: u8) -> Result<IrqLine, IrqError> {
        if irq == CASCADE_IRQ || irq >= IRQS {
            return Err(IrqError { irq });
        }
        Ok(IrqLine { controller: self.0.clone(), irq, asserted: AtomicBool::new(false) })
    }

    /// Delivers a message signalled interrupt: a write of `data` to `address` by a device (SDM volume 3, 11.11).
    /// Returns whether a local APIC took it.
    pub fn deliver_msi(&self, address: u64, data: u32) -> bool {
        self.0.deliver_msi(address, data)
    }

    /// The controllers back to the state after RESET. Lines stay as devices drive them. No vCPU may be running.
    pub fn reset(&self) {
        self.0.reset();
    }
}

/// Where message signalled interrupts go.
pub trait MsiSink: Send + Sync {
    /// A device's write of `data` to `address` (SDM volume 3, 11.11). One that is no interrupt is dropped. Called
    /// from any thread, perhaps with the device's own lock held.
    fn send_msi(&self, address: u64, data: u32);
    /// A message that is sent by a write to an eventfd, where that is possible.
    fn message_event(&self) -> Option<Box<dyn MessageEvent>> {
        None
    }
}

impl MsiSink for Interrupts {
    fn send_msi(&self, address: u64, data: u32) {
        self.deliver_msi(address, data);
    }

    fn message_event(&self) -> Option<Box<dyn MessageEvent>> {
        self.0.message_event()
    }
}

impl fmt::Debug for Interrupts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Interrupts")
    }
}

/// One device's wire to an interrupt, which other devices may share: it is asserted while any of their lines is.
/// Made by [`Interrupts::line`]. Dropping the line releases it.
pub struct IrqLine {
    controller: Arc<dyn InterruptController>,
    irq: u8,
    asserted: AtomicBool,
}

impl IrqLine {
    /// Asserts or releases the line. Calls of one line must be ordered by its device's lock, or their order is
    /// open.
    pub fn set(&self, level: bool) {
        if self.asserted.swap(level, Ordering::SeqCst) != level {
            self.controller.change_line(self.irq, level);
        }
    }

    /// A short pulse: one interrupt if it is edge-triggered.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }

    /// The number of the interrupt.
    pub fn irq(&self) -> u8 {
        self.irq
    }
}

impl Drop for IrqLine {
    fn drop(&mut self) {
        self.set(false);
    }
}

impl fmt::Debug for IrqLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let asserted = self.asserted.load(Ordering::SeqCst);
        f.debug_struct("IrqLine").field("irq", &self.irq).field("asserted", &asserted).finish()
    }
}

/// How many lines assert each interrupt.
#[derive(Debug, Default)]
pub(crate) struct Wires([u32; IRQS as usize]);

impl Wires {
    /// One more line asserts `irq`, or one less. Returns whether the interrupt as a whole rose or fell.
    pub(crate) fn change(&mut self, irq: u8, asserted: bool) -> bool {
        let Some(count) = self.0.get_mut(usize::from(irq)) else { return false };
        let was = *count != 0;
        *count = if asserted { count.saturating_add(1) } else { count.saturating_sub(1) };
        was != (*count != 0)
    }

    /// Whether any line asserts `irq`.
    pub(crate) fn is_asserted(&self, irq: u8) -> bool {
        self.0.get(usize::from(irq)).is_some_and(|&n| n != 0)
    }
}

/// Interrupt controllers that the engine has: this only joins the lines of an interrupt.
pub struct EngineInterrupts {
    sink: Arc<dyn InterruptSink>,
    /// Held while the engine is told, so that it sees changes in their order.
    wires: Mutex<Wires>,
}

impl EngineInterrupts {
    /// The controllers behind `sink`.
    pub fn new(sink: Arc<dyn InterruptSink>) -> Arc<Self> {
        Arc::new(Self { sink, wires: Mutex::default() })
    }
}

impl InterruptController for EngineInterrupts {
    fn change_line(&self, irq: u8, asserted: bool) {
        let mut wires = self.wires.lock();
        if wires.change(irq, asserted) {
            self.sink.set_line(irq, asserted);
        }
    }

    fn deliver_msi(&self, address: u64, data: u32) -> bool {
        self.sink.signal_msi(address, data)
    }

    fn message_event(&self) -> Option<Box<dyn MessageEvent>> {
        self.sink.message_event()
    }

    fn reset(&self) {
        self.sink.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_engine::MessageInterrupts;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u8, bool)>>);

    impl MessageInterrupts for Recorder {
        fn signal_msi(&self, address: u64, data: u32) -> bool {
            (address, data) == (0xfee0_0000, 0x41)
        }
        fn message_event(&self) -> Option<Box<dyn MessageEvent>> {
            None
        }
    }

    impl InterruptSink for Recorder {
        fn set_line(&self, irq: u8, level: bool) {
            self.0.lock().push((irq, level));
        }
        fn reset(&self) {}
    }

    #[test]
    fn an_engine_sees_an_interrupt_of_several_lines_once() {
        let sink = Arc::new(Recorder::default());
        let interrupts = Interrupts::new(EngineInterrupts::new(sink.clone()));
        let (a, b) = (interrupts.line(16).unwrap(), interrupts.line(16).unwrap());
        a.set(true);
        b.set(true);
        a.set(true);
        a.set(false);
        drop(b);
        interrupts.line(4).unwrap().pulse();
        assert_eq!(*sink.0.lock(), [(16, true), (16, false), (4, true), (4, false)]);
        assert!(interrupts.deliver_msi(0xfee0_0000, 0x41));
        assert!(!interrupts.deliver_msi(0xfee0_0000, 0x42));
    }

    #[test]
    fn lines_that_no_device_can_have_are_refused() {
        let interrupts = Interrupts::new(EngineInterrupts::new(Arc::new(Recorder::default())));
        for irq in [2, 24, 255] {
            assert_eq!(interrupts.line(irq).err(), Some(IrqError { irq }));
        }
    }
}

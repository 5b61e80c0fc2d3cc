//! Interrupt lines: how a device asks for an interrupt.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::irqchip::InterruptChips;

/// There is no such interrupt for a device.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("interrupt {irq} is not available to devices: 0, 1 and 3 to 23 are")]
pub struct IrqError {
    /// What was asked for.
    pub irq: u8,
}

/// Where message signalled interrupts go.
pub trait MsiSink: Send + Sync {
    /// A device's write of `data` to `address` (SDM volume 3, 11.11). One that is no interrupt is dropped. Called
    /// from any thread, perhaps with the device's own lock held.
    fn send_msi(&self, address: u64, data: u32);
}

impl MsiSink for InterruptChips {
    fn send_msi(&self, address: u64, data: u32) {
        self.deliver_msi(address, data);
    }
}

/// One device's wire to an interrupt, which other devices may share: it is asserted while any of their lines is.
/// Made by [`InterruptChips::line`]. Dropping the line releases it.
pub struct IrqLine {
    chips: Arc<InterruptChips>,
    irq: u8,
    asserted: AtomicBool,
}

impl IrqLine {
    pub(crate) fn new(chips: Arc<InterruptChips>, irq: u8) -> Self {
        Self { chips, irq, asserted: AtomicBool::new(false) }
    }

    /// Asserts or releases the line. Calls of one line must be ordered by its device's lock, or their order is
    /// open.
    pub fn set(&self, level: bool) {
        if self.asserted.swap(level, Ordering::SeqCst) != level {
            self.chips.change_line(self.irq, level);
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

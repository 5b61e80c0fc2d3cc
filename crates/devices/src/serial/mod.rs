//! A 16550A serial port, the VM's console.
//!
//! (vm-superio's port was considered: it has no FIFO control, no modem status changes, merges interrupt causes in
//! IIR, and signals edges where the chip has a level, so it can miss input.)

mod uart;

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use tracing::warn;

use crate::bus::{BusError, MachineBus, PortDevice};
use crate::irq::IrqLine;

pub use uart::{QUEUE_SIZE, Uart};

struct Output {
    sink: Box<dyn Write + Send>,
    /// Writing failed, and it was said.
    failed: bool,
}

impl Output {
    fn write(&mut self, bytes: &[u8]) {
        let result = self.sink.write_all(bytes).and_then(|()| self.sink.flush());
        match result {
            Ok(()) => self.failed = false,
            Err(error) if !self.failed => {
                self.failed = true;
                warn!("the console's output is lost: {error}");
            }
            Err(_) => (),
        }
    }
}

/// A serial port with its interrupt, output and input.
pub struct Serial {
    uart: Mutex<Uart>,
    /// There is room for input again. With `uart`.
    room: Condvar,
    /// Taken while `uart` is held, so that bytes keep their order, and released after it.
    output: Mutex<Output>,
    irq: IrqLine,
}

impl Serial {
    /// A port that interrupts through `irq` and writes what the guest sends to `output`, a byte at a time and each
    /// flushed. A slow `output` slows the vCPU that writes down; if it fails, what the guest sends is lost.
    pub fn new(irq: IrqLine, output: Box<dyn Write + Send>) -> Arc<Self> {
        Arc::new(Self {
            uart: Mutex::default(),
            room: Condvar::new(),
            output: Mutex::new(Output { sink: output, failed: false }),
            irq,
        })
    }

    /// Puts the port's 8 registers on the bus from `base` on.
    ///
    /// # Errors
    /// [`BusError`] when the ports are taken.
    pub fn register(self: &Arc<Self>, base: u16, bus: &mut MachineBus) -> Result<(), BusError> {
        bus.register_ports(base, 8, "serial port", self.clone())
    }

    /// Queues input for the guest. Takes as much as there is room for (64 KiB) and gives how many bytes it took;
    /// [`Self::wait_for_room`] before the rest.
    pub fn push_input(&self, input: &[u8]) -> usize {
        self.access(|uart| uart.push(input))
    }

    /// Waits until there is room for input, at most `timeout`. Returns whether there is.
    pub fn wait_for_room(&self, timeout: Duration) -> bool {
        let mut uart = self.uart.lock();
        self.room.wait_while_for(&mut uart, |uart| uart.room() == 0, timeout);
        uart.room() != 0
    }

    /// Accesses the registers, and lets the interrupt line and whoever waits for room follow.
    fn access<R>(&self, access: impl FnOnce(&mut Uart) -> R) -> R {
        let mut uart = self.uart.lock();
        let was_full = uart.room() == 0;
        let result = access(&mut uart);
        self.irq.set(uart.interrupt());
        if was_full && uart.room() != 0 {
            self.room.notify_all();
        }
        result
    }

    /// Back to the state after reset. Input that the guest has not read is kept for the next one.
    pub fn reset(&self) {
        self.access(Uart::reset);
    }
}

impl PortDevice for Serial {
    fn read(&self, offset: u16, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.access(|uart| {
                let value = uart.read(offset + i as u16);
                // The line falls when the FIFO is empty and rises when it is filled again.
                self.irq.set(uart.interrupt());
                uart.refill();
                value
            });
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        for (i, &byte) in data.iter().enumerate() {
            let transmitted = self.access(|uart| {
                let byte = uart.write(offset + i as u16, byte)?;
                // The transmitter is full for a moment.
                self.irq.set(uart.interrupt_without_transmitter());
                // Locked in the order of the writes, and held when the registers are free again: a slow console
                // holds up who writes to it, not the interrupts and the input.
                Some((byte, self.output.lock()))
            });
            if let Some((byte, mut output)) = transmitted {
                output.write(&[byte]);
            }
        }
    }
}

#[cfg(test)]
mod tests;

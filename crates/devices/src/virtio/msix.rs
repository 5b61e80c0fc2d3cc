//! How a device interrupts: MSI-X (PCI Local Bus Specification 3.0, 6.8.2), or the pin with the ISR status (virtio 1.2,
//! 4.1.4.5).

use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::vectors::Vectors;
use crate::bytes;
use crate::irq::{IrqLine, MsiSink};

/// Bytes of a table entry: address, data, vector control.
pub const ENTRY_SIZE: u64 = 16;
const MASKED: u32 = 1;
/// No vector (virtio 1.2, 4.1.5.1.2).
const NO_VECTOR: u16 = 0xffff;
/// ISR: a queue has used buffers.
const ISR_QUEUE: u8 = 1;
/// ISR: the configuration changed.
const ISR_CONFIG: u8 = 2;

/// One entry of the table. Masked after reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    address: u64,
    data: u32,
    control: u32,
}

impl Default for Entry {
    fn default() -> Self {
        Self { address: 0, data: 0, control: MASKED }
    }
}

/// All that can be saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterruptState {
    table: Vec<Entry>,
    /// A bit a vector: an interrupt came while it was masked.
    pending: Vec<bool>,
    /// MSI-X is on, and all vectors are masked by the function's mask.
    enabled: bool,
    function_masked: bool,
    /// Whether the function may send messages.
    bus_master: bool,
    /// Whether the pin is off.
    pin_off: bool,
    isr: u8,
    /// The vector of each queue.
    queues: Vec<u16>,
    config: u16,
}

/// A device's interrupts. Locks inside; used by vCPUs and by the device's threads.
pub struct Interrupts {
    state: Mutex<InterruptState>,
    line: IrqLine,
    msi: Arc<dyn MsiSink>,
    /// Taken while `state` is held.
    vectors: Mutex<Vectors>,
}

impl Interrupts {
    /// For a device with `queues` queues: a vector each, and one for changes of the configuration.
    pub fn new(queues: usize, line: IrqLine, msi: Arc<dyn MsiSink>) -> Self {
        let vectors = Mutex::new(Vectors::new(queues + 1));
        Self { state: Mutex::new(InterruptState::new(queues, queues + 1)), line, msi, vectors }
    }

    /// How many vectors there are.
    pub fn vectors(&self) -> usize {
        self.state.lock().table.len()
    }

    /// Tells the driver that queue `index` has used buffers.
    pub fn signal_queue(&self, index: u16) {
        let mut state = self.state.lock();
        let vector = state.queues.get(usize::from(index)).copied().unwrap_or(NO_VECTOR);
        self.signal(&mut state, vector, ISR_QUEUE);
    }

    /// Tells the driver that the device's configuration or status changed.
    pub fn signal_config(&self) {
        let mut state = self.state.lock();
        let vector = state.config;
        self.signal(&mut state, vector, ISR_CONFIG);
    }

    fn signal(&self, state: &mut InterruptState, vector: u16, cause: u8) {
        if state.enabled {
            self.send(state, vector.into());
        } else {
            state.isr |= cause;
            self.drive_line(state);
        }
    }

    fn send(&self, state: &mut InterruptState, vector: usize) {
        let (Some(entry), Some(pending)) = (state.table.get(vector), state.pending.get_mut(vector)) else {
            return;
        };
        *pending = state.function_masked || entry.control & MASKED != 0;
        if !*pending && state.bus_master {
            let (address, data) = (entry.address, entry.data);
            if !self.vectors.lock().send(vector, address, data) {
                self.msi.send_msi(address, data);
            }
        }
    }

    /// Tells the engine which messages can be sent now.
    fn set_vectors(&self, state: &InterruptState) {
        if state.enabled && state.bus_master && !state.function_masked {
            let mut vectors = self.vectors.lock();
            for (index, entry) in state.table.iter().enumerate() {
                let message = (entry.control & MASKED == 0).then_some((entry.address, entry.data));
                vectors.set(index, message, self.msi.as_ref());
            }
        }
    }

    fn send_pending(&self, state: &mut InterruptState) {
        if state.enabled && !state.function_masked {
            for vector in 0..state.pending.len() {
                if state.pending[vector] {
                    self.send(state, vector);
                }
            }
        }
    }

    fn drive_line(&self, state: &InterruptState) {
        self.line.set(state.isr != 0 && !state.enabled && !state.pin_off);
    }

    /// Whether the function asserts its pin, or would.
    pub fn is_pin_pending(&self) -> bool {
        self.state.lock().isr != 0
    }

    /// The driver reads the ISR status, which clears it.
    pub fn take_isr(&self) -> u8 {
        let mut state = self.state.lock();
        let isr = std::mem::take(&mut state.isr);
        self.drive_line(&state);
        isr
    }

    /// The driver changed MSI-X message control, bus mastering, or the pin in the configuration space.
    pub fn set_control(&self, enabled: bool, function_masked: bool, bus_master: bool, pin_off: bool) {
        let mut state = self.state.lock();
        (state.enabled, state.function_masked) = (enabled, function_masked);
        (state.bus_master, state.pin_off) = (bus_master, pin_off);
        self.drive_line(&state);
        self.set_vectors(&state);
        self.send_pending(&mut state);
    }

    /// The vector of queue `index`, as the driver reads it back.
    pub fn queue_vector(&self, index: u16) -> u16 {
        self.state.lock().queues.get(usize::from(index)).copied().unwrap_or(NO_VECTOR)
    }

    /// The vector for changes of the configuration.
    pub fn config_vector(&self) -> u16 {
        self.state.lock().config
    }

    /// Maps a queue to a vector; one that does not exist reads back as none.
    pub fn set_queue_vector(&self, index: u16, vector: u16) {
        let mut state = self.state.lock();
        let vector = state.checked(vector);
        if let Some(slot) = state.queues.get_mut(usize::from(index)) {
            *slot = vector;
        }
    }

    /// Maps changes of the configuration to a vector.
    pub fn set_config_vector(&self, vector: u16) {
        let mut state = self.state.lock();
        state.config = state.checked(vector);
    }

    /// A load from the table.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        let state = self.state.lock();
        let entry = state.table.get((offset / ENTRY_SIZE) as usize).copied().unwrap_or_default();
        let mut image = [0; ENTRY_SIZE as usize];
        image[..8].copy_from_slice(&entry.address.to_le_bytes());
        image[8..12].copy_from_slice(&entry.data.to_le_bytes());
        image[12..].copy_from_slice(&entry.control.to_le_bytes());
        let at = (offset % ENTRY_SIZE) as usize;
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = image.get(at + i).copied().unwrap_or(0);
        }
    }

    /// A store to the table: 4 or 8 bytes, aligned; others are dropped.
    pub fn table_write(&self, offset: u64, data: &[u8]) {
        let mut state = self.state.lock();
        let vector = (offset / ENTRY_SIZE) as usize;
        let Some(entry) = state.table.get_mut(vector) else { return };
        let value = bytes::value(data);
        match (offset % ENTRY_SIZE, data.len()) {
            (0, 8) => entry.address = value,
            (0, 4) => entry.address = entry.address & !0xffff_ffff | value,
            (4, 4) => entry.address = entry.address & 0xffff_ffff | value << 32,
            (8, 4) => entry.data = value as u32,
            (8, 8) => (entry.data, entry.control) = (value as u32, (value >> 32) as u32 & MASKED),
            (12, 4) => entry.control = value as u32 & MASKED,
            _ => return,
        }
        self.set_vectors(&state);
        self.send_pending(&mut state);
    }

    /// A load from the pending bits.
    pub fn pending_read(&self, offset: u64, data: &mut [u8]) {
        let state = self.state.lock();
        for (i, byte) in data.iter_mut().enumerate() {
            let first = (offset as usize).saturating_add(i).saturating_mul(8);
            let bit = |n: usize| state.pending.get(first.saturating_add(n)).is_some_and(|&p| p);
            *byte = (0..8).fold(0, |bits, n| bits | u8::from(bit(n)) << n);
        }
    }

    /// A reset of the device by its driver: vectors are forgotten; what belongs to PCI stays.
    pub fn reset_device(&self) {
        let mut state = self.state.lock();
        state.queues.fill(NO_VECTOR);
        state.config = NO_VECTOR;
        state.pending.fill(false);
        state.isr = 0;
        self.drive_line(&state);
    }

    /// A reset of the machine.
    pub fn reset(&self) {
        let mut state = self.state.lock();
        *state = InterruptState::new(state.queues.len(), state.table.len());
        self.drive_line(&state);
    }

    /// What to save.
    pub fn state(&self) -> InterruptState {
        self.state.lock().clone()
    }

    /// Takes what was saved; `false` if it is another device's.
    pub fn restore(&self, saved: &InterruptState) -> bool {
        let mut state = self.state.lock();
        let lens = |s: &InterruptState| (s.table.len(), s.pending.len(), s.queues.len());
        if lens(saved) != lens(&state) {
            return false;
        }
        *state = saved.clone();
        self.drive_line(&state);
        self.set_vectors(&state);
        true
    }
}

impl InterruptState {
    fn new(queues: usize, vectors: usize) -> Self {
        Self {
            table: vec![Entry::default(); vectors],
            pending: vec![false; vectors],
            enabled: false,
            function_masked: false,
            bus_master: false,
            pin_off: false,
            isr: 0,
            queues: vec![NO_VECTOR; queues],
            config: NO_VECTOR,
        }
    }

    fn checked(&self, vector: u16) -> u16 {
        if usize::from(vector) < self.table.len() { vector } else { NO_VECTOR }
    }
}

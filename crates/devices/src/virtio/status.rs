//! The device status field (virtio 1.2, 2.1).

use std::sync::atomic::{AtomicU8, Ordering};

use virtio_bindings::bindings::virtio_config as bits;

/// The driver has set it up.
pub const DRIVER_OK: u8 = bits::VIRTIO_CONFIG_S_DRIVER_OK as u8;
/// The driver accepted the features.
pub const FEATURES_OK: u8 = bits::VIRTIO_CONFIG_S_FEATURES_OK as u8;
/// The device cannot go on without a reset.
pub const NEEDS_RESET: u8 = bits::VIRTIO_CONFIG_S_NEEDS_RESET as u8;

/// The field: written by the driver, and by any thread of the device that finds the driver wrong.
#[derive(Debug, Default)]
pub struct Status(AtomicU8);

impl Status {
    /// The field as the driver reads it.
    pub fn get(&self) -> u8 {
        self.0.load(Ordering::Acquire)
    }

    /// Whether all of `bits` are set.
    pub fn has(&self, bits: u8) -> bool {
        self.get() & bits == bits
    }

    /// Sets bits; returns what the field was.
    pub fn add(&self, bits: u8) -> u8 {
        self.0.fetch_or(bits, Ordering::AcqRel)
    }

    /// Back to zero, or to what was saved.
    pub fn set(&self, value: u8) {
        self.0.store(value, Ordering::Release);
    }
}

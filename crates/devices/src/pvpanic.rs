//! The port by which a guest's kernel tells that it has panicked (QEMU, docs/specs/pvpanic): Linux's driver is
//! `pvpanic-mmio`, which finds the port through ACPI.

use crate::bus::PortDevice;
use crate::power::{PowerEvent, PowerSink};

/// The guest has panicked, and does not go on.
const PANICKED: u8 = 1 << 0;
/// The guest has panicked, and another kernel in it writes a dump.
const CRASH_LOADED: u8 = 1 << 1;

/// Tells of panics.
#[derive(Debug)]
pub struct Pvpanic {
    power: PowerSink,
}

impl Pvpanic {
    /// A port that reports to `power`.
    pub fn new(power: PowerSink) -> Self {
        Self { power }
    }
}

impl PortDevice for Pvpanic {
    fn read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = PANICKED | CRASH_LOADED;
        }
    }
    fn write(&self, _offset: u16, data: &[u8]) {
        if let Some(&value) = data.first()
            && value & (PANICKED | CRASH_LOADED) != 0
        {
            self.power.send(PowerEvent::GuestPanic { crash_loaded: value & CRASH_LOADED != 0 });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::power::recorder;

    #[test]
    fn panics_are_told_and_other_bits_ignored() {
        let (power, events) = recorder();
        let port = Pvpanic::new(power);
        let mut able = [0xff; 2];
        port.read(0, &mut able);
        assert_eq!(able, [3, 0]);
        for value in [&[1][..], &[2], &[0x80], &[0], &[]] {
            port.write(0, value);
        }
        let expected = [false, true].map(|crash_loaded| PowerEvent::GuestPanic { crash_loaded });
        assert_eq!(*events.lock(), expected);
    }
}

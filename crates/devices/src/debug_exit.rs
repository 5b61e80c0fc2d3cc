//! The debug-exit port: lets a test guest end the process with a code of its choice.

use crate::bus::PortDevice;
use crate::power::{PowerEvent, PowerSink};

/// Ends the VM with `(value << 1) | 1` when the guest writes `value` to its port, so that a guest can never
/// report the code 0 of an orderly power-off. Only the low 8 bits of the code survive in a process's exit status.
#[derive(Debug)]
pub struct DebugExit {
    power: PowerSink,
}

impl DebugExit {
    /// A port that reports to `power`.
    pub fn new(power: PowerSink) -> Self {
        Self { power }
    }
}

impl PortDevice for DebugExit {
    fn read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(0);
    }
    fn write(&self, _offset: u16, data: &[u8]) {
        if let Some(&value) = data.first() {
            self.power.send(PowerEvent::DebugExit(value << 1 | 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::power::recorder;

    #[test]
    fn a_write_ends_the_vm_with_an_odd_code() {
        let (power, events) = recorder();
        let port = DebugExit::new(power);
        port.write(0, &[0]);
        port.write(0, &[0x10, 0, 0, 0]);
        port.write(0, &[0xff]);
        let codes = [1, 0x21, 0xff].map(PowerEvent::DebugExit);
        assert_eq!(*events.lock(), codes);
    }
}

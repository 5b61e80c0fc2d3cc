//! The I/O APIC: 24 inputs to interrupt messages (Intel 82093AA data sheet, order 290566), version 0x20 with the
//! EOI register of later chip sets (Intel ICH9 data sheet, 13.5).

use super::message::{DeliveryMode, Message};
use crate::bytes;

/// Inputs of the I/O APIC.
pub const PINS: u8 = 24;
/// Size of the register page in bytes.
pub const MMIO_SIZE: u64 = 0x1000;

const VERSION: u32 = 0x20 | (PINS as u32 - 1) << 16;
const MASKED: u64 = 1 << 16;
const LEVEL: u64 = 1 << 15;
const REMOTE_IRR: u64 = 1 << 14;
const LOGICAL: u64 = 1 << 11;
/// Vector, delivery mode, destination mode, polarity, trigger mode, mask and destination.
const WRITABLE: u64 = 0xff00_0000_0001_afff;

const IOREGSEL: u64 = 0x00;
const IOWIN: u64 = 0x10;
const EOI: u64 = 0x40;

const REG_ID: u8 = 0;
const REG_VERSION: u8 = 1;
const REG_ARBITRATION: u8 = 2;
const REG_REDIRECTION: u8 = 0x10;

/// A message that a pin sends.
pub type Sent = (u8, Message);

/// The registers. Operations give the messages that the caller must deliver, after it released its lock.
#[derive(Clone, Debug)]
pub struct IoApic {
    select: u8,
    id: u8,
    entries: [u64; PINS as usize],
    /// Inputs that are asserted, whatever their polarity.
    lines: u32,
}

impl Default for IoApic {
    fn default() -> Self {
        Self { select: 0, id: 0, entries: [MASKED; PINS as usize], lines: 0 }
    }
}

impl IoApic {
    /// Drives input `pin`; others than 0 to 23 are ignored.
    pub fn set_line(&mut self, pin: u8, level: bool) -> Option<Sent> {
        if pin >= PINS {
            return None;
        }
        let bit = 1 << pin;
        let was = self.lines & bit != 0;
        if !level {
            self.lines &= !bit;
            return None;
        }
        self.lines |= bit;
        match self.entries[usize::from(pin)] & LEVEL != 0 {
            true => self.service_level(pin),
            // An edge on a masked pin is lost.
            false if !was => self.send(pin),
            false => None,
        }
    }

    /// The end of the interrupt with `vector`, from a local APIC or the EOI register.
    pub fn end_of_interrupt(&mut self, vector: u8) -> Vec<Sent> {
        let mut sent = Vec::new();
        for pin in 0..PINS {
            let entry = &mut self.entries[usize::from(pin)];
            if *entry as u8 == vector && *entry & REMOTE_IRR != 0 {
                *entry &= !REMOTE_IRR;
                sent.extend(self.service_level(pin));
            }
        }
        sent
    }

    /// What `pin` sends, unless it is masked.
    pub fn message(&self, pin: u8) -> Option<Message> {
        (pin < PINS).then(|| self.send(pin)).flatten().map(|(_, message)| message)
    }

    /// No local APIC took the message of `pin`: no EOI will come for it.
    pub fn undelivered(&mut self, pin: u8) {
        if let Some(entry) = self.entries.get_mut(usize::from(pin)) {
            *entry &= !REMOTE_IRR;
        }
    }

    /// A load from the register page.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset & !3 {
            IOREGSEL => self.select.into(),
            IOWIN => self.register(self.select),
            _ => 0,
        };
        bytes::fill(data, value.into(), (offset & 3) as usize, 4);
    }

    /// A store to the register page. Only aligned ones are taken; the upper half of one of 8 bytes is dropped.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Vec<Sent> {
        let value = bytes::value(data) as u32;
        match offset {
            IOREGSEL => self.select = value as u8,
            IOWIN if data.len() >= 4 => return self.write_register(self.select, value).into_iter().collect(),
            EOI => return self.end_of_interrupt(value as u8),
            _ => (),
        }
        Vec::new()
    }

    fn register(&self, index: u8) -> u32 {
        match index {
            REG_ID | REG_ARBITRATION => u32::from(self.id) << 24,
            REG_VERSION => VERSION,
            _ => match index.checked_sub(REG_REDIRECTION) {
                Some(n) if n < 2 * PINS => {
                    let entry = self.entries[usize::from(n / 2)];
                    if n % 2 == 0 { entry as u32 } else { (entry >> 32) as u32 }
                }
                _ => u32::MAX,
            },
        }
    }

    fn write_register(&mut self, index: u8, value: u32) -> Option<Sent> {
        if index == REG_ID {
            self.id = (value >> 24) as u8 & 0xf;
            return None;
        }
        let n = index.checked_sub(REG_REDIRECTION).filter(|&n| n < 2 * PINS)?;
        let pin = n / 2;
        let entry = &mut self.entries[usize::from(pin)];
        let value = u64::from(value);
        let new = if n % 2 == 0 { *entry & !0xffff_ffff | value } else { *entry & 0xffff_ffff | value << 32 };
        *entry = *entry & REMOTE_IRR | new & WRITABLE;
        if *entry & LEVEL == 0 {
            // Remote IRR has no meaning for edges; kernels clear it so.
            *entry &= !REMOTE_IRR;
            return None;
        }
        self.service_level(pin)
    }

    fn service_level(&mut self, pin: u8) -> Option<Sent> {
        let entry = self.entries[usize::from(pin)];
        let asserted = self.lines >> pin & 1 != 0;
        if !asserted || entry & LEVEL == 0 || entry & REMOTE_IRR != 0 {
            return None;
        }
        let sent = self.send(pin)?;
        if matches!(sent.1.mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority) {
            self.entries[usize::from(pin)] |= REMOTE_IRR;
        }
        Some(sent)
    }

    fn send(&self, pin: u8) -> Option<Sent> {
        let entry = self.entries[usize::from(pin)];
        let message = Message {
            vector: entry as u8,
            mode: DeliveryMode::from_bits(entry >> 8),
            destination: (entry >> 56) as u32,
            logical: entry & LOGICAL != 0,
            wide: false,
            level: entry & LEVEL != 0,
        };
        (entry & MASKED == 0).then_some((pin, message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(apic: &mut IoApic, register: u8, value: u32) -> Vec<Sent> {
        apic.write(IOREGSEL, &[register, 0, 0, 0]);
        apic.write(IOWIN, &value.to_le_bytes())
    }
    fn get(apic: &mut IoApic, register: u8) -> u32 {
        apic.write(IOREGSEL, &[register]);
        let mut data = [0; 4];
        apic.read(IOWIN, &mut data);
        u32::from_le_bytes(data)
    }
    fn entry(apic: &mut IoApic, pin: u8, low: u32) -> Vec<Sent> {
        set(apic, REG_REDIRECTION + 2 * pin + 1, 0x0300_0000);
        set(apic, REG_REDIRECTION + 2 * pin, low)
    }

    #[test]
    fn an_edge_sends_one_message() {
        let mut apic = IoApic::default();
        assert_eq!(apic.set_line(4, true), None);
        entry(&mut apic, 4, 0x34);
        assert_eq!(apic.set_line(4, true), None);
        apic.set_line(4, false);
        let (pin, message) = apic.set_line(4, true).unwrap();
        assert_eq!((pin, message.vector, message.destination, message.level), (4, 0x34, 3, false));
        assert_eq!(apic.set_line(24, true), None);
    }

    #[test]
    fn a_level_waits_for_eoi_and_repeats_while_asserted() {
        let mut apic = IoApic::default();
        entry(&mut apic, 9, 0x8039);
        assert!(apic.set_line(9, true).unwrap().1.level);
        assert_eq!(apic.set_line(9, true), None);
        assert_eq!(get(&mut apic, 0x10 + 18), 0xc039);
        assert_eq!(apic.end_of_interrupt(0x38), []);
        assert_eq!(apic.end_of_interrupt(0x39).len(), 1);
        apic.set_line(9, false);
        assert_eq!(apic.write(EOI, &[0x39, 0, 0, 0]), []);
        assert_eq!(get(&mut apic, 0x10 + 18), 0x8039);
    }

    #[test]
    fn unmasking_an_asserted_level_sends_and_edge_mode_clears_remote_irr() {
        let mut apic = IoApic::default();
        entry(&mut apic, 16, 0x1_8040);
        assert_eq!(apic.set_line(16, true), None);
        assert_eq!(entry(&mut apic, 16, 0x8040).len(), 1);
        entry(&mut apic, 16, 0x1_0040);
        assert_eq!(get(&mut apic, 0x10 + 32), 0x1_0040);
        assert_eq!(entry(&mut apic, 16, 0x8040).len(), 1);
        apic.undelivered(16);
        assert_eq!(get(&mut apic, 0x10 + 32), 0x8040);
    }

    #[test]
    fn identification() {
        let mut apic = IoApic::default();
        set(&mut apic, REG_ID, 0x5fff_ffff);
        assert_eq!(get(&mut apic, REG_ID), 0x0f00_0000);
        assert_eq!(get(&mut apic, REG_VERSION), 0x0017_0020);
        assert_eq!(get(&mut apic, 0x40), u32::MAX);
    }
}

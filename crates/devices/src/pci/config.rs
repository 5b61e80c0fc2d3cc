//! A function's configuration space: type 0 header and capabilities (PCI Local Bus Specification 3.0, chapter 6).

use super::{BarRange, PciError};

/// Bytes that are kept; the extended space above reads as zero: no extended capabilities.
const SIZE: usize = 256;
const BARS: u8 = 6;

const VENDOR: usize = 0x00;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const HEADER_TYPE: usize = 0x0e;
const BAR0: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;
const HEADER_END: usize = 0x40;

const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_MASTER: u16 = 1 << 2;
const COMMAND_INTX_OFF: u16 = 1 << 10;
/// Memory, bus master, parity, SERR and INTx disable.
const COMMAND_WRITABLE: u16 = COMMAND_MEMORY | COMMAND_MASTER | 1 << 6 | 1 << 8 | COMMAND_INTX_OFF;
const STATUS_INTERRUPT: u8 = 1 << 3;
const STATUS_CAPABILITIES: u8 = 1 << 4;

/// What a BAR is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere; takes the next BAR too.
    Memory64,
    /// Memory anywhere whose reads have no side effects; takes the next BAR too.
    Prefetchable64,
}

impl BarKind {
    fn flags(self) -> u8 {
        match self {
            Self::Memory32 => 0,
            Self::Memory64 => 0x4,
            Self::Prefetchable64 => 0xc,
        }
    }
    fn is_64_bit(self) -> bool {
        self != Self::Memory32
    }
}

/// What a function is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FunctionIds {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Class, subclass and programming interface, in the low 24 bits.
    pub class: u32,
    /// Revision.
    pub revision: u8,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// A configuration space: bytes, and which bits of them the guest can write.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    bars: [Option<(BarKind, u64)>; BARS as usize],
    /// Where the link to the next capability goes.
    last_link: usize,
    /// Where the next capability goes.
    free: usize,
}

impl ConfigSpace {
    /// A type 0 header without BARs and capabilities.
    pub fn new(ids: FunctionIds) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            bars: [None; BARS as usize],
            last_link: CAPABILITIES,
            free: HEADER_END,
        };
        space.set(VENDOR, &ids.vendor.to_le_bytes());
        space.set(VENDOR + 2, &ids.device.to_le_bytes());
        space.set(REVISION, &(ids.class << 8 | u32::from(ids.revision)).to_le_bytes());
        space.set(SUBSYSTEM, &ids.subsystem_vendor.to_le_bytes());
        space.set(SUBSYSTEM + 2, &ids.subsystem.to_le_bytes());
        space.writable[COMMAND..COMMAND + 2].copy_from_slice(&COMMAND_WRITABLE.to_le_bytes());
        space.writable[INTERRUPT_LINE] = 0xff;
        space
    }

    /// Says that the device has more functions than this one.
    pub fn set_multifunction(&mut self) {
        self.bytes[HEADER_TYPE] |= 0x80;
    }

    /// Adds a memory BAR of `size` bytes.
    ///
    /// # Errors
    /// [`PciError::BadBar`] when `index` or `size` is not possible.
    pub fn add_bar(&mut self, index: u8, kind: BarKind, size: u64) -> Result<(), PciError> {
        let slots = usize::from(index)..usize::from(index) + if kind.is_64_bit() { 2 } else { 1 };
        let limit = if kind.is_64_bit() { 1 << 63 } else { 1 << 31 };
        let free = slots.end <= usize::from(BARS)
            && slots.clone().all(|slot| self.bars[slot].is_none() && self.bar_writable(slot) == 0);
        if !free || !size.is_power_of_two() || !(16..=limit).contains(&size) {
            return Err(PciError::BadBar { index, size });
        }
        let at = BAR0 + 4 * slots.start;
        self.bars[slots.start] = Some((kind, size));
        self.bytes[at] = kind.flags();
        let writable = (!(size - 1)).to_le_bytes();
        self.writable[at..at + 4 * slots.len()].copy_from_slice(&writable[..4 * slots.len()]);
        Ok(())
    }

    /// Adds a capability: `body` is what follows ID and link, `writable` which of its bits the guest can write
    /// (as long as `body`, or shorter: the rest is read-only). Gives its offset.
    ///
    /// # Errors
    /// [`PciError::NoRoom`] when it does not fit.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<u8, PciError> {
        let at = self.free;
        let len = body.len() + 2;
        if len > SIZE - at {
            return Err(PciError::NoRoom { len });
        }
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        for (mask, &bits) in self.writable[at + 2..at + len].iter_mut().zip(writable) {
            *mask = bits;
        }
        // Below 256: it fits.
        let offset = at as u8;
        self.bytes[self.last_link] = offset;
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        self.last_link = at + 1;
        self.free = (at + len).next_multiple_of(4);
        Ok(offset)
    }

    /// Says which pin interrupts: 0 for INTA# to 3 for INTD#; and what firmware would note as its interrupt.
    pub fn set_interrupt(&mut self, pin: u8, gsi: u8) {
        self.bytes[INTERRUPT_PIN] = pin + 1;
        self.bytes[INTERRUPT_LINE] = gsi;
    }

    /// Shows in the status register whether the function asserts its pin.
    pub fn set_interrupt_status(&mut self, asserted: bool) {
        self.bytes[STATUS] =
            self.bytes[STATUS] & !STATUS_INTERRUPT | if asserted { STATUS_INTERRUPT } else { 0 };
    }

    /// A load.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(usize::from(offset) + i).copied().unwrap_or(0);
        }
    }

    /// A store by the guest: read-only bits stay.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (i, &byte) in data.iter().enumerate() {
            let at = usize::from(offset) + i;
            if let (Some(old), Some(&mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *old = *old & !mask | byte & mask;
            }
        }
    }

    /// Changes bytes from the device's side, whatever is writable. Bytes past the end are dropped.
    pub fn set(&mut self, offset: usize, data: &[u8]) {
        for (byte, &new) in self.bytes.iter_mut().skip(offset).zip(data) {
            *byte = new;
        }
    }

    /// Whether the function may access memory and send MSIs.
    pub fn is_bus_master(&self) -> bool {
        self.command() & COMMAND_MASTER != 0
    }

    /// Whether the guest turned the interrupt pin off.
    pub fn is_intx_off(&self) -> bool {
        self.command() & COMMAND_INTX_OFF != 0
    }

    /// The BARs that are mapped now.
    pub fn bars(&self) -> Vec<BarRange> {
        if self.command() & COMMAND_MEMORY == 0 {
            return Vec::new();
        }
        (0..BARS)
            .filter_map(|bar| {
                let (kind, len) = self.bars[usize::from(bar)]?;
                let at = BAR0 + 4 * usize::from(bar);
                let mut bytes = [0; 8];
                let used = if kind.is_64_bit() { 8 } else { 4 };
                bytes[..used].copy_from_slice(&self.bytes[at..at + used]);
                let start = u64::from_le_bytes(bytes) & !0xf;
                // All ones is how the guest finds the size, zero that it was not placed yet.
                let top = if kind.is_64_bit() { u64::MAX } else { u32::MAX.into() };
                let placed = start != 0 && start.checked_add(len - 1).is_some_and(|last| last < top);
                placed.then_some(BarRange { bar, start, len })
            })
            .collect()
    }

    /// All bytes, to be saved.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Takes the bits that the guest can write from saved bytes; missing bytes stay as they are.
    pub fn restore(&mut self, bytes: &[u8]) {
        let len = bytes.len().min(SIZE);
        self.write(0, &bytes[..len]);
    }

    /// Back to the state after reset, as far as a function has one that is common to all: command, BARs and
    /// interrupt line.
    pub fn reset(&mut self) {
        self.bytes[COMMAND..COMMAND + 2].fill(0);
        for (at, mask) in (BAR0..).zip(self.writable[BAR0..BAR0 + 4 * usize::from(BARS)].iter()) {
            self.bytes[at] &= !mask;
        }
        self.set_interrupt_status(false);
    }

    fn command(&self) -> u16 {
        u16::from_le_bytes([self.bytes[COMMAND], self.bytes[COMMAND + 1]])
    }
    fn bar_writable(&self, slot: usize) -> u8 {
        // The highest byte of a BAR's mask has a bit set if the slot is in use, also as an upper half.
        self.writable[BAR0 + 4 * slot + 3]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        ConfigSpace::new(FunctionIds {
            vendor: 0x1af4,
            device: 0x1042,
            class: 0x01_8000,
            revision: 1,
            subsystem_vendor: 0x1af4,
            subsystem: 2,
        })
    }
    fn read(space: &ConfigSpace, offset: u16) -> u32 {
        let mut data = [0; 4];
        space.read(offset, &mut data);
        u32::from_le_bytes(data)
    }
    fn write(space: &mut ConfigSpace, offset: u16, value: u32) {
        space.write(offset, &value.to_le_bytes());
    }

    #[test]
    fn identity_cannot_be_written() {
        let mut space = space();
        write(&mut space, 0, u32::MAX);
        write(&mut space, 8, u32::MAX);
        assert_eq!(read(&space, 0), 0x1042_1af4);
        assert_eq!(read(&space, 8), 0x0180_0001);
        assert_eq!(read(&space, 0x2c), 0x0002_1af4);
        assert_eq!(read(&space, 0x100), 0);
    }

    #[test]
    fn bars_give_their_size_and_map_when_memory_is_on() {
        let mut space = space();
        space.add_bar(0, BarKind::Memory32, 0x1000).unwrap();
        space.add_bar(4, BarKind::Prefetchable64, 0x4000).unwrap();
        for offset in [0x10, 0x20, 0x24] {
            write(&mut space, offset, u32::MAX);
        }
        assert_eq!([0x10, 0x20, 0x24].map(|o| read(&space, o)), [0xffff_f000, 0xffff_c00c, u32::MAX]);
        write(&mut space, 4, 0x7);
        assert_eq!(space.bars(), []);
        write(&mut space, 0x10, 0xc000_0000);
        write(&mut space, 0x20, 0x0000_8000);
        write(&mut space, 0x24, 0x80);
        let expected = [(0, 0xc000_0000, 0x1000), (4, 0x80_0000_8000, 0x4000)];
        assert_eq!(space.bars(), expected.map(|(bar, start, len)| BarRange { bar, start, len }));
        assert!(space.is_bus_master());
        write(&mut space, 4, 0);
        assert_eq!(space.bars(), []);
        space.reset();
        assert_eq!(read(&space, 0x20), 0xc);
    }

    #[test]
    fn impossible_bars_are_refused() {
        let mut space = space();
        space.add_bar(1, BarKind::Memory64, 0x1000).unwrap();
        for (index, kind, size) in [
            (0, BarKind::Memory64, 0x1000),
            (1, BarKind::Memory32, 0x1000),
            (2, BarKind::Memory32, 0x1000),
            (5, BarKind::Memory64, 0x1000),
            (6, BarKind::Memory32, 0x1000),
            (255, BarKind::Memory32, 0x1000),
            (0, BarKind::Memory32, 8),
            (0, BarKind::Memory32, 0x1800),
            (0, BarKind::Memory32, 1 << 32),
        ] {
            assert_eq!(space.add_bar(index, kind, size), Err(PciError::BadBar { index, size }));
        }
    }

    #[test]
    fn capabilities_are_linked() {
        let mut space = space();
        assert_eq!(space.add_capability(0x11, &[1, 2, 3], &[0xff]), Ok(0x40));
        assert_eq!(space.add_capability(0x09, &[0; 14], &[]), Ok(0x48));
        assert_eq!(read(&space, 0x34) & 0xff, 0x40);
        assert_eq!(read(&space, 0x40), 0x0201_4811);
        assert_eq!(read(&space, 0x48) & 0xffff, 0x0009);
        assert_eq!(read(&space, 4) >> 16, 0x10);
        write(&mut space, 0x40, u32::MAX);
        assert_eq!(read(&space, 0x40), 0x02ff_4811);
        assert_eq!(space.add_capability(0x09, &[0; 170], &[]), Err(PciError::NoRoom { len: 172 }));
    }
}

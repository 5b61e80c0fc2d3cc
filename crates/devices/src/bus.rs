//! The bus: which device answers at which port and guest physical address.

use std::sync::Arc;

use berth_engine::Bus;
use berth_memory::GuestPhysAddr;
use tracing::trace;

/// A device with I/O ports. Locks inside: called from several vCPU threads at once.
pub trait PortDevice: Send + Sync {
    /// IN from the port `offset` after the first: fills all of `data`, which lies within the device's range.
    fn read(&self, offset: u16, data: &mut [u8]);
    /// OUT to the port `offset` after the first.
    fn write(&self, offset: u16, data: &[u8]);
}

/// A device with memory-mapped registers. Locks inside: called from several vCPU threads at once.
pub trait MmioDevice: Send + Sync {
    /// A load `offset` bytes into the device: fills all of `data`, which lies within the device's range.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// A store `offset` bytes into the device.
    fn write(&self, offset: u64, data: &[u8]);
    /// Who answers `offset` bytes into the device, where it only leads to others; `None`: the device itself.
    fn leads_to(&self, offset: u64) -> Option<MmioRange> {
        let _ = offset;
        None
    }
}

/// A range of guest physical addresses that a device answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MmioRange {
    /// The device, for people.
    pub name: String,
    /// First guest physical address.
    pub start: GuestPhysAddr,
    /// Length in bytes.
    pub len: u64,
}

/// Why a device cannot be put on the bus.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// The range shares addresses with another device.
    #[error("{name} at {start:#x} for {len:#x} overlaps {other} at {other_start:#x}")]
    Overlap {
        /// The new device.
        name: &'static str,
        /// Its first port or address.
        start: u64,
        /// Its length.
        len: u64,
        /// The device that is already there.
        other: &'static str,
        /// First port or address of that device.
        other_start: u64,
    },
    /// The range is empty or goes past the end of the address space.
    #[error("{name} at {start:#x} for {len:#x} is not a range of the address space")]
    BadRange {
        /// The new device.
        name: &'static str,
        /// Its first port or address.
        start: u64,
        /// Its length.
        len: u64,
    },
}

struct Entry<D: ?Sized> {
    start: u64,
    last: u64,
    name: &'static str,
    device: Arc<D>,
}

/// Ranges in ascending order, without overlap.
struct Ranges<D: ?Sized>(Vec<Entry<D>>);

impl<D: ?Sized> Ranges<D> {
    fn insert(
        &mut self,
        start: u64,
        len: u64,
        max: u64,
        name: &'static str,
        device: Arc<D>,
    ) -> Result<(), BusError> {
        let bad = BusError::BadRange { name, start, len };
        let last = len.checked_sub(1).and_then(|l| start.checked_add(l));
        let Some(last) = last.filter(|&l| l <= max) else { return Err(bad) };
        let at = self.0.partition_point(|e| e.last < start);
        if let Some(other) = self.0.get(at).filter(|e| e.start <= last) {
            let (other, other_start) = (other.name, other.start);
            return Err(BusError::Overlap { name, start, len, other, other_start });
        }
        self.0.insert(at, Entry { start, last, name, device });
        Ok(())
    }

    fn find(&self, address: u64) -> Option<&Entry<D>> {
        self.0.get(self.0.partition_point(|e| e.last < address)).filter(|e| e.start <= address)
    }

    /// Splits an access of `len` bytes at the ends of devices, and calls `part` with the device (or `None`), the
    /// offset in it, and the bytes of the access.
    fn split(&self, address: u64, len: usize, mut part: impl FnMut(Option<&D>, u64, std::ops::Range<usize>)) {
        let mut done = 0;
        while done < len {
            let at = address.wrapping_add(done as u64);
            match self.find(at) {
                Some(e) => {
                    let left = usize::try_from(e.last - at).unwrap_or(usize::MAX).saturating_add(1);
                    let end = done.saturating_add(left).min(len);
                    part(Some(&e.device), at - e.start, done..end);
                    done = end;
                }
                None => {
                    part(None, at, done..done + 1);
                    done += 1;
                }
            }
        }
    }
}

/// The port and memory-mapped devices of one VM. Devices are registered first; after that it does not change, so
/// accesses take no lock here.
pub struct MachineBus {
    ports: Ranges<dyn PortDevice>,
    mmio: Ranges<dyn MmioDevice>,
}

impl Default for MachineBus {
    fn default() -> Self {
        Self { ports: Ranges(Vec::new()), mmio: Ranges(Vec::new()) }
    }
}

impl MachineBus {
    /// A bus without devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `device` at `len` ports from `start` on. `name` is for messages.
    ///
    /// # Errors
    /// [`BusError`] when the range is impossible or taken.
    pub fn register_ports(
        &mut self,
        start: u16,
        len: u16,
        name: &'static str,
        device: Arc<dyn PortDevice>,
    ) -> Result<(), BusError> {
        self.ports.insert(start.into(), len.into(), 0xffff, name, device)
    }

    /// Puts `device` at `len` bytes from guest physical `start` on. `name` is for messages.
    ///
    /// # Errors
    /// [`BusError`] when the range is impossible or taken.
    pub fn register_mmio(
        &mut self,
        start: GuestPhysAddr,
        len: u64,
        name: &'static str,
        device: Arc<dyn MmioDevice>,
    ) -> Result<(), BusError> {
        self.mmio.insert(start.0, len, u64::MAX, name, device)
    }

    /// Who answers loads and stores at `at`.
    pub fn mmio_at(&self, at: GuestPhysAddr) -> Option<MmioRange> {
        let entry = self.mmio.find(at.0)?;
        Some(entry.device.leads_to(at.0 - entry.start).unwrap_or_else(|| MmioRange {
            name: entry.name.to_owned(),
            start: GuestPhysAddr(entry.start),
            len: (entry.last - entry.start).saturating_add(1),
        }))
    }
}

impl Bus for MachineBus {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        self.ports.split(port.into(), data.len(), |device, offset, part| match device {
            Some(device) => device.read(offset as u16, &mut data[part]),
            None => {
                trace!("read of port {offset:#x}: no device");
                data[part].fill(0xff);
            }
        });
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        self.ports.split(port.into(), data.len(), |device, offset, part| match device {
            Some(device) => device.write(offset as u16, &data[part]),
            None => trace!("write of {:02x?} to port {offset:#x}: no device", &data[part]),
        });
    }

    fn mmio_read(&self, addr: GuestPhysAddr, data: &mut [u8]) {
        self.mmio.split(addr.0, data.len(), |device, offset, part| match device {
            Some(device) => device.read(offset, &mut data[part]),
            None => {
                trace!("load from {offset:#x}: no device");
                data[part].fill(0xff);
            }
        });
    }

    fn mmio_write(&self, addr: GuestPhysAddr, data: &[u8]) {
        self.mmio.split(addr.0, data.len(), |device, offset, part| match device {
            Some(device) => device.write(offset, &data[part]),
            None => trace!("store of {:02x?} to {offset:#x}: no device", &data[part]),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;

    /// Reads give the offset of each byte; writes are kept.
    #[derive(Default)]
    struct Probe(Mutex<Vec<(u64, Vec<u8>)>>);
    impl PortDevice for Probe {
        fn read(&self, offset: u16, data: &mut [u8]) {
            data.iter_mut().enumerate().for_each(|(i, b)| *b = offset as u8 + i as u8);
        }
        fn write(&self, offset: u16, data: &[u8]) {
            self.0.lock().push((offset.into(), data.to_vec()));
        }
    }
    impl MmioDevice for Probe {
        fn read(&self, offset: u64, data: &mut [u8]) {
            PortDevice::read(self, offset as u16, data);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn accesses_reach_the_device_that_has_the_address() {
        let (a, b) = (Arc::new(Probe::default()), Arc::new(Probe::default()));
        let mut bus = MachineBus::new();
        bus.register_ports(0x70, 2, "b", b.clone()).unwrap();
        bus.register_ports(0x60, 4, "a", a.clone()).unwrap();
        bus.port_write(0x61, &[7]);
        bus.port_write(0x70, &[1, 2]);
        assert_eq!(*a.0.lock(), [(1, vec![7])]);
        assert_eq!(*b.0.lock(), [(0, vec![1, 2])]);
    }

    #[test]
    fn an_access_is_split_where_devices_end_and_holes_read_as_ones() {
        let mut bus = MachineBus::new();
        bus.register_mmio(GuestPhysAddr(0x1000), 2, "low", Arc::new(Probe::default())).unwrap();
        bus.register_mmio(GuestPhysAddr(0x1004), 0x10, "high", Arc::new(Probe::default())).unwrap();
        let mut data = [0x55; 8];
        bus.mmio_read(GuestPhysAddr(0x1000), &mut data);
        assert_eq!(data, [0, 1, 0xff, 0xff, 0, 1, 2, 3]);
        let mut data = [0; 4];
        bus.port_read(0xffff, &mut data);
        assert_eq!(data, [0xff; 4]);
        let who = |at| bus.mmio_at(GuestPhysAddr(at)).map(|r| (r.name, r.start.0, r.len));
        assert_eq!(who(0x1013), Some(("high".to_owned(), 0x1004, 0x10)));
        assert_eq!([who(0x1002), who(0x1014)], [None, None]);
    }

    #[test]
    fn overlapping_and_impossible_ranges_are_refused() {
        let mut bus = MachineBus::new();
        let probe = Arc::new(Probe::default());
        bus.register_ports(0x100, 8, "first", probe.clone()).unwrap();
        for (start, len) in [(0x100, 8), (0xff, 2), (0x107, 1), (0x80, 0x200), (0x102, 2)] {
            let e = bus.register_ports(start, len, "second", probe.clone()).unwrap_err();
            assert!(matches!(e, BusError::Overlap { other: "first", other_start: 0x100, .. }), "{e}");
        }
        assert!(bus.register_ports(0xffff, 2, "end", probe.clone()).is_err());
        assert!(bus.register_ports(0x10, 0, "empty", probe.clone()).is_err());
        bus.register_ports(0x108, 1, "after", probe.clone()).unwrap();
        bus.register_mmio(GuestPhysAddr(u64::MAX), 1, "last", probe.clone()).unwrap();
        assert!(bus.register_mmio(GuestPhysAddr(u64::MAX), 2, "wraps", probe).is_err());
    }
}

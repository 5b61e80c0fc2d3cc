//! The host bridge at 00:00.0: only an identity, so that guests see that there is a bus.

use parking_lot::Mutex;

use super::{BarRange, ConfigSpace, FunctionIds, PciFunction};

/// The PCI ID repository's "QEMU PCIe Host bridge" of Red Hat: a generic bridge without registers of its own.
const IDS: FunctionIds = FunctionIds {
    vendor: 0x1b36,
    device: 0x0008,
    class: 0x06_0000,
    revision: 0,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

/// The host bridge.
#[derive(Debug)]
pub struct HostBridge(Mutex<ConfigSpace>);

impl Default for HostBridge {
    fn default() -> Self {
        Self(Mutex::new(ConfigSpace::new(IDS)))
    }
}

impl PciFunction for HostBridge {
    fn name(&self) -> String {
        "PCI host bridge".to_owned()
    }
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.0.lock().read(offset, data);
    }
    fn config_write(&self, offset: u16, data: &[u8]) {
        self.0.lock().write(offset, data);
    }
    fn bars(&self) -> Vec<BarRange> {
        Vec::new()
    }
    fn bar_read(&self, _bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn bar_write(&self, _bar: u8, _offset: u64, _data: &[u8]) {}
}

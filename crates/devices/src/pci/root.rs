//! The root of PCI: finds functions and BARs for accesses, and the reset control register among its ports.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use berth_memory::GuestPhysAddr;
use berth_memory::layout::{
    PCI_ECAM_SIZE, PCI_ECAM_START, PCI_MMIO32_SIZE, PCI_MMIO32_START, PCI_MMIO64_SIZE, PCI_MMIO64_START,
    ports,
};
use parking_lot::{Mutex, RwLock};

use super::{BarRange, HostBridge, PciError, PciFunction};
use crate::bus::{BusError, MachineBus, MmioDevice, MmioRange, PortDevice};
use crate::bytes;
use crate::power::{PowerEvent, PowerSink};

/// The configuration mechanism's first port: address; the data is 4 further.
const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_PORTS: u16 = 8;
const CONFIG_DATA: u16 = 4;
const RESET_OFFSET: u16 = ports::RESET - CONFIG_ADDRESS;
const ADDRESS_ENABLE: u32 = 1 << 31;
/// Reset control: bits that read back: kind of reset.
const RESET_KEPT: u8 = 0x0a;
/// Reset control: resets.
const RESET_CPU: u8 = 1 << 2;

/// log2 of a function's share of ECAM.
const ECAM_SHIFT: u32 = 12;
const FUNCTION_SPACE: u64 = 1 << ECAM_SHIFT;
/// Configuration registers whose writes may move BARs.
const COMMAND: Range<u16> = 4..6;
const BARS: Range<u16> = 0x10..0x28;

/// A function's place: bus in bits 8 to 15, device in 3 to 7, function in 0 to 2.
type Address = u16;

struct Window {
    range: BarRange,
    function: Arc<dyn PciFunction>,
}

#[derive(Default)]
struct PortRegisters {
    address: u32,
    reset: u8,
}

/// The root with its functions, all on bus 0.
///
/// Lock order: `windows` may be held while a function is asked for its BARs; nothing is held while a function is
/// accessed.
pub struct PciRoot {
    functions: RwLock<BTreeMap<Address, Arc<dyn PciFunction>>>,
    /// Mapped BARs. Where the guest lets two overlap, the first is accessed.
    windows: RwLock<Vec<Arc<Window>>>,
    registers: Mutex<PortRegisters>,
    power: PowerSink,
}

impl PciRoot {
    /// A bus with the host bridge at 00:00.0 and nothing else. `power` is asked when the reset control register
    /// is written.
    pub fn new(power: PowerSink) -> Arc<Self> {
        let bridge: Arc<dyn PciFunction> = Arc::new(HostBridge::default());
        Arc::new(Self {
            functions: RwLock::new(BTreeMap::from([(0, bridge)])),
            windows: RwLock::default(),
            registers: Mutex::default(),
            power,
        })
    }

    /// Puts a function at 00:`device`.`function`.
    ///
    /// # Errors
    /// [`PciError`] when there is no such place, or it is taken.
    pub fn add(&self, device: u8, function: u8, pci: Arc<dyn PciFunction>) -> Result<(), PciError> {
        if device > 31 || function > 7 {
            return Err(PciError::BadAddress { device, function });
        }
        let address = u16::from(device) << 3 | u16::from(function);
        let mut functions = self.functions.write();
        if functions.contains_key(&address) {
            return Err(PciError::Taken { device, function });
        }
        functions.insert(address, pci);
        drop(functions);
        self.map_bars();
        Ok(())
    }

    /// Puts the configuration ports with the reset control register, ECAM and the BAR windows on the bus.
    ///
    /// # Errors
    /// [`BusError`] when the addresses are taken.
    pub fn register(self: &Arc<Self>, bus: &mut MachineBus) -> Result<(), BusError> {
        bus.register_ports(CONFIG_ADDRESS, CONFIG_PORTS, "PCI configuration", Arc::new(Ports(self.clone())))?;
        bus.register_mmio(PCI_ECAM_START, PCI_ECAM_SIZE, "PCI ECAM", Arc::new(Ecam(self.clone())))?;
        for (base, size) in [(PCI_MMIO32_START, PCI_MMIO32_SIZE), (PCI_MMIO64_START, PCI_MMIO64_SIZE)] {
            let window = Arc::new(BarWindow { root: self.clone(), base });
            bus.register_mmio(base, size, "PCI memory window", window)?;
        }
        Ok(())
    }

    /// The ports' registers back to the state after reset. Functions are reset by who made them; after that this
    /// finds their BARs unmapped.
    pub fn reset(&self) {
        *self.registers.lock() = PortRegisters::default();
        self.map_bars();
    }

    fn function(&self, address: u64) -> Option<Arc<dyn PciFunction>> {
        let address = Address::try_from(address).ok()?;
        self.functions.read().get(&address).cloned()
    }

    /// `offset` is into ECAM.
    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let register = offset % FUNCTION_SPACE;
        // An access does not run on into the next function.
        let within = data.len().min((FUNCTION_SPACE - register) as usize);
        let (data, beyond) = data.split_at_mut(within);
        beyond.fill(0xff);
        match self.function(offset >> ECAM_SHIFT) {
            Some(function) => function.config_read(register as u16, data),
            None => data.fill(0xff),
        }
    }

    fn config_write(&self, offset: u64, data: &[u8]) {
        let register = (offset % FUNCTION_SPACE) as u16;
        let within = data.len().min(usize::from(FUNCTION_SPACE as u16 - register));
        let Some(function) = self.function(offset >> ECAM_SHIFT) else { return };
        function.config_write(register, &data[..within]);
        let written = register..register + within as u16;
        let touches = |r: &Range<u16>| written.start < r.end && r.start < written.end;
        if touches(&COMMAND) || touches(&BARS) {
            self.map_bars();
        }
    }

    fn map_bars(&self) {
        // Taken first, so that of two writers the later one's look at the functions counts.
        let mut windows = self.windows.write();
        let functions: Vec<_> = self.functions.read().values().cloned().collect();
        windows.clear();
        for function in functions {
            for range in function.bars() {
                windows.push(Arc::new(Window { range, function: function.clone() }));
            }
        }
    }

    /// The BAR at `address`, and how far into it that is.
    fn window(&self, address: u64) -> Option<(Arc<Window>, u64)> {
        self.windows.read().iter().find_map(|window| {
            let offset = address.checked_sub(window.range.start).filter(|&o| o < window.range.len)?;
            Some((window.clone(), offset))
        })
    }
}

/// CF8 to CFF.
struct Ports(Arc<PciRoot>);

impl Ports {
    /// Where in ECAM an access at `offset` of the data port goes.
    fn target(&self, offset: u16) -> Option<u64> {
        let address = self.0.registers.lock().address;
        let function = u64::from(address >> 8 & 0xffff);
        let register = u64::from(address & 0xfc) + u64::from(offset - CONFIG_DATA);
        (address & ADDRESS_ENABLE != 0).then_some(function << ECAM_SHIFT | register)
    }
}

impl PortDevice for Ports {
    fn read(&self, offset: u16, data: &mut [u8]) {
        if offset >= CONFIG_DATA {
            match self.target(offset) {
                Some(target) => self.0.config_read(target, data),
                None => data.fill(0xff),
            }
            return;
        }
        let registers = self.0.registers.lock();
        match (offset, data.len()) {
            (0, 4..) => bytes::fill(data, registers.address.into(), 0, 4),
            (RESET_OFFSET, 1) => data.fill(registers.reset),
            _ => data.fill(0xff),
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        if offset >= CONFIG_DATA {
            if let Some(target) = self.target(offset) {
                self.0.config_write(target, data);
            }
            return;
        }
        match (offset, data) {
            (0, [_, _, _, _, ..]) => self.0.registers.lock().address = bytes::value(data) as u32,
            (RESET_OFFSET, &[value]) => {
                self.0.registers.lock().reset = value & RESET_KEPT;
                if value & RESET_CPU != 0 {
                    self.0.power.send(PowerEvent::Reset);
                }
            }
            _ => (),
        }
    }
}

struct Ecam(Arc<PciRoot>);

impl MmioDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.config_read(offset, data);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.0.config_write(offset, data);
    }
}

struct BarWindow {
    root: Arc<PciRoot>,
    base: GuestPhysAddr,
}

impl MmioDevice for BarWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.root.window(self.base.0 + offset) {
            Some((window, offset)) => {
                let within = data.len().min((window.range.len - offset) as usize);
                let (data, beyond) = data.split_at_mut(within);
                beyond.fill(0xff);
                window.function.bar_read(window.range.bar, offset, data);
            }
            None => data.fill(0xff),
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((window, offset)) = self.root.window(self.base.0 + offset) {
            let within = data.len().min((window.range.len - offset) as usize);
            window.function.bar_write(window.range.bar, offset, &data[..within]);
        }
    }
    fn leads_to(&self, offset: u64) -> Option<MmioRange> {
        let (window, _) = self.root.window(self.base.0 + offset)?;
        let BarRange { bar, start, len } = window.range;
        let name = format!("{}, BAR {bar}", window.function.name());
        Some(MmioRange { name, start: GuestPhysAddr(start), len })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::{BarKind, ConfigSpace, FunctionIds};
    use crate::power::recorder;
    use berth_engine::Bus;

    /// One BAR that is plain memory.
    struct Ram {
        config: Mutex<ConfigSpace>,
        memory: Mutex<[u8; 4096]>,
    }
    impl Ram {
        fn new() -> Arc<Self> {
            let mut config = ConfigSpace::new(FunctionIds { vendor: 0x1234, ..FunctionIds::default() });
            config.add_bar(0, BarKind::Memory32, 4096).unwrap();
            Arc::new(Self { config: Mutex::new(config), memory: Mutex::new([0; 4096]) })
        }
    }
    impl PciFunction for Ram {
        fn name(&self) -> String {
            "memory".to_owned()
        }
        fn config_read(&self, offset: u16, data: &mut [u8]) {
            self.config.lock().read(offset, data);
        }
        fn config_write(&self, offset: u16, data: &[u8]) {
            self.config.lock().write(offset, data);
        }
        fn bars(&self) -> Vec<BarRange> {
            self.config.lock().bars()
        }
        fn bar_read(&self, _bar: u8, offset: u64, data: &mut [u8]) {
            let at = offset as usize;
            data.copy_from_slice(&self.memory.lock()[at..at + data.len()]);
        }
        fn bar_write(&self, _bar: u8, offset: u64, data: &[u8]) {
            let at = offset as usize;
            self.memory.lock()[at..at + data.len()].copy_from_slice(data);
        }
    }

    fn machine() -> (MachineBus, Arc<PciRoot>, Arc<Mutex<Vec<PowerEvent>>>) {
        let (power, events) = recorder();
        let root = PciRoot::new(power);
        let mut bus = MachineBus::new();
        root.register(&mut bus).unwrap();
        (bus, root, events)
    }
    fn ecam(device: u64, register: u64) -> GuestPhysAddr {
        PCI_ECAM_START + (device << 15 | register)
    }
    fn read(bus: &MachineBus, address: GuestPhysAddr) -> u32 {
        let mut data = [0; 4];
        bus.mmio_read(address, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn both_mechanisms_find_the_host_bridge_and_nothing_else() {
        let (bus, ..) = machine();
        assert_eq!(read(&bus, ecam(0, 0)), 0x0008_1b36);
        assert_eq!(read(&bus, ecam(1, 0)), u32::MAX);
        assert_eq!(read(&bus, PCI_ECAM_START + 0xfff_f000), u32::MAX);
        let by_port = |address: u32, offset: u16| {
            bus.port_write(0xcf8, &address.to_le_bytes());
            let mut data = [0; 2];
            bus.port_read(0xcfc + offset, &mut data);
            u16::from_le_bytes(data)
        };
        assert_eq!(by_port(0x8000_0000, 2), 0x0008);
        assert_eq!(by_port(0x8000_0008, 2), 0x0600);
        assert_eq!(by_port(0x8001_0000, 0), 0xffff);
        assert_eq!(by_port(0x0000_0000, 0), 0xffff);
        let mut address = [0; 4];
        bus.port_read(0xcf8, &mut address);
        assert_eq!(address, [0; 4]);
    }

    #[test]
    fn bars_follow_the_guest() {
        let (bus, root, _) = machine();
        root.add(3, 0, Ram::new()).unwrap();
        bus.mmio_write(ecam(3, 0x10), &0xc123_4000_u32.to_le_bytes());
        assert_eq!(read(&bus, GuestPhysAddr(0xc123_4000)), u32::MAX);
        bus.mmio_write(ecam(3, 4), &[2, 0]);
        bus.mmio_write(GuestPhysAddr(0xc123_4ffc), &[1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(read(&bus, GuestPhysAddr(0xc123_4ffe)), 0xffff_0403);
        bus.mmio_write(ecam(3, 0x10), &0xc000_0000_u32.to_le_bytes());
        assert_eq!(read(&bus, GuestPhysAddr(0xc000_0ffc)), 0x0403_0201);
        let there =
            MmioRange { name: "memory, BAR 0".to_owned(), start: GuestPhysAddr(0xc000_0000), len: 4096 };
        assert_eq!(bus.mmio_at(GuestPhysAddr(0xc000_0ffc)), Some(there));
        assert_eq!(bus.mmio_at(GuestPhysAddr(0xc000_1000)).unwrap().name, "PCI memory window");
        assert_eq!(read(&bus, GuestPhysAddr(0xc123_4ffc)), u32::MAX);
    }

    #[test]
    fn places_are_checked() {
        let (_bus, root, _) = machine();
        assert_eq!(root.add(0, 0, Ram::new()), Err(PciError::Taken { device: 0, function: 0 }));
        assert_eq!(root.add(32, 0, Ram::new()), Err(PciError::BadAddress { device: 32, function: 0 }));
        assert_eq!(root.add(31, 8, Ram::new()), Err(PciError::BadAddress { device: 31, function: 8 }));
        assert_eq!(root.add(31, 7, Ram::new()), Ok(()));
    }

    #[test]
    fn the_reset_register_lies_inside_the_configuration_address() {
        let (bus, _, events) = machine();
        bus.port_write(0xcf8, &0x8000_0600_u32.to_le_bytes());
        bus.port_write(0xcf9, &[0x02]);
        assert!(events.lock().is_empty());
        bus.port_write(ports::RESET, &[ports::RESET_VALUE]);
        assert_eq!(*events.lock(), [PowerEvent::Reset]);
        let mut value = [0];
        bus.port_read(0xcf9, &mut value);
        assert_eq!(value, [0x02]);
    }
}

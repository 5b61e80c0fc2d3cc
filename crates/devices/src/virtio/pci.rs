//! A virtio device as a PCI function (virtio 1.2, 4.1).
//!
//! ```text
//!   BAR 0   0x0000 common configuration   0x2000 device configuration   0x4000 MSI-X table
//!           0x1000 ISR status             0x3000 notifications          0x5000 MSI-X pending bits
//! ```

use std::sync::Arc;

use berth_memory::GuestPhysAddr;
use berth_memory::layout::ports::PCI_INTX_GSI;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::device::read_config_bytes;
use super::doorbells::Doorbells;
use super::msix::{ENTRY_SIZE, InterruptState, Interrupts};
use super::queue::Link;
use super::status::Status;
use super::transport::{COMMON_SIZE, Transport, TransportError, TransportState};
use super::{DeviceState, Dma, StateError, VirtioDevice};
use crate::irq::{IrqLine, MsiSink};
use crate::pci::{BarKind, BarRange, ConfigSpace, FunctionIds, PciError, PciFunction};

const VENDOR: u16 = 0x1af4;
/// Device ID of kind 0 (virtio 1.2, 4.1.2.1).
const FIRST_DEVICE: u16 = 0x1040;
/// Modern only.
const REVISION: u8 = 1;

const BAR: u8 = 0;
const BAR_SIZE: u64 = 0x8000;
const PAGE: u64 = 0x1000;
const COMMON: u64 = 0;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x5000;
/// Bytes between the notification registers of two queues.
const NOTIFY_STEP: u32 = 4;

// Kinds of structures (virtio 1.2, 4.1.4).
const CAP_COMMON: u8 = 1;
const CAP_NOTIFY: u8 = 2;
const CAP_ISR: u8 = 3;
const CAP_DEVICE: u8 = 4;
const CAP_WINDOW: u8 = 5;
const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;
/// Offset of message control in the MSI-X capability, and its bits.
const MSIX_CONTROL: u8 = 2;
const MSIX_ENABLE: u16 = 1 << 15;
const MSIX_MASK: u16 = 1 << 14;
/// In the window of virtio 1.2, 4.1.4.9: BAR, offset, length and data.
const WINDOW_BAR: u8 = 4;
const WINDOW_DATA: u8 = 16;

/// Why a device cannot be put on PCI.
#[derive(Debug, thiserror::Error)]
pub enum VirtioPciError {
    /// The configuration space.
    #[error("internal error: {0}")]
    Pci(#[from] PciError),
    /// The queues.
    #[error(transparent)]
    Transport(#[from] TransportError),
}

/// What a function is wired to.
pub struct PciWiring {
    /// Guest memory.
    pub dma: Dma,
    /// Where messages go.
    pub msi: Arc<dyn MsiSink>,
    /// The function's interrupt pin.
    pub line: IrqLine,
}

/// A virtio device on PCI.
pub struct VirtioPci {
    device: Arc<dyn VirtioDevice>,
    link: Arc<Link>,
    config: Mutex<ConfigSpace>,
    msix_capability: u8,
    window_capability: u8,
    /// Taken before the locks of interrupts and queues.
    transport: Mutex<Transport>,
    doorbells: Doorbells,
}

impl VirtioPci {
    /// Puts `device` on PCI. `name` is for messages.
    ///
    /// # Errors
    /// [`VirtioPciError`].
    pub fn new(device: Arc<dyn VirtioDevice>, name: &str, wiring: PciWiring) -> Result<Self, VirtioPciError> {
        let queues = device.queue_sizes().len();
        let mut config = config_space(device.as_ref())?;
        let pin_gsi = wiring.line.irq();
        // Devices have one function each, which has pin A.
        config.set_interrupt(0, pin_gsi.max(PCI_INTX_GSI));
        config.add_bar(BAR, BarKind::Memory32, BAR_SIZE)?;
        let interrupts = Interrupts::new(queues, wiring.line, wiring.msi);
        let vectors = interrupts.vectors() as u16;
        let mut msix = Vec::new();
        msix.extend((vectors - 1).to_le_bytes());
        msix.extend((TABLE as u32 | u32::from(BAR)).to_le_bytes());
        msix.extend((PENDING as u32 | u32::from(BAR)).to_le_bytes());
        let writable = (MSIX_ENABLE | MSIX_MASK).to_le_bytes();
        let msix_capability = config.add_capability(CAPABILITY_MSIX, &msix, &writable)?;
        for (kind, offset, len) in
            [(CAP_COMMON, COMMON, COMMON_SIZE as u64), (CAP_ISR, ISR, 1), (CAP_DEVICE, DEVICE, PAGE)]
        {
            config.add_capability(CAPABILITY_VENDOR, &structure(kind, offset, len, &[]), &[])?;
        }
        let notify_len = queues as u64 * u64::from(NOTIFY_STEP);
        let notify = structure(CAP_NOTIFY, NOTIFY, notify_len, &NOTIFY_STEP.to_le_bytes());
        config.add_capability(CAPABILITY_VENDOR, &notify, &[])?;
        let window = structure(CAP_WINDOW, 0, 0, &[0; 4]);
        // BAR, offset, length and data: all but the kind and the padding.
        let writable = [&[0, 0, 0xff, 0, 0, 0][..], &[0xff; 12]].concat();
        let window_capability = config.add_capability(CAPABILITY_VENDOR, &window, &writable)?;

        let link = Arc::new(Link { name: name.to_owned(), status: Status::default(), interrupts });
        let transport = Transport::new(device.clone(), link.clone(), wiring.dma.clone())?;
        let doorbells = Doorbells::new(transport.doorbells(), wiring.dma, NOTIFY_STEP.into());
        let (config, transport) = (Mutex::new(config), Mutex::new(transport));
        Ok(Self { device, link, config, msix_capability, window_capability, transport, doorbells })
    }

    /// Back to the state after power-up.
    pub fn reset(&self) {
        self.transport.lock().reset();
        let mut config = self.config.lock();
        config.reset();
        self.place_doorbells(&config);
        config.set(usize::from(self.msix_capability + MSIX_CONTROL) + 1, &[0]);
        self.link.interrupts.reset();
    }

    /// Stops the device's threads; every request that was begun is done when it returns.
    pub fn pause(&self) {
        self.transport.lock().stop();
    }

    /// Goes on after [`Self::pause`] or [`Self::restore`].
    pub fn resume(&self) {
        self.transport.lock().resume();
    }

    /// All that the guest can tell, after [`Self::pause`].
    pub fn state(&self) -> VirtioPciState {
        VirtioPciState {
            version: STATE_VERSION,
            transport: self.transport.lock().state(),
            interrupts: self.link.interrupts.state(),
            config: self.config.lock().bytes().to_vec(),
            device: self.device.state(),
        }
    }

    /// Takes what [`Self::state`] gave of a device that was made from the same description.
    ///
    /// # Errors
    /// [`StateError`] when it does not fit; the device is in no good state then.
    pub fn restore(&self, state: &VirtioPciState) -> Result<(), StateError> {
        let bad = |reason: String| StateError { device: self.link.name.clone(), reason };
        if state.version != STATE_VERSION {
            return Err(bad(format!(
                "it has version {}, and this Berth reads {STATE_VERSION}",
                state.version
            )));
        }
        self.transport.lock().restore(&state.transport).map_err(bad)?;
        if !self.link.interrupts.restore(&state.interrupts) {
            return Err(bad("it has another number of interrupts".to_owned()));
        }
        let mut config = self.config.lock();
        config.restore(&state.config);
        self.place_doorbells(&config);
        drop(config);
        self.device.restore(&state.device).map_err(bad)
    }

    /// Tells the doorbells where the BAR is now.
    fn place_doorbells(&self, config: &ConfigSpace) {
        let bar = config.bars().into_iter().find(|range| range.bar == BAR);
        self.doorbells.place(bar.map(|range| GuestPhysAddr(range.start + NOTIFY)));
    }

    /// Tells the interrupts what the configuration space says of them.
    fn apply_control(&self, config: &ConfigSpace) {
        let mut control = [0; 2];
        config.read((self.msix_capability + MSIX_CONTROL).into(), &mut control);
        let control = u16::from_le_bytes(control);
        self.link.interrupts.set_control(
            control & MSIX_ENABLE != 0,
            control & MSIX_MASK != 0,
            config.is_bus_master(),
            config.is_intx_off(),
        );
    }

    /// Where in the BAR the window in configuration space leads, if `offset` is its data.
    fn window(&self, config: &ConfigSpace, offset: u16, len: usize) -> Option<u64> {
        if offset != u16::from(self.window_capability + WINDOW_DATA) {
            return None;
        }
        let mut cap = [0; 12];
        config.read((self.window_capability + WINDOW_BAR).into(), &mut cap);
        let at = u64::from(u32::from_le_bytes([cap[4], cap[5], cap[6], cap[7]]));
        let wanted = u32::from_le_bytes([cap[8], cap[9], cap[10], cap[11]]) as usize;
        let good = cap[0] == BAR && matches!(wanted, 1 | 2 | 4) && wanted <= len && at < BAR_SIZE;
        good.then_some(at)
    }

    fn window_len(&self, config: &ConfigSpace) -> usize {
        let mut len = [0; 4];
        config.read(u16::from(self.window_capability + WINDOW_BAR) + 8, &mut len);
        (u32::from_le_bytes(len) as usize).min(4)
    }
}

/// Identity and class of the function.
fn config_space(device: &dyn VirtioDevice) -> Result<ConfigSpace, PciError> {
    let kind = device.kind();
    Ok(ConfigSpace::new(FunctionIds {
        vendor: VENDOR,
        device: FIRST_DEVICE + kind as u16,
        class: kind.pci_class(),
        revision: REVISION,
        subsystem_vendor: VENDOR,
        subsystem: FIRST_DEVICE + kind as u16,
    }))
}

/// `virtio_pci_cap` without ID and link.
fn structure(kind: u8, offset: u64, len: u64, rest: &[u8]) -> Vec<u8> {
    let mut body = vec![(16 + rest.len()) as u8, kind, BAR, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend((len as u32).to_le_bytes());
    body.extend(rest);
    body
}

impl PciFunction for VirtioPci {
    fn name(&self) -> String {
        format!("virtio device {}", self.link.name)
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let mut config = self.config.lock();
        if let Some(at) = self.window(&config, offset, data.len()) {
            let len = self.window_len(&config);
            drop(config);
            data.fill(0);
            self.bar_read(BAR, at, &mut data[..len]);
            return;
        }
        config.set_interrupt_status(self.link.interrupts.is_pin_pending());
        config.read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut config = self.config.lock();
        config.write(offset, data);
        if let Some(at) = self.window(&config, offset, data.len()) {
            let len = self.window_len(&config);
            drop(config);
            self.bar_write(BAR, at, &data[..len]);
            return;
        }
        self.apply_control(&config);
        self.place_doorbells(&config);
    }

    fn bars(&self) -> Vec<BarRange> {
        self.config.lock().bars()
    }

    fn bar_read(&self, _bar: u8, offset: u64, data: &mut [u8]) {
        let at = offset % PAGE;
        match offset - at {
            COMMON => self.transport.lock().read(at, data),
            ISR if at == 0 => read_config_bytes(&[self.link.interrupts.take_isr()], 0, data),
            DEVICE => self.device.read_config(at, data),
            TABLE => self.link.interrupts.table_read(at, data),
            PENDING => self.link.interrupts.pending_read(at, data),
            _ => data.fill(0),
        }
    }

    fn bar_write(&self, _bar: u8, offset: u64, data: &[u8]) {
        let at = offset % PAGE;
        match offset - at {
            COMMON => self.transport.lock().write(at, data),
            DEVICE => self.device.write_config(at, data),
            NOTIFY => self.doorbells.ring(at),
            TABLE => self.link.interrupts.table_write(at, data),
            _ => {}
        }
    }
}

impl Drop for VirtioPci {
    /// Ends the device's threads.
    fn drop(&mut self) {
        self.transport.get_mut().stop();
    }
}

/// Counts changes of [`VirtioPciState`] and of what is in it that older ones cannot read.
const STATE_VERSION: u32 = 1;

/// A saved device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioPciState {
    version: u32,
    transport: TransportState,
    interrupts: InterruptState,
    config: Vec<u8>,
    device: DeviceState,
}

const _: () = assert!(ENTRY_SIZE * 256 <= PAGE, "the MSI-X table has its page");

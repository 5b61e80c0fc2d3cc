//! The common configuration: features, status and queues (virtio 1.2, 4.1.4.3 and 3.1.1).

use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::queue::Link;
use super::status::{DRIVER_OK, FEATURES_OK, NEEDS_RESET};
use super::{Dma, Session, VirtioDevice, Virtqueue};

/// Length of the structure in bytes.
pub const COMMON_SIZE: usize = 0x3c;

const DEVICE_FEATURE_SELECT: usize = 0x00;
const DEVICE_FEATURE: usize = 0x04;
const DRIVER_FEATURE_SELECT: usize = 0x08;
const DRIVER_FEATURE: usize = 0x0c;
const CONFIG_MSIX_VECTOR: usize = 0x10;
const NUM_QUEUES: usize = 0x12;
const DEVICE_STATUS: usize = 0x14;
const CONFIG_GENERATION: usize = 0x15;
const QUEUE_SELECT: usize = 0x16;
const QUEUE_SIZE: usize = 0x18;
const QUEUE_MSIX_VECTOR: usize = 0x1a;
const QUEUE_ENABLE: usize = 0x1c;
const QUEUE_NOTIFY_OFF: usize = 0x1e;
const QUEUE_DESC: usize = 0x20;
const QUEUE_DRIVER: usize = 0x28;
const QUEUE_DEVICE: usize = 0x30;

/// Features of the transport and of queues.
const COMMON_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// One queue, used by the transport and by the device's threads.
struct Slot {
    queue: Arc<Mutex<Queue>>,
    doorbell: Arc<EventFd>,
}

/// The registers of one device.
pub struct Transport {
    device: Arc<dyn VirtioDevice>,
    link: Arc<Link>,
    dma: Dma,
    slots: Vec<Slot>,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    /// Whether the device was started and not stopped since.
    running: bool,
}

/// Why a device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// A size that no queue can have.
    #[error("{0}: a queue of {1} descriptors is not possible")]
    QueueSize(String, u16),
    /// The host refuses.
    #[error("{0}: the host refuses an eventfd: {1}")]
    EventFd(String, #[source] std::io::Error),
}

impl Transport {
    pub fn new(device: Arc<dyn VirtioDevice>, link: Arc<Link>, dma: Dma) -> Result<Self, TransportError> {
        let slot = |&size: &u16| {
            let queue = Queue::new(size).map_err(|_| TransportError::QueueSize(link.name.clone(), size))?;
            let doorbell =
                EventFd::new(EFD_NONBLOCK).map_err(|e| TransportError::EventFd(link.name.clone(), e))?;
            Ok(Slot { queue: Arc::new(Mutex::new(queue)), doorbell: Arc::new(doorbell) })
        };
        let slots = device.queue_sizes().iter().map(slot).collect::<Result<_, TransportError>>()?;
        Ok(Self {
            device,
            link,
            dma,
            slots,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            running: false,
        })
    }

    /// The doorbell of each queue.
    pub fn doorbells(&self) -> Vec<Arc<EventFd>> {
        self.slots.iter().map(|slot| slot.doorbell.clone()).collect()
    }

    fn offered(&self) -> u64 {
        self.device.features() | COMMON_FEATURES
    }

    fn slot(&self) -> Option<&Slot> {
        self.slots.get(usize::from(self.queue_select))
    }

    /// A load from the structure.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let mut image = [0; COMMON_SIZE];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        let half = |value: u64, select: u32| match select {
            0 => value as u32,
            1 => (value >> 32) as u32,
            _ => 0,
        };
        put(DEVICE_FEATURE_SELECT, &self.device_feature_select.to_le_bytes());
        put(DEVICE_FEATURE, &half(self.offered(), self.device_feature_select).to_le_bytes());
        put(DRIVER_FEATURE_SELECT, &self.driver_feature_select.to_le_bytes());
        put(DRIVER_FEATURE, &half(self.driver_features, self.driver_feature_select).to_le_bytes());
        put(CONFIG_MSIX_VECTOR, &self.link.interrupts.config_vector().to_le_bytes());
        put(NUM_QUEUES, &(self.slots.len() as u16).to_le_bytes());
        put(DEVICE_STATUS, &[self.link.status.get()]);
        put(CONFIG_GENERATION, &[self.device.config_generation()]);
        put(QUEUE_SELECT, &self.queue_select.to_le_bytes());
        if let Some(slot) = self.slot() {
            let queue = slot.queue.lock();
            put(QUEUE_SIZE, &queue.size().to_le_bytes());
            let vector = self.link.interrupts.queue_vector(self.queue_select);
            put(QUEUE_MSIX_VECTOR, &vector.to_le_bytes());
            put(QUEUE_ENABLE, &u16::from(queue.ready()).to_le_bytes());
            put(QUEUE_NOTIFY_OFF, &self.queue_select.to_le_bytes());
            put(QUEUE_DESC, &queue.desc_table().to_le_bytes());
            put(QUEUE_DRIVER, &queue.avail_ring().to_le_bytes());
            put(QUEUE_DEVICE, &queue.used_ring().to_le_bytes());
        }
        super::device::read_config_bytes(&image, offset, data);
    }

    /// A store to the structure: to a field as a whole, or to half of one of 8 bytes; others are dropped.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let value = crate::bytes::value(data);
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        match (offset, data.len()) {
            (DEVICE_FEATURE_SELECT, 4) => self.device_feature_select = value as u32,
            (DRIVER_FEATURE_SELECT, 4) => self.driver_feature_select = value as u32,
            (DRIVER_FEATURE, 4) if !self.link.status.has(FEATURES_OK) => {
                let (shift, kept) = match self.driver_feature_select {
                    0 => (0, 0xffff_ffff << 32),
                    1 => (32, 0xffff_ffff),
                    _ => return,
                };
                self.driver_features = self.driver_features & kept | value << shift;
            }
            (CONFIG_MSIX_VECTOR, 2) => self.link.interrupts.set_config_vector(value as u16),
            (DEVICE_STATUS, 1) => self.set_status(value as u8),
            (QUEUE_SELECT, 2) => self.queue_select = value as u16,
            (QUEUE_MSIX_VECTOR, 2) => {
                self.link.interrupts.set_queue_vector(self.queue_select, value as u16);
            }
            (QUEUE_ENABLE, 2) if value == 1 => self.enable_queue(),
            (QUEUE_SIZE, 2) => self.configure(|queue| queue.try_set_size(value as u16)),
            (QUEUE_DESC | QUEUE_DRIVER | QUEUE_DEVICE, 4 | 8) => self.set_address(offset, data.len(), value),
            (0x24 | 0x2c | 0x34, 4) => self.set_address(offset, 4, value),
            _ => {}
        }
    }

    /// Changes the selected queue, unless it is enabled.
    fn configure(&mut self, change: impl FnOnce(&mut Queue) -> Result<(), virtio_queue::Error>) {
        let Some(slot) = self.slot() else { return };
        let mut queue = slot.queue.lock();
        if queue.ready() {
            return;
        }
        if let Err(e) = change(&mut queue) {
            drop(queue);
            self.link.fail(&format_args!("queue {}: {e}", self.queue_select));
        }
    }

    fn set_address(&mut self, offset: usize, len: usize, value: u64) {
        let field = offset & !7;
        self.configure(|queue| {
            let old = match field {
                QUEUE_DESC => queue.desc_table(),
                QUEUE_DRIVER => queue.avail_ring(),
                _ => queue.used_ring(),
            };
            let address = GuestAddress(match (offset & 4, len) {
                (_, 8) => value,
                (0, _) => old & !0xffff_ffff | value,
                _ => old & 0xffff_ffff | value << 32,
            });
            match field {
                QUEUE_DESC => queue.try_set_desc_table_address(address),
                QUEUE_DRIVER => queue.try_set_avail_ring_address(address),
                _ => queue.try_set_used_ring_address(address),
            }
        });
    }

    fn enable_queue(&mut self) {
        let Some(slot) = self.slot() else { return };
        let mut queue = slot.queue.lock();
        queue.set_event_idx(self.driver_features >> VIRTIO_RING_F_EVENT_IDX & 1 != 0);
        queue.set_ready(true);
        if !queue.is_valid(self.dma.memory().map()) {
            queue.set_ready(false);
            drop(queue);
            self.link.fail(&format_args!("queue {}: its rings are not in RAM", self.queue_select));
        }
    }

    fn set_status(&mut self, value: u8) {
        if value == 0 {
            self.reset();
            return;
        }
        let old = self.link.status.get();
        // The driver cannot take bits back, nor set the one that is the device's to set.
        let mut new = value & !NEEDS_RESET & !old;
        if new & FEATURES_OK != 0 && !self.features_are_good() {
            new &= !FEATURES_OK;
        }
        if new & DRIVER_OK != 0 && (old | new) & FEATURES_OK == 0 {
            self.link.fail(&"it is started without an agreement on features");
            new &= !DRIVER_OK;
        }
        self.link.status.add(new);
        if new & DRIVER_OK != 0 && old & NEEDS_RESET == 0 {
            self.start();
        }
    }

    /// The driver took no feature that was not offered, and the one that this transport cannot do without.
    fn features_are_good(&self) -> bool {
        self.driver_features & !self.offered() == 0 && self.driver_features >> VIRTIO_F_VERSION_1 & 1 != 0
    }

    fn start(&mut self) {
        let queues = self.slots.iter().zip(0..).map(|(slot, index)| {
            slot.queue.lock().ready().then(|| {
                let (queue, doorbell) = (slot.queue.clone(), slot.doorbell.clone());
                // What came before the start is found in the queue.
                let _ = doorbell.write(1);
                Virtqueue::new(index, queue, doorbell, self.dma.clone(), self.link.clone())
            })
        });
        let session =
            Session { features: self.driver_features, queues: queues.collect(), link: self.link.clone() };
        self.running = true;
        if let Err(e) = self.device.start(session) {
            tracing::error!("{}: the host refuses what the device needs: {e}", self.link.name);
            self.link.fail(&"it cannot be started");
        }
    }

    /// Stops the device's threads if they run; returns whether they did.
    pub fn stop(&mut self) -> bool {
        let was = std::mem::replace(&mut self.running, false);
        if was {
            self.device.stop();
        }
        was
    }

    /// Starts the device again after [`Self::stop`].
    pub fn resume(&mut self) {
        let ready = self.link.status.has(DRIVER_OK) && !self.link.status.has(NEEDS_RESET);
        if ready && !self.running {
            self.start();
        }
    }

    /// The device and its queues as before the driver found it.
    pub fn reset(&mut self) {
        self.stop();
        self.device.reset();
        for slot in &self.slots {
            slot.queue.lock().reset();
            let _ = slot.doorbell.read();
        }
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        self.link.status.set(0);
        self.link.interrupts.reset_device();
    }
}

/// The registers, to be saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    status: u8,
    offered: u64,
    driver_features: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    queue_select: u16,
    queues: Vec<SavedQueue>,
}

/// As `virtio_queue::QueueState`, which cannot be written out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(remote = "QueueState")]
struct QueueStateDef {
    max_size: u16,
    next_avail: u16,
    next_used: u16,
    event_idx_enabled: bool,
    size: u16,
    ready: bool,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedQueue(#[serde(with = "QueueStateDef")] QueueState);

impl Transport {
    /// What to save; the device is stopped.
    pub fn state(&self) -> TransportState {
        TransportState {
            status: self.link.status.get(),
            offered: self.offered(),
            driver_features: self.driver_features,
            device_feature_select: self.device_feature_select,
            driver_feature_select: self.driver_feature_select,
            queue_select: self.queue_select,
            queues: self.slots.iter().map(|slot| SavedQueue(slot.queue.lock().state())).collect(),
        }
    }

    /// Takes what was saved; the device stays stopped.
    ///
    /// # Errors
    /// Says for people what does not fit.
    pub fn restore(&mut self, state: &TransportState) -> Result<(), String> {
        self.stop();
        if state.queues.len() != self.slots.len() {
            return Err(format!("it has {} queues, not {}", self.slots.len(), state.queues.len()));
        }
        // Before the agreement the register holds whatever the driver wrote to it.
        let agreed = state.status & FEATURES_OK != 0;
        if state.status & DRIVER_OK != 0 && !agreed {
            return Err("it was started without an agreement on features".to_owned());
        }
        let missing = state.driver_features & !self.offered();
        if agreed && missing != 0 {
            return Err(format!("its driver uses features that are not there: {missing:#x}"));
        }
        let queues = state.queues.iter().zip(&self.slots).map(|(saved, slot)| {
            let queue = Queue::try_from(saved.0).map_err(|e| e.to_string())?;
            let fits = queue.max_size() == slot.queue.lock().max_size()
                && (!queue.ready() || queue.is_valid(self.dma.memory().map()));
            if fits { Ok(queue) } else { Err("a queue that is not possible".to_owned()) }
        });
        for (queue, slot) in queues.collect::<Result<Vec<_>, String>>()?.into_iter().zip(&self.slots) {
            *slot.queue.lock() = queue;
        }
        self.driver_features = state.driver_features;
        self.device_feature_select = state.device_feature_select;
        self.driver_feature_select = state.driver_feature_select;
        self.queue_select = state.queue_select;
        self.link.status.set(state.status);
        Ok(())
    }
}

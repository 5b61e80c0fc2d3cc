//! What a virtio device is to its transport.

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::balloon::BalloonState;
use super::console::ConsoleState;
use super::queue::{Link, Virtqueue};

/// Kinds of devices by their numbers (virtio 1.2, 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceKind {
    /// Network interface.
    Net = 1,
    /// Disk.
    Block = 2,
    /// Terminal.
    Console = 3,
    /// Random numbers.
    Rng = 4,
    /// Memory balloon.
    Balloon = 5,
    /// Sockets.
    Vsock = 19,
}

impl DeviceKind {
    /// Class, subclass and interface of the PCI function (PCI Code and ID Assignment Specification, 1).
    pub fn pci_class(self) -> u32 {
        match self {
            Self::Net => 0x02_0000,
            Self::Block => 0x01_8000,
            Self::Console => 0x07_8000,
            Self::Rng | Self::Balloon | Self::Vsock => 0xff_0000,
        }
    }
}

/// What a device gets when its driver is ready, and has until [`VirtioDevice::stop`].
pub struct Session {
    /// The features that the driver accepted.
    pub features: u64,
    /// The queues by number; `None` for those that the driver did not enable.
    pub queues: Vec<Option<Virtqueue>>,
    pub(super) link: Arc<Link>,
}

impl Session {
    /// Whether the driver accepted feature bit `bit`.
    pub fn has_feature(&self, bit: u32) -> bool {
        self.features >> bit & 1 != 0
    }

    /// Takes queue `index`, if it is enabled and still there.
    pub fn take_queue(&mut self, index: usize) -> Option<Virtqueue> {
        self.queues.get_mut(index)?.take()
    }

    /// Tells the driver of changes of the configuration; see [`ConfigSignal::send`].
    pub fn config_signal(&self) -> ConfigSignal {
        ConfigSignal(self.link.clone())
    }
}

/// Tells a driver that its device's configuration changed.
#[derive(Clone)]
pub struct ConfigSignal(Arc<Link>);

impl ConfigSignal {
    /// Interrupts the driver. The device counts [`VirtioDevice::config_generation`] up before.
    pub fn send(&self) {
        self.0.interrupts.signal_config();
    }
}

/// A saved device that does not fit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{device}: the saved state does not fit: {reason}")]
pub struct StateError {
    /// Name of the device.
    pub device: String,
    /// What is wrong.
    pub reason: String,
}

/// What a device keeps besides its queues.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceState {
    /// Nothing.
    Stateless,
    /// A terminal.
    Console(ConsoleState),
    /// A balloon.
    Balloon(BalloonState),
}

impl DeviceState {
    /// The complaint about the state of another kind of device.
    pub(super) fn other_kind() -> String {
        "it is that of another kind of device".to_owned()
    }
}

/// A virtio device. All methods are called from any thread, several at once: it locks inside.
///
/// Order of calls: [`Self::start`] when the driver is ready, [`Self::stop`] before the queues change or are saved;
/// again from the start after a reset. The transport never calls `start` twice without `stop` between.
pub trait VirtioDevice: Send + Sync {
    /// What it is.
    fn kind(&self) -> DeviceKind;
    /// The size of each of its queues: powers of two up to 32768.
    fn queue_sizes(&self) -> Vec<u16>;
    /// Feature bits of this kind of device; those of the transport and of queues are added.
    fn features(&self) -> u64;
    /// A load from the device's configuration. Bytes past its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// A store to the device's configuration.
    fn write_config(&self, _offset: u64, _data: &[u8]) {}
    /// Counts changes of the configuration that the driver did not make.
    fn config_generation(&self) -> u8 {
        0
    }
    /// Starts to work on the queues.
    ///
    /// # Errors
    /// What the host says when it refuses a thread or another resource: the driver then sees DEVICE_NEEDS_RESET.
    fn start(&self, session: Session) -> io::Result<()>;
    /// Stops: when it returns no thread of the device touches a queue, and every request that was begun is done.
    fn stop(&self);
    /// The driver has reset the device, which is stopped: what belongs to the driver is forgotten.
    fn reset(&self) {}
    /// What to save besides queues and features. The device is stopped.
    fn state(&self) -> DeviceState {
        DeviceState::Stateless
    }
    /// Takes what was saved. The device is stopped.
    ///
    /// # Errors
    /// What is wrong with it, for people.
    fn restore(&self, state: &DeviceState) -> Result<(), String> {
        match state {
            DeviceState::Stateless => Ok(()),
            _ => Err(DeviceState::other_kind()),
        }
    }
}

/// Fills a load from a configuration that has the bytes `config`.
pub(super) fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    for (i, byte) in (offset..).zip(data) {
        *byte = usize::try_from(i).ok().and_then(|i| config.get(i)).copied().unwrap_or(0);
    }
}

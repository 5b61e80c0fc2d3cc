//! Network interfaces (virtio 1.2, 5.1).
//!
//! ```text
//!   thread NAME/net0.N, one a pair of queues:   transmit ─► Port::send ─► tap device, or stream to passt
//!                                               receive  ◄─ Port::receive ◄─┘
//! ```
//! Offloads (checksums, segmentation) are the tap device's own: headers go through as they are. A stream has none, but
//! the guest may send packets of 64 KiB there.

mod counters;
mod pair;
mod port;
mod stream;
mod tap;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use parking_lot::Mutex;
use virtio_bindings::bindings::virtio_net as ids;

use super::device::read_config_bytes;
use super::events::Worker;
use super::{Chain, DeviceKind, Session, VirtioDevice, Virtqueue};
use counters::Traffic;
use pair::Pair;
use port::{HEADER, MAX_PACKET};

pub use counters::NetCounters;
pub use port::{Cable, Port, Received};
pub use stream::{Stream, StreamError};
pub use tap::{Tap, TapError};

const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 64;
/// A packet without offloads: header, Ethernet header with a VLAN tag, payload.
const PLAIN_PACKET: u64 = HEADER as u64 + 18 + 1500;
const CONFIG_SIZE: usize = 12;
const LINK_UP: u16 = ids::VIRTIO_NET_S_LINK_UP as u16;

/// A network interface.
pub struct Net {
    mac: [u8; 6],
    cable: Arc<dyn Cable>,
    thread_names: Vec<String>,
    traffic: Arc<Traffic>,
    workers: Mutex<Vec<Worker>>,
}

impl Net {
    /// An interface with this address at the end of `cable`; `thread_names` has a name for the thread of each pair of
    /// queues, and one for commands.
    pub fn new(mac: [u8; 6], cable: Arc<dyn Cable>, mut thread_names: Vec<String>) -> Self {
        thread_names.resize(usize::from(cable.pairs()) + 1, "berth/net".to_owned());
        Self { mac, cable, thread_names, traffic: Arc::default(), workers: Mutex::default() }
    }

    /// What it has carried since it was made.
    pub fn counters(&self) -> NetCounters {
        self.traffic.counters()
    }

    /// A descriptor that becomes readable when the other end sends something that somebody asked for; `None` where that
    /// cannot be told.
    ///
    /// # Errors
    /// What the host says.
    pub fn host_socket(&self) -> io::Result<Option<OwnedFd>> {
        self.cable.host_socket()
    }

    fn has_control(&self) -> bool {
        self.cable.pairs() > 1
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Net
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![QUEUE_SIZE; 2 * usize::from(self.cable.pairs())];
        if self.has_control() {
            sizes.push(CONTROL_QUEUE_SIZE);
        }
        sizes
    }

    fn features(&self) -> u64 {
        let mut features = self.cable.features()
            | 1 << ids::VIRTIO_NET_F_MAC
            | 1 << ids::VIRTIO_NET_F_STATUS
            | 1 << ids::VIRTIO_NET_F_MRG_RXBUF;
        if self.has_control() {
            features |= 1 << ids::VIRTIO_NET_F_CTRL_VQ | 1 << ids::VIRTIO_NET_F_MQ;
        }
        if self.cable.mtu().is_some() {
            features |= 1 << ids::VIRTIO_NET_F_MTU;
        }
        features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; CONFIG_SIZE];
        config[..6].copy_from_slice(&self.mac);
        config[6..8].copy_from_slice(&LINK_UP.to_le_bytes());
        config[8..10].copy_from_slice(&self.cable.pairs().to_le_bytes());
        config[10..12].copy_from_slice(&self.cable.mtu().unwrap_or(0).to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn start(&self, mut session: Session) -> io::Result<()> {
        let mergeable = session.has_feature(ids::VIRTIO_NET_F_MRG_RXBUF);
        let segments = session.has_feature(ids::VIRTIO_NET_F_GUEST_TSO4)
            || session.has_feature(ids::VIRTIO_NET_F_GUEST_TSO6)
            || session.has_feature(ids::VIRTIO_NET_F_MTU);
        let mut workers = Vec::new();
        for (index, name) in (0..self.cable.pairs()).zip(&self.thread_names) {
            let at = 2 * usize::from(index);
            let (Some(receive), Some(transmit)) = (session.take_queue(at), session.take_queue(at + 1)) else {
                continue;
            };
            let mut port = self.cable.port(index)?;
            port.set_features(session.features)?;
            let least = if segments { MAX_PACKET } else { PLAIN_PACKET };
            let pair = Pair { receive, transmit, port, mergeable, least, traffic: self.traffic.clone() };
            workers.push(Worker::spawn(name.clone(), move |poll| pair.run(&poll))?);
        }
        self.cable.use_pairs(1)?;
        let control = session.take_queue(2 * usize::from(self.cable.pairs()));
        if let (Some(control), Some(name)) = (control, self.thread_names.last()) {
            let cable = self.cable.clone();
            workers.push(Worker::spawn(name.clone(), move |poll| {
                poll.add(control.doorbell(), 0)?;
                while poll.wait(None)?.is_some() {
                    control.clear_doorbell();
                    control.serve(|chain| command(&control, chain, cable.as_ref()));
                }
                Ok(())
            })?);
        }
        *self.workers.lock() = workers;
        Ok(())
    }

    fn stop(&self) {
        self.workers.lock().clear();
    }
}

/// A command of the driver (virtio 1.2, 5.1.6.5): how many pairs of queues it uses.
fn command(queue: &Virtqueue, mut chain: Chain, cable: &dyn Cable) {
    let mut bytes = [0; 4];
    let n = chain.readable.read(queue.dma(), &mut bytes);
    let [class, command, low, high] = bytes;
    let is_pairs = n == 4
        && u32::from(class) == ids::VIRTIO_NET_CTRL_MQ
        && u32::from(command) == ids::VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET;
    let count = u16::from_le_bytes([low, high]);
    let done = is_pairs && (1..=cable.pairs()).contains(&count) && cable.use_pairs(count).is_ok();
    let answer = if done { ids::VIRTIO_NET_OK } else { ids::VIRTIO_NET_ERR };
    let written = chain.writable.write(queue.dma(), &[answer as u8]);
    queue.push(chain.head, written as u32);
}

//! What a network interface is connected to.

use std::io;
use std::os::fd::{OwnedFd, RawFd};

use crate::virtio::{Buffers, Dma};

/// Length of `virtio_net_hdr_v1` (virtio 1.2, 5.1.6), which precedes each packet.
pub const HEADER: usize = 12;
/// Longest packet with its header: what segmentation offload makes of one IP packet and an Ethernet header.
pub const MAX_PACKET: u64 = 65_535 + 18 + HEADER as u64;

/// What came from the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// A packet with its header, of so many bytes.
    Packet(u64),
    /// One that did not fit.
    Dropped,
}

/// The end of a cable, for one pair of queues.
pub trait Port: Send {
    /// Becomes readable, and writable, edge by edge.
    fn fd(&self) -> RawFd;
    /// What the driver accepted, before the first packet.
    ///
    /// # Errors
    /// What the host says.
    fn set_features(&mut self, features: u64) -> io::Result<()>;
    /// Sends a packet with its header. One that cannot be sent now is dropped, as networks do: `false`.
    ///
    /// # Errors
    /// What the host says: the other end is gone.
    fn send(&mut self, dma: &Dma, packet: &mut Buffers) -> io::Result<bool>;
    /// Whether a packet can be sent now; if not, [`Self::fd`] becomes writable later.
    fn can_send(&self) -> bool {
        true
    }
    /// Goes on with what could not be sent.
    ///
    /// # Errors
    /// What the host says: the other end is gone.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
    /// Receives a packet with its header into `room`; `None` when there is none now.
    ///
    /// # Errors
    /// What the host says: the other end is gone.
    fn receive(&mut self, dma: &Dma, room: &Buffers) -> io::Result<Option<Received>>;
}

/// How a network interface is offered to the guest.
pub trait Cable: Send + Sync {
    /// Feature bits that the other end makes possible.
    fn features(&self) -> u64;
    /// How many pairs of queues it has, 1 or more.
    fn pairs(&self) -> u16;
    /// The end for pair `index`. Called once for each at every start of the driver.
    ///
    /// # Errors
    /// What the host says.
    fn port(&self, index: u16) -> io::Result<Box<dyn Port>>;
    /// The driver uses the first `count` pairs.
    ///
    /// # Errors
    /// What the host says.
    fn use_pairs(&self, _count: u16) -> io::Result<()> {
        Ok(())
    }
    /// See [`super::Net::host_socket`].
    ///
    /// # Errors
    /// What the host says.
    fn host_socket(&self) -> io::Result<Option<OwnedFd>> {
        Ok(None)
    }
    /// Largest packet that the guest should send, without Ethernet header, where the other end has one to say.
    fn mtu(&self) -> Option<u16> {
        None
    }
}

//! One connection: a stream of the guest and a Unix socket of the host.
//!
//! Credit (virtio 1.2, 5.10.6.3): each side says how large its buffer for the connection is and how much it has taken out
//! of it, and the other sends no more than fits. So what waits for the host's socket is bounded by [`BUFFER`].

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::num::Wrapping;
use std::os::unix::net::UnixStream;

use super::packet::{Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// Bytes from the guest that may wait for the host's socket.
pub const BUFFER: u32 = 256 << 10;
/// The guest is told of room when this much was taken since it was told last.
const UPDATE_AFTER: u32 = BUFFER / 4;

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// A host program has connected and not yet said to which port.
    Greeting,
    /// The guest was asked.
    Requested,
    /// Both sides agreed.
    Open,
}

/// A connection.
pub struct Connection {
    pub stream: UnixStream,
    pub phase: Phase,
    /// What the host program said before the guest's port was known.
    pub greeting: Vec<u8>,
    /// Data of the guest that the socket did not take.
    waiting: VecDeque<u8>,
    /// Bytes taken from the guest, and what it was told of that last.
    forwarded: Wrapping<u32>,
    told: Wrapping<u32>,
    /// The guest's buffer, what it took out, and what was sent to it.
    peer_buffer: u32,
    peer_forwarded: Wrapping<u32>,
    sent: Wrapping<u32>,
    /// The guest will not send, or not receive, any more.
    pub guest_done: u32,
    /// The socket has nothing more to give, and the guest was told.
    pub host_done: bool,
}

impl Connection {
    /// With a socket that does not block.
    pub fn new(stream: UnixStream, phase: Phase) -> Self {
        Self {
            stream,
            phase,
            greeting: Vec::new(),
            waiting: VecDeque::new(),
            forwarded: Wrapping(0),
            told: Wrapping(0),
            peer_buffer: 0,
            peer_forwarded: Wrapping(0),
            sent: Wrapping(0),
            guest_done: 0,
            host_done: false,
        }
    }

    /// The guest's port is known. Only what follows the greeting counts as sent to the guest.
    pub fn request(&mut self) {
        self.phase = Phase::Requested;
        self.greeting = Vec::new();
        self.sent = Wrapping(0);
    }

    /// Takes the guest's account of its buffer.
    pub fn take_credit(&mut self, header: &Header) {
        self.peer_buffer = header.buf_alloc;
        self.peer_forwarded = Wrapping(header.fwd_cnt);
    }

    /// Bytes that the guest has room for.
    pub fn credit(&self) -> u32 {
        self.peer_buffer.saturating_sub((self.sent - self.peer_forwarded).0)
    }

    /// Puts our account into a header, and notes that the guest knows it.
    pub fn tell(&mut self, header: &mut Header) {
        header.buf_alloc = BUFFER;
        header.fwd_cnt = self.forwarded.0;
        self.told = self.forwarded;
    }

    /// Whether the guest should be told of room.
    pub fn should_tell(&self) -> bool {
        (self.forwarded - self.told).0 >= UPDATE_AFTER
    }

    /// Data from the guest: to the socket, or kept until that takes it. An error ends the connection: the guest sent more
    /// than there was room for, or nobody listens.
    pub fn send(&mut self, mut data: &[u8]) -> io::Result<()> {
        if self.waiting.len() + data.len() > BUFFER as usize {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "more than there is room for"));
        }
        while self.waiting.is_empty() && !data.is_empty() {
            match self.stream.write(data) {
                Ok(n) => {
                    self.forwarded += n as u32;
                    data = &data[n..];
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            }
        }
        self.waiting.extend(data);
        Ok(())
    }

    /// Gives the socket what waits for it.
    pub fn send_waiting(&mut self) -> io::Result<()> {
        while !self.waiting.is_empty() {
            match self.stream.write(self.waiting.as_slices().0) {
                Ok(n) => {
                    self.forwarded += n as u32;
                    self.waiting.drain(..n);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Whether data waits for the socket.
    pub fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether data of the socket can go to the guest now.
    pub fn wants_data(&self) -> bool {
        match self.phase {
            Phase::Greeting => true,
            Phase::Requested => false,
            Phase::Open => !self.host_done && self.guest_done & SHUTDOWN_RECEIVE == 0 && self.credit() > 0,
        }
    }

    /// Data for the guest: `None` when there is none now, 0 at the end of the stream.
    pub fn receive(&mut self, data: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match self.stream.read(data) {
                Ok(n) => {
                    self.sent += n as u32;
                    return Ok(Some(n));
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) => return Err(e),
            }
        }
    }

    /// Whether the guest has sent all that it will, and the socket has it.
    pub fn is_drained(&self) -> bool {
        self.guest_done & SHUTDOWN_SEND != 0 && self.waiting.is_empty()
    }
}

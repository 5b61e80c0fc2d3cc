//! A connection: frames in, frames out, both bounded.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use berth_agent_protocol::{Decoder, Frame, FrameError, FromGuest, FromHost, Stream, data, hello, message};
use nix::errno::Errno;
use nix::unistd::{read, write};

/// Bytes that wait for the host, from which on nothing more is read: neither requests nor a command's output.
const ENOUGH: usize = 64 << 10;

/// Why a connection is over.
#[derive(Debug, thiserror::Error)]
pub enum Over {
    /// The host closed it, or the connection broke.
    #[error("the host is gone")]
    Gone,
    /// The host sent something that cannot be understood.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The host sent something that it may not send now.
    #[error("{0}")]
    Rule(&'static str),
}

/// A socket with what came and what is to go.
pub struct Connection {
    socket: OwnedFd,
    decoder: Decoder,
    outgoing: VecDeque<u8>,
}

impl Connection {
    /// With a socket that does not block.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket, decoder: Decoder::default(), outgoing: VecDeque::new() }
    }

    /// Whether the host took so much of what it was sent that more may be made for it.
    pub fn has_room(&self) -> bool {
        self.outgoing.len() < ENOUGH
    }

    /// Whether something waits for the host.
    pub fn has_outgoing(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Takes what has come, as much as `buffer` holds. Take all frames before the next call.
    ///
    /// # Errors
    /// [`Over::Gone`].
    pub fn receive(&mut self, buffer: &mut [u8]) -> Result<(), Over> {
        match retry(|| read(&self.socket, buffer)) {
            Ok(0) => Err(Over::Gone),
            Ok(n) => {
                self.decoder.feed(buffer.get(..n).unwrap_or_default());
                Ok(())
            }
            Err(Errno::EAGAIN) => Ok(()),
            Err(_) => Err(Over::Gone),
        }
    }

    /// The next frame that has come.
    ///
    /// # Errors
    /// [`Over::Frame`].
    pub fn next_frame(&mut self) -> Result<Option<Frame<FromHost>>, Over> {
        Ok(self.decoder.next_frame()?)
    }

    /// Greets the host.
    pub fn greet(&mut self, version: u16) {
        self.outgoing.extend(hello(version));
    }

    /// Sends a message; those of the agent are all short.
    pub fn send(&mut self, m: &FromGuest) {
        self.outgoing.extend(message(m).unwrap_or_default());
    }

    /// Sends output of a command.
    pub fn send_data(&mut self, stream: Stream, bytes: &[u8]) {
        self.outgoing.extend(data(stream, bytes));
    }

    /// Gives the socket what waits for it; returns whether it took something.
    ///
    /// # Errors
    /// [`Over::Gone`].
    pub fn flush(&mut self) -> Result<bool, Over> {
        let mut progress = false;
        while !self.outgoing.is_empty() {
            match retry(|| write(&self.socket, self.outgoing.as_slices().0)) {
                Ok(n) => {
                    self.outgoing.drain(..n);
                    progress = true;
                }
                Err(Errno::EAGAIN) => return Ok(progress),
                Err(_) => return Err(Over::Gone),
            }
        }
        // A connection that waits for its next request keeps no buffer.
        self.outgoing = VecDeque::new();
        Ok(progress)
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A system call, again as long as a signal interrupts it.
pub fn retry<T>(mut call: impl FnMut() -> nix::Result<T>) -> nix::Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// Makes a descriptor not block.
///
/// # Errors
/// What the kernel says.
pub fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

//! Where the host connects.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept4, bind, getpeername, listen, socket,
};

/// Connections that wait.
const BACKLOG: i32 = 64;

/// A listening socket.
pub struct Listener {
    socket: OwnedFd,
    only_host: bool,
}

impl Listener {
    /// At a vsock port, for the host alone.
    ///
    /// # Errors
    /// What the kernel says: `EAFNOSUPPORT` without vsock, `EADDRINUSE` if somebody has the port.
    pub fn vsock(port: u32) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
        bind(socket.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, port))?;
        listen(&socket, Backlog::new(BACKLOG)?)?;
        Ok(Self { socket, only_host: true })
    }

    /// Any listening socket that does not block; whoever can connect is trusted.
    pub fn trusting(socket: OwnedFd) -> Self {
        Self { socket, only_host: false }
    }

    /// The next connection; its socket does not block. `None`: nobody waits.
    pub fn accept(&self) -> Option<OwnedFd> {
        loop {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let fd = accept4(self.socket.as_raw_fd(), flags).ok()?;
            // SAFETY: accept4 made the descriptor, and nobody else knows it.
            let connection = unsafe { OwnedFd::from_raw_fd(fd) };
            if !self.only_host || is_host(&connection) {
                return Some(connection);
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Whether the other end is the host (VMADDR_CID_HOST) and not a program of this guest (vsock has a loopback too).
fn is_host(connection: &OwnedFd) -> bool {
    getpeername::<VsockAddr>(connection.as_raw_fd()).is_ok_and(|peer| peer.cid() == libc::VMADDR_CID_HOST)
}

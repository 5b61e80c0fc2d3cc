//! A Unix stream socket with Ethernet packets, each after its length in 4 bytes, big-endian: the protocol of QEMU's
//! `-netdev stream`, which passt speaks.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;

use parking_lot::Mutex;
use tracing::debug;
use virtio_bindings::bindings::virtio_net as ids;

use super::port::{Cable, HEADER, MAX_PACKET, Port, Received};
use crate::virtio::{Buffers, Dma};

const LENGTH: usize = 4;
/// Bytes that are read at a time: a few of the largest packets.
const BUFFER: usize = 256 << 10;
/// Flag of a header: the checksum was checked (virtio 1.2, 5.1.6.4).
const DATA_VALID: u8 = ids::VIRTIO_NET_HDR_F_DATA_VALID as u8;
/// What passt tells guests that ask.
const PASST_MTU: u16 = 65_520;

/// Beginnings of what passt says before it gets to the point: of the system's log, and when root starts it.
const NOISE: [&str; 2] = ["Failed to send ", "Don't run as root"];

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// passt is not there.
    #[error("user networking needs the program passt, which is not installed: apt-get install passt")]
    NoPasst,
    /// It does not start.
    #[error("passt does not start: {0}")]
    Start(#[source] io::Error),
    /// It ended at once.
    #[error("passt ended at once ({0}): {1}")]
    Ended(std::process::ExitStatus, String),
    /// Nobody listens.
    #[error("cannot connect to {path}: {source}")]
    Connect {
        /// The socket.
        path: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// A connection to passt or a program like it.
pub struct Stream {
    socket: UnixStream,
    passt: Mutex<Option<Child>>,
    mtu: Option<u16>,
    /// Of the connection, whichever driver uses it.
    buffers: Arc<Mutex<StreamBuffers>>,
}

/// What is under way.
#[derive(Default)]
struct StreamBuffers {
    /// What was read, in [`BUFFER`] bytes, and which part of it the guest has not got yet.
    input: Vec<u8>,
    unread: std::ops::Range<usize>,
    /// What the socket did not take.
    output: Vec<u8>,
}

impl Stream {
    /// Starts passt, which ends with its connection. `tcp` and `udp` are port forwardings as its options `-t` and `-u` take
    /// them.
    ///
    /// # Errors
    /// [`StreamError`].
    pub fn passt(tcp: &[String], udp: &[String]) -> Result<Self, StreamError> {
        let (socket, theirs) = UnixStream::pair().map_err(StreamError::Start)?;
        let theirs = OwnedFd::from(theirs);
        let fd = theirs.as_raw_fd();
        // What does not fit is sent again only after a while. passt does the same for a socket that it makes itself.
        for fd in [socket.as_raw_fd(), fd] {
            enlarge_buffer(fd);
        }
        let mut command = Command::new("passt");
        command.args(["--foreground", "--quiet", "--fd", &fd.to_string()]);
        command.args(["--mtu", &PASST_MTU.to_string()]);
        for (option, ports) in [("--tcp-ports", tcp), ("--udp-ports", udp)] {
            // Without a word passt forwards nothing.
            for port in ports {
                command.args([option, port]);
            }
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        // SAFETY: between fork and exec only fcntl(2) and setpgid(2) are called, on numbers.
        unsafe {
            command.pre_exec(move || {
                // The terminal's signals are for the VM, not for its network.
                libc::setpgid(0, 0);
                if libc::fcntl(fd, libc::F_SETFD, 0) < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
            });
        }
        let mut child = command.spawn().map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => StreamError::NoPasst,
            _ => StreamError::Start(e),
        })?;
        drop(theirs);
        if let Some(status) = wait_until_settled(&mut child, &socket) {
            let mut said = String::new();
            if let Some(stderr) = &mut child.stderr {
                // What can be read explains it; the rest does not.
                let _ = stderr.take(4096).read_to_string(&mut said);
            }
            let telling =
                |line: &&str| !line.is_empty() && !NOISE.iter().any(|noise| line.starts_with(noise));
            let said = said.lines().map(str::trim).filter(telling).collect::<Vec<_>>().join("; ");
            return Err(StreamError::Ended(status, said));
        }
        if let Some(stderr) = child.stderr.take() {
            // Read, or passt would wait for it some day. Without a thread it is closed instead.
            let _ = thread::Builder::new().name("passt".to_owned()).spawn(move || {
                for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                    debug!("passt: {line}");
                }
            });
        }
        Ok(Self { socket, passt: Mutex::new(Some(child)), mtu: Some(PASST_MTU), buffers: Arc::default() })
    }

    /// Connects to a program that listens at `path`.
    ///
    /// # Errors
    /// [`StreamError::Connect`].
    pub fn connect(path: &Path) -> Result<Self, StreamError> {
        let socket = UnixStream::connect(path)
            .map_err(|source| StreamError::Connect { path: path.display().to_string(), source })?;
        Ok(Self { socket, passt: Mutex::new(None), mtu: None, buffers: Arc::default() })
    }
}

/// Lets a socket hold as much as the host allows, for what is sent by it.
fn enlarge_buffer(socket: RawFd) {
    let size = libc::c_int::MAX / 2;
    // SAFETY: pointer and length are those of one live integer. Refused, the socket keeps its size.
    unsafe {
        libc::setsockopt(
            socket,
            libc::SOL_SOCKET,
            libc::SO_SNDBUF,
            (&raw const size).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
}

/// Waits a moment for a program that ends at once because its options are wrong, which closes its end of `socket`.
fn wait_until_settled(child: &mut Child, socket: &UnixStream) -> Option<std::process::ExitStatus> {
    const MOMENT: libc::c_int = 150;
    let mut fd = libc::pollfd { fd: socket.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: the pointer is to one live pollfd, as the count says.
    let n = unsafe { libc::poll(&raw mut fd, 1, MOMENT) };
    if n == 1 && fd.revents & libc::POLLHUP != 0 {
        child.wait().ok()
    } else {
        child.try_wait().ok().flatten()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // passt ends when nobody has the other end any more; waited for, so that it leaves no zombie.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        if let Some(mut child) = self.passt.lock().take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Cable for Stream {
    fn features(&self) -> u64 {
        1 << ids::VIRTIO_NET_F_GUEST_CSUM
    }

    fn pairs(&self) -> u16 {
        1
    }

    fn port(&self, _index: u16) -> io::Result<Box<dyn Port>> {
        let socket = self.socket.try_clone()?;
        socket.set_nonblocking(true)?;
        Ok(Box::new(StreamPort { socket, buffers: self.buffers.clone(), checked: false }))
    }

    fn mtu(&self) -> Option<u16> {
        self.mtu
    }

    /// passt passes on what comes to forwarded ports, and answers; it says nothing by itself.
    fn host_socket(&self) -> io::Result<Option<OwnedFd>> {
        let passt = self.passt.lock().is_some();
        passt.then(|| self.socket.try_clone().map(OwnedFd::from)).transpose()
    }
}

struct StreamPort {
    socket: UnixStream,
    /// Only this port uses them, as long as it lives.
    buffers: Arc<Mutex<StreamBuffers>>,
    /// The driver knows of checked checksums.
    checked: bool,
}

impl StreamBuffers {
    /// The next whole packet of what was read.
    fn packet(&self) -> io::Result<Option<std::ops::Range<usize>>> {
        let rest = &self.input[self.unread.clone()];
        let Some((length, rest)) = rest.split_first_chunk::<LENGTH>() else { return Ok(None) };
        let length = u32::from_be_bytes(*length) as usize;
        if length as u64 > MAX_PACKET {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a packet longer than any"));
        }
        let start = self.unread.start + LENGTH;
        Ok((rest.len() >= length).then_some(start..start + length))
    }

    /// Reads more; `false` when there is nothing now.
    fn fill(&mut self, mut socket: &UnixStream) -> io::Result<bool> {
        // Less than a packet: there is room for its rest.
        self.input.resize(BUFFER, 0);
        self.input.copy_within(self.unread.clone(), 0);
        self.unread = 0..self.unread.len();
        loop {
            match socket.read(&mut self.input[self.unread.end..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    self.unread.end += n;
                    return Ok(true);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) => return Err(e),
            }
        }
    }
}

impl Port for StreamPort {
    fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    fn set_features(&mut self, features: u64) -> io::Result<()> {
        self.checked = features >> ids::VIRTIO_NET_F_GUEST_CSUM & 1 != 0;
        Ok(())
    }

    fn send(&mut self, dma: &Dma, packet: &mut Buffers) -> io::Result<bool> {
        packet.take(HEADER as u64);
        let len = packet.len();
        if len == 0 || len > MAX_PACKET {
            return Ok(false);
        }
        let length = (len as u32).to_be_bytes();
        let mut iovecs = vec![libc::iovec { iov_base: length.as_ptr().cast_mut().cast(), iov_len: LENGTH }];
        let _hold = dma.hold(packet.as_slice());
        iovecs.extend(dma.iovecs(packet.as_slice()));
        // SAFETY: the iovecs are `length` and guest memory, which `dma` keeps mapped; the host only reads them.
        let n = unsafe {
            libc::writev(self.socket.as_raw_fd(), iovecs.as_ptr(), iovecs.len().min(1024) as libc::c_int)
        };
        let sent = match usize::try_from(n) {
            Ok(n) => n,
            Err(_) => match io::Error::last_os_error() {
                e if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => 0,
                e => return Err(e),
            },
        };
        if sent < LENGTH + len as usize {
            // The rest of a packet must follow, or the stream makes no sense any more.
            let mut buffers = self.buffers.lock();
            buffers.output.extend(length.iter().skip(sent));
            packet.take(sent.saturating_sub(LENGTH) as u64);
            let mut rest = vec![0; packet.len() as usize];
            packet.read(dma, &mut rest);
            buffers.output.extend(rest);
        }
        Ok(true)
    }

    fn can_send(&self) -> bool {
        self.buffers.lock().output.is_empty()
    }

    fn flush(&mut self) -> io::Result<()> {
        let output = &mut self.buffers.lock().output;
        while !output.is_empty() {
            match self.socket.write(output) {
                Ok(n) => drop(output.drain(..n)),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn receive(&mut self, dma: &Dma, room: &Buffers) -> io::Result<Option<Received>> {
        let mut buffers = self.buffers.lock();
        let range = loop {
            match buffers.packet()? {
                Some(range) => break range,
                None if buffers.fill(&self.socket)? => {}
                None => return Ok(None),
            }
        };
        buffers.unread.start = range.end;
        let mut header = [0; HEADER];
        // It came from a program of this host.
        header[0] = if self.checked { DATA_VALID } else { 0 };
        let mut room = room.clone();
        if room.len() < (HEADER + range.len()) as u64 {
            return Ok(Some(Received::Dropped));
        }
        let written = room.write(dma, &header) + room.write(dma, &buffers.input[range]);
        Ok(Some(Received::Packet(written as u64)))
    }
}

//! Tap devices of the host (`Documentation/networking/tuntap.rst` of Linux).

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use virtio_bindings::bindings::virtio_net as ids;

use super::port::{Cable, HEADER, Port, Received};
use crate::virtio::{Buffers, Dma};

const DEVICE: &str = "/dev/net/tun";

// Requests of tun(4); the libc crate has those of network devices.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;
/// Adds an interface to a bridge (`linux/sockios.h`).
const SIOCBRADDIF: libc::c_ulong = 0x89a2;
const TUN_F_CSUM: libc::c_uint = 0x01;
const TUN_F_TSO4: libc::c_uint = 0x02;
const TUN_F_TSO6: libc::c_uint = 0x04;
const TUN_F_TSO_ECN: libc::c_uint = 0x08;

/// Why there is no tap device.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// No tun driver, or no permission.
    #[error("cannot open {DEVICE}: {0}; is the module tun loaded, and may this user open it?")]
    Open(#[source] io::Error),
    /// No such tap device, or not ours.
    #[error(
        "cannot use the tap device {name}: {source}; make it for this user: ip tuntap add dev {name} mode tap user $USER{multi}"
    )]
    Attach {
        /// Its name.
        name: String,
        /// What the host said.
        #[source]
        source: io::Error,
        /// What else the command needs.
        multi: &'static str,
    },
    /// No tap device of our own.
    #[error(
        "cannot make a tap device: {0}; it needs CAP_NET_ADMIN: run as root, or make one and use tap=NAME"
    )]
    Create(#[source] io::Error),
    /// The bridge.
    #[error(
        "cannot attach a tap device to the bridge {bridge}: {source}; is there such a bridge (ip link show type bridge)?"
    )]
    Bridge {
        /// Its name.
        bridge: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// Anything else.
    #[error("the host refuses to {doing} the tap device {name}: {source}")]
    Setup {
        /// What was tried.
        doing: &'static str,
        /// Its name.
        name: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// A tap device, with a descriptor for each pair of queues.
pub struct Tap {
    queues: Vec<File>,
}

impl Tap {
    /// Uses the existing tap device `name`.
    ///
    /// # Errors
    /// [`TapError`].
    pub fn existing(name: &str, pairs: u16) -> Result<Self, TapError> {
        if interface_index(name) == 0 {
            let source = io::Error::from_raw_os_error(libc::ENODEV);
            return Err(TapError::Attach { name: name.to_owned(), source, multi: " multi_queue" });
        }
        // A device that was made with one queue takes no more.
        match Self::open(name, pairs) {
            Err(_) if pairs > 1 => Self::open(name, 1),
            result => result,
        }
        .map_err(|e| match e {
            TapError::Create(source) => TapError::Attach { name: name.to_owned(), source, multi: "" },
            e => e,
        })
    }

    /// Makes a tap device that lives as long as this, and attaches it to the existing bridge `bridge`.
    ///
    /// # Errors
    /// [`TapError`].
    pub fn on_bridge(bridge: &str, pairs: u16) -> Result<Self, TapError> {
        let tap = Self::open("berth%d", pairs)?;
        let name = tap.name()?;
        let socket = control_socket().map_err(|source| TapError::Setup {
            doing: "reach",
            name: name.clone(),
            source,
        })?;
        let failed = |source| TapError::Bridge { bridge: bridge.to_owned(), source };
        let mut request = request(bridge);
        request.ifr_ifru.ifru_ifindex = interface_index(&name) as libc::c_int;
        // SAFETY: SIOCBRADDIF reads an ifreq with the bridge's name and an index.
        check(unsafe { libc::ioctl(socket.as_raw_fd(), SIOCBRADDIF, &raw const request) }).map_err(failed)?;
        set_up(&socket, &name).map_err(|source| TapError::Setup { doing: "switch on", name, source })?;
        Ok(tap)
    }

    fn open(name: &str, pairs: u16) -> Result<Self, TapError> {
        let mut name = name.to_owned();
        let mut queues = Vec::new();
        for _ in 0..pairs.max(1) {
            let file = File::options()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
                .open(DEVICE)
                .map_err(TapError::Open)?;
            let mut request = request(&name);
            let multi = if pairs > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
            let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | multi;
            request.ifr_ifru.ifru_flags = flags as libc::c_short;
            // SAFETY: TUNSETIFF reads and writes an ifreq that lives through the call.
            check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) })
                .map_err(TapError::Create)?;
            name = name_of(&request);
            let size = HEADER as libc::c_int;
            // SAFETY: TUNSETVNETHDRSZ reads an int that lives through the call.
            check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ, &raw const size) }).map_err(
                |source| TapError::Setup { doing: "set the header of", name: name.clone(), source },
            )?;
            queues.push(file);
        }
        Ok(Self { queues })
    }

    /// The device's name.
    ///
    /// # Errors
    /// [`TapError::Setup`].
    pub fn name(&self) -> Result<String, TapError> {
        const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
        let mut request = request("");
        let fd = self.queues.first().map_or(-1, AsRawFd::as_raw_fd);
        // SAFETY: TUNGETIFF writes an ifreq that lives through the call.
        check(unsafe { libc::ioctl(fd, TUNGETIFF, &raw mut request) }).map_err(|source| TapError::Setup {
            doing: "name",
            name: "?".to_owned(),
            source,
        })?;
        Ok(name_of(&request))
    }
}

impl Cable for Tap {
    fn features(&self) -> u64 {
        1 << ids::VIRTIO_NET_F_CSUM
            | 1 << ids::VIRTIO_NET_F_GUEST_CSUM
            | 1 << ids::VIRTIO_NET_F_GUEST_TSO4
            | 1 << ids::VIRTIO_NET_F_GUEST_TSO6
            | 1 << ids::VIRTIO_NET_F_GUEST_ECN
            | 1 << ids::VIRTIO_NET_F_HOST_TSO4
            | 1 << ids::VIRTIO_NET_F_HOST_TSO6
            | 1 << ids::VIRTIO_NET_F_HOST_ECN
    }

    fn pairs(&self) -> u16 {
        self.queues.len() as u16
    }

    fn port(&self, index: u16) -> io::Result<Box<dyn Port>> {
        let file = self.queues.get(usize::from(index)).ok_or(io::ErrorKind::NotFound)?;
        Ok(Box::new(TapPort(file.try_clone()?)))
    }

    fn use_pairs(&self, count: u16) -> io::Result<()> {
        if self.queues.len() < 2 {
            return Ok(());
        }
        for (index, file) in self.queues.iter().enumerate() {
            let mut request = request("");
            let flag =
                if index < usize::from(count) { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
            request.ifr_ifru.ifru_flags = flag as libc::c_short;
            // SAFETY: TUNSETQUEUE reads an ifreq that lives through the call.
            match check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETQUEUE, &raw const request) }) {
                // It is as it shall be.
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
                result => result?,
            }
        }
        Ok(())
    }
}

struct TapPort(File);

impl Port for TapPort {
    fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    fn set_features(&mut self, features: u64) -> io::Result<()> {
        let has = |bit: u32| features >> bit & 1 != 0;
        let mut offload = 0;
        for (bit, flag) in [
            (ids::VIRTIO_NET_F_GUEST_CSUM, TUN_F_CSUM),
            (ids::VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4),
            (ids::VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6),
            (ids::VIRTIO_NET_F_GUEST_ECN, TUN_F_TSO_ECN),
        ] {
            if has(bit) {
                offload |= flag;
            }
        }
        if offload & TUN_F_CSUM == 0 {
            offload = 0;
        }
        // SAFETY: TUNSETOFFLOAD takes a number.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(offload)) })
    }

    fn send(&mut self, dma: &Dma, packet: &mut Buffers) -> io::Result<bool> {
        let _hold = dma.hold(packet.as_slice());
        let iovecs = dma.iovecs(packet.as_slice());
        // SAFETY: the iovecs are guest memory, which `dma` keeps mapped; the host only reads it.
        let n = unsafe {
            libc::writev(self.0.as_raw_fd(), iovecs.as_ptr(), iovecs.len().min(1024) as libc::c_int)
        };
        if n >= 0 {
            return Ok(true);
        }
        match io::Error::last_os_error() {
            // Switched off, or removed.
            e if matches!(e.raw_os_error(), Some(libc::EBADFD | libc::ENODEV)) => Err(e),
            // A packet that the host does not like, or has no room for.
            _ => Ok(false),
        }
    }

    fn receive(&mut self, dma: &Dma, room: &Buffers) -> io::Result<Option<Received>> {
        let _hold = dma.hold(room.as_slice());
        let iovecs = dma.iovecs(room.as_slice());
        loop {
            // SAFETY: the iovecs are guest memory, which `dma` keeps mapped and nobody has references to.
            let n = unsafe {
                libc::readv(self.0.as_raw_fd(), iovecs.as_ptr(), iovecs.len().min(1024) as libc::c_int)
            };
            match u64::try_from(n) {
                Ok(n) => {
                    for buffer in room.clone().take(n).as_slice() {
                        dma.written(buffer.start, buffer.len.into());
                    }
                    return Ok(Some(Received::Packet(n)));
                }
                Err(_) => match io::Error::last_os_error() {
                    e if e.kind() == io::ErrorKind::Interrupted => {}
                    e if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                    // Switched off for now.
                    e if e.raw_os_error() == Some(libc::EIO) => return Ok(None),
                    e => return Err(e),
                },
            }
        }
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The number of a network interface of this namespace; 0 if there is none.
fn interface_index(name: &str) -> libc::c_uint {
    // SAFETY: it reads a string, which ends with NUL in the array's last byte at the latest.
    unsafe { libc::if_nametoindex(request_name(name).as_ptr().cast()) }
}

fn request_name(name: &str) -> [u8; libc::IFNAMSIZ] {
    let mut bytes = [0; libc::IFNAMSIZ];
    for (byte, new) in bytes.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
        *byte = new;
    }
    bytes
}

fn request(name: &str) -> libc::ifreq {
    // SAFETY: all-zero bytes are an ifreq.
    let mut request: libc::ifreq = unsafe { MaybeUninit::zeroed().assume_init() };
    for (character, byte) in request.ifr_name.iter_mut().zip(request_name(name)) {
        *character = byte as libc::c_char;
    }
    request
}

fn name_of(request: &libc::ifreq) -> String {
    let bytes: Vec<u8> = request.ifr_name.iter().map(|&c| c as u8).take_while(|&b| b != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn control_socket() -> io::Result<OwnedFd> {
    // SAFETY: it takes numbers; the result is a new descriptor of ours.
    unsafe {
        let fd = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}

fn set_up(socket: &OwnedFd, name: &str) -> io::Result<()> {
    let mut request = request(name);
    // SAFETY: SIOCGIFFLAGS writes, SIOCSIFFLAGS reads an ifreq that lives through the call; the first fills the flags.
    unsafe {
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request))?;
        request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short;
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request))
    }
}

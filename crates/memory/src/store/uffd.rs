//! userfaultfd (the kernel's `Documentation/admin-guide/mm/userfaultfd.rst`): who touches a missing page of a
//! registered range waits until [`Userfault`] fills it.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use linux_raw_sys::general as sys;

use crate::{HostVirtAddr, PAGE_SIZE};

/// `UFFD_USER_MODE_ONLY`: faults from inside the kernel are not handled but fail.
const USER_MODE_ONLY: libc::c_int = 1;
/// `UFFD_FEATURE_MOVE` (Linux 6.8).
const FEATURE_MOVE: u64 = 1 << 16;
/// `UFFDIO_REGISTER_MODE_MISSING`.
const MODE_MISSING: u64 = 1;
/// `UFFD_EVENT_PAGEFAULT`.
const EVENT_PAGEFAULT: u8 = 0x12;
/// Bytes of a message, and where the address of a page fault is in it.
const MESSAGE: usize = 32;
const MESSAGE_ADDRESS: usize = 16;
/// Messages that are read at once.
const MESSAGES: usize = 16;

/// `USERFAULTFD_IOC_NEW` of /dev/userfaultfd: `_IO(0xAA, 0x00)`.
const NEW: u32 = 0xAA << 8;
const API: u32 = read_write::<sys::uffdio_api>(0x3f);
const REGISTER: u32 = read_write::<sys::uffdio_register>(0x00);
/// `_IOR`, although the kernel reads it.
const WAKE: u32 = 2 << 30 | (size_of::<sys::uffdio_range>() as u32) << 16 | 0xAA << 8 | 0x02;
const COPY: u32 = read_write::<sys::uffdio_copy>(0x03);
const ZEROPAGE: u32 = read_write::<sys::uffdio_zeropage>(0x04);
const MOVE: u32 = read_write::<sys::uffdio_move>(0x05);

const fn read_write<T>(number: u32) -> u32 {
    3 << 30 | (size_of::<T>() as u32) << 16 | 0xAA << 8 | number
}

/// A userfaultfd that may move pages.
pub(super) struct Userfault {
    fd: OwnedFd,
    kernel_faults: bool,
}

impl Userfault {
    /// Opens one, for all faults if that is wanted and the host allows it, and else for those of user mode.
    pub(super) fn open(all: bool) -> io::Result<Self> {
        let (fd, kernel_faults) = match all.then(|| new_fd(0).or_else(|_| new_fd_of_device())) {
            Some(Ok(fd)) => (fd, true),
            _ => (new_fd(USER_MODE_ONLY)?, false),
        };
        let this = Self { fd, kernel_faults };
        let mut api = sys::uffdio_api { api: 0xAA, features: FEATURE_MOVE, ioctls: 0 };
        this.call(API, &mut api)?;
        Ok(this)
    }

    /// Whether faults of system calls on guest memory are handled too.
    pub(super) fn kernel_faults(&self) -> bool {
        self.kernel_faults
    }

    /// Missing pages of the range are reported from now on.
    pub(super) fn register(&self, start: HostVirtAddr, len: u64) -> io::Result<()> {
        let range = sys::uffdio_range { start: start.0, len };
        self.call(REGISTER, &mut sys::uffdio_register { range, mode: MODE_MISSING, ioctls: 0 })
    }

    /// Takes the page at `from` away from there, whole, and puts it to the missing page `to`. Nobody can write it
    /// between.
    pub(super) fn move_page(&self, from: HostVirtAddr, to: HostVirtAddr) -> io::Result<()> {
        let mut argument = sys::uffdio_move { dst: to.0, src: from.0, len: PAGE_SIZE, mode: 0, move_: 0 };
        self.call(MOVE, &mut argument)
    }

    /// Fills the missing page at `to` with `data`, and wakes who waits for it.
    pub(super) fn copy(&self, to: HostVirtAddr, data: &[u8; PAGE_SIZE as usize]) -> io::Result<()> {
        let src = data.as_ptr() as u64;
        self.call(COPY, &mut sys::uffdio_copy { dst: to.0, src, len: PAGE_SIZE, mode: 0, copy: 0 })
    }

    /// Maps the kernel's page of zeros to missing pages, up to the first that is not missing, and wakes who waits.
    /// Returns how many bytes that were.
    pub(super) fn zero(&self, start: HostVirtAddr, len: u64) -> io::Result<u64> {
        let range = sys::uffdio_range { start: start.0, len };
        let mut argument = sys::uffdio_zeropage { range, mode: 0, zeropage: 0 };
        match self.call(ZEROPAGE, &mut argument) {
            Ok(()) => Ok(len),
            Err(e) => match u64::try_from(argument.zeropage) {
                Ok(done) if done > 0 => Ok(done),
                _ => Err(e),
            },
        }
    }

    /// Wakes who waits for the page at `page`; he looks again.
    pub(super) fn wake(&self, page: HostVirtAddr) -> io::Result<()> {
        self.call(WAKE, &mut sys::uffdio_range { start: page.0, len: PAGE_SIZE })
    }

    /// Calls `fault` with the page of each fault that is waiting to be handled, without waiting for more.
    pub(super) fn read(&self, mut fault: impl FnMut(HostVirtAddr)) -> io::Result<()> {
        let mut messages = [0u64; MESSAGES * MESSAGE / 8];
        let room = size_of_val(&messages);
        // SAFETY: the call writes at most `room` bytes to the array.
        let n = unsafe { libc::read(self.fd.as_raw_fd(), messages.as_mut_ptr().cast(), room) };
        let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
        for message in messages[..n / 8].chunks_exact(MESSAGE / 8) {
            if message[0] as u8 == EVENT_PAGEFAULT {
                fault(HostVirtAddr(message[MESSAGE_ADDRESS / 8]).page_base());
            }
        }
        Ok(())
    }

    fn call<T>(&self, request: u32, argument: &mut T) -> io::Result<()> {
        // SAFETY: `argument` is the structure of `request`. What the kernel does to memory: it fills missing pages of
        // registered ranges and takes pages away from them, both only where `Store` asks for it.
        match unsafe { libc::ioctl(self.fd.as_raw_fd(), request as libc::Ioctl, argument) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn new_fd(flags: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: the call takes flags and no pointer.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags | libc::O_CLOEXEC | libc::O_NONBLOCK) };
    owned(fd)
}

fn new_fd_of_device() -> io::Result<OwnedFd> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/userfaultfd")?;
    // SAFETY: the call takes flags and no pointer.
    let fd =
        unsafe { libc::ioctl(device.as_raw_fd(), NEW as libc::Ioctl, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    owned(fd.into())
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    match libc::c_int::try_from(fd) {
        // SAFETY: the call returned a new descriptor that nobody else owns.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

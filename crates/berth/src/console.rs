//! The serial console: from standard input to the guest, and from the guest to standard output.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

use crate::escape::{EscapeFilter, Key};

/// Most bytes of typing that wait for a guest that does not read; more is dropped.
const MAX_WAITING: usize = 64 << 10;
/// How long to wait on a terminal before input is offered again that the guest did not take.
const RETRY: Duration = Duration::from_millis(5);
/// How long to wait at a time until the guest takes what comes from a pipe.
const PATIENCE: Duration = Duration::from_secs(1);

/// Who takes input and keys.
pub trait Guest {
    /// Takes some or all of `bytes`; returns how many.
    fn input(&mut self, bytes: &[u8]) -> usize;
    /// Waits until [`Self::input`] takes something, at most `timeout`.
    fn wait_for_room(&mut self, timeout: Duration);
    /// Does what a key of Berth's asks.
    fn key(&mut self, key: Key);
}

/// Feeds standard input to the guest until its end. On a terminal `keys` takes Berth's keys out; a pipe is passed on
/// byte by byte, as slowly as the guest takes it.
///
/// # Errors
/// What the host says about standard input.
pub fn forward_input(keys: Option<EscapeFilter>, guest: &mut impl Guest) -> io::Result<()> {
    let mut filter = keys;
    let mut waiting: Vec<u8> = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let taken = guest.input(&waiting).min(waiting.len());
        waiting.drain(..taken);
        // A terminal is read even while the guest takes nothing, or its keys could not end such a guest.
        let read = if waiting.is_empty() || filter.is_some() {
            poll(libc::STDIN_FILENO, libc::POLLIN, (!waiting.is_empty()).then_some(RETRY))?
        } else {
            guest.wait_for_room(PATIENCE);
            false
        };
        if !read {
            continue;
        }
        let n = match read_input(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => continue,
            Err(e) => return Err(e),
        };
        let input = buffer.get(..n).unwrap_or_default();
        match &mut filter {
            Some(filter) => {
                for key in filter.feed(input, &mut waiting) {
                    guest.key(key);
                }
                waiting.truncate(MAX_WAITING);
            }
            None => waiting.extend_from_slice(input),
        }
    }
    while !waiting.is_empty() {
        let taken = guest.input(&waiting).min(waiting.len());
        waiting.drain(..taken);
        if !waiting.is_empty() {
            guest.wait_for_room(PATIENCE);
        }
    }
    Ok(())
}

/// Reads standard input, without a buffer of the standard library's; 0 at its end.
///
/// # Errors
/// What the host says: [`io::ErrorKind::WouldBlock`] where another program that shares it made it non-blocking.
pub fn read_input(buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        // SAFETY: pointer and length are those of one live buffer.
        let n = unsafe { libc::read(libc::STDIN_FILENO, buffer.as_mut_ptr().cast(), buffer.len()) };
        if let Ok(n) = usize::try_from(n) {
            return Ok(n);
        }
        match io::Error::last_os_error() {
            e if e.kind() == io::ErrorKind::Interrupted => {}
            // A terminal whose other end is gone says so.
            e if e.raw_os_error() == Some(libc::EIO) => return Ok(0),
            e => return Err(e),
        }
    }
}

/// Waits until a descriptor that does not block takes output.
///
/// # Errors
/// What the host says.
pub fn wait_for_output(fd: BorrowedFd<'_>) -> io::Result<()> {
    poll(fd.as_raw_fd(), libc::POLLOUT, None).map(|_| ())
}

/// Waits for standard input that does not block.
///
/// # Errors
/// What the host says.
pub fn wait_for_input() -> io::Result<()> {
    poll(libc::STDIN_FILENO, libc::POLLIN, None).map(|_| ())
}

/// Standard output without a buffer, for what the guest prints. When its reader is gone the guest goes on.
pub struct Output(Option<File>);

impl Output {
    /// # Errors
    /// What the host says when standard output is closed.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Some(File::from(io::stdout().as_fd().try_clone_to_owned()?))))
    }

    /// Whether its reader is gone.
    pub fn is_closed(&self) -> bool {
        self.0.is_none()
    }
}

impl Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let Some(file) = &mut self.0 else { return Ok(data.len()) };
        loop {
            match file.write(data) {
                // Another program that shares the terminal or pipe may have made it non-blocking.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    poll(file.as_raw_fd(), libc::POLLOUT, None)?;
                }
                Err(e) if e.kind() == io::ErrorKind::BrokenPipe || e.raw_os_error() == Some(libc::EIO) => {
                    tracing::warn!(
                        "the reader of the console's output is gone; the guest runs on without it"
                    );
                    self.0 = None;
                    return Ok(data.len());
                }
                result => return result,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Waits until `fd` is ready for `events`, or has ended; `false` after `timeout` or a signal.
fn poll(fd: RawFd, events: libc::c_short, timeout: Option<Duration>) -> io::Result<bool> {
    let mut fd = libc::pollfd { fd, events, revents: 0 };
    let timeout = timeout.map_or(-1, |t| t.as_millis() as libc::c_int);
    // SAFETY: the pointer is to one live pollfd, as the count says.
    match unsafe { libc::poll(&raw mut fd, 1, timeout) } {
        -1 => match io::Error::last_os_error() {
            e if e.kind() == io::ErrorKind::Interrupted => Ok(false),
            e => Err(e),
        },
        n => Ok(n > 0),
    }
}

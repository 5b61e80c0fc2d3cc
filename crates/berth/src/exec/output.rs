//! An output of the command: written by a thread of its own, and no faster asked for than it is written.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

use berth_agent_protocol::{FromHost, Stream};

use super::session::Line;
use crate::{console, log};

/// Bytes of an output that may be under way to its reader.
pub const CREDIT: u32 = 256 << 10;
/// New credit is given in portions of at least this.
const GRANT: u32 = CREDIT / 4;

/// Where the command's output goes.
pub struct Output {
    stream: Stream,
    parts: Sender<Vec<u8>>,
    thread: JoinHandle<()>,
    /// Bytes that the guest may send.
    credit: u32,
    /// Credit that the thread gave since.
    granted: Receiver<u32>,
}

impl Output {
    /// Starts the thread, which writes to `to`.
    ///
    /// # Errors
    /// What the host says.
    pub fn start(stream: Stream, to: BorrowedFd<'_>, line: Line) -> io::Result<Self> {
        let file = File::from(to.try_clone_to_owned()?);
        let (parts, received) = channel();
        let (grant, granted) = channel();
        let writer = Writer { stream, file, line, grant };
        let name = if stream == Stream::Stderr { "stderr" } else { "stdout" };
        let thread = thread::Builder::new().name(name.to_owned()).spawn(move || writer.run(&received))?;
        Ok(Self { stream, parts, thread, credit: CREDIT, granted })
    }

    /// Which it is.
    pub fn stream(&self) -> Stream {
        self.stream
    }

    /// Takes output; `false` if the guest had no credit for it.
    pub fn take(&mut self, bytes: Vec<u8>) -> bool {
        self.credit = self.granted.try_iter().fold(self.credit, u32::saturating_add);
        let Some(left) = u32::try_from(bytes.len()).ok().and_then(|n| self.credit.checked_sub(n)) else {
            return false;
        };
        self.credit = left;
        // The thread takes everything as long as this lives.
        let _ = self.parts.send(bytes);
        true
    }

    /// Waits until everything is written.
    pub fn finish(self) {
        drop(self.parts);
        // A thread that panicked has said so.
        let _ = self.thread.join();
    }
}

/// The thread.
struct Writer {
    stream: Stream,
    file: File,
    line: Line,
    grant: Sender<u32>,
}

impl Writer {
    fn run(mut self, parts: &Receiver<Vec<u8>>) {
        let mut written = 0;
        let mut is_open = true;
        for part in parts {
            if is_open && let Err(e) = self.write(&part) {
                is_open = false;
                self.line.say(&FromHost::CloseOutput(self.stream));
                // As usual for a reader that went away, or a terminal: the command hears of it.
                if e.kind() != io::ErrorKind::BrokenPipe && e.raw_os_error() != Some(libc::EIO) {
                    log::message(&format!("cannot write the command's output: {e}"));
                }
            }
            written += part.len() as u32;
            if is_open && written >= GRANT {
                // First here, then there: the guest may use it at once.
                let _ = self.grant.send(written);
                self.line.say(&FromHost::Credit(self.stream, written));
                written = 0;
            }
        }
    }

    fn write(&mut self, mut part: &[u8]) -> io::Result<()> {
        while !part.is_empty() {
            match self.file.write(part) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => part = part.get(n..).unwrap_or_default(),
                // Another program that shares the terminal or pipe may have made it non-blocking.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    console::wait_for_output(self.file.as_fd())?
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

//! Reads, writes and flushes through io_uring (io_uring(7)).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, opcode, squeue};

/// What one request needs as long as the kernel works on it.
struct Slot<T> {
    owner: T,
    expected: u64,
    /// Where the kernel finds the buffers' addresses: they stay at their place.
    _iovecs: Box<[libc::iovec]>,
}

/// A request for the ring.
pub enum Transfer {
    /// Read into the buffers.
    Read,
    /// Write the buffers; durably if set.
    Write {
        /// Whether the data must be durable at completion.
        durable: bool,
    },
    /// Make durable what was written.
    Flush,
}

/// Requests to one file, each with something of type `T` that is given back with its result. Dropping it waits for all.
pub struct Ring<T> {
    ring: IoUring,
    file: File,
    slots: Vec<Option<Slot<T>>>,
    free: Vec<usize>,
    /// Entries that are not submitted yet.
    waiting: usize,
}

impl<T> Ring<T> {
    /// A ring for up to `entries` requests at a time to `file`.
    ///
    /// # Errors
    /// What the host says: it may not have io_uring, or forbid it.
    pub fn new(file: File, entries: u16) -> io::Result<Self> {
        let ring = IoUring::builder().setup_single_issuer().build(entries.into()).or_else(|_| {
            // Kernels before 6.0 do not know the flag.
            IoUring::new(entries.into())
        })?;
        let slots = (0..entries).map(|_| None).collect();
        Ok(Self { ring, file, slots, free: (0..usize::from(entries)).collect(), waiting: 0 })
    }

    /// Becomes readable when something is done.
    pub fn fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }

    /// How many requests are being done.
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether the kernel did not take all requests yet: [`Self::submit`] again.
    pub fn is_behind(&self) -> bool {
        self.waiting > 0
    }

    /// Whether nothing is being done.
    pub fn is_idle(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Adds a request; [`Self::submit`] sends it. Gives `owner` back when there is no room.
    ///
    /// # Safety
    /// The memory that `iovecs` name stays mapped until the request's completion was returned, and nobody has
    /// references to it.
    pub unsafe fn add(
        &mut self,
        kind: Transfer,
        iovecs: Vec<libc::iovec>,
        offset: u64,
        owner: T,
    ) -> Result<(), T> {
        let Some(index) = self.free.pop() else { return Err(owner) };
        let fd = Fd(self.file.as_raw_fd());
        let iovecs = iovecs.into_boxed_slice();
        let (start, count) = (iovecs.as_ptr(), iovecs.len() as u32);
        let expected = iovecs.iter().map(|v| v.iov_len as u64).sum();
        let entry: squeue::Entry = match kind {
            Transfer::Read => opcode::Readv::new(fd, start, count).offset(offset).build(),
            Transfer::Write { durable } => {
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                opcode::Writev::new(fd, start, count).offset(offset).rw_flags(flags as _).build()
            }
            Transfer::Flush => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
        };
        self.slots[index] = Some(Slot { owner, expected, _iovecs: iovecs });
        let entry = entry.user_data(index as u64);
        // SAFETY: the buffers stay as the caller promises; the addresses of them stay in the slot, and the file in
        // `self`, until the completion. A queue as long as there are slots has room.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_err() {
            self.free.push(index);
            if let Some(slot) = self.slots[index].take() {
                return Err(slot.owner);
            }
        }
        self.waiting += 1;
        Ok(())
    }

    /// Hands all added requests to the kernel.
    ///
    /// # Errors
    /// What the host says.
    pub fn submit(&mut self) -> io::Result<()> {
        while self.waiting > 0 {
            match self.ring.submit() {
                Ok(n) => self.waiting = self.waiting.saturating_sub(n),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // The kernel is short of memory or waits for completions to be taken: those are looked for next.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => return Ok(()),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// A request that is done: its owner, and whether all of it was done.
    pub fn next_done(&mut self) -> Option<(T, io::Result<()>)> {
        let done = self.ring.completion().next()?;
        let index = usize::try_from(done.user_data()).ok()?;
        let slot = self.slots.get_mut(index)?.take()?;
        self.free.push(index);
        let result = match u64::try_from(done.result()) {
            Ok(n) if n == slot.expected => Ok(()),
            Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(_) => Err(io::Error::from_raw_os_error(-done.result())),
        };
        Some((slot.owner, result))
    }

    /// Waits until something is done.
    ///
    /// # Errors
    /// What the host says.
    pub fn wait(&mut self) -> io::Result<()> {
        match self.ring.submit_and_wait(1) {
            Ok(n) => {
                self.waiting = self.waiting.saturating_sub(n);
                Ok(())
            }
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => Ok(()),
            Err(e) => Err(e),
        }
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        while !self.is_idle() {
            if self.wait().is_err() {
                // The kernel may still write into the slots' memory: it must not be freed.
                std::mem::forget(std::mem::take(&mut self.slots));
                return;
            }
            while self.next_done().is_some() {}
        }
    }
}

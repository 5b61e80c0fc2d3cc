//! Threads of devices, and what they wait for.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tracing::error;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Most events that one look takes.
const BATCH: usize = 32;
/// The token of the end.
const STOP: u64 = u64::MAX;

/// Descriptors that a thread waits for, each with a token of its choice.
pub struct Poll {
    epoll: Epoll,
}

impl Poll {
    /// Waits for `fd` to be readable too.
    ///
    /// # Errors
    /// What the host says.
    pub fn add(&self, fd: RawFd, token: u64) -> io::Result<()> {
        self.add_for(fd, token, EventSet::IN)
    }

    /// Waits for `events` of `fd` too.
    ///
    /// # Errors
    /// What the host says.
    pub fn add_for(&self, fd: RawFd, token: u64, events: EventSet) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, token))
    }

    /// Waits until something is ready, at most `timeout`; `None` when the thread is to end.
    ///
    /// # Errors
    /// What the host says.
    pub fn wait(&self, timeout: Option<Duration>) -> io::Result<Option<Vec<(u64, EventSet)>>> {
        let mut events = [EpollEvent::default(); BATCH];
        let timeout = timeout.map_or(-1, |t| i32::try_from(t.as_millis()).unwrap_or(i32::MAX));
        let n = match self.epoll.wait(timeout, &mut events) {
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
            Err(e) => return Err(e),
        };
        let mut ready = Vec::with_capacity(n);
        for event in &events[..n] {
            if event.data() == STOP {
                return Ok(None);
            }
            ready.push((event.data(), event.event_set()));
        }
        Ok(Some(ready))
    }
}

/// A thread of a device. Dropping it ends the thread and waits for that.
pub struct Worker {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts a thread that runs `run` until [`Poll::wait`] says that it is to end. An error of `run` is logged.
    ///
    /// # Errors
    /// What the host says.
    pub fn spawn(
        name: String,
        run: impl FnOnce(Poll) -> io::Result<()> + Send + 'static,
    ) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let epoll = Epoll::new()?;
        epoll.ctl(ControlOperation::Add, stop.as_raw_fd(), EpollEvent::new(EventSet::IN, STOP))?;
        let poll = Poll { epoll };
        let device = name.clone();
        let thread = thread::Builder::new().name(name).spawn(move || {
            if let Err(e) = run(poll) {
                error!("{device}: the device stands still: {e}");
            }
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It cannot fail: the counter is 0 or 1.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            // A panic was reported by the thread.
            let _ = thread.join();
        }
    }
}

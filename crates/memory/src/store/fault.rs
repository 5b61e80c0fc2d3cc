//! The thread that fills missing pages.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Mark, Shared};
use crate::{HostVirtAddr, PAGE_SHIFT, PAGE_SIZE};

/// Pages that are filled with zeros at once, when one that was never there is touched. They cost no memory before they
/// are written, and the next of them no fault of this kind.
const ZEROS: usize = 64;
/// How long to wait when the host has no memory for a page.
const NO_MEMORY: Duration = Duration::from_millis(1);

/// The thread; dropping this ends it.
pub(super) struct FaultHandler {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl FaultHandler {
    pub(super) fn start(shared: Arc<Shared>, name: String) -> io::Result<Self> {
        let stop = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let stopped = stop.clone();
        let thread = thread::Builder::new().name(name).spawn(move || {
            if let Err(e) = serve(&shared, &stopped) {
                // Every thread that touches a missing page would wait for ever.
                tracing::error!("page faults of guest memory cannot be handled any more: {e}");
                std::process::abort();
            }
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for FaultHandler {
    fn drop(&mut self) {
        // An eventfd takes many more than one.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(shared: &Shared, stop: &EventFd) -> io::Result<()> {
    let mut result = Ok(());
    loop {
        let descriptor = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut ready = [descriptor(shared.userfault.as_fd().as_raw_fd()), descriptor(stop.as_raw_fd())];
        // SAFETY: the array has as many entries as the call is told.
        if unsafe { libc::poll(ready.as_mut_ptr(), ready.len() as libc::nfds_t, -1) } < 0 {
            match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => continue,
                e => return Err(e),
            }
        }
        if ready[1].revents != 0 {
            return Ok(());
        }
        let read = shared.userfault.read(|host| {
            let start = Instant::now();
            if result.is_ok() {
                result = resolve(shared, host, start);
            }
        });
        match read {
            Err(e) if !matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return Err(e);
            }
            _ => {}
        }
        std::mem::replace(&mut result, Ok(()))?;
    }
}

/// Fills the page at `host`, whoever waits for it.
fn resolve(shared: &Shared, host: HostVirtAddr, start: Instant) -> io::Result<()> {
    let Some((page, left)) = shared.page_at(host) else {
        // Nobody touches missing pages of the staging area.
        return Err(io::Error::other(format!("a fault at {host}, which is not guest memory")));
    };
    let mut state = shared.state.lock();
    let filled = match shared.mark(page) {
        mark @ (Mark::None | Mark::Zero) => {
            let mut pages = 1;
            while pages < left.min(ZEROS - page % ZEROS) && shared.mark(page + pages) == Mark::None {
                pages += 1;
            }
            let filled = fill(|| shared.userfault.zero(host, (pages as u64) << PAGE_SHIFT).map(drop))?;
            if filled == Filled::There {
                // What filled it has not woken those who came later.
                fill(|| shared.userfault.wake(host))?;
            }
            if mark == Mark::None {
                shared.zero_faults.fetch_add(1, Ordering::Relaxed);
                return Ok(());
            }
            filled
        }
        Mark::Moving(place) => match shared.staged(place) {
            Some(staged) => fill(|| shared.userfault.copy(host, staged))?,
            None => Filled::There,
        },
        Mark::Content(id) => {
            let mut bytes = [0; PAGE_SIZE as usize];
            state.contents.read(id, &mut bytes)?;
            fill(|| shared.userfault.copy(host, &bytes))?
        }
    };
    match filled {
        Filled::Now => shared.set_mark(&mut state, page, Mark::None),
        Filled::Gone => return Ok(()),
        // Nobody else fills pages.
        Filled::There => {
            return Err(io::Error::other(format!("the stored page at {host} is in memory as well")));
        }
    }
    drop(state);
    shared.refaults.fetch_add(1, Ordering::Relaxed);
    shared.latency.add(start.elapsed());
    Ok(())
}

/// What came of filling a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Filled {
    Now,
    /// It was there already.
    There,
    /// Its mapping is not there any more: the VM ends.
    Gone,
}

/// Calls `how` until the host has memory and time for it.
fn fill(mut how: impl FnMut() -> io::Result<()>) -> io::Result<Filled> {
    loop {
        match how() {
            Ok(()) => return Ok(Filled::Now),
            Err(e) => match e.raw_os_error() {
                Some(libc::EAGAIN) => thread::yield_now(),
                Some(libc::ENOMEM) => thread::sleep(NO_MEMORY),
                Some(libc::EEXIST) => return Ok(Filled::There),
                Some(libc::ENOENT | libc::ESRCH) => return Ok(Filled::Gone),
                _ => return Err(e),
            },
        }
    }
}

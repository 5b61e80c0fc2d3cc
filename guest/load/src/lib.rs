//! The load of the guests of `berth rehearse`: keeps all vCPUs as busy as its kind says, and tells the host over vsock
//! how much it has done.
//!
//! ```text
//!   kernel command line: berth.load=cpu ─► init starts this instead of a shell
//!                                            ├─ a worker for each vCPU (work): units, errors
//!   berth rehearse ─► vsock port 1025 ──────►└─ an answerer for each connection (answer): the sums
//! ```
//!
//! Its answers are the small requests whose latency the host measures: one byte in, one line out, by a thread that
//! competes with the workers as a server's would.

mod answer;
mod work;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;

use berth_agent_protocol::load::{Count, Kind, PORT};
use berth_guest_agent::Listener;

/// The name that the program is called by to be the load.
pub const NAME: &str = "berth-load";

/// What the workers have done.
#[derive(Debug, Default)]
struct Tally {
    units: AtomicU64,
    errors: AtomicU64,
    /// Workers that have begun.
    ready: AtomicUsize,
}

impl Tally {
    fn count(&self, workers: usize) -> Count {
        Count {
            nanos: monotonic_nanos(),
            units: self.units.load(Ordering::Relaxed),
            errors: self.errors.load(Ordering::Relaxed),
            ready: self.ready.load(Ordering::Acquire) == workers,
        }
    }
}

/// Works and answers until something goes wrong.
///
/// # Errors
/// What the kernel says: there is no vsock, or no thread.
pub fn run(kind: Kind) -> io::Result<()> {
    // The name that `ps` shows, however it was started. Without it the load works as well.
    let _ = std::fs::write("/proc/self/comm", NAME);
    let listener = Listener::vsock(PORT)?;
    let workers = thread::available_parallelism()?.get();
    let tally = Arc::new(Tally::default());
    work::start(kind, workers, &tally)?;
    answer::serve(&listener, move || tally.count(workers))
}

fn monotonic_nanos() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: it fills the structure that the pointer is for; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

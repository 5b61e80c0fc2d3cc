//! Whether the thread of a vCPU runs at the moment, which a process may not ask directly: the clock of a thread's CPU time
//! stands still while it does not.

use std::sync::atomic::{AtomicI32, Ordering};

/// The thread of a vCPU.
#[derive(Debug, Default)]
pub(crate) struct Seat {
    /// Its number, or 0 while no thread runs the vCPU.
    thread: AtomicI32,
}

impl Seat {
    /// This thread runs the vCPU from now on, until it calls [`Self::leave`].
    pub(crate) fn take(&self) {
        // SAFETY: a call without arguments.
        let thread = unsafe { libc::gettid() };
        self.thread.store(thread, Ordering::Relaxed);
    }

    /// This thread runs the vCPU no more.
    pub(crate) fn leave(&self) {
        self.thread.store(0, Ordering::Relaxed);
    }

    /// The clock of the thread that runs the vCPU.
    pub(crate) fn clock(&self) -> Option<CpuClock> {
        let thread = self.thread.load(Ordering::Relaxed);
        (thread > 0).then_some(CpuClock(thread))
    }
}

/// The clock of a thread's CPU time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CpuClock(i32);

impl CpuClock {
    /// Nanoseconds, up to this moment if the thread runs; `None` if it has ended.
    pub(crate) fn now(self) -> Option<u64> {
        // What pthread_getcpuclockid(3) makes of a thread's number: CPUCLOCK_PERTHREAD_MASK and CPUCLOCK_SCHED
        // (include/linux/posix-timers_types.h).
        let clock = !self.0 << 3 | 4 | 2;
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: it fills the structure, or fails if there is no such thread in this process.
        let known = unsafe { libc::clock_gettime(clock, &raw mut time) } == 0;
        known.then(|| time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
    }
}

/// Whether one of these threads does not run.
pub(crate) fn somebody_stands_still(clocks: &[CpuClock]) -> bool {
    let before: Vec<_> = clocks.iter().map(|clock| clock.now()).collect();
    clocks.iter().zip(before).any(|(clock, before)| before.is_some() && clock.now() == before)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::mpsc::channel;
    use std::time::{Duration, Instant};

    #[test]
    fn the_clock_of_a_thread_goes_while_it_runs() {
        let seat = Seat::default();
        assert!(seat.clock().is_none());
        seat.take();
        // This thread runs whenever it looks.
        assert!(!somebody_stands_still(&[seat.clock().unwrap()]));
        seat.leave();
        assert!(seat.clock().is_none());
    }

    #[test]
    fn a_thread_that_waits_stands_still_and_one_that_ended_does_not_count() {
        let seat = Arc::new(Seat::default());
        let (end, ended) = channel::<()>();
        let (say, said) = channel();
        let theirs = seat.clone();
        let thread = std::thread::spawn(move || {
            theirs.take();
            say.send(()).unwrap();
            // Until the other side is dropped.
            let _ = ended.recv();
        });
        said.recv().unwrap();
        let clock = seat.clock().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while !somebody_stands_still(&[clock]) {
            assert!(Instant::now() < deadline, "it waits, and its clock goes");
        }
        drop(end);
        thread.join().unwrap();
        while clock.now().is_some() {
            assert!(Instant::now() < deadline, "it has ended, and has a clock");
        }
        assert!(!somebody_stands_still(&[clock]));
    }
}

//! The VM's monotonic clock.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Nanoseconds since the VM's clock started.
pub type Nanos = u64;

/// Nanoseconds in a second.
pub const NANOS_PER_SEC: Nanos = 1_000_000_000;

/// A monotonic clock that starts at 0 with the VM: the host's, or one that is set by hand so that tests (and
/// replays) are deterministic. Clones show the same time. The host's clock can be stopped for a while.
#[derive(Clone, Debug)]
pub struct Clock(Source);

#[derive(Clone, Debug)]
enum Source {
    Host(Arc<HostClock>),
    Manual(Arc<AtomicU64>),
}

#[derive(Debug)]
struct HostClock {
    start: Instant,
    /// How long it has been stopped in all.
    skipped: AtomicU64,
    /// What it shows while it is stopped; else [`RUNS`].
    stopped_at: AtomicU64,
}

const RUNS: Nanos = Nanos::MAX;

impl HostClock {
    fn running(&self) -> Nanos {
        (self.start.elapsed().as_nanos() as Nanos).saturating_sub(self.skipped.load(Ordering::SeqCst))
    }
    fn now(&self) -> Nanos {
        match self.stopped_at.load(Ordering::SeqCst) {
            RUNS => self.running(),
            at => at,
        }
    }
}

impl Clock {
    /// The host's monotonic clock, starting now.
    pub fn host() -> Self {
        let (skipped, stopped_at) = (AtomicU64::new(0), AtomicU64::new(RUNS));
        Self(Source::Host(Arc::new(HostClock { start: Instant::now(), skipped, stopped_at })))
    }
    /// A clock that stands at 0 until [`Self::set`].
    pub fn manual() -> Self {
        Self(Source::Manual(Arc::default()))
    }
    /// The time now.
    pub fn now(&self) -> Nanos {
        match &self.0 {
            Source::Host(clock) => clock.now(),
            Source::Manual(now) => now.load(Ordering::SeqCst),
        }
    }
    /// Moves a manual clock to `now`; the host's clock cannot be set, and stays.
    pub fn set(&self, now: Nanos) {
        if let Source::Manual(at) = &self.0 {
            at.store(now, Ordering::SeqCst);
        }
    }
    /// Lets the host's clock stand still. A manual clock does so by itself.
    pub(super) fn stop(&self) {
        if let Source::Host(clock) = &self.0 {
            clock.stopped_at.store(clock.now(), Ordering::SeqCst);
        }
    }
    /// Lets the host's clock go on from where it was stopped.
    pub(super) fn go_on(&self) {
        if let Source::Host(clock) = &self.0 {
            let stood = clock.running().saturating_sub(clock.now());
            // In this order: who reads in between sees the time at which it stood.
            clock.skipped.fetch_add(stood, Ordering::SeqCst);
            clock.stopped_at.store(RUNS, Ordering::SeqCst);
        }
    }
    /// Whether the clock only moves by [`Self::set`].
    pub fn is_manual(&self) -> bool {
        matches!(self.0, Source::Manual(_))
    }
    /// The host's instant at which this clock shows `at`; `None` for a manual clock, one that stands still, or a time
    /// too far away.
    pub(super) fn instant(&self, at: Nanos) -> Option<Instant> {
        match &self.0 {
            Source::Host(clock) if clock.stopped_at.load(Ordering::SeqCst) == RUNS => {
                let at = at.saturating_add(clock.skipped.load(Ordering::SeqCst));
                clock.start.checked_add(Duration::from_nanos(at))
            }
            Source::Host(_) => None,
            Source::Manual(_) => None,
        }
    }
}

/// How many ticks of a counter of `hz` there are in `nanos`, wrapping at 2^64.
pub(crate) fn ticks(nanos: Nanos, hz: u64) -> u64 {
    (u128::from(nanos) * u128::from(hz) / u128::from(NANOS_PER_SEC)) as u64
}

/// How many nanoseconds `ticks` of a counter of `hz` take, rounded up, at most `Nanos::MAX`.
pub(crate) fn nanos(ticks: u64, hz: u64) -> Nanos {
    let nanos = (u128::from(ticks) * u128::from(NANOS_PER_SEC)).div_ceil(u128::from(hz.max(1)));
    nanos.try_into().unwrap_or(Nanos::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversions_round_so_that_a_deadline_is_never_early() {
        for (t, hz) in [(1, 1_193_182), (65_536, 1_193_182), (10_u64.pow(12), 2_345_678_901)] {
            assert!(ticks(nanos(t, hz), hz) >= t);
            assert!(ticks(nanos(t, hz) - 1, hz) < t);
        }
        assert_eq!(nanos(u64::MAX, 1), Nanos::MAX);
    }

    #[test]
    fn the_hosts_clock_can_stand_still() {
        let clock = Clock::host();
        clock.stop();
        let at = clock.now();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!((clock.now(), clock.instant(at)), (at, None));
        clock.go_on();
        let (now, real) = (clock.now(), clock.instant(0).unwrap().elapsed().as_nanos() as Nanos);
        assert!(now >= at && real >= now, "{at} {now} {real}");
        let Source::Host(inner) = &clock.0 else { panic!("it is the host's") };
        assert!(inner.skipped.load(Ordering::SeqCst) >= 20_000_000);
        // Going on twice skips nothing more than the moment in between.
        clock.stop();
        clock.stop();
        clock.go_on();
        assert!(clock.now() >= now);
    }

    #[test]
    fn a_manual_clock_moves_only_when_set() {
        let clock = Clock::manual();
        let same = clock.clone();
        clock.set(5);
        assert_eq!(same.now(), 5);
    }
}

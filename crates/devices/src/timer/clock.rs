//! The VM's monotonic clock.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Nanoseconds since the VM's clock started.
pub type Nanos = u64;

/// Nanoseconds in a second.
pub const NANOS_PER_SEC: Nanos = 1_000_000_000;

/// A monotonic clock that starts at 0 with the VM: the host's, or one that is set by hand so that tests (and
/// replays) are deterministic. Clones show the same time.
#[derive(Clone, Debug)]
pub struct Clock(Source);

#[derive(Clone, Debug)]
enum Source {
    Host(Instant),
    Manual(Arc<AtomicU64>),
}

impl Clock {
    /// The host's monotonic clock, starting now.
    pub fn host() -> Self {
        Self(Source::Host(Instant::now()))
    }
    /// A clock that stands at 0 until [`Self::set`].
    pub fn manual() -> Self {
        Self(Source::Manual(Arc::default()))
    }
    /// The time now.
    pub fn now(&self) -> Nanos {
        match &self.0 {
            Source::Host(start) => start.elapsed().as_nanos() as Nanos,
            Source::Manual(now) => now.load(Ordering::SeqCst),
        }
    }
    /// Moves a manual clock to `now`; the host's clock cannot be set, and stays.
    pub fn set(&self, now: Nanos) {
        if let Source::Manual(at) = &self.0 {
            at.store(now, Ordering::SeqCst);
        }
    }
    /// Whether the clock only moves by [`Self::set`].
    pub fn is_manual(&self) -> bool {
        matches!(self.0, Source::Manual(_))
    }
    /// The host's instant at which this clock shows `at`; `None` for a manual clock or a time too far away.
    pub(super) fn instant(&self, at: Nanos) -> Option<Instant> {
        match &self.0 {
            Source::Host(start) => start.checked_add(Duration::from_nanos(at)),
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
    fn a_manual_clock_moves_only_when_set() {
        let clock = Clock::manual();
        let same = clock.clone();
        clock.set(5);
        assert_eq!(same.now(), 5);
    }
}

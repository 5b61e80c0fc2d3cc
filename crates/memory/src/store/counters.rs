//! What the store counts.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::Serialize;

/// How the cold store stands.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StoreCounters {
    /// Pages in the store now.
    pub stored_pages: u64,
    /// Those of them that are all zeros, and cost nothing.
    pub zero_pages: u64,
    /// Different contents of the others.
    pub distinct_pages: u64,
    /// What these take compressed, in bytes.
    pub compressed_bytes: u64,
    /// The memory for it, with holes, in bytes.
    pub memory_bytes: u64,
    /// What of it is in the store's file instead, with holes, in bytes.
    pub file_bytes: u64,
    /// Pages whose content was in the store already when they came, since the start.
    pub duplicates: u64,
    /// Pages that were taken out of the guest's memory since the start.
    pub evicted: u64,
    /// Pages that the guest or a device touched and got back, since the start.
    pub refaults: u64,
    /// First touches of pages that were not stored, since the store began.
    pub zero_faults: u64,
    /// How long handling of [`Self::refaults`] took.
    pub latency: Latency,
}

/// A histogram of times. Its buckets are at most half as wide again as the one before.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Latency {
    /// Bucket `2k` counts times below `1.5 * 2^k` ns, bucket `2k + 1` those below `2^(k+1)` ns, if none before does.
    pub buckets: Vec<u64>,
}

impl Latency {
    /// The time that `share` (0 to 1) of all stay below; 0 if there are none.
    pub fn quantile(&self, share: f64) -> Duration {
        let total: u64 = self.buckets.iter().sum();
        let wanted = (total as f64 * share).ceil() as u64;
        let mut seen = 0;
        for (bucket, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= wanted && seen > 0 {
                let power = 1u64 << (bucket / 2);
                return Duration::from_nanos(if bucket % 2 == 0 { power + power / 2 } else { power * 2 });
            }
        }
        Duration::ZERO
    }
}

/// Buckets up to half a minute.
const BUCKETS: usize = 70;

/// A [`Latency`] that is being counted.
pub(super) struct LatencyCounter([AtomicU64; BUCKETS]);

impl LatencyCounter {
    pub(super) fn new() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }

    pub(super) fn add(&self, time: Duration) {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).max(2);
        let power = ns.ilog2();
        let half = ns >> (power - 1) & 1;
        let bucket = (power as usize * 2 + half as usize).min(BUCKETS - 1);
        self.0[bucket].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> Latency {
        Latency { buckets: self.0.iter().map(|count| count.load(Ordering::Relaxed)).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_not_below_the_times() {
        let counter = LatencyCounter::new();
        (1..=1000).for_each(|us| counter.add(Duration::from_micros(us)));
        let latency = counter.get();
        for (share, us) in [(0.5, 500), (0.99, 990), (1.0, 1000)] {
            let quantile = latency.quantile(share).as_micros();
            assert!((us..us * 3 / 2 + 1).contains(&quantile), "{share}: {quantile}");
        }
        assert_eq!(Latency::default().quantile(0.5), Duration::ZERO);
    }
}

//! The time-stamp counter: its frequency, and conversion to the VM's clock.

use std::arch::x86_64::{__cpuid, __cpuid_count, _rdtsc};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use tracing::debug;

use super::{Clock, Nanos, nanos, ticks};

/// What CPUID may be wrong by, as a fraction of 1/100, before the measurement is believed instead.
const CPUID_TOLERANCE: u64 = 100;
/// Measuring time when CPUID gives a frequency: only to see that it is about right.
const CHECK: Duration = Duration::from_millis(1);
/// Measuring time when it does not. Both ends of the measurement are known to some 50 ns: 7 parts in a million.
const MEASURE: Duration = Duration::from_millis(15);

/// The host's TSC frequency in hertz: from CPUID (leaf 0x15, SDM volume 3, 20.7.3, or a hypervisor's timing leaf
/// 0x40000010) where a short measurement agrees with it, else measured. Takes up to 20 ms the first time.
pub fn tsc_hz() -> u64 {
    static HZ: OnceLock<u64> = OnceLock::new();
    *HZ.get_or_init(|| {
        let Some(cpuid) = cpuid_hz() else {
            let hz = measure(MEASURE);
            debug!("TSC measured at {hz} Hz");
            return hz;
        };
        let check = measure(CHECK);
        if cpuid.abs_diff(check) <= check / CPUID_TOLERANCE {
            debug!("TSC is {cpuid} Hz by CPUID");
            return cpuid;
        }
        let hz = measure(MEASURE);
        debug!("TSC measured at {hz} Hz; CPUID says {cpuid}");
        hz
    })
}

fn cpuid_hz() -> Option<u64> {
    /// Where hypervisors put their leaves, and the one that holds the TSC frequency in kHz.
    const HYPERVISOR: u32 = 0x4000_0000;
    const TIMING: u32 = 0x4000_0010;
    if __cpuid(0).eax >= 0x15 {
        let leaf = __cpuid_count(0x15, 0);
        let (denominator, numerator, crystal) = (leaf.eax, leaf.ebx, leaf.ecx);
        if denominator != 0 && numerator != 0 && crystal != 0 {
            return Some(u64::from(crystal) * u64::from(numerator) / u64::from(denominator));
        }
    }
    let under_hypervisor = __cpuid(1).ecx >> 31 != 0;
    if under_hypervisor && (TIMING..TIMING + 0x100).contains(&__cpuid(HYPERVISOR).eax) {
        let khz = __cpuid(TIMING).eax;
        return (khz != 0).then(|| u64::from(khz) * 1000);
    }
    None
}

/// Counts TSC ticks over `time` of the host's monotonic clock.
fn measure(time: Duration) -> u64 {
    let (start, start_tsc) = moment();
    std::thread::sleep(time);
    let (end, end_tsc) = moment();
    let elapsed = (end - start).as_nanos().max(1);
    (u128::from(end_tsc.wrapping_sub(start_tsc)) * 1_000_000_000 / elapsed) as u64
}

/// A point in time on both clocks: of several tries the one in which reading the clock took least, so that no
/// interruption lies in between.
fn moment() -> (Instant, u64) {
    let one = || {
        let before = read_tsc();
        let instant = Instant::now();
        let took = read_tsc().wrapping_sub(before);
        (took, instant, before.wrapping_add(took / 2))
    };
    let best = (0..16).map(|_| one()).fold(one(), |best, next| if next.0 < best.0 { next } else { best });
    (best.1, best.2)
}

/// The host's time-stamp counter.
pub fn read_tsc() -> u64 {
    // SAFETY: RDTSC exists on every x86-64 CPU and accesses no memory; Linux leaves it enabled for programs.
    unsafe { _rdtsc() }
}

/// The guest's TSC before its own offset: the host's counter, or one derived from a manual clock.
#[derive(Clone, Debug)]
pub struct TscClock {
    hz: u64,
    clock: Clock,
}

impl TscClock {
    /// A TSC of `hz` (from [`tsc_hz`] if `clock` is the host's) beside `clock`.
    pub fn new(hz: u64, clock: Clock) -> Self {
        Self { hz: hz.max(1), clock }
    }
    /// Ticks a second.
    pub fn hz(&self) -> u64 {
        self.hz
    }
    /// The counter now.
    pub fn now(&self) -> u64 {
        if self.clock.is_manual() { ticks(self.clock.now(), self.hz) } else { read_tsc() }
    }
    /// The time on the VM's clock at which the counter reaches `tsc`, or now if it has.
    pub fn deadline(&self, tsc: u64) -> Nanos {
        let left = tsc.saturating_sub(self.now());
        self.clock.now().saturating_add(nanos(left, self.hz))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frequency_agrees_with_a_longer_measurement() {
        let hz = tsc_hz();
        let measured = measure(Duration::from_millis(100));
        // Noisy neighbours may stretch the measurement; an error of units would be a thousandfold.
        assert!(hz.abs_diff(measured) < measured / 1000, "{hz} {measured}");
    }

    #[test]
    fn deadlines_of_a_manual_clock() {
        let clock = Clock::manual();
        let tsc = TscClock::new(2_000_000_000, clock.clone());
        clock.set(100);
        assert_eq!(tsc.now(), 200);
        assert_eq!(tsc.deadline(2_000), 1_000);
        assert_eq!(tsc.deadline(3), 100);
        assert_eq!(tsc.deadline(u64::MAX), 100 + nanos(u64::MAX - 200, 2_000_000_000));
    }
}

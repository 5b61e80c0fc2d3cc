//! kvmclock: nanoseconds since the VM started, as a line through one point that all vCPUs share.
//!
//! The guest computes `time = base + (((tsc - base_tsc) << shift) * multiplier >> 32)`. The base never changes,
//! so clocks of different vCPUs agree exactly and can be declared stable. While the VM stands still the guest's counter
//! does too, and the base moves on the host's counter only: what the guest was told stays right.

use std::arch::x86_64::_rdtsc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use berth_memory::GuestPhysAddr;

use super::shared;
use crate::cpu::Cpu;
use crate::fault::Guest;

const ENABLE: u64 = 1;
/// The clocks of all vCPUs agree (struct pvclock_vcpu_time_info, flags).
const TSC_STABLE: u8 = 1;
const NANOS: u128 = 1_000_000_000;
/// Size of struct pvclock_vcpu_time_info in bytes.
const TIME_INFO_SIZE: u64 = 32;

/// What a vCPU wrote into the clock's MSRs.
#[derive(Debug, Default)]
pub(super) struct Clock {
    system_time: u64,
    wall_clock: u64,
}

/// How to make nanoseconds from ticks: `(ticks << shift) * multiplier >> 32`, a negative shift being to the right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Scale {
    multiplier: u32,
    shift: i8,
}

impl Scale {
    /// For a counter of `hz` ticks a second; zero counts as one. The ticks are shifted until their rate is above
    /// 10^9 a second and at most twice that: the multiplier then has all its 32 bits.
    fn of(hz: u64) -> Self {
        let hz = u128::from(hz.max(1));
        let mut left = 0;
        while hz << left <= NANOS {
            left += 1;
        }
        let mut right = 0;
        while hz > (2 * NANOS) << right {
            right += 1;
        }
        let multiplier = (NANOS << (32 + right)) / (hz << left);
        Self { multiplier: u32::try_from(multiplier).unwrap_or(u32::MAX), shift: left - right }
    }

    fn nanos(self, ticks: u64) -> u64 {
        let ticks = u128::from(ticks);
        let shifted = if self.shift < 0 { ticks >> -self.shift } else { ticks << self.shift };
        ((shifted * u128::from(self.multiplier)) >> 32) as u64
    }

    /// So many ticks that [`Self::nanos`] of them is `nanos`, or just above it.
    fn ticks(self, nanos: u64) -> u64 {
        let shifted = (u128::from(nanos) << 32).div_ceil(u128::from(self.multiplier));
        let ticks = match self.shift {
            right @ ..0 => shifted << -right,
            left => shifted.div_ceil(1 << left),
        };
        u64::try_from(ticks).unwrap_or(u64::MAX)
    }
}

/// The moment when a VM's time began.
pub(super) struct TimeBase {
    /// The host's time-stamp counter then. It changes only while no vCPU runs.
    host_tsc: AtomicU64,
    scale: Scale,
}

impl TimeBase {
    pub(super) fn now(tsc_hz: u64) -> Self {
        Self { host_tsc: AtomicU64::new(host_tsc()), scale: Scale::of(tsc_hz) }
    }

    /// Time since then.
    pub(super) fn elapsed(&self) -> Duration {
        Duration::from_nanos(self.scale.nanos(host_tsc().wrapping_sub(self.host_tsc())))
    }

    /// The host's counter when it began, less what was skipped since.
    fn host_tsc(&self) -> u64 {
        self.host_tsc.load(Ordering::SeqCst)
    }

    /// `ticks` of the host's counter were no time of the VM.
    pub(super) fn skip(&self, ticks: u64) {
        self.host_tsc.fetch_add(ticks, Ordering::SeqCst);
    }

    /// Moves the beginning so that `nanos` have passed since then.
    pub(super) fn set(&self, nanos: u64) {
        self.host_tsc.store(host_tsc().wrapping_sub(self.scale.ticks(nanos)), Ordering::SeqCst);
    }
}

fn host_tsc() -> u64 {
    // SAFETY: every x86-64 CPU has RDTSC, and user code may execute it on every host that Berth supports.
    unsafe { _rdtsc() }
}

pub(in crate::exec) fn read_system_time(cpu: &mut Cpu) -> Guest<u64> {
    Ok(cpu.msrs.pv.clock.system_time)
}

/// MSR_KVM_SYSTEM_TIME_NEW: guest physical address of struct pvclock_vcpu_time_info, and bit 0 to enable it. As
/// with KVM an address that is not RAM is accepted and nothing is written.
pub(in crate::exec) fn write_system_time(cpu: &mut Cpu, value: u64) -> Guest<()> {
    cpu.msrs.pv.clock.system_time = value;
    publish(cpu);
    Ok(())
}

/// The vCPU's time-stamp counter was set: its line through the base moves with it.
pub(in crate::exec) fn clock_moved(cpu: &mut Cpu) {
    publish(cpu);
}

fn publish(cpu: &Cpu) {
    let value = cpu.msrs.pv.clock.system_time;
    let (memory, addr) = (&cpu.vm.memory, value & !ENABLE);
    let fits = memory.host_address(GuestPhysAddr(addr), TIME_INFO_SIZE).is_some();
    if value & ENABLE == 0 || !fits {
        return;
    }
    let time = &cpu.vm.pv.time;
    let Some(version) = shared::word(memory, addr) else { return };
    let mut body = [0; TIME_INFO_SIZE as usize - 8];
    body[..8].copy_from_slice(&time.host_tsc().wrapping_add(cpu.msrs.tsc_offset).to_le_bytes());
    // Bytes 8 to 15 are the time at that count: 0.
    body[16..20].copy_from_slice(&time.scale.multiplier.to_le_bytes());
    body[20] = time.scale.shift as u8;
    body[21] = TSC_STABLE;
    shared::versioned(version, || {
        // Whether it fits was checked above.
        let _ = memory.write(GuestPhysAddr(addr + 8), &body);
    });
    cpu.vm.dirty.mark_range(GuestPhysAddr(addr), TIME_INFO_SIZE);
}

pub(in crate::exec) fn read_wall_clock(cpu: &mut Cpu) -> Guest<u64> {
    Ok(cpu.msrs.pv.clock.wall_clock)
}

/// MSR_KVM_WALL_CLOCK_NEW: writes the wall-clock time at which the VM's time began into struct
/// pvclock_wall_clock {version, seconds, nanoseconds} at the given guest physical address.
pub(in crate::exec) fn write_wall_clock(cpu: &mut Cpu, value: u64) -> Guest<()> {
    cpu.msrs.pv.clock.wall_clock = value;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let start = now.saturating_sub(cpu.vm.pv.time.elapsed());
    let memory = &cpu.vm.memory;
    let words = [0, 4, 8].map(|offset| shared::word(memory, value.wrapping_add(offset)));
    if let [Some(version), Some(seconds), Some(nanos)] = words {
        shared::versioned(version, || {
            // The structure has 32 bits for the seconds.
            seconds.store(start.as_secs() as u32, Ordering::Relaxed);
            nanos.store(start.subsec_nanos(), Ordering::Relaxed);
        });
        cpu.vm.dirty.mark_range(GuestPhysAddr(value), 12);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_of_ticks_is_a_second() {
        for hz in [1, 1_000, 999_999_999, 1_000_000_000, 1_000_000_001, 2_445_431_000, 5_200_000_000, 1 << 36]
        {
            let nanos = Scale::of(hz).nanos(hz);
            assert!((999_999_990..=1_000_000_000).contains(&nanos), "{hz} Hz: {nanos}");
        }
    }

    #[test]
    fn ticks_are_the_inverse_of_nanoseconds() {
        for hz in [1_000, 999_999_999, 1_000_000_000, 2_445_431_000, 5_200_000_000] {
            let scale = Scale::of(hz);
            for nanos in [0, 1, 1_000_000_007, 86_400_000_000_000] {
                let there = scale.nanos(scale.ticks(nanos));
                // A tick of a slow counter is many nanoseconds.
                let tick = 1_000_000_000 / hz + 2;
                assert!((nanos..=nanos + tick).contains(&there), "{hz} Hz: {nanos} became {there}");
            }
        }
    }

    #[test]
    fn an_hour_does_not_drift() {
        let hz = 2_445_431_000;
        let nanos = Scale::of(hz).nanos(hz * 3600);
        assert!(3_600_000_000_000 - nanos < 2_000, "{nanos}");
    }

    #[test]
    fn multipliers_use_all_their_bits() {
        for hz in [1_000_000, 1_500_000_000, 2_445_431_000, 4_000_000_001] {
            assert!(Scale::of(hz).multiplier >= 1 << 31, "{hz}");
        }
        assert_eq!(Scale::of(2_000_000_000), Scale { multiplier: 1 << 31, shift: 0 });
        assert_eq!(Scale::of(4_000_000_000), Scale { multiplier: 1 << 31, shift: -1 });
    }
}

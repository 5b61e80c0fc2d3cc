//! The local APIC's timer (SDM volume 3, 11.5.4): counting down, without any thread.

use crate::timer::{MIN_PERIOD, Nanos};

/// Frequency of the timer's input clock in hertz, before the divide register: CPUID leaf 0x15 and the
/// paravirtual interfaces report it as the crystal or bus clock. One tick is one nanosecond.
pub const BUS_CLOCK_HZ: u64 = 1_000_000_000;

/// What the timer does when it reaches zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    OneShot,
    Periodic,
    TscDeadline,
}

impl Mode {
    /// From the LVT timer register. The reserved encoding counts as one-shot.
    pub fn from_lvt(lvt: u32) -> Self {
        match lvt >> 17 & 3 {
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            _ => Self::OneShot,
        }
    }
}

/// Initial count, divide configuration, and when the count reaches zero.
#[derive(Clone, Debug, Default)]
pub(super) struct CountDown {
    pub initial: u32,
    /// Bits 0, 1 and 3 as the guest wrote them.
    pub divide: u32,
    /// When the count reaches zero (next); `None` while stopped.
    pub expiry: Option<Nanos>,
}

impl CountDown {
    /// Bus clocks for one count: 1 to 128.
    fn divisor(&self) -> u64 {
        let power = (self.divide & 3) | (self.divide >> 1 & 4);
        if power == 7 { 1 } else { 2 << power }
    }
    fn period(&self) -> Nanos {
        u64::from(self.initial) * self.divisor()
    }
    /// The distance at which interrupts of a periodic timer come.
    fn served_period(&self) -> Nanos {
        self.period().max(MIN_PERIOD)
    }

    /// Writes the initial count: starts, or stops with 0.
    pub fn start(&mut self, initial: u32, now: Nanos) {
        self.initial = initial;
        self.expiry = (initial != 0).then(|| now.saturating_add(self.period()));
    }

    /// Goes on where a saved timer was: `left` of `initial` counts are left; 0 is a timer that stands.
    pub fn resume(&mut self, divide: u32, initial: u32, left: u32, now: Nanos) {
        self.divide = divide & 0xb;
        self.initial = initial;
        let left = u64::from(left.min(initial)) * self.divisor();
        self.expiry = (left != 0).then(|| now.saturating_add(left));
    }

    /// Stops without changing the initial count.
    pub fn stop(&mut self) {
        self.expiry = None;
    }

    /// The current count.
    pub fn current(&self, now: Nanos, mode: Mode) -> u32 {
        let Some(expiry) = self.expiry else { return 0 };
        let left = match expiry.checked_sub(now) {
            Some(left) => left,
            // It is over, but the host has not come to it.
            None if mode == Mode::Periodic => self.period() - (now - expiry) % self.period().max(1),
            None => 0,
        };
        left.div_ceil(self.divisor()).min(self.initial.into()) as u32
    }

    /// Writes the divide configuration; the current count stays and goes on at the new rate.
    pub fn set_divide(&mut self, value: u32, now: Nanos, mode: Mode) {
        let current = self.current(now, mode);
        self.divide = value;
        if self.expiry.is_some() {
            self.expiry = Some(now.saturating_add(u64::from(current) * self.divisor()));
        }
    }

    /// Looks whether the count has reached zero by `now`; a periodic timer goes on, without catching up on what
    /// was missed.
    pub fn expire(&mut self, now: Nanos, mode: Mode) -> bool {
        let Some(expiry) = self.expiry.filter(|&e| e <= now) else { return false };
        self.expiry = match mode {
            Mode::Periodic => {
                let period = self.served_period();
                Some(expiry.saturating_add(((now - expiry) / period + 1).saturating_mul(period)))
            }
            _ => None,
        };
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divisors() {
        let divisor = |divide| CountDown { divide, ..CountDown::default() }.divisor();
        assert_eq!([0, 1, 2, 3, 8, 9, 10, 11].map(divisor), [2, 4, 8, 16, 32, 64, 128, 1]);
    }

    #[test]
    fn one_shot_counts_down_once() {
        let mut timer = CountDown { divide: 0b0011, ..CountDown::default() };
        timer.start(1000, 50);
        assert_eq!(timer.current(50 + 16 * 400, Mode::OneShot), 600);
        assert!(!timer.expire(50 + 15_999, Mode::OneShot));
        assert!(timer.expire(50 + 16_000, Mode::OneShot));
        assert!(!timer.expire(100_000, Mode::OneShot));
        assert_eq!(timer.current(100_000, Mode::OneShot), 0);
    }

    #[test]
    fn periodic_keeps_its_phase_and_skips_what_was_missed() {
        let mut timer = CountDown { divide: 0b1011, ..CountDown::default() };
        timer.start(1_000_000, 0);
        assert!(timer.expire(1_000_100, Mode::Periodic));
        assert_eq!(timer.expiry, Some(2_000_000));
        assert_eq!(timer.current(4_250_000, Mode::Periodic), 750_000);
        assert!(timer.expire(4_250_000, Mode::Periodic));
        assert_eq!(timer.expiry, Some(5_000_000));
    }

    #[test]
    fn a_tiny_period_is_served_at_the_least_distance() {
        let mut timer = CountDown { divide: 0b1011, ..CountDown::default() };
        timer.start(1, 0);
        assert!(timer.expire(1, Mode::Periodic));
        assert_eq!(timer.expiry, Some(1 + MIN_PERIOD));
    }

    #[test]
    fn a_new_divisor_keeps_the_count() {
        let mut timer = CountDown { divide: 0b1011, ..CountDown::default() };
        timer.start(1000, 0);
        timer.set_divide(0, 400, Mode::OneShot);
        assert_eq!(timer.current(400, Mode::OneShot), 600);
        assert_eq!(timer.expiry, Some(1600));
    }
}

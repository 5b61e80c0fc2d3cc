//! The registers of an MC146818 real-time clock with 128 bytes of memory (Motorola data sheet MC146818A), as a
//! function of wall-clock time.
//!
//! The clock is the host's UTC plus a whole number of seconds that the guest set. Interrupt flags are found by
//! looking, when somebody asks, at what happened since they were last looked at.

use time::{Date, Month, OffsetDateTime, Time};

use crate::timer::{NANOS_PER_SEC, Nanos, nanos, ticks};

/// Nanoseconds since 1970-01-01 00:00 UTC.
pub type WallTime = u64;

/// Indices.
mod at {
    pub const SECONDS: u8 = 0x00;
    pub const SECONDS_ALARM: u8 = 0x01;
    pub const MINUTES: u8 = 0x02;
    pub const MINUTES_ALARM: u8 = 0x03;
    pub const HOURS: u8 = 0x04;
    pub const HOURS_ALARM: u8 = 0x05;
    pub const WEEKDAY: u8 = 0x06;
    pub const DAY: u8 = 0x07;
    pub const MONTH: u8 = 0x08;
    pub const YEAR: u8 = 0x09;
    pub const A: u8 = 0x0a;
    pub const B: u8 = 0x0b;
    pub const C: u8 = 0x0c;
    pub const D: u8 = 0x0d;
    pub const CENTURY: u8 = 0x32;
}

/// Update in progress.
const A_UIP: u8 = 1 << 7;
/// Oscillator running at 32768 Hz, periodic rate 1024 Hz.
const A_DEFAULT: u8 = 0x26;
/// Updates are inhibited: the guest sets the clock.
const B_SET: u8 = 1 << 7;
const B_BINARY: u8 = 1 << 2;
const B_24_HOURS: u8 = 1 << 1;
/// Periodic, alarm and update-ended: the same bits enable in B and flag in C.
const PERIODIC: u8 = 1 << 6;
const ALARM: u8 = 1 << 5;
const UPDATE: u8 = 1 << 4;
const INTERRUPTS: u8 = PERIODIC | ALARM | UPDATE;
const C_IRQF: u8 = 1 << 7;
/// The memory and time are valid: the battery is full.
const D_VALID: u8 = 1 << 7;

const PM: u8 = 0x80;
/// Alarm values from here on match always.
const ANY: u8 = 0xc0;

/// How long before the update the guest is told (data sheet, table 5).
const UPDATE_WARNING: Nanos = 244_000;
const CRYSTAL_HZ: u64 = 32_768;
const DAY: u64 = 86_400;

/// Registers, memory and the difference to the host's clock.
#[derive(Clone, Debug)]
pub struct Rtc {
    index: u8,
    memory: [u8; 128],
    /// What the guest's clock is ahead of the host's, in seconds.
    offset: i64,
    /// Flags of register C that are not read yet.
    flags: u8,
    /// Until when `flags` are complete.
    seen: WallTime,
}

impl Rtc {
    /// A clock that shows UTC, with memory sizes as a PC's firmware leaves them: bytes of RAM below and above 4 GiB.
    pub fn new(ram_below_4g: u64, ram_above_4g: u64, now: WallTime) -> Self {
        let mut rtc = Self { index: 0, memory: [0; 128], offset: 0, flags: 0, seen: now };
        rtc.memory[usize::from(at::A)] = A_DEFAULT;
        rtc.memory[usize::from(at::B)] = B_24_HOURS;
        let word = |bytes: u64, unit: u64| (bytes / unit).min(0xffff) as u16;
        let above_1m = word(ram_below_4g.saturating_sub(1 << 20), 1 << 10);
        let above_16m = word(ram_below_4g.saturating_sub(16 << 20), 64 << 10);
        // The PC/AT's 640 KiB of base memory, and a coprocessor.
        for (index, value) in [(0x15, 640), (0x17, above_1m), (0x30, above_1m), (0x34, above_16m)] {
            rtc.memory[index..index + 2].copy_from_slice(&value.to_le_bytes());
        }
        rtc.memory[0x14] = 0x02;
        let above_4g = (ram_above_4g >> 16).min(0xff_ffff) as u32;
        rtc.memory[0x5b..0x5e].copy_from_slice(&above_4g.to_le_bytes()[..3]);
        rtc
    }

    /// RESET: interrupts are off, the time and the memory stay.
    pub fn reset(&mut self) {
        self.memory[usize::from(at::B)] &= !(INTERRUPTS | B_SET);
        self.flags = 0;
        self.index = 0;
    }

    /// OUT to port 0x70. Bit 7 masks NMIs, which nothing here sends.
    pub fn select(&mut self, index: u8) {
        self.index = index & 0x7f;
    }

    /// Whether the interrupt line is asserted.
    pub fn interrupt(&self) -> bool {
        self.flags & self.b() & INTERRUPTS != 0
    }

    /// IN from port 0x71.
    pub fn read(&mut self, now: WallTime) -> u8 {
        self.look(now);
        match self.index {
            at::SECONDS
            | at::MINUTES
            | at::HOURS
            | at::WEEKDAY
            | at::DAY
            | at::MONTH
            | at::YEAR
            | at::CENTURY
                if !self.is_setting() =>
            {
                self.clock(self.index, now)
            }
            at::A => {
                let updates_soon =
                    !self.is_setting() && now % NANOS_PER_SEC >= NANOS_PER_SEC - UPDATE_WARNING;
                self.memory[usize::from(at::A)] | if updates_soon { A_UIP } else { 0 }
            }
            at::C => {
                let irqf = if self.interrupt() { C_IRQF } else { 0 };
                std::mem::take(&mut self.flags) | irqf
            }
            at::D => D_VALID,
            index => self.memory[usize::from(index)],
        }
    }

    /// OUT to port 0x71.
    pub fn write(&mut self, value: u8, now: WallTime) {
        self.look(now);
        match self.index {
            at::SECONDS
            | at::MINUTES
            | at::HOURS
            | at::WEEKDAY
            | at::DAY
            | at::MONTH
            | at::YEAR
            | at::CENTURY => {
                if self.is_setting() {
                    self.memory[usize::from(self.index)] = value;
                } else {
                    self.hold(now);
                    self.memory[usize::from(self.index)] = value;
                    self.set_clock(now);
                }
            }
            at::A => self.memory[usize::from(at::A)] = value & !A_UIP,
            at::B => {
                let was = self.is_setting();
                if !was && value & B_SET != 0 {
                    self.hold(now);
                }
                // The format of what was set is that of the time it was written in.
                if was && value & B_SET == 0 {
                    self.set_clock(now);
                }
                self.memory[usize::from(at::B)] = value;
            }
            at::C | at::D => (),
            index => self.memory[usize::from(index)] = value,
        }
    }

    /// When the interrupt line can rise next.
    pub fn next_interrupt(&self, now: WallTime) -> Option<WallTime> {
        let second = now / NANOS_PER_SEC;
        let waiting = self.b() & INTERRUPTS & !self.flags;
        let periodic = self.period_shift().filter(|_| waiting & PERIODIC != 0).map(|shift| {
            let next = (ticks(now, CRYSTAL_HZ) >> shift) + 1;
            nanos(next << shift, CRYSTAL_HZ)
        });
        let update =
            (waiting & UPDATE != 0 && !self.is_setting()).then(|| (second + 1).saturating_mul(NANOS_PER_SEC));
        let alarm = (waiting & ALARM != 0 && !self.is_setting())
            .then(|| (1..=DAY).find(|&s| self.alarm_matches(second + s)))
            .flatten()
            .map(|s| (second + s).saturating_mul(NANOS_PER_SEC));
        [periodic, update, alarm].into_iter().flatten().min()
    }

    /// Sets the flags of what happened until `now`.
    pub fn look(&mut self, now: WallTime) {
        let before = std::mem::replace(&mut self.seen, now);
        if now <= before {
            // The host's clock was set back.
            return;
        }
        if let Some(shift) = self.period_shift()
            && ticks(before, CRYSTAL_HZ) >> shift != ticks(now, CRYSTAL_HZ) >> shift
        {
            self.flags |= PERIODIC;
        }
        let (first, last) = (before / NANOS_PER_SEC + 1, now / NANOS_PER_SEC);
        if first > last || self.is_setting() {
            return;
        }
        self.flags |= UPDATE;
        // A day has every time.
        let first = first.max(last.saturating_sub(DAY - 1));
        if self.flags & ALARM == 0 && (first..=last).any(|second| self.alarm_matches(second)) {
            self.flags |= ALARM;
        }
    }

    fn b(&self) -> u8 {
        self.memory[usize::from(at::B)]
    }
    fn is_setting(&self) -> bool {
        self.b() & B_SET != 0
    }

    /// log2 of the crystal's ticks in a period of the periodic interrupt (data sheet, table 5).
    fn period_shift(&self) -> Option<u32> {
        match self.memory[usize::from(at::A)] & 0xf {
            0 => None,
            rate @ 1..=2 => Some(u32::from(rate) + 6),
            rate => Some(u32::from(rate) - 1),
        }
    }

    fn guest_seconds(&self, second: u64) -> i64 {
        i64::try_from(second).unwrap_or(i64::MAX).saturating_add(self.offset)
    }

    /// Whether the alarm is for the time that it is at `second` of the host's clock.
    fn alarm_matches(&self, second: u64) -> bool {
        let of_day = self.guest_seconds(second).rem_euclid(DAY as i64) as u64;
        let (h, m, s) = ((of_day / 3600) as u8, (of_day / 60 % 60) as u8, (of_day % 60) as u8);
        let matches = |index: u8, value: u8| {
            let alarm = self.memory[usize::from(index)];
            alarm >= ANY || alarm == value
        };
        matches(at::SECONDS_ALARM, self.encode(s))
            && matches(at::MINUTES_ALARM, self.encode(m))
            && matches(at::HOURS_ALARM, self.encode_hour(h))
    }

    fn encode(&self, value: u8) -> u8 {
        if self.b() & B_BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }
    fn encode_hour(&self, hour: u8) -> u8 {
        if self.b() & B_24_HOURS != 0 {
            return self.encode(hour);
        }
        let twelve = (hour + 11) % 12 + 1;
        self.encode(twelve) | if hour >= 12 { PM } else { 0 }
    }
    fn decode(&self, value: u8) -> u8 {
        if self.b() & B_BINARY != 0 { value } else { (value >> 4).wrapping_mul(10).wrapping_add(value & 0xf) }
    }
    fn decode_hour(&self, value: u8) -> u8 {
        if self.b() & B_24_HOURS != 0 {
            return self.decode(value);
        }
        self.decode(value & !PM) % 12 + if value & PM != 0 { 12 } else { 0 }
    }

    /// A register of the running clock.
    fn clock(&self, index: u8, now: WallTime) -> u8 {
        let seconds = self.guest_seconds(now / NANOS_PER_SEC);
        let Ok(time) = OffsetDateTime::from_unix_timestamp(seconds) else { return 0 };
        let year = time.year().unsigned_abs();
        match index {
            at::SECONDS => self.encode(time.second()),
            at::MINUTES => self.encode(time.minute()),
            at::HOURS => self.encode_hour(time.hour()),
            at::WEEKDAY => self.encode(time.weekday().number_from_sunday()),
            at::DAY => self.encode(time.day()),
            at::MONTH => self.encode(time.month().into()),
            at::YEAR => self.encode((year % 100) as u8),
            _ => self.encode((year / 100 % 100) as u8),
        }
    }

    /// Copies the running clock into the registers, to be changed there.
    fn hold(&mut self, now: WallTime) {
        for index in
            [at::SECONDS, at::MINUTES, at::HOURS, at::WEEKDAY, at::DAY, at::MONTH, at::YEAR, at::CENTURY]
        {
            self.memory[usize::from(index)] = self.clock(index, now);
        }
    }

    /// Lets the clock go on from what the registers say; if that is no date it goes on as before.
    fn set_clock(&mut self, now: WallTime) {
        let register = |index: u8| self.memory[usize::from(index)];
        let number = |index| self.decode(register(index));
        let year = i32::from(number(at::CENTURY)) * 100 + i32::from(number(at::YEAR));
        let date = Month::try_from(number(at::MONTH))
            .and_then(|month| Date::from_calendar_date(year, month, number(at::DAY)));
        let time =
            Time::from_hms(self.decode_hour(register(at::HOURS)), number(at::MINUTES), number(at::SECONDS));
        if let (Ok(date), Ok(time)) = (date, time) {
            let seconds = OffsetDateTime::new_utc(date, time).unix_timestamp();
            self.offset = seconds.saturating_sub_unsigned(now / NANOS_PER_SEC);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2026-11-22 13:14:15 UTC, a Sunday.
    const NOW: WallTime = 1_795_353_255 * NANOS_PER_SEC;
    const SECOND: Nanos = NANOS_PER_SEC;

    fn rtc() -> Rtc {
        Rtc::new(3 << 30, 5 << 30, NOW)
    }
    fn read(rtc: &mut Rtc, index: u8, now: WallTime) -> u8 {
        rtc.select(index);
        rtc.read(now)
    }
    fn write(rtc: &mut Rtc, index: u8, value: u8, now: WallTime) {
        rtc.select(index);
        rtc.write(value, now);
    }
    fn clock(rtc: &mut Rtc, now: WallTime) -> [u8; 8] {
        [0x32, 9, 8, 7, 6, 4, 2, 0].map(|index| read(rtc, index, now))
    }

    #[test]
    fn shows_utc_in_every_format() {
        let mut rtc = rtc();
        assert_eq!(clock(&mut rtc, NOW), [0x20, 0x26, 0x11, 0x22, 0x01, 0x13, 0x14, 0x15]);
        write(&mut rtc, at::B, B_BINARY | B_24_HOURS, NOW);
        assert_eq!(clock(&mut rtc, NOW), [20, 26, 11, 22, 1, 13, 14, 15]);
        write(&mut rtc, at::B, 0, NOW);
        assert_eq!(read(&mut rtc, at::HOURS, NOW), 0x81);
        assert_eq!(read(&mut rtc, at::HOURS, NOW - 3600 * SECOND), 0x92);
        assert_eq!(read(&mut rtc, at::HOURS, NOW + 11 * 3600 * SECOND), 0x12);
    }

    #[test]
    fn the_guest_can_set_the_clock() {
        let mut rtc = rtc();
        write(&mut rtc, at::B, B_SET | B_24_HOURS, NOW);
        for (index, value) in [(0x32, 0x19), (9, 0x99), (8, 0x12), (7, 0x31), (4, 0x23), (2, 0x59), (0, 0x58)]
        {
            write(&mut rtc, index, value, NOW);
        }
        assert_eq!(read(&mut rtc, 0, NOW + 9 * SECOND), 0x58);
        let set = NOW + 10 * SECOND;
        write(&mut rtc, at::B, B_24_HOURS, set);
        assert_eq!(clock(&mut rtc, set), [0x19, 0x99, 0x12, 0x31, 0x06, 0x23, 0x59, 0x58]);
        assert_eq!(clock(&mut rtc, set + 2 * SECOND), [0x20, 0, 1, 1, 7, 0, 0, 0]);
        // One register, while the clock runs; then an impossible date, which is not taken.
        write(&mut rtc, at::DAY, 0x28, set + 2 * SECOND);
        assert_eq!(read(&mut rtc, at::DAY, set + 2 * SECOND), 0x28);
        write(&mut rtc, at::MONTH, 0x13, set + 2 * SECOND);
        assert_eq!(read(&mut rtc, at::MONTH, set + 2 * SECOND), 1);
    }

    #[test]
    fn update_in_progress_warns_before_the_second_ends() {
        let mut rtc = rtc();
        assert_eq!(read(&mut rtc, at::A, NOW + SECOND / 2), A_DEFAULT);
        assert_eq!(read(&mut rtc, at::A, NOW + SECOND - 1), A_DEFAULT | A_UIP);
    }

    #[test]
    fn the_alarm_interrupts_at_its_time() {
        let mut rtc = rtc();
        for (index, value) in [(5, 0x13), (3, 0x15), (1, 0x00), (at::B, B_24_HOURS | ALARM)] {
            write(&mut rtc, index, value, NOW);
        }
        let due = NOW + 45 * SECOND;
        assert_eq!(rtc.next_interrupt(NOW), Some(due));
        rtc.look(due - 1);
        assert!(!rtc.interrupt());
        rtc.look(due);
        assert!(rtc.interrupt());
        assert_eq!(read(&mut rtc, at::C, due), C_IRQF | ALARM | UPDATE | PERIODIC);
        assert!(!rtc.interrupt());
        assert_eq!(rtc.next_interrupt(due), Some(due + DAY * SECOND));
        write(&mut rtc, 3, 0xff, due);
        write(&mut rtc, 5, 0xff, due);
        assert_eq!(rtc.next_interrupt(due), Some(due + 60 * SECOND));
        write(&mut rtc, 1, 0x77, due);
        assert_eq!(rtc.next_interrupt(due), None);
    }

    #[test]
    fn update_and_periodic_interrupts() {
        let mut rtc = rtc();
        write(&mut rtc, at::B, B_24_HOURS | UPDATE, NOW);
        assert_eq!(rtc.next_interrupt(NOW + 1), Some(NOW + SECOND));
        write(&mut rtc, at::B, B_24_HOURS | PERIODIC, NOW);
        let next = rtc.next_interrupt(NOW).unwrap();
        assert!(next > NOW && next <= NOW + SECOND / 1024 + 1);
        rtc.look(next);
        assert!(rtc.interrupt());
        assert_eq!(rtc.next_interrupt(next), None);
        rtc.reset();
        assert!(!rtc.interrupt());
    }

    #[test]
    fn memory_sizes() {
        let mut rtc = rtc();
        let word = |rtc: &mut Rtc, i| u16::from_le_bytes([read(rtc, i, NOW), read(rtc, i + 1, NOW)]);
        assert_eq!(word(&mut rtc, 0x15), 640);
        assert_eq!(word(&mut rtc, 0x30), 0xffff);
        assert_eq!(word(&mut rtc, 0x34), (((3_u64 << 30) - (16 << 20)) >> 16) as u16);
        assert_eq!(word(&mut rtc, 0x5c), (5_u64 << 30 >> 24) as u16);
    }
}

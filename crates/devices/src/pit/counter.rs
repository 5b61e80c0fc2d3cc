//! One counter of the 8254, as a function of time.

use crate::timer::{Nanos, nanos, ticks};

/// The counters' clock in hertz: the 14.31818 MHz of the first PC divided by 12.
pub const PIT_HZ: u64 = 1_193_182;

/// Which bytes of the count an access moves (control word bits 4 and 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Low,
    High,
    /// Low, then high.
    Both,
}

/// A counter. Times are the VM's clock; the count is derived from when it began.
#[derive(Clone, Debug)]
pub(super) struct Counter {
    /// 0 to 5.
    mode: u8,
    bcd: bool,
    access: Access,
    gate: bool,
    /// The count as the guest wrote it, one half possibly to come.
    written: u16,
    /// The low half was written, the high one is to come.
    write_high: bool,
    read_high: bool,
    /// The count in ticks, 1 to 65536; `None` until one is written.
    count: Option<u32>,
    /// When counting began, or would have if it had never paused. `None` while it waits for a count or, in modes
    /// 1 and 5, for a trigger.
    origin: Option<Nanos>,
    /// Ticks done when the gate stopped the counter.
    paused: Option<u64>,
    latched: Option<u16>,
    status: Option<u8>,
}

impl Default for Counter {
    fn default() -> Self {
        Self {
            mode: 0,
            bcd: false,
            access: Access::Both,
            gate: true,
            written: 0,
            write_high: false,
            read_high: false,
            count: None,
            origin: None,
            paused: None,
            latched: None,
            status: None,
        }
    }
}

impl Counter {
    /// A control word for this counter that is not a latch command.
    pub fn control(&mut self, value: u8, access: Access) {
        *self = Self {
            // Modes 6 and 7 are other names of 2 and 3.
            mode: match value >> 1 & 7 {
                mode @ 6.. => mode - 4,
                mode => mode,
            },
            bcd: value & 1 != 0,
            access,
            gate: self.gate,
            ..Self::default()
        };
    }

    /// Latches the count until it is read; a second latch before that does nothing.
    pub fn latch_count(&mut self, now: Nanos) {
        if self.latched.is_none() {
            self.latched = Some(self.current(now));
        }
    }

    /// Latches the status byte.
    pub fn latch_status(&mut self, now: Nanos) {
        let access = match self.access {
            Access::Low => 1,
            Access::High => 2,
            Access::Both => 3,
        };
        let null_count = self.count.is_none() || self.write_high;
        let status = u8::from(self.output(now)) << 7
            | u8::from(null_count) << 6
            | access << 4
            | self.mode << 1
            | u8::from(self.bcd);
        self.status.get_or_insert(status);
    }

    pub fn read(&mut self, now: Nanos) -> u8 {
        if let Some(status) = self.status.take() {
            return status;
        }
        let value = self.latched.unwrap_or_else(|| self.current(now));
        let (byte, done) = match self.access {
            Access::Low => (value as u8, true),
            Access::High => ((value >> 8) as u8, true),
            Access::Both if self.read_high => ((value >> 8) as u8, true),
            Access::Both => (value as u8, false),
        };
        self.read_high = !done;
        if done {
            self.latched = None;
        }
        byte
    }

    pub fn write(&mut self, value: u8, now: Nanos) {
        match self.access {
            Access::Low => self.written = value.into(),
            Access::High => self.written = u16::from(value) << 8,
            Access::Both if !self.write_high => {
                self.written = value.into();
                self.write_high = true;
                if self.mode == 0 {
                    // The first byte stops mode 0 (data sheet, "Mode 0").
                    self.origin = None;
                }
                return;
            }
            Access::Both => {
                self.written |= u16::from(value) << 8;
                self.write_high = false;
            }
        }
        self.load(now);
    }

    /// Takes the written count. Periodic modes begin anew at once, where the chip would finish the period.
    fn load(&mut self, now: Nanos) {
        let digits = |v: u16| (0..4).rev().fold(0, |n, i| n * 10 + u32::from(v >> (4 * i) & 0xf).min(9));
        let count = if self.bcd { digits(self.written) } else { self.written.into() };
        self.count = Some(if count == 0 { self.modulus() } else { count });
        if self.needs_trigger() {
            return;
        }
        self.origin = Some(now);
        self.paused = (!self.gate).then_some(0);
    }

    pub fn gate(&self) -> bool {
        self.gate
    }

    pub fn set_gate(&mut self, gate: bool, now: Nanos) {
        let rises = gate && !self.gate;
        let falls = !gate && self.gate;
        self.gate = gate;
        if rises && self.needs_trigger() {
            self.origin = self.count.map(|_| now);
        }
        if self.needs_trigger() || self.origin.is_none() {
            return;
        }
        if falls {
            self.paused = Some(self.done(now));
        } else if rises && let Some(done) = self.paused.take() {
            // Periodic modes start over; the others go on.
            let done = if self.is_periodic() { 0 } else { done };
            self.origin = Some(now.saturating_sub(nanos(done, PIT_HZ)));
        }
    }

    pub fn is_periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }
    /// Modes that a rising gate starts.
    fn needs_trigger(&self) -> bool {
        matches!(self.mode, 1 | 5)
    }
    fn modulus(&self) -> u32 {
        if self.bcd { 10_000 } else { 0x1_0000 }
    }

    /// Ticks since counting began.
    fn done(&self, now: Nanos) -> u64 {
        match (self.paused, self.origin) {
            (Some(done), _) => done,
            (None, Some(origin)) => ticks(now.saturating_sub(origin), PIT_HZ),
            (None, None) => 0,
        }
    }

    /// The count as the guest reads it.
    fn current(&self, now: Nanos) -> u16 {
        let Some(count) = self.count else { return 0 };
        let (count, done) = (u64::from(count), self.done(now));
        let left = match self.mode {
            2 => count - done % count,
            // Counts down by two, twice a period.
            3 => (count - 2 * done % count) & !1,
            _ => {
                let modulus = u64::from(self.modulus());
                (count + modulus - done % modulus) % modulus
            }
        };
        if !self.bcd {
            return left as u16;
        }
        let digit = |i| ((left / 10_u64.pow(i) % 10) << (4 * i)) as u16;
        (0..4).map(digit).sum()
    }

    /// The level of OUT.
    pub fn output(&self, now: Nanos) -> bool {
        let Some(count) = self.count else { return self.mode != 0 };
        if self.origin.is_none() {
            return self.mode != 0;
        }
        let (count, done) = (u64::from(count), self.done(now));
        match self.mode {
            0 | 1 => done >= count,
            2 => self.paused.is_some() || done % count != count - 1,
            3 => self.paused.is_some() || done % count < count.div_ceil(2),
            _ => done != count,
        }
    }

    /// When OUT rises next after `now`; in periodic modes, once a period.
    pub fn next_rise(&self, now: Nanos) -> Option<Nanos> {
        let (count, origin) = (u64::from(self.count?), self.origin?);
        if self.paused.is_some() {
            return None;
        }
        let done = self.done(now);
        let at = match self.mode {
            2 | 3 => (done / count + 1) * count,
            0 | 1 if done < count => count,
            4 | 5 if done <= count => count + 1,
            _ => return None,
        };
        Some(origin.saturating_add(nanos(at, PIT_HZ)))
    }
}

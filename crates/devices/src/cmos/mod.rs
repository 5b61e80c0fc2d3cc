//! CMOS memory and real-time clock at ports 0x70 and 0x71.

mod rtc;

use std::sync::{Arc, Weak};
use std::time::SystemTime;

use parking_lot::Mutex;

use crate::bus::{BusError, MachineBus, PortDevice};
use crate::irq::IrqLine;
use crate::timer::{Clock, Timer, Timers};

pub use rtc::{Rtc, WallTime};

/// 2000-01-01 00:00 UTC: what a VM on a manual clock starts at.
const MANUAL_START: WallTime = 946_684_800_000_000_000;

/// The clock with its interrupt and its place on the host's clock.
pub struct Cmos {
    rtc: Mutex<Rtc>,
    irq: IrqLine,
    clock: Clock,
    timer: Timer,
}

impl Cmos {
    /// A clock that shows the host's UTC (from 2000-01-01 on if the timers are manual), interrupts through `irq`,
    /// and whose memory says how many bytes of RAM there are below and above 4 GiB.
    pub fn new(irq: IrqLine, timers: &Timers, ram_below_4g: u64, ram_above_4g: u64) -> Arc<Self> {
        let clock = timers.clock().clone();
        Arc::new_cyclic(|me: &Weak<Self>| {
            let me = me.clone();
            let timer = timers.timer(move || {
                if let Some(cmos) = me.upgrade() {
                    cmos.follow(&mut cmos.rtc.lock());
                }
            });
            Self { rtc: Mutex::new(Rtc::new(ram_below_4g, ram_above_4g, wall(&clock))), irq, clock, timer }
        })
    }

    /// Puts index and data port on the bus from `base` on.
    ///
    /// # Errors
    /// [`BusError`] when the ports are taken.
    pub fn register(self: &Arc<Self>, base: u16, bus: &mut MachineBus) -> Result<(), BusError> {
        bus.register_ports(base, 2, "CMOS", self.clone())
    }

    /// RESET: interrupts are off, the time and the memory stay.
    pub fn reset(&self) {
        let mut rtc = self.rtc.lock();
        rtc.reset();
        self.follow(&mut rtc);
    }

    /// Drives the line, and arms the timer for when it can rise next.
    fn follow(&self, rtc: &mut Rtc) {
        let now = wall(&self.clock);
        rtc.look(now);
        self.irq.set(rtc.interrupt());
        let next = rtc.next_interrupt(now);
        self.timer.set(next.map(|at| self.clock.now().saturating_add(at.saturating_sub(now))));
    }
}

fn wall(clock: &Clock) -> WallTime {
    if clock.is_manual() {
        return MANUAL_START.saturating_add(clock.now());
    }
    SystemTime::UNIX_EPOCH.elapsed().map_or(0, |t| t.as_nanos() as WallTime)
}

impl PortDevice for Cmos {
    fn read(&self, offset: u16, data: &mut [u8]) {
        let mut rtc = self.rtc.lock();
        for (i, byte) in data.iter_mut().enumerate() {
            // The index cannot be read.
            *byte = if usize::from(offset) + i == 1 { rtc.read(wall(&self.clock)) } else { 0xff };
        }
        self.follow(&mut rtc);
    }
    fn write(&self, offset: u16, data: &[u8]) {
        let mut rtc = self.rtc.lock();
        for (i, &byte) in data.iter().enumerate() {
            match usize::from(offset) + i {
                0 => rtc.select(byte),
                _ => rtc.write(byte, wall(&self.clock)),
            }
        }
        self.follow(&mut rtc);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irqchip::InterruptChips;
    use crate::timer::TscClock;

    #[test]
    fn the_update_interrupt_comes_each_second_that_it_is_acknowledged() {
        let timers = Timers::manual();
        let chips = InterruptChips::new(1, &timers, &TscClock::new(1, timers.clock().clone())).unwrap();
        let cmos = Cmos::new(chips.line(8).unwrap(), &timers, 1 << 28, 0);
        cmos.write(0, &[0x0b, 0x12]);
        let second = 1_000_000_000;
        timers.advance(second / 2);
        assert!(!chips.is_asserted(8));
        for _ in 0..3 {
            timers.advance(second);
            assert!(chips.is_asserted(8));
            cmos.write(0, &[0x0c]);
            let mut c = [0];
            cmos.read(1, &mut c);
            assert_eq!(c[0] & 0x90, 0x90);
            assert!(!chips.is_asserted(8));
        }
        cmos.reset();
        timers.advance(second);
        assert!(!chips.is_asserted(8));
    }
}

//! The 8254 programmable interval timer (Intel data sheet, order 231164) and port 0x61, as on a PC.
//!
//! Counter 0 drives IRQ 0, counter 1 nothing, counter 2 the speaker, whose gate and output are in port 0x61:
//! kernels time themselves with it.

mod counter;

use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use self::counter::{Access, Counter};
use crate::bus::{BusError, MachineBus, PortDevice};
use crate::irq::IrqLine;
use crate::timer::{Clock, MIN_PERIOD, Nanos, Timer, Timers};

pub use counter::PIT_HZ;

/// The counter that drives IRQ 0.
const TICK: usize = 0;
/// The counter of the speaker.
const SPEAKER: usize = 2;
/// Half the period of the refresh signal in port 0x61: 15 µs.
const REFRESH_TOGGLE: Nanos = 15_085;

/// Registers of the three counters and of port 0x61.
#[derive(Clone, Debug)]
pub struct PitRegisters {
    counters: [Counter; 3],
    /// Port 0x61 bit 1: the speaker is connected to counter 2.
    speaker_data: bool,
}

impl Default for PitRegisters {
    fn default() -> Self {
        let mut counters: [Counter; 3] = Default::default();
        counters[SPEAKER].set_gate(false, 0);
        Self { counters, speaker_data: false }
    }
}

impl PitRegisters {
    fn read(&mut self, port: u16, now: Nanos) -> u8 {
        // The control word cannot be read.
        self.counters.get_mut(usize::from(port)).map_or(0, |counter| counter.read(now))
    }

    fn write(&mut self, port: u16, value: u8, now: Nanos) {
        match self.counters.get_mut(usize::from(port)) {
            Some(counter) => counter.write(value, now),
            None => self.control(value, now),
        }
    }

    fn control(&mut self, value: u8, now: Nanos) {
        let Some(counter) = self.counters.get_mut(usize::from(value >> 6)) else {
            return self.read_back(value, now);
        };
        let access = match value >> 4 & 3 {
            0 => return counter.latch_count(now),
            1 => Access::Low,
            2 => Access::High,
            _ => Access::Both,
        };
        counter.control(value, access);
    }

    /// The read-back command: bits 1 to 3 select counters, 4 and 5 (low) what to latch.
    fn read_back(&mut self, value: u8, now: Nanos) {
        for (i, counter) in self.counters.iter_mut().enumerate() {
            if value >> (i + 1) & 1 == 0 {
                continue;
            }
            if value & 0x20 == 0 {
                counter.latch_count(now);
            }
            if value & 0x10 == 0 {
                counter.latch_status(now);
            }
        }
    }

    fn read_port_61(&self, now: Nanos) -> u8 {
        let speaker = &self.counters[SPEAKER];
        u8::from(speaker.gate())
            | u8::from(self.speaker_data) << 1
            | ((now / REFRESH_TOGGLE % 2) as u8) << 4
            | u8::from(speaker.output(now)) << 5
    }

    fn write_port_61(&mut self, value: u8, now: Nanos) {
        self.counters[SPEAKER].set_gate(value & 1 != 0, now);
        self.speaker_data = value & 2 != 0;
    }
}

/// The PIT with its interrupt and its place on the host's clock.
pub struct Pit {
    registers: Mutex<PitRegisters>,
    irq: IrqLine,
    clock: Clock,
    timer: Timer,
}

impl Pit {
    /// A PIT that interrupts through `irq` (IRQ 0).
    pub fn new(irq: IrqLine, timers: &Timers) -> Arc<Self> {
        Arc::new_cyclic(|me: &Weak<Self>| {
            let me = me.clone();
            let timer = timers.timer(move || {
                if let Some(pit) = me.upgrade() {
                    pit.tick();
                }
            });
            Self { registers: Mutex::default(), irq, clock: timers.clock().clone(), timer }
        })
    }

    /// Puts the counters at 0x40 to 0x43 and port 0x61 on the bus.
    ///
    /// # Errors
    /// [`BusError`] when the ports are taken.
    pub fn register(self: &Arc<Self>, bus: &mut MachineBus) -> Result<(), BusError> {
        bus.register_ports(0x40, 4, "PIT", self.clone())?;
        bus.register_ports(0x61, 1, "speaker control", Arc::new(Port61(self.clone())))
    }

    /// Back to the state after power-up.
    pub fn reset(&self) {
        let mut registers = self.registers.lock();
        *registers = PitRegisters::default();
        self.timer.cancel();
        self.irq.set(false);
    }

    /// Counter 0 was written or has come to its end: lets IRQ 0 follow OUT and arms the timer for its next rise.
    fn follow(&self, registers: &PitRegisters, now: Nanos) {
        let counter = &registers.counters[TICK];
        if !counter.is_periodic() {
            self.irq.set(counter.output(now));
        }
        let earliest = if counter.is_periodic() { now.saturating_add(MIN_PERIOD) } else { 0 };
        // A period too short for the host still ends when the chip's would, only not each of them.
        self.timer.set(
            counter
                .next_rise(now)
                .map(|at| if at >= earliest { at } else { counter.next_rise(earliest).unwrap_or(earliest) }),
        );
    }

    fn tick(&self) {
        let registers = self.registers.lock();
        let now = self.clock.now();
        if registers.counters[TICK].is_periodic() && self.timer.deadline().is_none() {
            // OUT falls and rises again; what was missed meanwhile is not made up for.
            self.irq.pulse();
        }
        self.follow(&registers, now);
    }
}

impl PortDevice for Pit {
    fn read(&self, offset: u16, data: &mut [u8]) {
        let mut registers = self.registers.lock();
        let now = self.clock.now();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = registers.read(offset + i as u16, now);
        }
    }
    fn write(&self, offset: u16, data: &[u8]) {
        let mut registers = self.registers.lock();
        let now = self.clock.now();
        for (i, &byte) in data.iter().enumerate() {
            let port = offset + i as u16;
            registers.write(port, byte, now);
            // Counter 0 itself, or a control word for it.
            if port == 0 || port == 3 && byte >> 6 == 0 && byte & 0x30 != 0 {
                self.follow(&registers, now);
            }
        }
    }
}

struct Port61(Arc<Pit>);

impl PortDevice for Port61 {
    fn read(&self, _offset: u16, data: &mut [u8]) {
        let registers = self.0.registers.lock();
        data.fill(registers.read_port_61(self.0.clock.now()));
    }
    fn write(&self, _offset: u16, data: &[u8]) {
        if let Some(&value) = data.first() {
            let mut registers = self.0.registers.lock();
            let now = self.0.clock.now();
            registers.write_port_61(value, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irqchip::InterruptChips;
    use crate::timer::TscClock;
    use berth_engine::Bus;

    const MS: Nanos = 1_000_000;

    struct Vm {
        timers: Timers,
        chips: Arc<InterruptChips>,
        bus: MachineBus,
    }
    impl Vm {
        fn new() -> Self {
            let timers = Timers::manual();
            let tsc = TscClock::new(1, timers.clock().clone());
            let chips = InterruptChips::new(1, &timers, &tsc).unwrap();
            let mut bus = MachineBus::new();
            chips.register(&mut bus).unwrap();
            Pit::new(chips.line(0).unwrap(), &timers).register(&mut bus).unwrap();
            let vm = Self { timers, chips, bus };
            for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 3), (0x21, 0)] {
                vm.out(port, value);
            }
            vm
        }
        fn out(&self, port: u16, value: u8) {
            self.bus.port_write(port, &[value]);
        }
        fn inb(&self, port: u16) -> u8 {
            let mut data = [0];
            self.bus.port_read(port, &mut data);
            data[0]
        }
        /// Whether IRQ 0 came since the last call.
        fn interrupted(&self) -> bool {
            self.chips.acknowledge_pic().is_some()
        }
    }

    #[test]
    fn the_tick_comes_once_a_period() {
        let vm = Vm::new();
        vm.out(0x43, 0x34);
        // 11932 ticks are 10.0001 ms.
        vm.out(0x40, (11_932 & 0xff) as u8);
        vm.out(0x40, (11_932 >> 8) as u8);
        vm.timers.advance(10 * MS);
        assert!(!vm.interrupted());
        for _ in 0..5 {
            vm.timers.advance(10 * MS + 1000);
            assert!(vm.interrupted());
            assert!(!vm.interrupted());
        }
    }

    #[test]
    fn one_shot_raises_the_line_until_it_is_programmed_again() {
        let vm = Vm::new();
        vm.out(0x43, 0x30);
        vm.out(0x40, 0xff);
        vm.out(0x40, 0x00);
        vm.timers.advance(MS);
        assert!(vm.interrupted() && vm.chips.is_asserted(0));
        vm.timers.advance(1000 * MS);
        assert!(!vm.interrupted());
        vm.out(0x43, 0x30);
        assert!(!vm.chips.is_asserted(0));
    }

    #[test]
    fn calibration_through_the_speaker_gate() {
        let vm = Vm::new();
        vm.out(0x61, vm.inb(0x61) & !2 | 1);
        vm.out(0x43, 0xb0);
        vm.out(0x42, 0x9c);
        vm.out(0x42, 0x2e);
        assert_eq!(vm.inb(0x61) & 0x21, 0x01);
        vm.timers.advance(9 * MS);
        assert_eq!(vm.inb(0x61) & 0x20, 0);
        vm.timers.advance(2 * MS);
        assert_eq!(vm.inb(0x61) & 0x20, 0x20);
    }

    #[test]
    fn a_low_gate_stops_the_count() {
        let vm = Vm::new();
        vm.out(0x61, 1);
        vm.out(0x43, 0xb0);
        vm.out(0x42, 0);
        vm.out(0x42, 0x10);
        let count = |vm: &Vm| {
            vm.out(0x43, 0x80);
            u16::from_le_bytes([vm.inb(0x42), vm.inb(0x42)])
        };
        vm.timers.advance(MS);
        let before = count(&vm);
        assert_eq!(before, 0x1000 - 1193);
        vm.out(0x61, 0);
        vm.timers.advance(5 * MS);
        assert_eq!(count(&vm), before);
        vm.out(0x61, 1);
        vm.timers.advance(MS);
        assert!(count(&vm).abs_diff(before - 1193) <= 1);
    }

    #[test]
    fn latches_and_read_back() {
        let vm = Vm::new();
        vm.out(0x43, 0x34);
        vm.out(0x40, 0x00);
        vm.out(0x40, 0x80);
        vm.timers.advance(MS);
        // Status and count of counter 0.
        vm.out(0x43, 0xc2);
        vm.timers.advance(MS);
        assert_eq!(vm.inb(0x40), 0xb4);
        assert_eq!(u16::from_le_bytes([vm.inb(0x40), vm.inb(0x40)]), 0x8000 - 1193);
        assert_eq!(u16::from_le_bytes([vm.inb(0x40), vm.inb(0x40)]), 0x8000 - 2386);
    }

    #[test]
    fn decimal_counting() {
        let vm = Vm::new();
        vm.out(0x43, 0x35);
        vm.out(0x40, 0x00);
        vm.out(0x40, 0x50);
        vm.timers.advance(MS);
        vm.out(0x43, 0x00);
        assert_eq!([vm.inb(0x40), vm.inb(0x40)], [0x07, 0x38]);
    }

    #[test]
    fn a_hostile_period_does_not_keep_the_host_busy() {
        let vm = Vm::new();
        vm.out(0x43, 0x14);
        vm.out(0x40, 1);
        let first = vm.chips.clone();
        vm.timers.advance(MIN_PERIOD * 2);
        assert!(first.acknowledge_pic().is_some());
    }
}

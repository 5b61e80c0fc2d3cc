//! ACPI power management: the fixed hardware of ACPI 6.5, 4.8.3: PM1 event and control block, the power-management
//! timer, and an empty block of general-purpose events.
//!
//! The machine has no SMI command port, so it is always in ACPI mode and SCI_EN is always set.

use std::sync::{Arc, Weak};

use berth_memory::layout::ports;
use parking_lot::Mutex;
use tracing::trace;

use crate::bus::{BusError, MachineBus, PortDevice};
use crate::irq::IrqLine;
use crate::power::{PowerEvent, PowerSink};
use crate::timer::{Clock, Nanos, Timer, Timers, nanos, ticks};

/// The power-management timer's frequency in hertz (ACPI 6.5, 4.8.2.1).
pub const PM_TIMER_HZ: u64 = 3_579_545;
/// The timer's status is set when this bit, its highest, changes.
const PM_TIMER_TOP_BIT: u32 = 31;

const STS_TIMER: u16 = 1 << 0;
const STS_GLOBAL: u16 = 1 << 5;
const STS_POWER_BUTTON: u16 = 1 << 8;
const STS_SLEEP_BUTTON: u16 = 1 << 9;
const STS_RTC: u16 = 1 << 10;
const ENABLES: u16 = STS_TIMER | STS_GLOBAL | STS_POWER_BUTTON | STS_SLEEP_BUTTON | STS_RTC;

const CNT_SCI_EN: u16 = 1 << 0;
/// Bus-master reload and the sleep type are kept; SLP_EN and GBL_RLS only act.
const CNT_KEPT: u16 = 1 << 1 | 7 << 10;
/// Bits of the control register's high byte.
const CNT_HIGH_SLP_EN: u8 = 1 << 5;
const CNT_HIGH_SLP_TYP_SHIFT: u8 = 2;

const GPE_HALF: usize = ports::GPE0_LEN as usize / 2;
/// Ports from the event block to the end of the general-purpose events.
const SPAN: u16 = ports::GPE0 + ports::GPE0_LEN as u16 - ports::PM1A_EVT;

/// What a port is a byte of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Byte {
    Status(usize),
    Enable(usize),
    Control(usize),
    Timer(usize),
    GpeEnable(usize),
    /// Reads as zero: the status of general-purpose events that never happen, and gaps between the blocks.
    Zero,
}

impl Byte {
    fn at(port: u16) -> Self {
        let within = |base: u16, len: u16| port.checked_sub(base).filter(|&o| o < len).map(usize::from);
        if let Some(offset) = within(ports::PM1A_EVT, 4) {
            if offset < 2 { Self::Status(offset) } else { Self::Enable(offset - 2) }
        } else if let Some(offset) = within(ports::PM1A_CNT, 2) {
            Self::Control(offset)
        } else if let Some(offset) = within(ports::PM_TMR, 4) {
            Self::Timer(offset)
        } else if let Some(offset) = within(ports::GPE0, ports::GPE0_LEN.into()).filter(|&o| o >= GPE_HALF) {
            Self::GpeEnable(offset - GPE_HALF)
        } else {
            Self::Zero
        }
    }
}

/// The registers.
#[derive(Clone, Debug, Default)]
pub struct PmRegisters {
    status: u16,
    enable: u16,
    control: u16,
    gpe_enable: [u8; GPE_HALF],
    /// How often the timer's highest bit had changed when its status was last looked at.
    toggles: u64,
}

impl PmRegisters {
    /// Notes whether the timer's highest bit changed since the last time.
    fn look(&mut self, now: Nanos) {
        let toggles = ticks(now, PM_TIMER_HZ) >> PM_TIMER_TOP_BIT;
        if toggles != self.toggles {
            self.toggles = toggles;
            self.status |= STS_TIMER;
        }
    }

    /// When the timer's status will make an interrupt, if it is enabled and not pending.
    fn next_interrupt(&self) -> Option<Nanos> {
        let waits = self.enable & STS_TIMER != 0 && self.status & STS_TIMER == 0;
        waits.then(|| nanos((self.toggles + 1) << PM_TIMER_TOP_BIT, PM_TIMER_HZ))
    }

    /// Whether the SCI is asserted.
    fn interrupt(&self) -> bool {
        self.status & self.enable != 0
    }

    fn read(&self, port: u16, now: Nanos) -> u8 {
        match Byte::at(port) {
            Byte::Status(i) => self.status.to_le_bytes()[i],
            Byte::Enable(i) => self.enable.to_le_bytes()[i],
            Byte::Control(i) => (self.control | CNT_SCI_EN).to_le_bytes()[i],
            Byte::Timer(i) => (ticks(now, PM_TIMER_HZ) as u32).to_le_bytes()[i],
            Byte::GpeEnable(i) => self.gpe_enable[i],
            Byte::Zero => 0,
        }
    }

    /// Writes a byte; returns the sleep type that is to be entered, if one is.
    fn write(&mut self, port: u16, value: u8) -> Option<u8> {
        let replace = |register: u16, i: usize| {
            let mut bytes = register.to_le_bytes();
            bytes[i] = value;
            u16::from_le_bytes(bytes)
        };
        match Byte::at(port) {
            // Writing ones clears.
            Byte::Status(i) => self.status &= !(u16::from(value) << (8 * i)),
            Byte::Enable(i) => self.enable = replace(self.enable, i) & ENABLES,
            Byte::Control(i) => {
                self.control = replace(self.control, i) & CNT_KEPT;
                return (i == 1 && value & CNT_HIGH_SLP_EN != 0)
                    .then_some(value >> CNT_HIGH_SLP_TYP_SHIFT & 7);
            }
            Byte::GpeEnable(i) => self.gpe_enable[i] = value,
            Byte::Timer(_) | Byte::Zero => (),
        }
        None
    }
}

/// The power-management block with its interrupt.
pub struct AcpiPm {
    registers: Mutex<PmRegisters>,
    sci: IrqLine,
    power: PowerSink,
    clock: Clock,
    timer: Timer,
}

impl AcpiPm {
    /// A block that asserts `sci` (level-triggered) for its events and tells `power` when the guest powers off.
    pub fn new(sci: IrqLine, power: PowerSink, timers: &Timers) -> Arc<Self> {
        Arc::new_cyclic(|me: &Weak<Self>| {
            let me = me.clone();
            let timer = timers.timer(move || {
                if let Some(pm) = me.upgrade() {
                    pm.with(|_, _| ());
                }
            });
            Self { registers: Mutex::default(), sci, power, clock: timers.clock().clone(), timer }
        })
    }

    /// Puts the block on the bus, at the ports of [`berth_memory::layout::ports`].
    ///
    /// # Errors
    /// [`BusError`] when the ports are taken.
    pub fn register(self: &Arc<Self>, bus: &mut MachineBus) -> Result<(), BusError> {
        bus.register_ports(ports::PM1A_EVT, SPAN, "ACPI power management", self.clone())
    }

    /// The owner of the VM presses the power button: an ACPI guest shuts itself down.
    pub fn press_power_button(&self) {
        self.with(|registers, _| registers.status |= STS_POWER_BUTTON);
    }

    /// Whether the guest enabled the event of the power button: whether pressing it can have an effect.
    pub fn hears_power_button(&self) -> bool {
        self.registers.lock().enable & STS_POWER_BUTTON != 0
    }

    /// Back to the state after power-up; the timer goes on.
    pub fn reset(&self) {
        self.with(|registers, _| {
            *registers = PmRegisters { toggles: registers.toggles, ..PmRegisters::default() };
        });
    }

    fn with<R>(&self, access: impl FnOnce(&mut PmRegisters, Nanos) -> R) -> R {
        let mut registers = self.registers.lock();
        let now = self.clock.now();
        registers.look(now);
        let result = access(&mut registers, now);
        self.sci.set(registers.interrupt());
        self.timer.set(registers.next_interrupt());
        result
    }
}

impl PortDevice for AcpiPm {
    fn read(&self, offset: u16, data: &mut [u8]) {
        const TIMER: u16 = ports::PM_TMR - ports::PM1A_EVT;
        if (TIMER..TIMER + 4).contains(&offset) {
            // Kernels read the timer very often, and it has no state.
            let now = self.clock.now();
            let registers = PmRegisters::default();
            for (i, byte) in data.iter_mut().enumerate() {
                *byte = registers.read(ports::PM1A_EVT + offset + i as u16, now);
            }
            return;
        }
        self.with(|registers, now| {
            for (i, byte) in data.iter_mut().enumerate() {
                *byte = registers.read(ports::PM1A_EVT + offset + i as u16, now);
            }
        });
    }

    fn write(&self, offset: u16, data: &[u8]) {
        let sleep = self.with(|registers, _| {
            let mut sleep = None;
            for (i, &byte) in data.iter().enumerate() {
                sleep = registers.write(ports::PM1A_EVT + offset + i as u16, byte).or(sleep);
            }
            sleep
        });
        match sleep {
            Some(ports::SLP_TYP_S5) => self.power.send(PowerEvent::PowerOff),
            Some(other) => trace!("sleep type {other} does not exist"),
            None => (),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irqchip::InterruptChips;
    use crate::power::recorder;
    use crate::timer::TscClock;
    use berth_engine::Bus;

    struct Vm {
        timers: Timers,
        chips: Arc<InterruptChips>,
        bus: MachineBus,
        pm: Arc<AcpiPm>,
        events: Arc<Mutex<Vec<PowerEvent>>>,
    }
    impl Vm {
        fn new() -> Self {
            let timers = Timers::manual();
            let tsc = TscClock::new(1, timers.clock().clone());
            let chips = InterruptChips::new(1, &timers, &tsc).unwrap();
            let (power, events) = recorder();
            let pm = AcpiPm::new(chips.line(ports::SCI_GSI).unwrap(), power, &timers);
            let mut bus = MachineBus::new();
            pm.register(&mut bus).unwrap();
            Self { timers, chips, bus, pm, events }
        }
        fn read(&self, port: u16) -> u16 {
            let mut data = [0; 2];
            self.bus.port_read(port, &mut data);
            u16::from_le_bytes(data)
        }
        fn write(&self, port: u16, value: u16) {
            self.bus.port_write(port, &value.to_le_bytes());
        }
        fn timer(&self) -> u32 {
            let mut data = [0; 4];
            self.bus.port_read(ports::PM_TMR, &mut data);
            u32::from_le_bytes(data)
        }
        fn sci(&self) -> bool {
            self.chips.is_asserted(ports::SCI_GSI)
        }
    }

    #[test]
    fn the_power_button_interrupts_once_it_is_enabled() {
        let vm = Vm::new();
        assert!(!vm.pm.hears_power_button());
        vm.pm.press_power_button();
        assert!(!vm.sci());
        vm.write(ports::PM1A_EVT + 2, STS_POWER_BUTTON);
        assert!(vm.sci() && vm.pm.hears_power_button());
        assert_eq!(vm.read(ports::PM1A_EVT), STS_POWER_BUTTON);
        vm.write(ports::PM1A_EVT, STS_POWER_BUTTON);
        assert!(!vm.sci());
        assert_eq!(vm.read(ports::PM1A_EVT), 0);
    }

    #[test]
    fn sleep_type_5_powers_off() {
        let vm = Vm::new();
        assert_eq!(vm.read(ports::PM1A_CNT), CNT_SCI_EN);
        vm.write(ports::PM1A_CNT, 5 << 10 | CNT_SCI_EN);
        assert_eq!(vm.read(ports::PM1A_CNT), 5 << 10 | CNT_SCI_EN);
        vm.write(ports::PM1A_CNT, 3 << 10 | 1 << 13);
        assert!(vm.events.lock().is_empty());
        vm.write(ports::PM1A_CNT, 5 << 10 | 1 << 13);
        vm.bus.port_write(ports::PM1A_CNT + 1, &[0x34]);
        assert_eq!(*vm.events.lock(), [PowerEvent::PowerOff; 2]);
    }

    #[test]
    fn the_timer_counts_and_tells_when_its_highest_bit_changes() {
        let vm = Vm::new();
        vm.timers.advance(1_000_000_000);
        assert_eq!(vm.timer(), PM_TIMER_HZ as u32);
        vm.write(ports::PM1A_EVT + 2, STS_TIMER);
        vm.timers.advance(598_000_000_000);
        assert!(!vm.sci());
        vm.timers.advance(2_000_000_000);
        assert!(vm.sci());
        vm.write(ports::PM1A_EVT, STS_TIMER);
        assert!(!vm.sci());
        vm.timers.advance(600_000_000_000);
        assert!(vm.sci());
    }

    #[test]
    fn general_purpose_events_never_happen() {
        let vm = Vm::new();
        vm.write(ports::GPE0 + 8, 0xa5a5);
        assert_eq!(vm.read(ports::GPE0 + 8), 0xa5a5);
        assert_eq!(vm.read(ports::GPE0), 0);
        assert!(!vm.sci());
        vm.pm.reset();
        assert_eq!(vm.read(ports::GPE0 + 8), 0);
    }
}

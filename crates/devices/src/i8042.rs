//! The PC's keyboard controller (Intel 8042) at ports 0x60 and 0x64, with nothing plugged in.
//!
//! Guests use it to reset the machine. What they ask of a keyboard or mouse is answered at once as a controller
//! answers for a missing device, so that no probe has to time out.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::bus::{BusError, MachineBus, PortDevice};
use crate::irq::IrqLine;
use crate::power::{PowerEvent, PowerSink};

const STATUS_OUTPUT_FULL: u8 = 1 << 0;
const STATUS_SYSTEM: u8 = 1 << 2;
/// The last write was to port 0x64.
const STATUS_COMMAND: u8 = 1 << 3;
/// The keyboard is not locked with a key.
const STATUS_UNLOCKED: u8 = 1 << 4;
/// The output is from the second port.
const STATUS_AUX: u8 = 1 << 5;
/// The device did not answer.
const STATUS_TIMEOUT: u8 = 1 << 6;

const CONFIG_KEYBOARD_IRQ: u8 = 1 << 0;
const CONFIG_SYSTEM: u8 = 1 << 2;
const CONFIG_KEYBOARD_OFF: u8 = 1 << 4;
const CONFIG_AUX_OFF: u8 = 1 << 5;
const CONFIG_TRANSLATE: u8 = 1 << 6;

/// What a device sends that did not understand; here: that is not there.
const RESEND: u8 = 0xfe;
/// Output port bit 0, low: reset.
const OUTPUT_NO_RESET: u8 = 1 << 0;
/// Output port bit 1: address line 20 is let through, always.
const OUTPUT_A20: u8 = 1 << 1;

/// What the next byte to port 0x60 is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Parameter {
    Keyboard,
    Aux,
    Config,
    OutputPort,
    /// Comes back as if it were from the keyboard.
    Loop,
}

/// The registers.
#[derive(Clone, Debug)]
pub struct Controller {
    config: u8,
    /// The output buffer, with the status bits that belong to it.
    output: Option<(u8, u8)>,
    parameter: Parameter,
    last_was_command: bool,
}

impl Default for Controller {
    fn default() -> Self {
        Self {
            config: CONFIG_SYSTEM | CONFIG_KEYBOARD_OFF | CONFIG_AUX_OFF | CONFIG_TRANSLATE,
            output: None,
            parameter: Parameter::Keyboard,
            last_was_command: false,
        }
    }
}

impl Controller {
    fn status(&self) -> u8 {
        let output = self.output.map_or(0, |(_, bits)| bits | STATUS_OUTPUT_FULL);
        let system = if self.config & CONFIG_SYSTEM != 0 { STATUS_SYSTEM } else { 0 };
        let command = if self.last_was_command { STATUS_COMMAND } else { 0 };
        output | system | command | STATUS_UNLOCKED
    }

    fn read_data(&mut self) -> u8 {
        self.output.take().map_or(0, |(byte, _)| byte)
    }

    /// Whether IRQ 1 is asserted.
    fn interrupt(&self) -> bool {
        self.config & CONFIG_KEYBOARD_IRQ != 0 && self.output.is_some_and(|(_, bits)| bits & STATUS_AUX == 0)
    }

    /// OUT to port 0x64. Returns whether the machine is to be reset.
    fn command(&mut self, command: u8) -> bool {
        self.last_was_command = true;
        self.parameter = Parameter::Keyboard;
        match command {
            0x20 => self.answer(self.config),
            0x60 => self.parameter = Parameter::Config,
            0xa7 => self.config |= CONFIG_AUX_OFF,
            0xa8 => self.config &= !CONFIG_AUX_OFF,
            // Test of the second port: its clock line is stuck, there is none.
            0xa9 => self.answer(0x01),
            0xaa => {
                *self = Self { last_was_command: true, ..Self::default() };
                self.answer(0x55);
            }
            // Test of the keyboard port: good.
            0xab => self.answer(0x00),
            0xad => self.config |= CONFIG_KEYBOARD_OFF,
            0xae => self.config &= !CONFIG_KEYBOARD_OFF,
            0xd0 => self.answer(OUTPUT_NO_RESET | OUTPUT_A20),
            0xd1 => self.parameter = Parameter::OutputPort,
            // Loops through the second port come back without its mark, as on controllers that have none.
            0xd2 | 0xd3 => self.parameter = Parameter::Loop,
            0xd4 => self.parameter = Parameter::Aux,
            // Pulses the low bits of the output port that are zero here.
            0xf0..=0xff => return command & OUTPUT_NO_RESET == 0,
            _ => (),
        }
        false
    }

    /// OUT to port 0x60. Returns whether the machine is to be reset.
    fn write_data(&mut self, value: u8) -> bool {
        self.last_was_command = false;
        match std::mem::replace(&mut self.parameter, Parameter::Keyboard) {
            Parameter::Keyboard => self.output = Some((RESEND, STATUS_TIMEOUT)),
            Parameter::Aux => self.output = Some((RESEND, STATUS_TIMEOUT | STATUS_AUX)),
            Parameter::Config => self.config = value,
            Parameter::OutputPort => return value & OUTPUT_NO_RESET == 0,
            Parameter::Loop => self.answer(value),
        }
        false
    }

    fn answer(&mut self, byte: u8) {
        self.output = Some((byte, 0));
    }
}

/// The controller with its interrupt and its reset line.
pub struct I8042 {
    controller: Mutex<Controller>,
    irq: IrqLine,
    power: PowerSink,
}

impl I8042 {
    /// A controller that interrupts through `irq` (IRQ 1) and asks `power` for resets.
    pub fn new(irq: IrqLine, power: PowerSink) -> Arc<Self> {
        Arc::new(Self { controller: Mutex::default(), irq, power })
    }

    /// Puts ports 0x60 and 0x64 on the bus.
    ///
    /// # Errors
    /// [`BusError`] when the ports are taken.
    pub fn register(self: &Arc<Self>, bus: &mut MachineBus) -> Result<(), BusError> {
        bus.register_ports(0x60, 1, "keyboard controller data", Arc::new(DataPort(self.clone())))?;
        bus.register_ports(0x64, 1, "keyboard controller command", Arc::new(CommandPort(self.clone())))
    }

    /// Back to the state after power-up.
    pub fn reset(&self) {
        self.with(|controller| *controller = Controller::default());
    }

    fn with<R>(&self, access: impl FnOnce(&mut Controller) -> R) -> R {
        let mut controller = self.controller.lock();
        let result = access(&mut controller);
        self.irq.set(controller.interrupt());
        result
    }

    fn reset_if(&self, asked: bool) {
        if asked {
            self.power.send(PowerEvent::Reset);
        }
    }
}

struct DataPort(Arc<I8042>);

impl PortDevice for DataPort {
    fn read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(self.0.with(Controller::read_data));
    }
    fn write(&self, _offset: u16, data: &[u8]) {
        if let Some(&value) = data.first() {
            let reset = self.0.with(|controller| controller.write_data(value));
            self.0.reset_if(reset);
        }
    }
}

struct CommandPort(Arc<I8042>);

impl PortDevice for CommandPort {
    fn read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(self.0.controller.lock().status());
    }
    fn write(&self, _offset: u16, data: &[u8]) {
        if let Some(&command) = data.first() {
            let reset = self.0.with(|controller| controller.command(command));
            self.0.reset_if(reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irqchip::InterruptChips;
    use crate::power::recorder;
    use crate::timer::{Timers, TscClock};
    use berth_engine::Bus;

    fn machine() -> (MachineBus, Arc<InterruptChips>, Arc<Mutex<Vec<PowerEvent>>>) {
        let timers = Timers::manual();
        let chips = InterruptChips::new(1, &timers, &TscClock::new(1, timers.clock().clone())).unwrap();
        let (power, events) = recorder();
        let mut bus = MachineBus::new();
        I8042::new(chips.line(1).unwrap(), power).register(&mut bus).unwrap();
        (bus, chips, events)
    }
    fn inb(bus: &MachineBus, port: u16) -> u8 {
        let mut data = [0];
        bus.port_read(port, &mut data);
        data[0]
    }
    /// A command, its parameter, and the answer if there is one.
    fn command(bus: &MachineBus, command: u8, parameter: Option<u8>) -> Option<u8> {
        bus.port_write(0x64, &[command]);
        if let Some(parameter) = parameter {
            bus.port_write(0x60, &[parameter]);
        }
        (inb(bus, 0x64) & STATUS_OUTPUT_FULL != 0).then(|| inb(bus, 0x60))
    }

    #[test]
    fn tests_and_configuration() {
        let (bus, ..) = machine();
        assert_eq!(command(&bus, 0xaa, None), Some(0x55));
        assert_eq!(command(&bus, 0xab, None), Some(0x00));
        assert_eq!(command(&bus, 0x60, Some(0x43)), None);
        assert_eq!(command(&bus, 0x20, None), Some(0x43));
        assert_eq!(command(&bus, 0xad, None), None);
        assert_eq!(command(&bus, 0x20, None), Some(0x53));
        assert_eq!(command(&bus, 0xd0, None), Some(0x03));
    }

    #[test]
    fn there_is_no_second_port() {
        let (bus, ..) = machine();
        bus.port_write(0x64, &[0xd3]);
        bus.port_write(0x60, &[0x5a]);
        assert_eq!(inb(&bus, 0x64) & (STATUS_AUX | STATUS_OUTPUT_FULL), STATUS_OUTPUT_FULL);
        assert_eq!(inb(&bus, 0x60), 0x5a);
        assert_eq!(command(&bus, 0xa9, None), Some(0x01));
    }

    #[test]
    fn a_missing_keyboard_answers_at_once() {
        let (bus, chips, _) = machine();
        command(&bus, 0x60, Some(0x01));
        bus.port_write(0x60, &[0xf2]);
        assert!(chips.is_asserted(1));
        assert_eq!(inb(&bus, 0x64) & (STATUS_TIMEOUT | STATUS_OUTPUT_FULL), 0x41);
        assert_eq!(inb(&bus, 0x60), RESEND);
        assert!(!chips.is_asserted(1));
        assert_eq!(inb(&bus, 0x64) & STATUS_OUTPUT_FULL, 0);
    }

    #[test]
    fn reset_by_pulse_and_by_output_port() {
        let (bus, _, events) = machine();
        command(&bus, 0xff, None);
        command(&bus, 0xd1, Some(0x03));
        assert!(events.lock().is_empty());
        command(&bus, 0xfe, None);
        command(&bus, 0xd1, Some(0x02));
        assert_eq!(*events.lock(), [PowerEvent::Reset; 2]);
    }
}

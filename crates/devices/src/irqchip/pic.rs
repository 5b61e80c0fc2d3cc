//! Two cascaded 8259A programmable interrupt controllers, as on a PC (Intel 8259A data sheet, order 231468), with
//! the edge/level control registers of PCI chip sets.
//!
//! The slave's output is the master's input 2. Inputs stay latched once an edge was seen, even if they fall before
//! the acknowledge cycle.

/// Which of a controller's registers a port is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PicPort {
    /// A0 = 0: ICW1, OCW2 and OCW3 when written; IRR, ISR or the poll byte when read.
    Command,
    /// A0 = 1: ICW2 to ICW4 and the mask.
    Data,
    /// Edge/level control register.
    Elcr,
}

/// Which controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PicSelect {
    /// IRQ 0 to 7.
    Master,
    /// IRQ 8 to 15.
    Slave,
}

/// The master's input that the slave drives.
const CASCADE: u8 = 2;

/// What the data port takes next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Expect {
    #[default]
    Mask,
    Icw2,
    Icw3,
    Icw4,
}

/// One 8259A.
#[derive(Clone, Debug)]
struct Chip {
    irr: u8,
    isr: u8,
    imr: u8,
    /// Inputs as they are now.
    lines: u8,
    /// Inputs that are level-triggered.
    elcr: u8,
    /// Bits of `elcr` that can be set.
    elcr_mask: u8,
    /// The input that drives another controller, if any: special fully nested mode lets it nest.
    cascade: u8,
    base: u8,
    expect: Expect,
    icw4: bool,
    single: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_mask: bool,
    special_fully_nested: bool,
    poll: bool,
    read_isr: bool,
    /// The input with the lowest priority; the next one has the highest.
    lowest: u8,
}

impl Chip {
    /// Everything masked, as firmware leaves it.
    fn new(elcr_mask: u8, cascade: u8) -> Self {
        Self {
            irr: 0,
            isr: 0,
            imr: 0xff,
            lines: 0,
            elcr: 0,
            elcr_mask,
            cascade,
            base: 0,
            expect: Expect::Mask,
            icw4: false,
            single: false,
            auto_eoi: false,
            rotate_on_auto_eoi: false,
            special_mask: false,
            special_fully_nested: false,
            poll: false,
            read_isr: false,
            lowest: 7,
        }
    }

    /// The input with the highest priority among the bits of `inputs`, and its rank, 0 (first) to 7.
    fn first(&self, inputs: u8) -> Option<(u8, u32)> {
        let rotation = u32::from(self.lowest + 1) & 7;
        let rank = inputs.rotate_right(rotation).trailing_zeros();
        (inputs != 0).then_some((((rank + rotation) & 7) as u8, rank))
    }

    /// The input to be acknowledged next, if the output is asserted.
    fn pending(&self) -> Option<u8> {
        let (input, rank) = self.first(self.irr & !self.imr)?;
        let mut serving = self.isr;
        if self.special_mask {
            serving &= !self.imr;
        }
        if self.special_fully_nested {
            serving &= !self.cascade;
        }
        match self.first(serving) {
            Some((_, serving)) if serving <= rank => None,
            _ => Some(input),
        }
    }

    fn set_line(&mut self, input: u8, level: bool) {
        let bit = 1 << input;
        if level {
            if self.elcr & bit != 0 || self.lines & bit == 0 {
                self.irr |= bit;
            }
            self.lines |= bit;
        } else {
            if self.elcr & bit != 0 {
                self.irr &= !bit;
            }
            self.lines &= !bit;
        }
    }

    /// The acknowledge cycle for `input`; gives the vector.
    fn acknowledge(&mut self, input: u8) -> u8 {
        let bit = 1 << input;
        if !self.auto_eoi {
            self.isr |= bit;
        } else if self.rotate_on_auto_eoi {
            self.lowest = input;
        }
        if self.elcr & bit == 0 {
            self.irr &= !bit;
        }
        self.base + input
    }

    fn initialize(&mut self, icw1: u8) {
        *self = Self {
            // Level-triggered requests persist; edges are forgotten, and the next needs its input low first.
            irr: self.irr & self.elcr,
            lines: self.lines,
            elcr: self.elcr,
            imr: 0,
            base: self.base,
            icw4: icw1 & 1 != 0,
            single: icw1 & 2 != 0,
            expect: Expect::Icw2,
            ..Self::new(self.elcr_mask, self.cascade)
        };
    }

    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            self.initialize(value);
        } else if value & 0x08 != 0 {
            if value & 0x04 != 0 {
                self.poll = true;
            }
            if value & 0x02 != 0 {
                self.read_isr = value & 1 != 0;
            }
            if value & 0x40 != 0 {
                self.special_mask = value & 0x20 != 0;
            }
        } else {
            self.write_ocw2(value);
        }
    }

    fn write_ocw2(&mut self, value: u8) {
        let named = value & 7;
        let rotate = value & 0x80 != 0;
        let specific = value & 0x40 != 0;
        let eoi = value & 0x20 != 0;
        if !eoi {
            match (rotate, specific) {
                (true, true) => self.lowest = named,
                (rotate, false) => self.rotate_on_auto_eoi = rotate,
                (false, true) => (),
            }
            return;
        }
        // A non-specific EOI does not see in-service bits that special mask mode hides.
        let visible = if self.special_mask { self.isr & !self.imr } else { self.isr };
        let ended = if specific { Some(named) } else { self.first(visible).map(|(input, _)| input) };
        if let Some(ended) = ended {
            self.isr &= !(1 << ended);
            if rotate {
                self.lowest = ended;
            }
        }
    }

    fn write_data(&mut self, value: u8) {
        match self.expect {
            Expect::Mask => self.imr = value,
            Expect::Icw2 => {
                self.base = value & 0xf8;
                self.expect = match (self.single, self.icw4) {
                    (false, _) => Expect::Icw3,
                    (true, true) => Expect::Icw4,
                    (true, false) => Expect::Mask,
                };
            }
            // The wiring is fixed.
            Expect::Icw3 => self.expect = if self.icw4 { Expect::Icw4 } else { Expect::Mask },
            Expect::Icw4 => {
                self.special_fully_nested = value & 0x10 != 0;
                self.auto_eoi = value & 0x02 != 0;
                self.expect = Expect::Mask;
            }
        }
    }

    fn read(&mut self, port: PicPort) -> u8 {
        if port == PicPort::Elcr {
            return self.elcr;
        }
        if std::mem::take(&mut self.poll) {
            return match self.pending() {
                Some(input) => {
                    self.acknowledge(input);
                    0x80 | input
                }
                None => 0,
            };
        }
        match port {
            PicPort::Command if self.read_isr => self.isr,
            PicPort::Command => self.irr,
            _ => self.imr,
        }
    }
}

/// Both controllers.
#[derive(Clone, Debug)]
pub struct Pic {
    master: Chip,
    slave: Chip,
}

impl Default for Pic {
    fn default() -> Self {
        // IRQ 0, 1, 2, 8 and 13 are always edge-triggered.
        Self { master: Chip::new(0xf8, 1 << CASCADE), slave: Chip::new(0xde, 0) }
    }
}

impl Pic {
    /// Drives input `irq`, 0 to 15 except 2, which is the slave's. Others are ignored.
    pub fn set_line(&mut self, irq: u8, level: bool) {
        match irq {
            CASCADE => return,
            0..8 => self.master.set_line(irq, level),
            8..16 => self.slave.set_line(irq - 8, level),
            _ => return,
        }
        self.cascade();
    }

    /// Whether INTR is asserted.
    pub fn intr(&self) -> bool {
        self.master.pending().is_some()
    }

    /// The CPU's acknowledge cycle; gives the vector, or `None` when INTR is not asserted.
    pub fn acknowledge(&mut self) -> Option<u8> {
        let input = self.master.pending()?;
        let mut vector = self.master.acknowledge(input);
        if input == CASCADE {
            vector = match self.slave.pending() {
                Some(input) => self.slave.acknowledge(input),
                // The request went away meanwhile: the spurious interrupt.
                None => self.slave.base + 7,
            };
            // The slave's output falls for the acknowledge cycle, so that another request is a new edge.
            self.master.set_line(CASCADE, false);
        }
        self.cascade();
        Some(vector)
    }

    /// IN from a register.
    pub fn read(&mut self, select: PicSelect, port: PicPort) -> u8 {
        let value = self.chip(select).read(port);
        self.cascade();
        value
    }

    /// OUT to a register.
    pub fn write(&mut self, select: PicSelect, port: PicPort, value: u8) {
        let chip = self.chip(select);
        match port {
            PicPort::Command => chip.write_command(value),
            PicPort::Data => chip.write_data(value),
            PicPort::Elcr => chip.elcr = value & chip.elcr_mask,
        }
        self.cascade();
    }

    fn chip(&mut self, select: PicSelect) -> &mut Chip {
        match select {
            PicSelect::Master => &mut self.master,
            PicSelect::Slave => &mut self.slave,
        }
    }

    fn cascade(&mut self) {
        let output = self.slave.pending().is_some();
        self.master.set_line(CASCADE, output);
    }
}

#[cfg(test)]
mod tests {
    use super::PicPort::*;
    use super::PicSelect::*;
    use super::*;

    /// Initialised as Linux does: vectors 0x30 to 0x3f, nothing masked.
    fn initialised(icw4: u8) -> Pic {
        let mut pic = Pic::default();
        for (chip, base, icw3) in [(Master, 0x30, 4), (Slave, 0x38, 2)] {
            pic.write(chip, Command, 0x11);
            pic.write(chip, Data, base);
            pic.write(chip, Data, icw3);
            pic.write(chip, Data, icw4);
            pic.write(chip, Data, 0);
        }
        pic
    }
    fn pulse(pic: &mut Pic, irq: u8) {
        pic.set_line(irq, true);
        pic.set_line(irq, false);
    }

    #[test]
    fn priorities_nest_until_eoi() {
        let mut pic = initialised(1);
        pulse(&mut pic, 4);
        assert_eq!(pic.acknowledge(), Some(0x34));
        pulse(&mut pic, 5);
        assert!(!pic.intr());
        pulse(&mut pic, 1);
        assert_eq!(pic.acknowledge(), Some(0x31));
        pic.write(Master, Command, 0x0b);
        assert_eq!(pic.read(Master, Command), 0x12);
        pic.write(Master, Command, 0x20);
        pic.write(Master, Command, 0x64);
        assert_eq!(pic.acknowledge(), Some(0x35));
    }

    #[test]
    fn the_slave_interrupts_through_input_2() {
        let mut pic = initialised(1);
        pulse(&mut pic, 12);
        pulse(&mut pic, 8);
        assert_eq!(pic.acknowledge(), Some(0x38));
        assert!(!pic.intr());
        pic.write(Slave, Command, 0x20);
        pic.write(Master, Command, 0x20);
        assert_eq!(pic.acknowledge(), Some(0x3c));
        assert_eq!(pic.acknowledge(), None);
    }

    #[test]
    fn a_request_that_went_away_is_spurious() {
        let mut pic = initialised(1);
        pic.write(Slave, Elcr, 0xff);
        assert_eq!(pic.read(Slave, Elcr), 0xde);
        pic.set_line(9, true);
        pic.set_line(9, false);
        assert_eq!(pic.acknowledge(), Some(0x3f));
        pic.write(Slave, Command, 0x0b);
        assert_eq!(pic.read(Slave, Command), 0);
    }

    #[test]
    fn a_level_input_interrupts_again_after_eoi() {
        let mut pic = initialised(1);
        pic.write(Master, Elcr, 0x20);
        pic.set_line(5, true);
        assert_eq!(pic.acknowledge(), Some(0x35));
        pic.write(Master, Command, 0x20);
        assert_eq!(pic.acknowledge(), Some(0x35));
        pic.set_line(5, false);
        pic.write(Master, Command, 0x20);
        assert!(!pic.intr());
    }

    #[test]
    fn masks_automatic_eoi_and_rotation() {
        let mut pic = initialised(3);
        pic.write(Master, Data, 0x10);
        pulse(&mut pic, 4);
        assert!(!pic.intr());
        pic.write(Master, Data, 0);
        assert_eq!(pic.acknowledge(), Some(0x34));
        pic.write(Master, Command, 0x80);
        pulse(&mut pic, 3);
        assert_eq!(pic.acknowledge(), Some(0x33));
        pulse(&mut pic, 3);
        pulse(&mut pic, 6);
        assert_eq!(pic.acknowledge(), Some(0x36));
    }

    #[test]
    fn polling_acknowledges() {
        let mut pic = initialised(1);
        pic.write(Master, Command, 0x0c);
        assert_eq!(pic.read(Master, Command), 0);
        pulse(&mut pic, 3);
        pic.write(Master, Command, 0x0c);
        assert_eq!(pic.read(Master, Command), 0x83);
        assert!(!pic.intr());
    }

    #[test]
    fn special_mask_mode_lets_lower_priorities_through() {
        let mut pic = initialised(1);
        pulse(&mut pic, 1);
        assert_eq!(pic.acknowledge(), Some(0x31));
        pulse(&mut pic, 5);
        assert!(!pic.intr());
        pic.write(Master, Data, 0x02);
        pic.write(Master, Command, 0x68);
        assert_eq!(pic.acknowledge(), Some(0x35));
    }
}

//! The registers of a 16550A (Texas Instruments TL16C550C data sheet, SLLS177).
//!
//! Transmission takes no time: the transmitter is always empty. Input waits in a queue and comes into the
//! receiver FIFO when that is empty, so that each FIFO full of input is an edge of the interrupt line.
//!
//! Input is not put into the FIFO before the guest wants it, because kernels clear the FIFO while they set the
//! port up, which would lose what was typed or piped before: the guest wants input when it enabled the
//! interrupt for it, or when it polls the line status. For the same reason a cleared FIFO's bytes go back into
//! the queue.

use std::collections::VecDeque;

/// Input that is kept for the guest besides the FIFO, in bytes.
pub const QUEUE_SIZE: usize = 64 << 10;
const FIFO_SIZE: usize = 16;
/// Reads of the line status in a row that count as polling for input. Waiting for the transmitter takes one.
const POLLS: u8 = 8;

/// Register offsets.
mod reg {
    pub const DATA: u16 = 0;
    pub const IER: u16 = 1;
    /// FCR when written.
    pub const IIR: u16 = 2;
    pub const LCR: u16 = 3;
    pub const MCR: u16 = 4;
    pub const LSR: u16 = 5;
    pub const MSR: u16 = 6;
    pub const SCRATCH: u16 = 7;
}

const IER_RECEIVED: u8 = 1 << 0;
const IER_TRANSMITTER: u8 = 1 << 1;
const IER_MODEM: u8 = 1 << 3;

const IIR_NONE: u8 = 0x01;
const IIR_MODEM: u8 = 0x00;
const IIR_TRANSMITTER: u8 = 0x02;
const IIR_RECEIVED: u8 = 0x04;
/// Characters below the trigger level have waited.
const IIR_TIMEOUT: u8 = 0x0c;
const IIR_FIFO: u8 = 0xc0;

const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RECEIVER: u8 = 1 << 1;

const LCR_DIVISOR: u8 = 1 << 7;

const MCR_DTR: u8 = 1 << 0;
const MCR_RTS: u8 = 1 << 1;
const MCR_OUT1: u8 = 1 << 2;
/// On a PC this connects the interrupt.
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOP: u8 = 1 << 4;

const LSR_DATA: u8 = 1 << 0;
const LSR_TRANSMITTER: u8 = 1 << 5 | 1 << 6;

const MSR_CTS: u8 = 1 << 4;
const MSR_DSR: u8 = 1 << 5;
const MSR_RI: u8 = 1 << 6;
const MSR_DCD: u8 = 1 << 7;

/// What a write sends.
pub(super) type Transmitted = Option<u8>;

/// A 16550A's registers, FIFO and queue.
#[derive(Clone, Debug)]
pub struct Uart {
    divisor: u16,
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    scratch: u8,
    /// The change bits of the modem status.
    msr_delta: u8,
    /// The transmitter became empty, and the guest has not seen it in IIR.
    transmitter_empty: bool,
    fifo: VecDeque<u8>,
    queue: VecDeque<u8>,
    /// Reads of the line status since the last other access.
    polls: u8,
}

impl Default for Uart {
    fn default() -> Self {
        Self {
            divisor: 12,
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            scratch: 0,
            msr_delta: 0,
            transmitter_empty: false,
            fifo: VecDeque::new(),
            queue: VecDeque::new(),
            polls: 0,
        }
    }
}

impl Uart {
    /// Back to the state after reset; input that is still queued stays.
    pub fn reset(&mut self) {
        self.unread();
        let queue = std::mem::take(&mut self.queue);
        *self = Self { queue, ..Self::default() };
    }

    /// Takes as much input as there is room for; gives how many bytes.
    pub fn push(&mut self, input: &[u8]) -> usize {
        let count = input.len().min(self.room());
        self.queue.extend(&input[..count]);
        self.refill();
        count
    }

    /// Bytes of input that can be taken.
    pub fn room(&self) -> usize {
        QUEUE_SIZE.saturating_sub(self.queue.len())
    }

    /// Whether the interrupt line is asserted.
    pub fn interrupt(&self) -> bool {
        self.identification() != IIR_NONE && self.mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2
    }

    /// [`Self::interrupt`] as it is while the transmitter is not empty.
    pub fn interrupt_without_transmitter(&self) -> bool {
        self.identification() != IIR_TRANSMITTER && self.interrupt()
    }

    /// IN from a register.
    pub fn read(&mut self, offset: u16) -> u8 {
        if offset == reg::LSR {
            self.polls = self.polls.saturating_add(1);
            self.refill();
        } else {
            self.polls = 0;
        }
        let divisor = self.lcr & LCR_DIVISOR != 0;
        match offset {
            reg::DATA if divisor => self.divisor as u8,
            reg::IER if divisor => (self.divisor >> 8) as u8,
            reg::DATA => self.fifo.pop_front().unwrap_or(0),
            reg::IER => self.ier,
            reg::IIR => {
                let id = self.identification();
                if id == IIR_TRANSMITTER {
                    self.transmitter_empty = false;
                }
                id | if self.fcr & FCR_ENABLE != 0 { IIR_FIFO } else { 0 }
            }
            reg::LCR => self.lcr,
            reg::MCR => self.mcr,
            reg::LSR => LSR_TRANSMITTER | if self.fifo.is_empty() { 0 } else { LSR_DATA },
            reg::MSR => self.modem_inputs() | std::mem::take(&mut self.msr_delta),
            reg::SCRATCH => self.scratch,
            _ => 0xff,
        }
    }

    /// OUT to a register.
    pub fn write(&mut self, offset: u16, value: u8) -> Transmitted {
        self.polls = 0;
        let divisor = self.lcr & LCR_DIVISOR != 0;
        match offset {
            reg::DATA if divisor => self.divisor = self.divisor & 0xff00 | u16::from(value),
            reg::IER if divisor => self.divisor = self.divisor & 0x00ff | u16::from(value) << 8,
            reg::DATA => {
                self.transmitter_empty = true;
                if self.mcr & MCR_LOOP == 0 {
                    return Some(value);
                }
                if self.fifo.len() < FIFO_SIZE {
                    self.fifo.push_back(value);
                }
            }
            reg::IER => {
                if value & !self.ier & IER_TRANSMITTER != 0 {
                    // Enabling it while the transmitter is empty interrupts.
                    self.transmitter_empty = true;
                }
                self.ier = value & 0x0f;
                self.refill();
            }
            reg::IIR => {
                if (value ^ self.fcr) & FCR_ENABLE != 0 || value & FCR_CLEAR_RECEIVER != 0 {
                    self.unread();
                }
                self.fcr = value & 0xc9;
                self.refill();
            }
            reg::LCR => self.lcr = value,
            reg::MCR => self.set_mcr(value & 0x1f),
            reg::SCRATCH => self.scratch = value,
            _ => (),
        }
        None
    }

    /// Moves input into the FIFO if that is empty and the guest wants input. The caller updates the interrupt line
    /// before, when a read has emptied the FIFO, and after.
    pub fn refill(&mut self) {
        let wanted = self.ier & IER_RECEIVED != 0 || self.polls >= POLLS;
        if self.fifo.is_empty() && wanted && self.mcr & MCR_LOOP == 0 {
            let size = if self.fcr & FCR_ENABLE != 0 { FIFO_SIZE } else { 1 };
            let count = size.min(self.queue.len());
            self.fifo.extend(self.queue.drain(..count));
        }
    }

    /// Empties the FIFO without losing input.
    fn unread(&mut self) {
        let fifo = std::mem::take(&mut self.fifo);
        // What was looped back was never input.
        if self.mcr & MCR_LOOP == 0 {
            fifo.into_iter().rev().for_each(|byte| self.queue.push_front(byte));
        }
    }

    /// IIR without the FIFO bits: the pending interrupt of the highest priority.
    fn identification(&self) -> u8 {
        let trigger = match (self.fcr & FCR_ENABLE != 0, self.fcr >> 6) {
            (false, _) | (true, 0) => 1,
            (true, 1) => 4,
            (true, 2) => 8,
            (true, _) => 14,
        };
        if self.ier & IER_RECEIVED != 0 && !self.fifo.is_empty() {
            if self.fifo.len() >= trigger { IIR_RECEIVED } else { IIR_TIMEOUT }
        } else if self.ier & IER_TRANSMITTER != 0 && self.transmitter_empty {
            IIR_TRANSMITTER
        } else if self.ier & IER_MODEM != 0 && self.msr_delta != 0 {
            IIR_MODEM
        } else {
            IIR_NONE
        }
    }

    /// The modem status without its change bits: a connected terminal, or the own outputs looped back.
    fn modem_inputs(&self) -> u8 {
        if self.mcr & MCR_LOOP == 0 {
            return MSR_CTS | MSR_DSR | MSR_DCD;
        }
        [(MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD)]
            .iter()
            .filter(|(output, _)| self.mcr & output != 0)
            .fold(0, |inputs, (_, input)| inputs | input)
    }

    fn set_mcr(&mut self, value: u8) {
        if (value ^ self.mcr) & MCR_LOOP != 0 {
            self.unread();
        }
        let before = self.modem_inputs();
        self.mcr = value;
        let after = self.modem_inputs();
        // The ring indicator's bit says that it fell, the others that they changed.
        let changed = (before ^ after) & !MSR_RI | before & !after & MSR_RI;
        self.msr_delta |= changed >> 4;
        self.refill();
    }
}

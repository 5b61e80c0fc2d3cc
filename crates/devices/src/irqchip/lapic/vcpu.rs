//! The local APIC as its vCPU sees it.

use std::sync::atomic::Ordering::SeqCst;

use berth_cpu::ApicState;
use berth_cpu::apic::base::{ADDRESS as BASE_ADDRESS, ENABLE as BASE_ENABLE, X2APIC as BASE_X2APIC};
use berth_engine::{ApicEvent, LocalApic, MsrFault};
use berth_memory::GuestPhysAddr;

use super::access::Effect;
use super::registers::{ESR_SEND_ILLEGAL, Registers, SVR_SUPPRESS_EOI};
use super::{EXTINT, FIRST_VECTOR, INIT, INTERRUPT, Lapic, NMI, STARTUP, STARTUP_SHIFT, STARTUP_VECTOR};
use crate::irqchip::message::{DeliveryMode, Message};

/// Who gets an IPI (ICR bits 18 and 19).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shorthand {
    None,
    Itself,
    All,
    Others,
}

const ICR_LOGICAL: u64 = 1 << 11;
const ICR_ASSERT: u64 = 1 << 14;
const ICR_LEVEL: u64 = 1 << 15;

impl Lapic {
    /// Does what a register write left to do; no lock is held.
    pub(super) fn perform(&self, effect: Effect) {
        match effect {
            Effect::None => (),
            Effect::Ipi(icr) => self.send(icr, self.route().x2apic),
            Effect::SelfIpi(vector) if vector < FIRST_VECTOR => self.error(ESR_SEND_ILLEGAL),
            Effect::SelfIpi(vector) => self.post(vector, false),
            Effect::EndOfInterrupt => self.eoi(),
            Effect::Lint0 => {
                if let Some(chips) = self.chips.upgrade() {
                    chips.refresh_extint(self);
                }
            }
            Effect::Error(bit) => self.error(bit),
            Effect::Timer => self.timer_expired(),
        }
    }

    /// Sends an IPI; `wide` if the ICR is an x2APIC's.
    fn send(&self, icr: u64, wide: bool) {
        let message = Message {
            vector: icr as u8,
            mode: DeliveryMode::from_bits(icr >> 8),
            destination: (icr >> if wide { 32 } else { 56 }) as u32,
            logical: icr & ICR_LOGICAL != 0,
            wide,
            // IPIs are edge-triggered, whatever the ICR says (11.6.1).
            level: false,
        };
        let vectored = matches!(message.mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority);
        if vectored && message.vector < FIRST_VECTOR {
            return self.error(ESR_SEND_ILLEGAL);
        }
        if message.mode == DeliveryMode::Init && icr & (ICR_LEVEL | ICR_ASSERT) == ICR_LEVEL {
            // INIT level de-assert only synchronised the arbitration IDs of old processors.
            return;
        }
        let shorthand = match icr >> 18 & 3 {
            0 => Shorthand::None,
            1 => Shorthand::Itself,
            2 => Shorthand::All,
            _ => Shorthand::Others,
        };
        if shorthand == Shorthand::Itself {
            self.accept(&message);
            return;
        }
        let Some(chips) = self.chips.upgrade() else { return };
        match shorthand {
            Shorthand::None | Shorthand::Itself => {
                chips.deliver(&message);
            }
            Shorthand::All => chips.deliver_all(&message, None),
            Shorthand::Others => chips.deliver_all(&message, Some(self.id())),
        }
    }

    fn take_flag(&self, flag: u32) -> u32 {
        let clear = if flag == STARTUP { STARTUP | STARTUP_VECTOR } else { flag };
        self.flags.fetch_and(!clear, SeqCst)
    }
}

impl LocalApic for Lapic {
    fn has_interrupt(&self) -> bool {
        self.flags.load(SeqCst) & (INTERRUPT | EXTINT) != 0
    }

    fn acknowledge(&self) -> Option<u8> {
        if self.flags.load(SeqCst) & EXTINT != 0
            && let Some(vector) = self.chips.upgrade().and_then(|chips| chips.acknowledge_pic())
        {
            return Some(vector);
        }
        let mut regs = self.registers.lock();
        let ppr = regs.ppr();
        let vector = self.highest_request().filter(|v| v >> 4 > ppr >> 4);
        if let Some(vector) = vector {
            self.irr[usize::from(vector >> 5)].fetch_and(!(1 << (vector & 31)), SeqCst);
            regs.set_in_service(vector);
        }
        self.update_priority(&regs);
        vector
    }

    fn take_event(&self) -> Option<ApicEvent> {
        let flags = self.flags.load(SeqCst);
        if flags & INIT != 0 {
            self.take_flag(INIT);
            Some(ApicEvent::Init)
        } else if flags & NMI != 0 {
            self.take_flag(NMI);
            Some(ApicEvent::Nmi)
        } else if flags & STARTUP != 0 {
            // The vector that is taken is the one that is cleared: another may have come since.
            let vector = (self.take_flag(STARTUP) >> STARTUP_SHIFT) as u8;
            Some(ApicEvent::Startup { vector })
        } else {
            None
        }
    }

    fn has_event(&self) -> bool {
        self.flags.load(SeqCst) & (INIT | NMI | STARTUP) != 0
    }

    fn cr8(&self) -> u8 {
        self.registers.lock().tpr >> 4
    }

    fn set_cr8(&self, value: u8) {
        let mut regs = self.registers.lock();
        regs.tpr = value << 4;
        self.update_priority(&regs);
    }

    fn read_msr(&self, msr: u32) -> Result<u64, MsrFault> {
        self.msr_read(msr)
    }

    fn write_msr(&self, msr: u32, value: u64) -> Result<(), MsrFault> {
        self.msr_write(msr, value)
    }

    fn mmio_base(&self) -> Option<GuestPhysAddr> {
        let base = self.base.load(SeqCst);
        (base & (BASE_ENABLE | BASE_X2APIC) == BASE_ENABLE).then_some(GuestPhysAddr(base & BASE_ADDRESS))
    }

    fn mmio_read(&self, offset: u16, data: &mut [u8]) {
        self.page_read(offset & 0xfff, data);
    }

    fn mmio_write(&self, offset: u16, data: &[u8]) {
        self.page_write(offset & 0xfff, data);
    }

    fn send_ipi(&self, icr: u64) {
        self.send(icr, true);
    }

    fn eoi(&self) {
        let mut regs = self.registers.lock();
        let Some(vector) = regs.in_service() else { return };
        regs.clear_in_service(vector);
        self.update_priority(&regs);
        let broadcast = self.is_level(vector) && regs.svr & SVR_SUPPRESS_EOI == 0;
        drop(regs);
        if broadcast && let Some(chips) = self.chips.upgrade() {
            chips.end_of_interrupt(vector);
        }
    }

    fn needs_explicit_eoi(&self) -> bool {
        let regs = self.registers.lock();
        let in_service: u32 = regs.isr.iter().map(|word| word.count_ones()).sum();
        in_service != 1
            || regs.in_service().is_some_and(|v| self.is_level(v))
            || self.highest_request().is_some()
    }

    fn reset(&self, init: bool) {
        let mut regs = self.registers.lock();
        let base = regs.base;
        *regs = Registers::new(self.id());
        if init {
            regs.base = base;
        } else {
            self.take_flag(NMI | INIT | STARTUP | STARTUP_VECTOR);
        }
        self.clear_requests();
        self.publish(&regs);
        self.update_priority(&regs);
        self.arm_timer(&regs);
        drop(regs);
        self.perform(Effect::Lint0);
    }

    fn state(&self) -> ApicState {
        self.save()
    }

    fn set_state(&self, state: &ApicState) {
        self.restore(state);
    }
}

#[cfg(test)]
mod tests;

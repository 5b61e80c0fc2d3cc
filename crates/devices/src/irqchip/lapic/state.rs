//! Saving and restoring a local APIC.

use std::sync::atomic::Ordering::SeqCst;

use berth_cpu::ApicState;
use berth_cpu::apic::REGISTERS;

use super::Lapic;
use super::access::Effect;
use super::registers::{Registers, offset};
use super::timer::Mode;

impl Lapic {
    /// All registers.
    pub(super) fn save(&self) -> ApicState {
        let regs = self.registers().lock();
        let at = |i: usize| self.read_register(&regs, 16 * i as u16).unwrap_or(0);
        let mut state = ApicState {
            base: regs.base,
            registers: std::array::from_fn::<u32, REGISTERS, _>(at),
            tsc_deadline: regs.tsc_deadline,
        };
        // What an x2APIC does not have at these places, or derives.
        state.set(offset::LDR, regs.effective_ldr(self.id().0));
        state.set(offset::DFR, regs.dfr);
        state.set(offset::ICR_HIGH, (regs.icr >> 32) as u32);
        state
    }

    /// Replaces all registers and what is pending; the timer goes on with the time that was left.
    pub(super) fn restore(&self, state: &ApicState) {
        let mut regs = self.registers().lock();
        *regs = Registers::from_state(state);
        let mode = regs.timer_mode();
        regs.tsc_deadline = if mode == Mode::TscDeadline { state.tsc_deadline } else { 0 };
        let (initial, left) = (state.get(offset::INITIAL_COUNT), state.get(offset::CURRENT_COUNT));
        regs.count.resume(state.get(offset::DIVIDE), initial, left, self.now());
        self.clear_requests();
        for (i, (irr, tmr)) in self.irr.iter().zip(&self.tmr).enumerate() {
            let at = 16 * i as u16;
            irr.store(state.get(offset::IRR + at), SeqCst);
            tmr.store(state.get(offset::TMR + at), SeqCst);
        }
        self.publish(&regs);
        self.update_priority(&regs);
        self.arm_timer(&regs);
        drop(regs);
        self.perform(Effect::Lint0);
    }
}

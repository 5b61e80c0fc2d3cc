//! The local APIC's registers that only its own vCPU and its timer change (SDM volume 3, 11.4 to 11.8).

use berth_cpu::ApicState;
use berth_cpu::apic::base::{BSP as BASE_BSP, ENABLE as BASE_ENABLE, X2APIC as BASE_X2APIC};
pub(super) use berth_cpu::apic::{LVT_MASKED, offset};
use berth_engine::VcpuId;

use super::timer::{CountDown, Mode};
use crate::irqchip::message::Route;

/// Version 0x14, six LVT entries, EOI broadcasts can be suppressed.
pub(super) const VERSION: u32 = 0x14 | 5 << 16 | 1 << 24;

/// SVR: software enable.
pub(super) const SVR_ENABLE: u32 = 1 << 8;
/// SVR: EOIs are not sent to the IOAPIC.
pub(super) const SVR_SUPPRESS_EOI: u32 = 1 << 12;
/// SVR: writable bits.
pub(super) const SVR_WRITABLE: u32 = 0xff | SVR_ENABLE | SVR_SUPPRESS_EOI;

/// ESR: a message with an illegal vector was sent.
pub(super) const ESR_SEND_ILLEGAL: u32 = 1 << 5;
/// ESR: a message with an illegal vector was received.
pub(super) const ESR_RECEIVE_ILLEGAL: u32 = 1 << 6;
/// ESR: an access to a register that does not exist.
pub(super) const ESR_ILLEGAL_REGISTER: u32 = 1 << 7;

/// Index of an LVT entry, in the order of the offsets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lvt {
    Timer,
    Thermal,
    Performance,
    Lint0,
    Lint1,
    Error,
}

impl Lvt {
    pub fn from_offset(at: u16) -> Option<Self> {
        const ALL: [Lvt; 6] =
            [Lvt::Timer, Lvt::Thermal, Lvt::Performance, Lvt::Lint0, Lvt::Lint1, Lvt::Error];
        let index = at.checked_sub(offset::LVT_TIMER)? >> 4;
        ALL.get(usize::from(index)).copied()
    }
    /// Bits that the guest can set (SDM volume 3, figure 11-8).
    pub fn writable(self) -> u32 {
        match self {
            Self::Timer => 0x7_00ff,
            Self::Thermal | Self::Performance => 0x1_07ff,
            Self::Lint0 | Self::Lint1 => 0x1_a7ff,
            Self::Error => 0x1_00ff,
        }
    }
    /// Bits that are not reserved: the writable ones, delivery status and remote IRR.
    pub fn defined(self) -> u32 {
        match self {
            Self::Lint0 | Self::Lint1 => self.writable() | 1 << 12 | 1 << 14,
            _ => self.writable() | 1 << 12,
        }
    }
}

/// The registers. IRR and TMR are not here: other threads set them.
#[derive(Clone, Debug)]
pub(super) struct Registers {
    /// IA32_APIC_BASE.
    pub base: u64,
    pub tpr: u8,
    /// Logical destination as written in xAPIC mode (bits 24 to 31).
    pub ldr: u32,
    pub dfr: u32,
    pub svr: u32,
    pub isr: [u32; 8],
    pub lvt: [u32; 6],
    pub icr: u64,
    pub esr: u32,
    /// Errors since the last write of ESR.
    pub errors: u32,
    pub count: CountDown,
    /// IA32_TSC_DEADLINE; 0 when not armed.
    pub tsc_deadline: u64,
}

impl Registers {
    /// The state after RESET; see [`ApicState::reset`].
    pub fn new(id: VcpuId) -> Self {
        Self::from_state(&ApicState::reset(id))
    }

    /// From a saved state: all but IRR, TMR, the timer's count and its deadline. Bits that the guest could not
    /// have set are dropped.
    pub fn from_state(state: &ApicState) -> Self {
        let word = |i: usize| state.get(offset::ISR + 16 * i as u16);
        let mut registers = Self {
            base: state.base,
            tpr: state.get(offset::TPR) as u8,
            ldr: state.get(offset::LDR) & 0xff00_0000,
            dfr: state.get(offset::DFR) | 0x0fff_ffff,
            svr: state.get(offset::SVR) & SVR_WRITABLE,
            isr: std::array::from_fn(word),
            lvt: [LVT_MASKED; 6],
            icr: u64::from(state.get(offset::ICR)) | u64::from(state.get(offset::ICR_HIGH)) << 32,
            esr: state.get(offset::ESR),
            errors: 0,
            count: CountDown::default(),
            tsc_deadline: 0,
        };
        for (i, entry) in registers.lvt.iter_mut().enumerate() {
            let at = offset::LVT_TIMER + 16 * i as u16;
            *entry = state.get(at) & Lvt::from_offset(at).map_or(0, Lvt::defined);
        }
        registers
    }

    pub fn is_bsp(&self) -> bool {
        self.base & BASE_BSP != 0
    }
    pub fn is_enabled(&self) -> bool {
        self.base & BASE_ENABLE != 0
    }
    pub fn is_x2apic(&self) -> bool {
        self.base & BASE_X2APIC != 0
    }
    pub fn lvt(&self, entry: Lvt) -> u32 {
        self.lvt[entry as usize]
    }
    pub fn timer_mode(&self) -> Mode {
        Mode::from_lvt(self.lvt(Lvt::Timer))
    }

    /// The logical destination register as it reads in the current mode (SDM volume 3, 11.12.10.2).
    pub fn effective_ldr(&self, id: u8) -> u32 {
        if self.is_x2apic() { u32::from(id >> 4) << 16 | 1 << (id & 0xf) } else { self.ldr }
    }

    pub fn route(&self, id: u8) -> Route {
        Route {
            ldr: self.effective_ldr(id),
            flat: self.dfr >> 28 == 0xf,
            enabled: self.is_enabled(),
            x2apic: self.is_x2apic(),
            software_enabled: self.svr & SVR_ENABLE != 0,
        }
    }

    /// The interrupt in service with the highest vector.
    pub fn in_service(&self) -> Option<u8> {
        highest(|word| self.isr[word])
    }
    pub fn set_in_service(&mut self, vector: u8) {
        self.isr[usize::from(vector >> 5)] |= 1 << (vector & 31);
    }
    pub fn clear_in_service(&mut self, vector: u8) {
        self.isr[usize::from(vector >> 5)] &= !(1 << (vector & 31));
    }

    /// Processor priority (SDM volume 3, 11.8.3.1).
    pub fn ppr(&self) -> u8 {
        let serving = self.in_service().unwrap_or(0);
        if self.tpr >> 4 >= serving >> 4 { self.tpr } else { serving & 0xf0 }
    }

    /// Whether the PIC's interrupts pass LINT0; a disabled APIC is as if it were not there (SDM volume 3, 11.4.3).
    pub fn accepts_extint(&self) -> bool {
        let lint0 = self.lvt(Lvt::Lint0);
        if self.is_enabled() { lint0 & (LVT_MASKED | 0x700) == 0x700 } else { self.is_bsp() }
    }

    pub fn set_svr(&mut self, value: u32) {
        self.svr = value & SVR_WRITABLE;
        if self.svr & SVR_ENABLE == 0 {
            self.lvt.iter_mut().for_each(|entry| *entry |= LVT_MASKED);
        }
    }

    /// Writes an LVT entry. Returns whether the timer's mode changed to or from TSC-deadline, which disarms it.
    pub fn set_lvt(&mut self, entry: Lvt, value: u32) -> bool {
        let deadline = |r: &Self| r.timer_mode() == Mode::TscDeadline;
        let was = deadline(self);
        let mut value = value & entry.writable();
        if self.svr & SVR_ENABLE == 0 {
            value |= LVT_MASKED;
        }
        self.lvt[entry as usize] = value;
        let changed = deadline(self) != was;
        if changed {
            self.count.stop();
            self.tsc_deadline = 0;
        }
        changed
    }
}

/// The highest bit of a 256-bit register given by its words.
pub(super) fn highest(word: impl Fn(usize) -> u32) -> Option<u8> {
    (0..8).rev().find_map(|i| {
        let bits = word(i);
        (bits != 0).then(|| (i * 32) as u8 + bits.ilog2() as u8)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn priority_is_the_higher_class_of_task_and_interrupt_in_service() {
        let mut r = Registers::new(VcpuId(0));
        r.tpr = 0x35;
        assert_eq!(r.ppr(), 0x35);
        r.set_in_service(0x31);
        assert_eq!(r.ppr(), 0x35);
        r.set_in_service(0xf3);
        assert_eq!(r.ppr(), 0xf0);
        assert_eq!(r.in_service(), Some(0xf3));
        r.clear_in_service(0xf3);
        assert_eq!(r.in_service(), Some(0x31));
    }

    #[test]
    fn disabling_by_software_masks_every_entry_for_good() {
        let mut r = Registers::new(VcpuId(0));
        assert!(r.accepts_extint());
        r.set_svr(0x1ff);
        r.set_lvt(Lvt::Error, 0xffff_fefe);
        assert_eq!(r.lvt(Lvt::Error), 0x1_00fe);
        r.set_lvt(Lvt::Error, 0xfe);
        r.set_svr(0xff);
        assert_eq!(r.lvt(Lvt::Error), 0x1_00fe);
        assert!(!r.accepts_extint());
        r.set_lvt(Lvt::Error, 0xfe);
        assert_eq!(r.lvt(Lvt::Error), 0x1_00fe);
    }

    #[test]
    fn x2apic_derives_the_logical_id() {
        let mut r = Registers::new(VcpuId(1));
        r.base |= BASE_X2APIC;
        assert_eq!(r.effective_ldr(0x25), 0x0002_0020);
    }
}

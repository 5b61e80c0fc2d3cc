//! Reads and writes of the registers, by page (xAPIC) and by MSR (x2APIC; SDM volume 3, 11.12).

use berth_cpu::apic::base::{
    ADDRESS as BASE_ADDRESS, BSP as BASE_BSP, ENABLE as BASE_ENABLE, X2APIC as BASE_X2APIC,
};
use berth_cpu::msr::{IA32_APIC_BASE, IA32_TSC_DEADLINE, X2APIC_FIRST, X2APIC_LAST};
use berth_engine::MsrFault;

use super::Lapic;
use super::registers::{ESR_ILLEGAL_REGISTER, Lvt, Registers, SVR_WRITABLE, VERSION, offset};
use super::timer::Mode;
use crate::bytes;

/// What a write leaves to be done once the registers are unlocked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    None,
    /// Send what is in the ICR.
    Ipi(u64),
    /// An interrupt to this APIC itself.
    SelfIpi(u8),
    EndOfInterrupt,
    /// LINT0 or the mode changed: the PIC's output may now pass, or not any more.
    Lint0,
    /// An error to report in ESR.
    Error(u32),
    /// Look whether the timer has expired.
    Timer,
}

const ICR_DELIVERY_STATUS: u64 = 1 << 12;
/// Reserved bits of the ICR in x2APIC mode.
const ICR_RESERVED: u64 = 0xfff3_2000;

impl Lapic {
    /// What a register reads as, or `None` if it cannot be read in this mode.
    pub(super) fn read_register(&self, regs: &Registers, at: u16) -> Option<u32> {
        let x2apic = regs.is_x2apic();
        let word = usize::from(at >> 4 & 7);
        Some(match at {
            offset::ID if x2apic => self.id().0.into(),
            offset::ID => u32::from(self.id().0) << 24,
            offset::VERSION => VERSION,
            offset::TPR => regs.tpr.into(),
            offset::PPR => regs.ppr().into(),
            offset::APR | offset::RRD | offset::EOI if !x2apic => 0,
            offset::LDR => regs.effective_ldr(self.id().0),
            offset::DFR if !x2apic => regs.dfr,
            offset::SVR => regs.svr,
            offset::ISR..offset::TMR => regs.isr[word],
            offset::TMR..offset::IRR => self.tmr_word(word),
            offset::IRR..offset::ESR => self.irr_word(word),
            offset::ESR => regs.esr,
            offset::ICR => regs.icr as u32,
            offset::ICR_HIGH if !x2apic => (regs.icr >> 32) as u32,
            offset::LVT_TIMER..=offset::LVT_ERROR => regs.lvt(Lvt::from_offset(at)?),
            offset::INITIAL_COUNT => regs.count.initial,
            offset::CURRENT_COUNT => regs.count.current(self.now(), regs.timer_mode()),
            offset::DIVIDE => regs.count.divide,
            _ => return None,
        })
    }

    /// Writes a register that exists in both modes; `None` if there is no such register.
    fn write_register(&self, regs: &mut Registers, at: u16, value: u32) -> Option<Effect> {
        match at {
            offset::TPR => {
                regs.tpr = value as u8;
                self.update_priority(regs);
            }
            offset::EOI => return Some(Effect::EndOfInterrupt),
            offset::SVR => {
                regs.set_svr(value);
                self.publish(regs);
                return Some(Effect::Lint0);
            }
            offset::ESR => {
                regs.esr = std::mem::take(&mut regs.errors);
            }
            offset::LVT_TIMER..=offset::LVT_ERROR => {
                let entry = Lvt::from_offset(at)?;
                if regs.set_lvt(entry, value) {
                    self.arm_timer(regs);
                }
                if entry == Lvt::Lint0 {
                    self.publish(regs);
                    return Some(Effect::Lint0);
                }
            }
            offset::INITIAL_COUNT => {
                if regs.timer_mode() != Mode::TscDeadline {
                    regs.count.start(value, self.now());
                    self.arm_timer(regs);
                }
            }
            offset::DIVIDE => {
                let mode = regs.timer_mode();
                regs.count.set_divide(value & 0xb, self.now(), mode);
                self.arm_timer(regs);
            }
            _ => return None,
        }
        Some(Effect::None)
    }

    pub(super) fn page_read(&self, at: u16, data: &mut [u8]) {
        let register = at & 0xff0;
        let mut regs = self.registers().lock();
        let value = self.read_register(&regs, register);
        if value.is_none() {
            regs.errors |= ESR_ILLEGAL_REGISTER;
        }
        drop(regs);
        bytes::fill(data, value.unwrap_or(0).into(), usize::from(at & 0xf), 4);
        if value.is_none() {
            self.perform(Effect::Error(ESR_ILLEGAL_REGISTER));
        }
    }

    pub(super) fn page_write(&self, at: u16, data: &[u8]) {
        // Registers are written with aligned 32-bit stores; what others do is undefined (11.4.1). Here: nothing.
        if at & 0xf != 0 || data.len() < 4 {
            return;
        }
        let value = bytes::value(data) as u32;
        let mut regs = self.registers().lock();
        let effect = match at {
            offset::ICR => {
                regs.icr = regs.icr & !0xffff_ffff | u64::from(value) & !ICR_DELIVERY_STATUS;
                Effect::Ipi(regs.icr)
            }
            offset::ICR_HIGH => {
                regs.icr = regs.icr & 0xffff_ffff | u64::from(value & 0xff00_0000) << 32;
                Effect::None
            }
            offset::LDR => {
                regs.ldr = value & 0xff00_0000;
                self.publish(&regs);
                Effect::None
            }
            offset::DFR => {
                regs.dfr = value | 0x0fff_ffff;
                self.publish(&regs);
                Effect::None
            }
            offset::ID
            | offset::VERSION
            | offset::APR
            | offset::PPR
            | offset::RRD
            | offset::ISR..offset::ESR
            | offset::CURRENT_COUNT => Effect::None,
            _ => self.write_register(&mut regs, at, value).unwrap_or(Effect::Error(ESR_ILLEGAL_REGISTER)),
        };
        drop(regs);
        self.perform(effect);
    }

    pub(super) fn msr_read(&self, msr: u32) -> Result<u64, MsrFault> {
        let regs = self.registers().lock();
        match msr {
            IA32_APIC_BASE => Ok(regs.base),
            IA32_TSC_DEADLINE => Ok(regs.tsc_deadline),
            X2APIC_FIRST..=X2APIC_LAST if regs.is_x2apic() => match x2apic_offset(msr)? {
                offset::ICR => Ok(regs.icr),
                at => self.read_register(&regs, at).map(u64::from).ok_or(MsrFault),
            },
            _ => Err(MsrFault),
        }
    }

    pub(super) fn msr_write(&self, msr: u32, value: u64) -> Result<(), MsrFault> {
        let mut regs = self.registers().lock();
        let effect = match msr {
            IA32_APIC_BASE => self.set_base(&mut regs, value)?,
            IA32_TSC_DEADLINE => {
                if regs.timer_mode() != Mode::TscDeadline {
                    return Ok(());
                }
                regs.tsc_deadline = value;
                if value != 0 && self.tsc_now() >= value {
                    Effect::Timer
                } else {
                    self.arm_timer(&regs);
                    Effect::None
                }
            }
            X2APIC_FIRST..=X2APIC_LAST if regs.is_x2apic() => {
                self.x2apic_write(&mut regs, x2apic_offset(msr)?, value)?
            }
            _ => return Err(MsrFault),
        };
        drop(regs);
        self.perform(effect);
        Ok(())
    }

    fn x2apic_write(&self, regs: &mut Registers, at: u16, value: u64) -> Result<Effect, MsrFault> {
        if at == offset::ICR {
            if value & ICR_RESERVED != 0 {
                return Err(MsrFault);
            }
            regs.icr = value & !ICR_DELIVERY_STATUS;
            return Ok(Effect::Ipi(regs.icr));
        }
        let allowed = match at {
            offset::TPR | offset::SELF_IPI => 0xff,
            offset::EOI | offset::ESR => 0,
            offset::SVR => SVR_WRITABLE,
            offset::INITIAL_COUNT => u32::MAX,
            offset::DIVIDE => 0xb,
            _ => Lvt::from_offset(at).ok_or(MsrFault)?.defined(),
        };
        if value & !u64::from(allowed) != 0 {
            return Err(MsrFault);
        }
        if at == offset::SELF_IPI {
            return Ok(Effect::SelfIpi(value as u8));
        }
        self.write_register(regs, at, value as u32).ok_or(MsrFault)
    }

    /// Writes IA32_APIC_BASE (SDM volume 3, 11.4.3, 11.4.4 and 11.12.5).
    fn set_base(&self, regs: &mut Registers, value: u64) -> Result<Effect, MsrFault> {
        const MODE: u64 = BASE_ENABLE | BASE_X2APIC;
        if value & !(BASE_BSP | MODE | BASE_ADDRESS) != 0 {
            return Err(MsrFault);
        }
        let (old, new) = (regs.base & MODE, value & MODE);
        let possible = match new {
            0 => true,
            // x2APIC mode is left through the disabled state only,
            BASE_ENABLE => old != MODE,
            // and entered from xAPIC mode only.
            MODE => old != 0,
            _ => false,
        };
        if !possible {
            return Err(MsrFault);
        }
        // Which vCPU is the bootstrap processor does not change.
        let base = value & !BASE_BSP | regs.base & BASE_BSP;
        if new == 0 {
            *regs = Registers::new(self.id());
            self.clear_requests();
            self.arm_timer(regs);
        }
        regs.base = base;
        self.publish(regs);
        self.update_priority(regs);
        Ok(Effect::Lint0)
    }
}

/// The page offset of an x2APIC MSR.
fn x2apic_offset(msr: u32) -> Result<u16, MsrFault> {
    u16::try_from((msr - X2APIC_FIRST) << 4).ok().filter(|&at| at < 0x400).ok_or(MsrFault)
}

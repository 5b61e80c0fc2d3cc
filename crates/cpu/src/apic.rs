//! The engine-neutral state of a local APIC (SDM volume 3, chapter 11).

use crate::VcpuId;

/// Offsets of the registers in the xAPIC's page (SDM volume 3, table 11-1); an x2APIC's MSR numbers are 0x800 plus
/// the offset divided by 16.
#[allow(missing_docs)]
pub mod offset {
    pub const ID: u16 = 0x20;
    pub const VERSION: u16 = 0x30;
    pub const TPR: u16 = 0x80;
    pub const APR: u16 = 0x90;
    pub const PPR: u16 = 0xa0;
    pub const EOI: u16 = 0xb0;
    pub const RRD: u16 = 0xc0;
    pub const LDR: u16 = 0xd0;
    pub const DFR: u16 = 0xe0;
    pub const SVR: u16 = 0xf0;
    pub const ISR: u16 = 0x100;
    pub const TMR: u16 = 0x180;
    pub const IRR: u16 = 0x200;
    pub const ESR: u16 = 0x280;
    pub const ICR: u16 = 0x300;
    pub const ICR_HIGH: u16 = 0x310;
    pub const LVT_TIMER: u16 = 0x320;
    pub const LVT_LINT0: u16 = 0x350;
    pub const LVT_LINT1: u16 = 0x360;
    pub const LVT_ERROR: u16 = 0x370;
    pub const INITIAL_COUNT: u16 = 0x380;
    pub const CURRENT_COUNT: u16 = 0x390;
    pub const DIVIDE: u16 = 0x3e0;
    pub const SELF_IPI: u16 = 0x3f0;
}

/// Bits of IA32_APIC_BASE (SDM volume 3, 11.4.3 and 11.12.1).
pub mod base {
    /// This is the bootstrap processor.
    pub const BSP: u64 = 1 << 8;
    /// x2APIC mode.
    pub const X2APIC: u64 = 1 << 10;
    /// Enabled.
    pub const ENABLE: u64 = 1 << 11;
    /// The address of the register page, in the largest physical address space (52 bits).
    pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
    /// Where the register page is after reset.
    pub const RESET_ADDRESS: u64 = 0xfee0_0000;
}

/// LVT: masked.
pub const LVT_MASKED: u32 = 1 << 16;
/// LVT: delivery mode NMI.
pub const LVT_NMI: u32 = 4 << 8;
/// LVT: delivery mode ExtINT.
pub const LVT_EXTINT: u32 = 7 << 8;

/// Number of registers in [`ApicState::registers`]: one every 16 bytes of the first KiB.
pub const REGISTERS: usize = 64;

/// All registers of one vCPU's local APIC, except its ID, which is the vCPU's number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApicState {
    /// IA32_APIC_BASE; see [`base`].
    pub base: u64,
    /// The registers as they read, at their offset divided by 16. The ICR's upper half is at [`offset::ICR_HIGH`]
    /// in x2APIC mode too. Of [`offset::ID`], [`offset::VERSION`] and [`offset::PPR`] nothing is taken over.
    pub registers: [u32; REGISTERS],
    /// IA32_TSC_DEADLINE; 0 when not armed.
    pub tsc_deadline: u64,
}

impl ApicState {
    /// The state after RESET (SDM volume 3, 11.4.7.1). The bootstrap processor's LINT pins are as firmware leaves
    /// them, because kernels are started without one: the PIC at LINT0 (virtual wire), NMI at LINT1
    /// (MultiProcessor Specification 1.4, 3.6.2.2).
    pub fn reset(id: VcpuId) -> Self {
        let bsp = id.0 == 0;
        let base = base::RESET_ADDRESS | base::ENABLE | if bsp { base::BSP } else { 0 };
        let mut state = Self { base, registers: [0; REGISTERS], tsc_deadline: 0 };
        state.set(offset::DFR, u32::MAX);
        state.set(offset::SVR, 0xff);
        for at in (offset::LVT_TIMER..=offset::LVT_ERROR).step_by(16) {
            state.set(at, LVT_MASKED);
        }
        if bsp {
            state.set(offset::LVT_LINT0, LVT_EXTINT);
            state.set(offset::LVT_LINT1, LVT_NMI);
        }
        state
    }

    /// The register at `offset` of the page; 0 beyond the last.
    pub fn get(&self, offset: u16) -> u32 {
        self.registers.get(usize::from(offset >> 4)).copied().unwrap_or(0)
    }

    /// Sets the register at `offset` of the page, if there is one.
    pub fn set(&mut self, offset: u16, value: u32) {
        if let Some(register) = self.registers.get_mut(usize::from(offset >> 4)) {
            *register = value;
        }
    }

    /// Whether it is in x2APIC mode.
    pub fn is_x2apic(&self) -> bool {
        self.base & base::X2APIC != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_bootstrap_processor_hears_the_pic_after_reset() {
        let (bsp, ap) = (ApicState::reset(VcpuId(0)), ApicState::reset(VcpuId(1)));
        assert_eq!((bsp.get(offset::LVT_LINT0), ap.get(offset::LVT_LINT0)), (LVT_EXTINT, LVT_MASKED));
        assert_eq!((bsp.base, ap.base), (0xfee0_0900, 0xfee0_0800));
        assert_eq!(bsp.get(0x400), 0);
    }
}

//! The kernel's PIC, IOAPIC and PIT, and the way of devices' interrupts to them (api.rst 4.24 to 4.29, 4.52, 4.70).

use std::sync::Arc;

use berth_engine::{EngineError, InterruptSink, MessageEvent, MessageInterrupts};
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_SPEAKER_DUMMY,
    kvm_irq_routing_entry, kvm_irqchip, kvm_pit_config, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use tracing::warn;

use crate::refused;
use crate::routes::{PINS, Routes, pin};

/// Inputs of the two PICs.
const PIC_INPUTS: u32 = 16;
/// Inputs of one PIC.
const ONE_PIC: u32 = 8;
/// The input of the first PIC that the second drives.
const CASCADE: u32 = 2;
/// The IOAPIC's pin of ISA interrupt 0, as the MADT says.
const IRQ0_PIN: u32 = 2;

/// The kernel's interrupt controllers of one VM, and their state after power-up.
pub struct KernelChips {
    vm: Arc<VmFd>,
    routes: Arc<Routes>,
    chips: [kvm_irqchip; 3],
    pit: kvm_pit_state2,
}

impl KernelChips {
    /// Creates controllers and PIT. Must come before the first vCPU.
    ///
    /// # Errors
    /// [`EngineError::Host`] when the kernel has none.
    pub fn create(vm: Arc<VmFd>) -> Result<Self, EngineError> {
        vm.create_irq_chip().map_err(refused("interrupt controllers in the kernel"))?;
        // Port 0x61 is the kernel's too, because its bits show the PIT's third counter.
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..kvm_pit_config::default() };
        vm.create_pit2(pit).map_err(refused("a timer (PIT) in the kernel"))?;
        let routes = Routes::new(vm.clone(), pins())?;
        let state = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..kvm_irqchip::default() };
            vm.get_irqchip(&mut chip).map(|()| chip).map_err(refused("the state of an interrupt controller"))
        };
        let chips =
            [state(KVM_IRQCHIP_PIC_MASTER)?, state(KVM_IRQCHIP_PIC_SLAVE)?, state(KVM_IRQCHIP_IOAPIC)?];
        let pit = vm.get_pit2().map_err(refused("the state of the timer"))?;
        Ok(Self { vm, routes, chips, pit })
    }
}

/// ISA interrupts go to the PICs and to the IOAPIC, the others to the IOAPIC only. KVM's own default has interrupt 0
/// at pin 0.
fn pins() -> Vec<kvm_irq_routing_entry> {
    let mut pins = Vec::new();
    for gsi in (0..PINS).filter(|&gsi| gsi != CASCADE) {
        if gsi < ONE_PIC {
            pins.push(pin(gsi, KVM_IRQCHIP_PIC_MASTER, gsi));
        } else if gsi < PIC_INPUTS {
            pins.push(pin(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - ONE_PIC));
        }
        pins.push(pin(gsi, KVM_IRQCHIP_IOAPIC, if gsi == 0 { IRQ0_PIN } else { gsi }));
    }
    pins
}

impl MessageInterrupts for KernelChips {
    fn signal_msi(&self, address: u64, data: u32) -> bool {
        self.routes.signal_msi(address, data)
    }

    fn message_event(&self) -> Option<Box<dyn MessageEvent>> {
        self.routes.message_event()
    }
}

impl InterruptSink for KernelChips {
    fn set_line(&self, irq: u8, level: bool) {
        if let Err(error) = self.vm.set_irq_line(irq.into(), level) {
            warn!("KVM does not take interrupt {irq}: {error}");
        }
    }

    fn reset(&self) {
        for chip in &self.chips {
            if let Err(error) = self.vm.set_irqchip(chip) {
                warn!("KVM does not reset interrupt controller {}: {error}", chip.chip_id);
            }
        }
        if let Err(error) = self.vm.set_pit2(&self.pit) {
            warn!("KVM does not reset the PIT: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_interrupt_but_the_cascade_has_its_pins() {
        let routes = pins();
        let pins = |gsi: u32| {
            let of = |e: &&kvm_irq_routing_entry| e.gsi == gsi;
            // SAFETY: all entries were made with this variant of the union.
            let pin = |e: &kvm_irq_routing_entry| unsafe { (e.u.irqchip.irqchip, e.u.irqchip.pin) };
            routes.iter().filter(of).map(pin).collect::<Vec<_>>()
        };
        assert_eq!(pins(0), [(KVM_IRQCHIP_PIC_MASTER, 0), (KVM_IRQCHIP_IOAPIC, 2)]);
        assert_eq!(pins(2), []);
        assert_eq!(pins(12), [(KVM_IRQCHIP_PIC_SLAVE, 4), (KVM_IRQCHIP_IOAPIC, 12)]);
        assert_eq!(pins(23), [(KVM_IRQCHIP_IOAPIC, 23)]);
        assert_eq!(routes.len(), 15 + 23);
    }
}

//! A split interrupt controller (KVM_CAP_SPLIT_IRQCHIP, api.rst 7.5): local APICs of the kernel, PIC, IOAPIC and PIT of
//! devices.
//!
//! The IOAPIC's messages go by KVM_SIGNAL_MSI. The routes of its pins are there for one reason: KVM looks in them which
//! vectors are level-triggered, and leaves the guest with KVM_EXIT_IOAPIC_EOI when one of these ends. The PIC's
//! interrupts are injected by the bootstrap processor's thread (KVM_INTERRUPT), which is kicked when one comes.

use std::sync::{Arc, OnceLock, Weak};

use berth_engine::{EngineError, LocalApics, MessageEvent, MessageInterrupts, PinController};
use kvm_bindings::{KVM_CAP_SPLIT_IRQCHIP, kvm_enable_cap, kvm_interrupt};
use kvm_ioctls::{VcpuFd, VmFd};
use tracing::warn;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use crate::refused;
use crate::routes::{PINS, Routes};

// api.rst 4.16.
ioctl_iow_nr!(KVM_INTERRUPT, kvm_bindings::KVMIO, 0x86, kvm_interrupt);

/// The kernel's local APICs of one VM, and the way to the other controllers.
pub struct SplitChips {
    routes: Arc<Routes>,
    controllers: OnceLock<Weak<dyn PinController>>,
}

impl SplitChips {
    /// Makes local APICs for all vCPUs to come. Must come before the first of them.
    ///
    /// # Errors
    /// [`EngineError::Host`] when the kernel has none.
    pub fn create(vm: Arc<VmFd>) -> Result<Self, EngineError> {
        let mut cap = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..kvm_enable_cap::default() };
        cap.args[0] = PINS.into();
        vm.enable_cap(&cap).map_err(refused("local APICs in the kernel"))?;
        Ok(Self { routes: Routes::new(vm, Vec::new())?, controllers: OnceLock::new() })
    }

    /// PIC and IOAPIC, once they are connected.
    pub fn controllers(&self) -> Option<Arc<dyn PinController>> {
        self.controllers.get()?.upgrade()
    }
}

impl MessageInterrupts for SplitChips {
    fn signal_msi(&self, address: u64, data: u32) -> bool {
        self.routes.signal_msi(address, data)
    }

    fn message_event(&self) -> Option<Box<dyn MessageEvent>> {
        self.routes.message_event()
    }
}

impl LocalApics for SplitChips {
    fn set_pin(&self, pin: u8, address: u64, data: u32) {
        if let Err(error) = self.routes.set_pin(pin, address, data) {
            warn!("KVM does not take the route of IOAPIC pin {pin}: {error}");
        }
    }

    fn connect(&self, controllers: Weak<dyn PinController>) {
        let _ = self.controllers.set(controllers);
    }
}

/// The PIC's way to one vCPU.
#[derive(Default)]
pub struct ExternalInterrupt {
    /// Acknowledged, but KVM has not taken it yet.
    vector: Option<u8>,
}

impl ExternalInterrupt {
    /// Gives KVM the PIC's interrupt if it can take one now; otherwise asks for an exit as soon as it can.
    pub fn offer(&mut self, fd: &mut VcpuFd, pic: &dyn PinController) {
        let waiting = self.vector.is_some() || pic.has_interrupt();
        let run = fd.get_kvm_run();
        if waiting && run.ready_for_interrupt_injection != 0 {
            // Once: KVM says anew after the next KVM_RUN whether it takes another.
            run.ready_for_interrupt_injection = 0;
            self.vector = self.vector.or_else(|| pic.acknowledge());
            if let Some(vector) = self.vector
                && inject(fd, vector)
            {
                self.vector = None;
            }
        }
        let more = self.vector.is_some() || pic.has_interrupt();
        fd.get_kvm_run().request_interrupt_window = more.into();
    }
}

/// Whether KVM took the vector; it has room for one.
fn inject(fd: &VcpuFd, vector: u8) -> bool {
    let interrupt = kvm_interrupt { irq: vector.into() };
    // SAFETY: the descriptor is a vCPU's, and the kernel only reads the structure.
    unsafe { ioctl_with_ref(fd, KVM_INTERRUPT(), &interrupt) == 0 }
}

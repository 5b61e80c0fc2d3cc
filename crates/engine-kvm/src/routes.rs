//! The table of interrupt routes (KVM_SET_GSI_ROUTING, api.rst 4.52): pins of controllers, and messages that are sent
//! by a write to an eventfd (KVM_IRQFD, 4.75).
//!
//! KVM takes the table only as a whole, so all of it is kept here. The lock is held while KVM takes a table, which waits
//! for interrupts on their way; only those who change a route take it.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use berth_engine::{EngineError, EventFd, MessageEvent};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_irq_routing_msi, kvm_msi,
};
use kvm_ioctls::{Cap, VmFd};
use parking_lot::Mutex;
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use crate::refused;

/// Interrupt numbers of pins; those of messages come after them.
pub const PINS: u32 = 24;

/// A pin of one of the kernel's controllers.
pub fn pin(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 { irqchip: kvm_irq_routing_irqchip { irqchip, pin } },
        ..kvm_irq_routing_entry::default()
    }
}

fn message(gsi: u32, (address, data): (u64, u32)) -> kvm_irq_routing_entry {
    let msi = kvm_irq_routing_msi {
        address_lo: address as u32,
        address_hi: (address >> 32) as u32,
        data,
        ..kvm_irq_routing_msi::default()
    };
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
        ..kvm_irq_routing_entry::default()
    }
}

/// Whether a write to `address` is an interrupt (SDM volume 3, 11.11.1): KVM looks at the lower bits only.
fn is_message(address: u64) -> bool {
    address >> 20 == 0xfee
}

/// The routes of one VM.
pub struct Routes {
    vm: Arc<VmFd>,
    /// How many routes the kernel takes.
    limit: usize,
    table: Mutex<Table>,
}

struct Table {
    pins: Vec<kvm_irq_routing_entry>,
    /// Messages by interrupt number; `None`: the number is in use and has no message yet.
    messages: BTreeMap<u32, Option<(u64, u32)>>,
}

impl Table {
    fn entries(&self) -> Vec<kvm_irq_routing_entry> {
        let messages = self.messages.iter().filter_map(|(&gsi, &m)| Some(message(gsi, m?)));
        self.pins.iter().copied().chain(messages).collect()
    }
}

impl Routes {
    /// A table with these pins, which KVM is told at once.
    ///
    /// # Errors
    /// [`EngineError::Host`].
    pub fn new(vm: Arc<VmFd>, pins: Vec<kvm_irq_routing_entry>) -> Result<Arc<Self>, EngineError> {
        let limit = usize::try_from(vm.check_extension_int(Cap::IrqRouting)).unwrap_or(0);
        let table = Table { pins, messages: BTreeMap::new() };
        let routes = Self { vm, limit, table: Mutex::new(table) };
        routes.tell(&routes.table.lock()).map_err(refused("interrupt routes"))?;
        Ok(Arc::new(routes))
    }

    fn tell(&self, table: &Table) -> io::Result<()> {
        let entries =
            KvmIrqRouting::from_entries(&table.entries()).map_err(|e| io::Error::other(format!("{e:?}")))?;
        Ok(self.vm.set_gsi_routing(&entries)?)
    }

    /// Changes the message of `gsi`; if KVM does not take it nothing changes.
    fn set(&self, gsi: u32, new: Option<(u64, u32)>) -> io::Result<()> {
        let mut table = self.table.lock();
        let old = table.messages.insert(gsi, new);
        let told = self.tell(&table);
        if told.is_err() {
            match old {
                Some(old) => table.messages.insert(gsi, old),
                None => table.messages.remove(&gsi),
            };
        }
        told
    }

    /// The message that the IOAPIC of devices sends for `pin`, so that KVM tells when it ends.
    pub fn set_pin(&self, pin: u8, address: u64, data: u32) -> io::Result<()> {
        self.set(pin.into(), Some((address, data)))
    }

    /// A number for a message of its own.
    fn reserve(&self) -> Option<u32> {
        let mut table = self.table.lock();
        if table.pins.len() + table.messages.len() >= self.limit {
            return None;
        }
        let gsi = (PINS..).find(|gsi| !table.messages.contains_key(gsi))?;
        table.messages.insert(gsi, None);
        Some(gsi)
    }

    /// An eventfd whose message is yet to be set. `None`: the host has no more of them.
    pub fn message_event(self: &Arc<Self>) -> Option<Box<dyn MessageEvent>> {
        let event = EventFd::new(EFD_NONBLOCK).ok()?;
        let gsi = self.reserve()?;
        let made = Event { routes: self.clone(), gsi, event };
        self.vm.register_irqfd(&made.event, gsi).ok()?;
        Some(Box::new(made))
    }

    /// KVM_SIGNAL_MSI (api.rst 4.70). Returns whether a local APIC took it.
    pub fn signal_msi(&self, address: u64, data: u32) -> bool {
        let msi = kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..kvm_msi::default()
        };
        is_message(address) && self.vm.signal_msi(msi).is_ok_and(|taken| taken > 0)
    }
}

struct Event {
    routes: Arc<Routes>,
    gsi: u32,
    event: EventFd,
}

impl MessageEvent for Event {
    fn set(&self, address: u64, data: u32) -> bool {
        is_message(address) && self.routes.set(self.gsi, Some((address, data))).is_ok()
    }

    fn event(&self) -> &EventFd {
        &self.event
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let _ = self.routes.vm.unregister_irqfd(&self.event, self.gsi);
        let mut table = self.routes.table.lock();
        table.messages.remove(&self.gsi);
        // One route too many does no harm.
        let _ = self.routes.tell(&table);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_without_a_message_have_no_route() {
        let messages = BTreeMap::from([(24, None), (25, Some((0xfee0_1000, 0x41)))]);
        let table = Table { pins: vec![pin(4, 0, 4)], messages };
        let entries = table.entries();
        assert_eq!(entries.iter().map(|e| e.gsi).collect::<Vec<_>>(), [4, 25]);
        // SAFETY: `message` makes this variant of the union.
        let msi = unsafe { entries[1].u.msi };
        assert_eq!((msi.address_lo, msi.address_hi, msi.data), (0xfee0_1000, 0, 0x41));
    }

    #[test]
    fn only_the_window_of_the_apics_takes_messages() {
        assert!(is_message(0xfeef_f00c));
        assert!(!is_message(0x1_fee0_0000) && !is_message(0xfed0_0000));
    }
}

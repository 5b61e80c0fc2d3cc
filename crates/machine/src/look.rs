//! Looking at a machine without changing it: where an address leads, and where memory is.

use std::sync::mpsc::channel;

use berth_cpu::apic::base;
use berth_cpu::{CpuState, VcpuId};
use berth_explain::{
    Device, ExplainError, Explanation, Hex, MachineView, MapError, MemoryMap, Question, Subject, explain,
    memory_map,
};
use berth_memory::{GuestPhysAddr, PAGE_SIZE, layout};

use crate::board::Board;
use crate::control::MachineControl;
use crate::event::Event;

/// Why a machine cannot be looked at. One line for people.
#[derive(Debug, thiserror::Error)]
pub enum LookError {
    /// No such vCPU.
    #[error("the VM has no vCPU {vcpu}: they are 0 to {last}")]
    NoVcpu {
        /// Which was asked for.
        vcpu: u8,
        /// The last that there is.
        last: usize,
    },
    /// The machine ended, or was reset, before its vCPU could say what its state is.
    #[error("the VM has ended, or was reset meanwhile")]
    Gone,
    /// The address.
    #[error(transparent)]
    Explain(#[from] ExplainError),
}

impl MachineControl {
    /// The state of a vCPU at an instruction boundary. A vCPU that runs stops for it and goes on.
    ///
    /// # Errors
    /// [`LookError`].
    pub fn vcpu_state(&self, vcpu: u8) -> Result<CpuState, LookError> {
        let vcpus = self.vcpu_threads().len();
        if usize::from(vcpu) >= vcpus {
            return Err(LookError::NoVcpu { vcpu, last: vcpus.saturating_sub(1) });
        }
        let (reply, state) = channel();
        self.send(Event::Look { vcpu: VcpuId(vcpu), reply });
        state.recv().map(|state| *state).map_err(|_| LookError::Gone)
    }

    /// Explains where an address leads, with the control registers of `vcpu`. `vm` is the name of the VM.
    ///
    /// # Errors
    /// [`LookError`].
    pub fn explain(&self, vm: &str, vcpu: u8, question: &Question) -> Result<Explanation, LookError> {
        let state = self.vcpu_state(vcpu)?;
        let view = View { board: self.board(), apic_base: state.apic.as_ref().map_or(0, |apic| apic.base) };
        let subject = Subject {
            vm,
            vcpu,
            state: &state,
            physical_bits: self.physical_bits(),
            memory: self.memory(),
            machine: &view,
        };
        Ok(explain(&subject, question)?)
    }

    /// A map of guest memory by page state, in chunks of `chunk_bytes` or as suits a screen. `vm` is the name of the VM.
    ///
    /// # Errors
    /// [`MapError`].
    pub fn memory_map(&self, vm: &str, chunk_bytes: Option<u64>) -> Result<MemoryMap, MapError> {
        memory_map(vm, self.memory(), chunk_bytes)
    }
}

/// The devices as a vCPU sees them.
struct View<'a> {
    board: &'a Board,
    apic_base: u64,
}

impl MachineView for View<'_> {
    fn device_at(&self, at: GuestPhysAddr) -> Option<Device> {
        let within = |start: u64, name: &str| {
            let inside = (start..start + PAGE_SIZE).contains(&at.0);
            inside.then(|| Device { name: name.to_owned(), start: Hex(start), len: PAGE_SIZE })
        };
        // An xAPIC has its registers in memory, each vCPU its own, in front of everything else.
        let xapic = self.apic_base & (base::ENABLE | base::X2APIC) == base::ENABLE;
        let local = xapic.then(|| within(self.apic_base & base::ADDRESS, "local APIC")).flatten();
        local.or_else(|| match self.board.mmio_at(at) {
            Some(range) => Some(Device { name: range.name, start: Hex(range.start.0), len: range.len }),
            // An engine that has interrupt controllers of its own has the IOAPIC where the tables say.
            None if self.board.local_apic(VcpuId(0)).is_none() => within(layout::IOAPIC_BASE.0, "IOAPIC"),
            None => None,
        })
    }
}

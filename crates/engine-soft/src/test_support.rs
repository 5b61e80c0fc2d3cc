//! What the tests of this crate share: a vCPU with memory, without a machine around it.

use std::sync::Arc;

use berth_cpu::VcpuId;
use berth_engine::{ApicEvent, Bus, LocalApic, MsrFault};
use berth_memory::{GuestMemory, GuestPhysAddr};

use crate::SoftOptions;
use crate::cpu::Cpu;
use crate::vm::Vm;

/// A local APIC that never has anything.
pub(crate) struct NoApic;

impl LocalApic for NoApic {
    fn has_interrupt(&self) -> bool {
        false
    }
    fn acknowledge(&self) -> Option<u8> {
        None
    }
    fn take_event(&self) -> Option<ApicEvent> {
        None
    }
    fn has_event(&self) -> bool {
        false
    }
    fn cr8(&self) -> u8 {
        0
    }
    fn set_cr8(&self, _: u8) {}
    fn read_msr(&self, _: u32) -> Result<u64, MsrFault> {
        Err(MsrFault)
    }
    fn write_msr(&self, _: u32, _: u64) -> Result<(), MsrFault> {
        Err(MsrFault)
    }
    fn mmio_base(&self) -> Option<GuestPhysAddr> {
        None
    }
    fn mmio_read(&self, _: u16, _: &mut [u8]) {}
    fn mmio_write(&self, _: u16, _: &[u8]) {}
    fn send_ipi(&self, _: u64) {}
    fn eoi(&self) {}
    fn needs_explicit_eoi(&self) -> bool {
        true
    }
    fn reset(&self, _: bool) {}
    fn state(&self) -> berth_cpu::ApicState {
        berth_cpu::ApicState::reset(berth_cpu::VcpuId(0))
    }
    fn set_state(&self, _: &berth_cpu::ApicState) {}
}

/// A bus without devices.
pub(crate) struct NoBus;

impl Bus for NoBus {
    fn port_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn port_write(&self, _: u16, _: &[u8]) {}
    fn mmio_read(&self, _: GuestPhysAddr, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: GuestPhysAddr, _: &[u8]) {}
}

impl Cpu {
    /// A vCPU in the reset state with `bytes` of RAM.
    pub(crate) fn for_tests(bytes: u64) -> Self {
        Self::for_tests_with_cache(bytes, 4 << 20)
    }

    /// The same with a code cache of a given size.
    pub(crate) fn for_tests_with_cache(bytes: u64, code_cache_bytes: u64) -> Self {
        let memory = GuestMemory::new(bytes).unwrap();
        let options =
            SoftOptions { code_cache_bytes, tsc_hz: 2_000_000_000, vm_name: "test".into(), vcpus: 1 };
        let vm = Arc::new(Vm::new(memory, &options).unwrap());
        let cpu = Cpu::new(Arc::clone(&vm), VcpuId(0), Arc::new(NoApic));
        vm.add_vcpu(Arc::clone(&cpu.shared));
        cpu
    }
}

//! KVM's paravirtual interface (Documentation/virt/kvm/x86/msr.rst, cpuid.rst and hypercalls.rst of Linux).
//!
//! ```text
//!   clock.rs      time since the VM started, wall-clock time at that moment
//!   steal.rs      time that the vCPU's thread wanted to run and could not; "preempted" flag; deferred TLB flush
//!   eoi.rs        end of interrupt without leaving translated code
//!   hypercall.rs  wake a vCPU, send IPIs to many, give way
//!   spin.rs       loops of PAUSE: giving way to a vCPU that has no host CPU
//!   shared.rs     atomic access to structures in guest memory
//! ```
//!
//! The run loop's part:
//! - before it waits (HLT, wait for SIPI): [`suspend`]; afterwards [`resume`];
//! - while the vCPU is halted: [`take_unhalt`] ends the halt;
//! - before it asks the APIC for interrupts: [`take_eoi`]; after it injected one: [`offer_eoi`];
//! - from time to time: [`update_steal_time`], which limits itself to once a millisecond.

mod clock;
mod eoi;
mod hypercall;
mod shared;
mod spin;
mod steal;

use std::sync::atomic::{AtomicBool, Ordering};

use berth_cpu::{MAX_VCPUS, VcpuId};

pub(super) use clock::{clock_moved, read_system_time, read_wall_clock, write_system_time, write_wall_clock};
pub use eoi::{offer_eoi, take_eoi};
pub(super) use eoi::{read_eoi, write_eoi};
pub use hypercall::hypercall;
pub use spin::pause;
pub(crate) use spin::{PAUSES, give_way};
pub(super) use steal::{read_steal_time, write_steal_time};
pub use steal::{resume, suspend, update_steal_time};

use crate::cpu::Cpu;

/// What one vCPU asked for, and what it was last told.
#[derive(Debug, Default)]
pub struct Pv {
    clock: clock::Clock,
    steal: steal::Steal,
    eoi: eoi::Eoi,
    spin: spin::Spin,
}

/// What all vCPUs of a VM share.
pub struct PvShared {
    time: clock::TimeBase,
    /// Who was woken by KVM_HC_KICK_CPU and has not noticed yet.
    unhalted: [AtomicBool; MAX_VCPUS as usize],
}

impl PvShared {
    /// Time starts now. `tsc_hz` is the frequency of the host's time-stamp counter.
    pub fn new(tsc_hz: u64) -> Self {
        Self { time: clock::TimeBase::now(tsc_hz), unhalted: std::array::from_fn(|_| AtomicBool::new(false)) }
    }

    /// The VM stood still for `ticks` of the host's counter.
    pub fn skip(&self, ticks: u64) {
        self.time.skip(ticks);
    }

    /// Nanoseconds of the paravirtual clock.
    pub fn clock(&self) -> u64 {
        u64::try_from(self.time.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Lets the clock go on from `nanos`. Vcpus publish it when they are given their state.
    pub fn set_clock(&self, nanos: u64) {
        self.time.set(nanos);
    }

    fn unhalt(&self, vcpu: VcpuId) {
        if let Some(flag) = self.unhalted.get(usize::from(vcpu.0)) {
            flag.store(true, Ordering::SeqCst);
        }
    }
}

/// Whether another vCPU ended this one's halt with KVM_HC_KICK_CPU since the last call.
pub fn take_unhalt(cpu: &Cpu) -> bool {
    let flag = cpu.vm.pv.unhalted.get(usize::from(cpu.id.0));
    flag.is_some_and(|flag| flag.load(Ordering::SeqCst) && flag.swap(false, Ordering::SeqCst))
}

#[cfg(test)]
mod tests;

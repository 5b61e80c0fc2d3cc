//! Giving way: a vCPU that only waits for another one lets that have the host CPU.
//!
//! A guest's kernel waits in loops of PAUSE: for a lock, for another CPU's answer to an interrupt. What it waits for may be
//! done by a vCPU of the same VM whose thread wants to run and has no host CPU; then each turn of the loop only makes
//! that later. Translated code counts PAUSE in [`crate::state::State::pauses_left`] and calls [`pause`] when it is 0,
//! which is what hardware's pause-loop exiting does (SDM volume 3, 26.1.3). The vCPU then sleeps for a moment, during which
//! the host's scheduler has one thread less to choose from: user space cannot name the one that is to run.
//!
//! Which vCPU has no host CPU is told by the clocks of the threads' CPU time ([`crate::seat`]).

use std::time::{Duration, Instant};

use crate::code::Flow;
use crate::cpu::Cpu;
use crate::exec::pv;
use crate::fault::Guest;

/// So many PAUSEs in a row are a loop: some tens of microseconds, as KVM takes for AMD's filter (3000) and Intel's window
/// (4096 cycles).
pub(crate) const PAUSES: u64 = 1024;
/// PAUSEs that take longer than this part of a second are no loop of nothing else.
const LOOP_TIME: u64 = 1000;
/// How long a vCPU sleeps at the first time, and at most when the same loop goes on and on.
const FIRST_SLEEP: Duration = Duration::from_micros(100);
const LONGEST_SLEEP: Duration = Duration::from_micros(800);

/// A vCPU's loop of PAUSE.
#[derive(Debug, Default)]
pub(super) struct Spin {
    /// Guest time-stamp counter when the last count was full, or the vCPU came back from its sleep.
    last: u64,
    /// How often the vCPU has slept in this loop.
    slept: u32,
}

/// PAUSE, when the count of [`PAUSES`] is full.
///
/// # Errors
/// None.
pub fn pause(cpu: &mut Cpu) -> Guest<Flow> {
    cpu.s.pauses_left = PAUSES;
    let now = cpu.msrs.tsc();
    let spin = &mut cpu.msrs.pv.spin;
    let took = now.wrapping_sub(std::mem::replace(&mut spin.last, now));
    if took > cpu.vm.tsc_hz / LOOP_TIME {
        spin.slept = 0;
        return Ok(Flow::Next);
    }
    Ok(if cpu.vm.somebody_lacks_a_cpu(cpu.id) { Flow::GiveWay } else { Flow::Next })
}

/// KVM_HC_SCHED_YIELD: the guest has sent an interrupt to the vCPU `apic_id`, and waits for it. If that wants to run and
/// does not, this vCPU sleeps.
pub(super) fn yield_to(cpu: &Cpu, apic_id: u64) -> Flow {
    let Some(id) = u8::try_from(apic_id).ok().filter(|&id| id < cpu.vm.vcpus && id != cpu.id.0) else {
        return Flow::Leave;
    };
    if cpu.vm.lacks_a_cpu(usize::from(id)) { Flow::GiveWay } else { Flow::Leave }
}

/// Sleeps, until there is a request at most. The caller must not hold the execution lock.
pub(crate) fn give_way(cpu: &mut Cpu) {
    let spin = &mut cpu.msrs.pv.spin;
    let time = FIRST_SLEEP.saturating_mul(1 << spin.slept.min(8)).min(LONGEST_SLEEP);
    spin.slept = spin.slept.saturating_add(1);
    // Other vCPUs see that this one does not run, and neither wait for it nor send it interrupts for TLB flushes.
    pv::suspend(cpu);
    cpu.shared.park(Some(Instant::now() + time));
    pv::resume(cpu);
    cpu.msrs.pv.spin.last = cpu.msrs.tsc();
    cpu.interrupt_check = true;
}

//! Steal time, the "preempted" flag, and TLB flushes that other vCPUs left for a vCPU that does not run.
//!
//! Steal is what the host's scheduler counts as time that the vCPU's thread waited on a run queue.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::thread::ThreadId;

use berth_memory::GuestPhysAddr;

use super::shared;
use crate::cpu::Cpu;
use crate::exec::msr::require;
use crate::fault::Guest;
use crate::memory::Flush;

const ENABLE: u64 = 1;
const RESERVED: u64 = 0x3e;
/// Size and alignment of struct kvm_steal_time in bytes.
const SIZE: u64 = 64;
// Offsets of its fields.
const STEAL: u64 = 0;
const VERSION: u64 = 8;
const PREEMPTED: u64 = 16;
/// Flags in `preempted`: the vCPU does not run; it must flush its TLB before it runs again.
const VCPU_PREEMPTED: u8 = 1 << 0;
const VCPU_FLUSH_TLB: u8 = 1 << 1;
/// Updates a second, at most.
const MAX_RATE: u64 = 1000;

/// What a vCPU asked for, and what it was told.
#[derive(Debug, Default)]
pub(super) struct Steal {
    msr: u64,
    /// Guest time-stamp counter at the last update.
    updated: u64,
    /// The thread's waiting time at the last update, in nanoseconds.
    waited: u64,
    source: Source,
}

impl Steal {
    fn address(&self) -> Option<u64> {
        (self.msr & ENABLE != 0).then_some(self.msr & !(SIZE - 1))
    }
}

/// Where the waiting time comes from.
#[derive(Debug, Default)]
enum Source {
    #[default]
    NotOpened,
    /// The schedstat file of this thread.
    Open(ThreadId, File),
    /// The host does not have it: no time is ever stolen.
    Missing,
}

impl Source {
    /// Nanoseconds that the current thread has waited on a run queue since it began. Also whether they count on
    /// from the last call: a vCPU may move to another thread.
    fn waited(&mut self) -> Option<(u64, bool)> {
        let me = std::thread::current().id();
        let same = matches!(self, Self::Open(thread, _) if *thread == me);
        if !same && !matches!(self, Self::Missing) {
            *self = match File::open("/proc/thread-self/schedstat") {
                Ok(file) => Self::Open(me, file),
                Err(_) => Self::Missing,
            };
        }
        let Self::Open(_, file) = self else { return None };
        let mut text = [0; 96];
        let len = file.read_at(&mut text, 0).ok()?;
        let waited = second_number(&text[..len])?;
        Some((waited, same))
    }
}

/// The second of the numbers in a line: time on the CPU, time waiting, number of slices.
fn second_number(line: &[u8]) -> Option<u64> {
    std::str::from_utf8(line).ok()?.split_ascii_whitespace().nth(1)?.parse().ok()
}

pub(in crate::exec) fn read_steal_time(cpu: &mut Cpu) -> Guest<u64> {
    Ok(cpu.msrs.pv.steal.msr)
}

/// MSR_KVM_STEAL_TIME: guest physical address of struct kvm_steal_time, 64-byte aligned, and bit 0 to enable it.
pub(in crate::exec) fn write_steal_time(cpu: &mut Cpu, value: u64) -> Guest<()> {
    require(value & RESERVED == 0)?;
    cpu.msrs.pv.steal.msr = value;
    if cpu.msrs.pv.steal.address().is_some() {
        publish(cpu);
    }
    Ok(())
}

/// Tells the guest how much time was stolen, at most once a millisecond. Cheap otherwise.
pub fn update_steal_time(cpu: &mut Cpu) {
    let steal = &cpu.msrs.pv.steal;
    let due = cpu.msrs.tsc().wrapping_sub(steal.updated) >= cpu.vm.tsc_hz / MAX_RATE;
    if steal.msr & ENABLE != 0 && due {
        publish(cpu);
    }
}

fn publish(cpu: &mut Cpu) {
    let now = cpu.msrs.tsc();
    let steal = &mut cpu.msrs.pv.steal;
    steal.updated = now;
    let Some(addr) = steal.address() else { return };
    let Some((waited, continues)) = steal.source.waited() else { return };
    let stolen = if continues { waited.saturating_sub(steal.waited) } else { 0 };
    steal.waited = waited;
    let memory = &cpu.vm.memory;
    let whole = memory.host_address(GuestPhysAddr(addr), SIZE).is_some();
    let (Some(total), Some(version)) =
        (shared::quad(memory, addr + STEAL), shared::word(memory, addr + VERSION))
    else {
        return;
    };
    if whole && stolen > 0 {
        shared::versioned(version, || {
            total.fetch_add(stolen, Ordering::Relaxed);
        });
        cpu.vm.dirty.mark(GuestPhysAddr(addr));
    }
}

/// To be called before the vCPU's thread waits: from now on other vCPUs see it as preempted, and may leave TLB
/// flushes for it instead of interrupting it.
pub fn suspend(cpu: &mut Cpu) {
    if let Some(addr) = cpu.msrs.pv.steal.address()
        && let Some(preempted) = shared::byte(&cpu.vm.memory, addr + PREEMPTED)
    {
        preempted.store(VCPU_PREEMPTED, Ordering::SeqCst);
        cpu.vm.dirty.mark(GuestPhysAddr(addr));
    }
}

/// To be called after a wait, before the vCPU uses any translation of an address.
pub fn resume(cpu: &mut Cpu) {
    let Some(addr) = cpu.msrs.pv.steal.address() else { return };
    let left = shared::byte(&cpu.vm.memory, addr + PREEMPTED).map_or(0, |p| p.swap(0, Ordering::SeqCst));
    cpu.vm.dirty.mark(GuestPhysAddr(addr));
    if left & VCPU_FLUSH_TLB != 0 {
        cpu.counters().flushes_left.add(1);
        cpu.flush_tlb(Flush::All);
    }
    update_steal_time(cpu);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_number_is_the_waiting_time() {
        assert_eq!(second_number(b"8236478 1234 17\n"), Some(1234));
        assert_eq!(second_number(b"8236478\n"), None);
        assert_eq!(second_number(b"a b c"), None);
    }

    #[test]
    fn waiting_time_counts_on_only_in_the_same_thread() {
        let mut source = Source::default();
        let Some((first, continues)) = source.waited() else {
            return; // This kernel has no schedstat.
        };
        assert!(!continues);
        let (second, continues) = source.waited().unwrap();
        assert!(continues && second >= first);
        let elsewhere = std::thread::spawn(move || source.waited().unwrap().1).join().unwrap();
        assert!(!elsewhere);
    }
}

//! Paravirtual end of interrupt: the guest clears a bit in its memory instead of writing the EOI register.
//!
//! When an interrupt is injected that needs nothing else at its end, the bit is set. A guest that finds it set
//! clears it and is done. Before the APIC is asked for interrupts again, a cleared bit is turned into an EOI. If
//! the bit is still set and another interrupt waits, it is taken back: the guest then writes the register, which
//! is noticed at once. This needs an APIC that kicks the vCPU for every new request, deliverable or not.

use std::sync::atomic::{AtomicU8, Ordering};

use super::shared;
use crate::cpu::Cpu;
use crate::exec::msr::require;
use crate::fault::Guest;

const ENABLE: u64 = 1;
/// The address is a multiple of 4; bit 1 is reserved.
const RESERVED: u64 = 2;
/// The bit in guest memory.
const NO_EOI_NEEDED: u8 = 1;
/// Vectors below are not valid for a local APIC (SDM volume 3, 11.5.2).
const FIRST_VECTOR: u8 = 16;

/// What a vCPU asked for, and whether an offer is open.
#[derive(Debug, Default)]
pub(super) struct Eoi {
    msr: u64,
    offered: bool,
}

fn flag(cpu: &Cpu) -> Option<&AtomicU8> {
    let msr = cpu.msrs.pv.eoi.msr;
    if msr & ENABLE == 0 { None } else { shared::byte(&cpu.vm.memory, msr & !3) }
}

pub(in crate::exec) fn read_eoi(cpu: &mut Cpu) -> Guest<u64> {
    Ok(cpu.msrs.pv.eoi.msr)
}

/// MSR_KVM_PV_EOI_EN: guest physical address of the word that holds the bit, 4-byte aligned, and bit 0 to enable
/// it.
pub(in crate::exec) fn write_eoi(cpu: &mut Cpu, value: u64) -> Guest<()> {
    require(value & RESERVED == 0)?;
    take_eoi(cpu);
    cpu.msrs.pv.eoi.offered = false;
    cpu.msrs.pv.eoi.msr = value;
    Ok(())
}

/// Spares the guest the EOI of the interrupt with `vector`, which was just injected, if that is possible.
pub fn offer_eoi(cpu: &mut Cpu, vector: u8) {
    if vector < FIRST_VECTOR || cpu.msrs.pv.eoi.msr & ENABLE == 0 || cpu.apic.needs_explicit_eoi() {
        return;
    }
    if let Some(flag) = flag(cpu) {
        flag.fetch_or(NO_EOI_NEEDED, Ordering::SeqCst);
        cpu.vm.mark_host(flag.as_ptr() as u64);
        cpu.msrs.pv.eoi.offered = true;
    }
}

/// Ends the interrupt in service if the guest has accepted the open offer. Withdraws the offer if another
/// interrupt has come meanwhile: that one must be noticed when this one ends.
pub fn take_eoi(cpu: &mut Cpu) {
    if !cpu.msrs.pv.eoi.offered {
        return;
    }
    let is_open = |bits: u8| bits & NO_EOI_NEEDED != 0;
    let open = match flag(cpu) {
        Some(flag) if is_open(flag.load(Ordering::SeqCst)) => {
            if !cpu.apic.needs_explicit_eoi() {
                return;
            }
            // The guest cannot take it any more: this vCPU runs here.
            let before = flag.fetch_and(!NO_EOI_NEEDED, Ordering::SeqCst);
            cpu.vm.mark_host(flag.as_ptr() as u64);
            is_open(before)
        }
        Some(_) => false,
        None => true,
    };
    cpu.msrs.pv.eoi.offered = false;
    if !open {
        cpu.apic.eoi();
    }
}

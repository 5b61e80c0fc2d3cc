//! Hypercalls by VMCALL or VMMCALL: number in RAX, arguments in RBX, RCX, RDX and RSI, result in RAX.

use berth_cpu::VcpuId;
use berth_cpu::bits::gpr;
use berth_engine::VcpuHandle;

use crate::code::Flow;
use crate::cpu::Cpu;
use crate::exec::pv::spin;
use crate::fault::Guest;

const VAPIC_POLL_IRQ: u64 = 1;
const KICK_CPU: u64 = 5;
const CLOCK_PAIRING: u64 = 9;
const SEND_IPI: u64 = 10;
const SCHED_YIELD: u64 = 11;

/// Results below zero (include/uapi/linux/kvm_para.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Error {
    Perm = 1,
    Inval = 22,
    OpNotSupp = 95,
    NoSys = 1000,
}

/// Destination and shorthand of an interrupt command: the bitmap says where it goes instead.
const ICR_DESTINATION: u64 = 0xffff_ffff << 32;
const ICR_SHORTHAND: u64 = 3 << 18;

/// VMCALL and VMMCALL.
///
/// # Errors
/// None: what is wrong is the guest's result in RAX.
pub fn hypercall(cpu: &mut Cpu) -> Guest<Flow> {
    let mask = if cpu.s.is_64bit() { u64::MAX } else { 0xffff_ffff };
    let number = cpu.s.gpr[gpr::RAX] & mask;
    let args = [gpr::RBX, gpr::RCX, gpr::RDX, gpr::RSI].map(|r| cpu.s.gpr[r] & mask);
    let result = if cpu.s.cpl() > 0 { Err(Error::Perm) } else { call(cpu, number, args) };
    let flow = match number {
        SCHED_YIELD if result.is_ok() => spin::yield_to(cpu, args[0]),
        _ => Flow::Leave,
    };
    let value = match result {
        Ok(value) => value,
        Err(error) => (-(error as i64)) as u64,
    };
    cpu.s.gpr[gpr::RAX] = value & mask;
    Ok(flow)
}

fn call(cpu: &mut Cpu, number: u64, args: [u64; 4]) -> Result<u64, Error> {
    match number {
        // Interrupts are looked for after every hypercall.
        VAPIC_POLL_IRQ => Ok(0),
        KICK_CPU => {
            kick(cpu, args[1]);
            Ok(0)
        }
        CLOCK_PAIRING => Err(Error::OpNotSupp),
        SEND_IPI => send_ipi(cpu, args),
        SCHED_YIELD => Ok(0),
        _ => Err(Error::NoSys),
    }
}

/// Ends the halt of the vCPU with this APIC ID; unknown ones are ignored.
fn kick(cpu: &Cpu, apic_id: u64) {
    let Some(id) = u8::try_from(apic_id).ok().filter(|&id| id < cpu.vm.vcpus) else { return };
    cpu.vm.pv.unhalt(VcpuId(id));
    if let Some(vcpu) = cpu.vm.vcpu(usize::from(id)) {
        vcpu.kick();
    }
}

/// Sends an IPI to every vCPU in a bitmap of two words that begins at APIC ID `min`. Returns how many got it.
fn send_ipi(cpu: &Cpu, [low, high, min, icr]: [u64; 4]) -> Result<u64, Error> {
    if icr & (ICR_DESTINATION | ICR_SHORTHAND) != 0 {
        return Err(Error::Inval);
    }
    let mut sent = 0;
    for id in destinations(low, high, min, cpu.s.is_64bit(), cpu.vm.vcpus) {
        cpu.apic.send_ipi(u64::from(id) << 32 | icr);
        sent += 1;
    }
    Ok(sent)
}

/// The APIC IDs below `vcpus` whose bits are set.
fn destinations(low: u64, high: u64, min: u64, is_64bit: bool, vcpus: u8) -> impl Iterator<Item = u8> {
    let word = if is_64bit { 64 } else { 32 };
    let bitmap = u128::from(low) | u128::from(high) << word;
    (0..vcpus).filter(move |&id| {
        let bit = u64::from(id).checked_sub(min);
        bit.is_some_and(|bit| bit < 2 * word && bitmap >> bit & 1 != 0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bitmaps_begin_at_min_and_end_with_the_vcpus() {
        let all = |low, high, min, long| destinations(low, high, min, long, 64).collect::<Vec<_>>();
        assert_eq!(all(0b1011, 0, 0, true), [0, 1, 3]);
        assert_eq!(all(0b1011, 1, 30, false), [30, 31, 33, 62]);
        assert_eq!(all(u64::MAX, u64::MAX, 62, true), [62, 63]);
        assert_eq!(all(u64::MAX, u64::MAX, 64, true), []);
        assert_eq!(all(u64::MAX, u64::MAX, u64::MAX, true), []);
    }
}

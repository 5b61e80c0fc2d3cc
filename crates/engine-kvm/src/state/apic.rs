//! The local APIC (api.rst 4.57 and 4.58). KVM's format is the page of the xAPIC; the ID is in its upper byte in
//! x2APIC mode too, because KVM_CAP_X2APIC_API is not enabled.

use berth_cpu::ApicState;
use berth_cpu::apic::offset;
use berth_cpu::msr::IA32_TSC_DEADLINE;
use berth_engine::EngineError;
use kvm_ioctls::VcpuFd;

use super::{bad, msrs};

/// LVT timer: TSC-deadline mode.
const DEADLINE_MODE: u32 = 2 << 17;
const MODE: u32 = 3 << 17;

pub fn read(vcpu: &VcpuFd, base: u64) -> Result<ApicState, EngineError> {
    let lapic = vcpu.get_lapic().map_err(bad("local APIC"))?;
    let tsc_deadline = msrs::read_one(vcpu, IA32_TSC_DEADLINE)?;
    let mut state = ApicState { base, registers: [0; berth_cpu::apic::REGISTERS], tsc_deadline };
    for (register, bytes) in state.registers.iter_mut().zip(lapic.regs.chunks_exact(16)) {
        *register = bytes[..4].iter().rev().fold(0, |value, &b| value << 8 | u32::from(b as u8));
    }
    Ok(state)
}

/// The base is written with the special registers.
pub fn write(vcpu: &VcpuFd, state: &ApicState) -> Result<(), EngineError> {
    // ID, version and what Berth does not know stay as they are.
    let mut lapic = vcpu.get_lapic().map_err(bad("local APIC"))?;
    for at in taken_over() {
        let place = &mut lapic.regs[usize::from(at)..][..4];
        for (to, from) in place.iter_mut().zip(state.get(at).to_le_bytes()) {
            *to = from as std::os::raw::c_char;
        }
    }
    vcpu.set_lapic(&lapic).map_err(bad("local APIC"))?;
    if state.get(offset::LVT_TIMER) & MODE == DEADLINE_MODE {
        let taken = msrs::write_one(vcpu, IA32_TSC_DEADLINE, state.tsc_deadline)?;
        if !taken && state.tsc_deadline != 0 {
            return Err(EngineError::BadState("KVM's local APIC has no TSC-deadline timer".to_owned()));
        }
    }
    Ok(())
}

fn taken_over() -> impl Iterator<Item = u16> {
    let single = [
        offset::TPR,
        offset::LDR,
        offset::DFR,
        offset::SVR,
        offset::ESR,
        offset::ICR,
        offset::ICR_HIGH,
        offset::INITIAL_COUNT,
        offset::CURRENT_COUNT,
        offset::DIVIDE,
    ];
    let lvt = (offset::LVT_TIMER..=offset::LVT_ERROR).step_by(16);
    single.into_iter().chain((offset::ISR..offset::ESR).step_by(16)).chain(lvt)
}

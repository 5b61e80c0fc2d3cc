//! Model-specific registers (api.rst 4.3, 4.18 and 4.19).

use berth_cpu::msr::{self as n, is_essential};
use berth_engine::EngineError;
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use tracing::debug;

/// Registers with a value that KVM keeps and a guest could miss. EFER and the bases of FS and GS are elsewhere in
/// the CPU state; writing a wall clock's address is a command.
const WANTED: &[u32] = &[
    n::IA32_TSC,
    n::IA32_TSC_ADJUST,
    n::IA32_SPEC_CTRL,
    n::IA32_SYSENTER_CS,
    n::IA32_SYSENTER_ESP,
    n::IA32_SYSENTER_EIP,
    n::IA32_MCG_STATUS,
    n::IA32_MISC_ENABLE,
    n::IA32_DEBUGCTL,
    n::IA32_PAT,
    n::IA32_MTRR_DEF_TYPE,
    n::KVM_SYSTEM_TIME_NEW,
    n::KVM_ASYNC_PF_EN,
    n::KVM_STEAL_TIME,
    n::KVM_PV_EOI_EN,
    n::KVM_POLL_CONTROL,
    n::IA32_STAR,
    n::IA32_LSTAR,
    n::IA32_CSTAR,
    n::IA32_FMASK,
    n::IA32_KERNEL_GS_BASE,
    n::IA32_TSC_AUX,
];
/// Variable-range MTRRs, base and mask in turn; then the fixed ones.
const MTRRS: [std::ops::RangeInclusive<u32>; 4] =
    [0x200..=0x20f, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26f];

/// Which of the registers this kernel has for guests of this CPU model.
pub struct KnownMsrs(Vec<u32>);

impl KnownMsrs {
    /// Asks `vcpu` for each: a kernel's list of registers (KVM_GET_MSR_INDEX_LIST) lacks some that it has.
    pub fn probe(vcpu: &VcpuFd) -> Result<Self, EngineError> {
        let mut wanted: Vec<u32> = WANTED.iter().copied().chain(MTRRS.into_iter().flatten()).collect();
        // KVM_GET_MSRS reads up to the first that it does not have.
        while !wanted.is_empty() {
            let mut list = list(wanted.iter().map(|&number| (number, 0)))?;
            let read = vcpu.get_msrs(&mut list).map_err(crate::refused("MSRs"))?;
            if read == wanted.len() {
                break;
            }
            wanted.remove(read);
        }
        Ok(Self(wanted))
    }
}

fn list(entries: impl Iterator<Item = (u32, u64)>) -> Result<Msrs, EngineError> {
    let entries: Vec<_> =
        entries.map(|(index, data)| kvm_msr_entry { index, data, ..kvm_msr_entry::default() }).collect();
    Msrs::from_entries(&entries).map_err(|_| EngineError::BadState(format!("it has {} MSRs", entries.len())))
}

pub fn read(vcpu: &VcpuFd, known: &KnownMsrs) -> Result<Vec<(u32, u64)>, EngineError> {
    let mut list = list(known.0.iter().map(|&number| (number, 0)))?;
    let read = vcpu.get_msrs(&mut list).map_err(super::bad("MSRs"))?;
    Ok(list.as_slice().iter().take(read).map(|e| (e.index, e.data)).collect())
}

pub fn write(vcpu: &VcpuFd, msrs: &[(u32, u64)]) -> Result<(), EngineError> {
    let mut rest = msrs;
    // KVM_SET_MSRS writes up to the first that does not take its value.
    while !rest.is_empty() {
        let written = vcpu.set_msrs(&list(rest.iter().copied())?).map_err(super::bad("MSRs"))?;
        let Some(&(number, value)) = rest.get(written) else { break };
        if is_essential(number) && value != 0 {
            return Err(EngineError::BadState(format!(
                "MSR {number:#x} does not take its value on this CPU model"
            )));
        }
        debug!("KVM has no MSR {number:#x} for this guest, or refuses {value:#x} for it");
        rest = &rest[written + 1..];
    }
    Ok(())
}

/// Writes one register.
pub fn write_one(vcpu: &VcpuFd, number: u32, value: u64) -> Result<bool, EngineError> {
    let written = vcpu.set_msrs(&list([(number, value)].into_iter())?).map_err(super::bad("MSRs"))?;
    Ok(written == 1)
}

/// Reads one register; 0 if there is none.
pub fn read_one(vcpu: &VcpuFd, number: u32) -> Result<u64, EngineError> {
    let mut list = list([(number, 0)].into_iter())?;
    let read = vcpu.get_msrs(&mut list).map_err(super::bad("MSRs"))?;
    Ok(list.as_slice().first().filter(|_| read == 1).map_or(0, |e| e.data))
}
/// Adds `ticks` to the time-stamp counter.
pub fn move_tsc(vcpu: &VcpuFd, ticks: u64) -> Result<(), EngineError> {
    let now = read_one(vcpu, n::IA32_TSC)?;
    write_one(vcpu, n::IA32_TSC, now.wrapping_add(ticks))?;
    Ok(())
}

//! x87, SSE and AVX state (api.rst 4.42 and 4.43). KVM's format is XSAVE's standard form, as is [`XsaveArea`].

use berth_cpu::{XSAVE_AREA_SIZE, XsaveArea};
use berth_engine::EngineError;
use kvm_bindings::kvm_xsave;
use kvm_ioctls::VcpuFd;

use super::bad;

/// What the legacy part leaves to software; the kernel notes there what signal frames hold.
const SOFTWARE: std::ops::Range<usize> = 416..512;
/// Offset of XSTATE_BV in the area: which components are not in their initial state.
const XSTATE_BV: usize = 512;
/// Offset of MXCSR_MASK, which is the CPU's and no state.
const MXCSR_MASK: std::ops::Range<usize> = 28..32;

pub fn read(vcpu: &VcpuFd) -> Result<XsaveArea, EngineError> {
    let xsave = vcpu.get_xsave().map_err(bad("floating-point state"))?;
    let mut area = XsaveArea([0; XSAVE_AREA_SIZE]);
    for (bytes, word) in area.0.chunks_exact_mut(4).zip(xsave.region) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    // The kernel fills in components that are in their initial state, so all are there.
    area.0[XSTATE_BV..XSTATE_BV + 64].fill(0);
    area.0[XSTATE_BV] = 7;
    area.0[MXCSR_MASK].fill(0);
    area.0[SOFTWARE].fill(0);
    Ok(area)
}

pub fn write(vcpu: &VcpuFd, area: &XsaveArea) -> Result<(), EngineError> {
    // What KVM has now says which components this CPU has.
    let mut xsave = vcpu.get_xsave().map_err(bad("floating-point state"))?;
    let mut bytes = area.0;
    bytes[XSTATE_BV..XSTATE_BV + 64].fill(0);
    bytes[XSTATE_BV] = if area.0[576..].iter().any(|&b| b != 0) { 7 } else { 3 };
    xsave.region.fill(0);
    for (word, bytes) in xsave.region.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = bytes.iter().rev().fold(0, |value, &b| value << 8 | u32::from(b));
    }
    write_raw(vcpu, &xsave)
}

fn write_raw(vcpu: &VcpuFd, xsave: &kvm_xsave) -> Result<(), EngineError> {
    // SAFETY: the kernel reads as much as KVM_GET_XSAVE writes, which is this structure, unless the process asked
    // for dynamic features (AMX) by arch_prctl(2), which Berth never does.
    unsafe { vcpu.set_xsave(xsave) }.map_err(bad("floating-point state"))
}

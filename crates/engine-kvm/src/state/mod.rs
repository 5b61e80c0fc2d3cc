//! The engine-neutral CPU state, from and to KVM.
//!
//! ```text
//!   CpuState ── registers: gpr, segments, control, debug ──► KVM_SET_SREGS, REGS, DEBUGREGS
//!       │    ── fpu, xcr0 ─────────────────────────────────► KVM_SET_XCRS, XSAVE
//!       │    ── msrs ──────────────────────────────────────► KVM_SET_MSRS
//!       │    ── apic ──────────────────────────────────────► KVM_SET_LAPIC, IA32_TSC_DEADLINE
//!       └─── pending, shadow, mp_state ────────────────────► KVM_SET_VCPU_EVENTS, MP_STATE
//! ```
//! In this order: CR8 in the special registers is the APIC's task priority, so the APIC comes after them; a
//! deadline is compared with the TSC, which is an MSR; and the timer's mode must be set before the deadline.

mod apic;
mod events;
mod fpu;
mod msrs;
mod registers;
mod sync;

use berth_cpu::{CpuState, MpState};
use berth_engine::EngineError;
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED,
    kvm_mp_state, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;

pub use msrs::{KnownMsrs, move_tsc};
pub use sync::has_sync_regs;

/// A state that KVM refuses: EINVAL is a bad value, all else is a bad host.
pub(crate) fn bad(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> EngineError {
    move |error| {
        if error.errno() == libc::EINVAL {
            EngineError::BadState(format!("KVM refuses the {what}"))
        } else {
            crate::refused(what)(error)
        }
    }
}

/// Writes `state`. The vCPU must not be running.
///
/// # Errors
/// [`EngineError::BadState`] when it is not possible on this CPU model.
pub fn write(vcpu: &VcpuFd, state: &CpuState) -> Result<(), EngineError> {
    state.check().map_err(|e| EngineError::BadState(e.to_string()))?;
    let current = vcpu.get_sregs().map_err(bad("special registers"))?;
    vcpu.set_sregs(&registers::special(state, &current)).map_err(bad("segment or control registers"))?;
    vcpu.set_regs(&registers::general(state)).map_err(bad("general-purpose registers"))?;
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..kvm_xcrs::default() };
    xcrs.xcrs[0].value = state.xcr0;
    vcpu.set_xcrs(&xcrs).map_err(bad("XCR0"))?;
    fpu::write(vcpu, &state.fpu)?;
    msrs::write(vcpu, &state.msrs)?;
    if let Some(apic) = &state.apic {
        apic::write(vcpu, apic)?;
    }
    vcpu.set_debug_regs(&registers::debug(state)).map_err(bad("debug registers"))?;
    vcpu.set_vcpu_events(&events::from_neutral(state)).map_err(bad("pending events"))?;
    let mp_state = match state.mp_state {
        MpState::Runnable => KVM_MP_STATE_RUNNABLE,
        MpState::Halted => KVM_MP_STATE_HALTED,
        MpState::WaitForSipi => KVM_MP_STATE_INIT_RECEIVED,
    };
    vcpu.set_mp_state(kvm_mp_state { mp_state }).map_err(bad("activity state"))
}

/// Reads the whole state. The vCPU must not be running, and must have completed its last exit.
///
/// # Errors
/// [`EngineError::Host`]; KVM gives no reason to expect it.
pub fn read(vcpu: &mut VcpuFd, known: &KnownMsrs, sync_regs: bool) -> Result<CpuState, EngineError> {
    let mut state = CpuState::default();
    let synced = sync::read(vcpu, sync_regs)?;
    registers::read(&synced, &mut state);
    registers::read_debug(vcpu, &mut state)?;
    let xcrs = vcpu.get_xcrs().map_err(bad("XCR0"))?;
    state.xcr0 = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).find(|x| x.xcr == 0).map_or(1, |x| x.value);
    state.fpu = fpu::read(vcpu)?;
    state.msrs = msrs::read(vcpu, known)?;
    state.apic = Some(Box::new(apic::read(vcpu, synced.sregs.apic_base)?));
    events::to_neutral(&synced.events, &mut state);
    state.mp_state = match vcpu.get_mp_state().map_err(bad("activity state"))?.mp_state {
        KVM_MP_STATE_HALTED => MpState::Halted,
        KVM_MP_STATE_INIT_RECEIVED | KVM_MP_STATE_UNINITIALIZED => MpState::WaitForSipi,
        // A start-up IPI that is being taken: KVM does so before anything else.
        _ => MpState::Runnable,
    };
    Ok(state)
}

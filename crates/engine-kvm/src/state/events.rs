//! Pending events, interrupt shadow and blocked NMIs (api.rst 4.31 and 4.32).

use berth_cpu::{CpuState, PendingEvents, PendingException};
use kvm_bindings::{
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, KVM_X86_SHADOW_INT_MOV_SS,
    KVM_X86_SHADOW_INT_STI, kvm_vcpu_events,
};

/// For KVM_SET_VCPU_EVENTS.
pub fn from_neutral(state: &CpuState) -> kvm_vcpu_events {
    let mut events = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
        ..kvm_vcpu_events::default()
    };
    if let Some(exception) = state.pending.exception {
        events.exception.injected = 1;
        events.exception.nr = exception.vector;
        events.exception.has_error_code = u8::from(exception.error.is_some());
        events.exception.error_code = exception.error.unwrap_or(0);
    }
    if let Some(vector) = state.pending.interrupt {
        events.interrupt.injected = 1;
        events.interrupt.nr = vector;
    }
    // Which instruction cast the shadow is not told apart: MOV SS blocks what STI blocks, and debug traps too.
    events.interrupt.shadow = if state.interrupt_shadow { KVM_X86_SHADOW_INT_STI as u8 } else { 0 };
    events.nmi.pending = u8::from(state.pending.nmi);
    events.nmi.masked = u8::from(state.nmi_blocked);
    events
}

/// From KVM_GET_VCPU_EVENTS. A software interrupt or exception that was being delivered is left out: RIP is still at
/// its instruction, which is executed again.
pub fn to_neutral(events: &kvm_vcpu_events, state: &mut CpuState) {
    const SHADOWS: u32 = KVM_X86_SHADOW_INT_MOV_SS | KVM_X86_SHADOW_INT_STI;
    /// INT3 and INTO.
    const SOFTWARE: [u8; 2] = [berth_cpu::bits::vector::BP, berth_cpu::bits::vector::OF];
    let exception = &events.exception;
    let raised = (exception.injected != 0 || exception.pending != 0) && !SOFTWARE.contains(&exception.nr);
    let interrupted = events.interrupt.injected != 0 && events.interrupt.soft == 0;
    state.pending = PendingEvents {
        exception: raised.then(|| PendingException {
            vector: exception.nr,
            error: (exception.has_error_code != 0).then_some(exception.error_code),
        }),
        interrupt: interrupted.then_some(events.interrupt.nr),
        nmi: events.nmi.pending != 0 || events.nmi.injected != 0,
    };
    state.interrupt_shadow = u32::from(events.interrupt.shadow) & SHADOWS != 0;
    state.nmi_blocked = events.nmi.masked != 0 && events.nmi.injected == 0;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_survive_the_way_there_and_back() {
        let exception = Some(PendingException { vector: 14, error: Some(2) });
        for pending in [
            PendingEvents::default(),
            PendingEvents { exception, ..PendingEvents::default() },
            PendingEvents { interrupt: Some(0x41), nmi: true, ..PendingEvents::default() },
        ] {
            let state =
                CpuState { pending, interrupt_shadow: true, nmi_blocked: true, ..CpuState::default() };
            let mut back = CpuState::default();
            to_neutral(&from_neutral(&state), &mut back);
            assert_eq!(back, state);
        }
    }

    #[test]
    fn software_interrupts_are_executed_again() {
        let mut events = kvm_vcpu_events::default();
        (events.interrupt.injected, events.interrupt.soft, events.interrupt.nr) = (1, 1, 0x80);
        (events.exception.injected, events.exception.nr) = (1, 3);
        let mut state = CpuState::default();
        to_neutral(&events, &mut state);
        assert_eq!(state.pending, PendingEvents::default());
    }
}

//! Registers that KVM_RUN brings along (KVM_CAP_SYNC_REGS, api.rst 8.4): one call instead of several when the state is
//! read. Exits of a running guest need no registers, so they do not ask for any.

use kvm_bindings::{
    KVM_SYNC_X86_EVENTS, KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS, kvm_regs, kvm_sregs, kvm_sync_regs,
    kvm_vcpu_events,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

use super::{EngineError, bad};

const WANTED: u32 = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS;

/// Whether KVM brings all of them along.
pub fn has_sync_regs(kvm: &Kvm) -> bool {
    kvm.check_extension_int(Cap::SyncRegs) as u32 & WANTED == WANTED
}

/// What every reading of the state needs.
pub struct Synced {
    pub regs: kvm_regs,
    pub sregs: kvm_sregs,
    pub events: kvm_vcpu_events,
}

/// Reads them, with one call if `sync_regs`. The vCPU must have completed its last exit.
pub fn read(vcpu: &mut VcpuFd, sync_regs: bool) -> Result<Synced, EngineError> {
    if sync_regs && let Some(kvm_sync_regs { regs, sregs, events }) = by_run(vcpu) {
        return Ok(Synced { regs, sregs, events });
    }
    Ok(Synced {
        regs: vcpu.get_regs().map_err(bad("general-purpose registers"))?,
        sregs: vcpu.get_sregs().map_err(bad("special registers"))?,
        events: vcpu.get_vcpu_events().map_err(bad("pending events"))?,
    })
}

/// A KVM_RUN that returns before it enters the guest: so `immediate_exit` makes it, with EINTR.
fn by_run(vcpu: &mut VcpuFd) -> Option<kvm_sync_regs> {
    let before = vcpu.get_kvm_run().immediate_exit;
    vcpu.get_kvm_run().kvm_valid_regs = WANTED.into();
    vcpu.set_kvm_immediate_exit(1);
    let interrupted = vcpu.run().is_err_and(|e| e.errno() == libc::EINTR);
    vcpu.set_kvm_immediate_exit(before);
    vcpu.get_kvm_run().kvm_valid_regs = 0;
    interrupted.then(|| vcpu.sync_regs())
}

//! Guest memory in KVM's slots (api.rst 4.35).

use berth_engine::EngineError;
use berth_memory::{GuestMemory, RamRegion};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;

use crate::refused;

/// Gives each region of RAM a slot: its index in [`GuestMemory::regions`].
pub fn map(vm: &VmFd, memory: &GuestMemory) -> Result<(), EngineError> {
    map_with(vm, memory, 0)
}

/// The same with these flags, which KVM may be given anew at any time.
pub fn map_with(vm: &VmFd, memory: &GuestMemory, flags: u32) -> Result<(), EngineError> {
    (0..).zip(memory.regions()).try_for_each(|(slot, region)| set_slot(vm, slot, region, flags))
}

fn set_slot(vm: &VmFd, slot: u32, region: &RamRegion, flags: u32) -> Result<(), EngineError> {
    let slot = kvm_userspace_memory_region {
        slot,
        flags,
        guest_phys_addr: region.start.0,
        memory_size: region.len,
        userspace_addr: region.host.0,
    };
    // SAFETY: the range is RAM of a `GuestMemory` that the engine keeps until the VM's descriptor is closed; the
    // guest may write all of it.
    unsafe { vm.set_user_memory_region(slot) }.map_err(refused("a slot for guest memory"))
}

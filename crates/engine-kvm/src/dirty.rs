//! Dirty logging: by KVM's bitmaps (KVM_GET_DIRTY_LOG, api.rst 4.8), or by its rings (KVM_CAP_DIRTY_LOG_RING, 8.29).
//!
//! Rings must be asked for before the first vCPU is made, so they are an option of the engine. KVM sees what vCPUs and
//! the kernel itself write; what devices write comes by `memory_written` and is added here.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use berth_engine::{DirtyMap, DirtyPages, EngineError};
use berth_memory::GuestMemory;
use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_MEM_LOG_DIRTY_PAGES, kvm_enable_cap,
};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use parking_lot::Mutex;
use tracing::warn;
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

use crate::ring::{ENTRIES, ENTRY_SIZE, Ring};
use crate::{memory, refused};

// api.rst 4.133.
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, kvm_bindings::KVMIO, 0xc7);

/// The log of one VM.
pub struct DirtyLog {
    vm: Arc<VmFd>,
    memory: GuestMemory,
    on: AtomicBool,
    /// What devices wrote, and what came out of the rings.
    map: DirtyMap,
    /// With rings: one a vCPU. Taken by those who fetch the log, and by a vCPU only when its ring is full.
    rings: Option<Mutex<Vec<Ring>>>,
}

impl DirtyLog {
    /// A log, off; with rings if `rings` and KVM has them. Must come before the first vCPU.
    pub fn new(vm: Arc<VmFd>, memory: GuestMemory, rings: bool) -> Self {
        let rings = (rings && enable_rings(&vm)).then(Mutex::default);
        let map = DirtyMap::new(&memory);
        Self { vm, memory, on: AtomicBool::new(false), map, rings }
    }

    /// A vCPU was made: its ring, if there are any.
    pub fn add_vcpu(&self, vcpu: &VcpuFd) -> Result<(), EngineError> {
        let Some(rings) = &self.rings else { return Ok(()) };
        rings.lock().push(Ring::map(vcpu).map_err(refused("a ring of written pages"))?);
        Ok(())
    }

    /// What devices write is noted here.
    pub fn map(&self) -> &DirtyMap {
        &self.map
    }

    pub fn start(&self) -> Result<(), EngineError> {
        if self.on.swap(true, Ordering::SeqCst) {
            // With an empty log: what is in KVM's goes.
            for region in 0..self.memory.regions().len() {
                self.take(region)?;
            }
        }
        self.map.switch(true);
        memory::map_with(&self.vm, &self.memory, KVM_MEM_LOG_DIRTY_PAGES)
    }

    pub fn take(&self, region: usize) -> Result<DirtyPages, EngineError> {
        let Some(ram) = self.memory.regions().get(region) else { return Ok(DirtyPages::default()) };
        if !self.on.load(Ordering::SeqCst) {
            return Ok(DirtyPages::default());
        }
        if self.rings.is_some() {
            self.harvest();
            return Ok(self.map.take(region));
        }
        let slot = u32::try_from(region).unwrap_or(u32::MAX);
        let words = self.vm.get_dirty_log(slot, ram.len as usize).map_err(refused("the written pages"))?;
        let mut pages = DirtyPages(words);
        pages.add(&self.map.take(region));
        Ok(pages)
    }

    pub fn stop(&self) -> Result<(), EngineError> {
        self.on.store(false, Ordering::SeqCst);
        memory::map_with(&self.vm, &self.memory, 0)?;
        self.harvest();
        self.map.switch(false);
        Ok(())
    }

    /// Empties the rings into the map; also called by a vCPU whose ring is full.
    pub fn harvest(&self) {
        let Some(rings) = &self.rings else { return };
        let mut rings = rings.lock();
        for ring in rings.iter_mut() {
            ring.drain(|slot, page| {
                if let Some(region) = self.memory.regions().get(slot as usize) {
                    self.map.mark(region.start + page.saturating_mul(berth_memory::PAGE_SIZE));
                }
            });
        }
        // KVM protects the pages again, and may use the entries. Before that nobody reads the pages.
        // SAFETY: the descriptor is a VM's, and this request has no argument.
        if unsafe { ioctl(&*self.vm, KVM_RESET_DIRTY_RINGS()) } < 0 {
            warn!("KVM does not take back its rings of written pages: {}", io::Error::last_os_error());
        }
    }
}

fn enable_rings(vm: &VmFd) -> bool {
    let bytes = vm.check_extension_int(Cap::DirtyLogRing).max(0) as usize;
    let size = ENTRIES * ENTRY_SIZE;
    // Newer kernels have both; x86 keeps its stores in order either way.
    [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING].into_iter().any(|cap| {
        let mut enable = kvm_enable_cap { cap, ..kvm_enable_cap::default() };
        enable.args[0] = size as u64;
        bytes >= size && vm.enable_cap(&enable).is_ok()
    })
}

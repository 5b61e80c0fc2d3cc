//! Which engine the cases run on.

use std::sync::Arc;

use berth_engine::Engine;
use berth_engine_soft::{SoftEngine, SoftOptions};
use berth_memory::GuestMemory;

/// Makes the engine for one guest. Engines to come are added here; no case knows.
pub fn create(memory: &GuestMemory, vcpus: u8, code_cache_bytes: u64) -> Arc<dyn Engine> {
    let options =
        SoftOptions { code_cache_bytes, tsc_hz: 2_000_000_000, vm_name: "system-case".into(), vcpus };
    Arc::new(SoftEngine::new(memory.clone(), options).expect("an engine"))
}

/// Whether this host, and with it every guest, follows AMD's rules where the vendors differ.
pub fn is_amd() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0);
    let vendor = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat();
    vendor == b"AuthenticAMD" || vendor == b"HygonGenuine"
}

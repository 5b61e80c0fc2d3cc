//! Which engine the cases run on.

use std::cell::Cell;
use std::fmt;
use std::sync::Arc;

use berth_engine::Engine;
use berth_engine_kvm::{KvmEngine, KvmOptions};
use berth_engine_soft::{SoftEngine, SoftOptions};
use berth_memory::GuestMemory;

/// An engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineKind {
    /// Berth's translator.
    Soft,
    /// The host's /dev/kvm.
    Kvm,
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Soft => "soft",
            Self::Kvm => "kvm",
        })
    }
}

thread_local! {
    static CURRENT: Cell<EngineKind> = const { Cell::new(EngineKind::Soft) };
}

/// Runs a case on `engine`: guests that this thread makes meanwhile run on it.
pub fn with_engine<R>(engine: EngineKind, case: impl FnOnce() -> R) -> R {
    let before = CURRENT.replace(engine);
    let result = case();
    CURRENT.set(before);
    result
}

/// What guests that this thread makes run on.
pub fn current() -> EngineKind {
    CURRENT.get()
}

/// Makes the engine for one guest. No case names one, except those that move a guest between engines.
pub fn create(memory: &GuestMemory, vcpus: u8, code_cache_bytes: u64) -> Arc<dyn Engine> {
    match CURRENT.get() {
        EngineKind::Soft => {
            let options =
                SoftOptions { code_cache_bytes, tsc_hz: 2_000_000_000, vm_name: "system-case".into(), vcpus };
            Arc::new(SoftEngine::new(memory.clone(), options).expect("an engine"))
        }
        EngineKind::Kvm => {
            let options = KvmOptions { vcpus, ..KvmOptions::default() }.with_environment();
            Arc::new(KvmEngine::new(memory.clone(), options).expect("an engine"))
        }
    }
}

/// Whether guests that this thread makes run on a KVM that emulates their kernels.
pub fn is_emulated() -> bool {
    CURRENT.get() == EngineKind::Kvm && !crate::limits::kvm_is_hardware()
}

/// How often something long is to be done: `count`, or less where the guest's instructions are emulated one by one.
pub fn rounds(count: u32) -> u32 {
    /// How much slower a page-table-based KVM is than the soft engine, at least.
    const SLOWER: u32 = 100;
    if is_emulated() { count / SLOWER } else { count }
}

/// Whether this host, and with it every guest, follows AMD's rules where the vendors differ.
pub fn is_amd() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0);
    let vendor = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat();
    vendor == b"AuthenticAMD" || vendor == b"HygonGenuine"
}

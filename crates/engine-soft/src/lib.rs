//! The soft engine: executes x86-64 guest code by translating it, block by block, to x86-64 host code.
//!
//! Guest and host have the same instruction set, so most instructions are copied; what must differ is replaced:
//!
//! | class | what happens |
//! |---|---|
//! | registers only | copied, with other register numbers where a guest register lives elsewhere |
//! | memory operand | software-TLB check, then the same instruction on the host address |
//! | jumps | linked within a page, looked up in a per-vCPU cache across pages |
//! | privileged, segments, I/O, strings | a helper in Rust does what the SDM says |
//!
//! The folders: `translate/` makes host code, `code/` keeps and runs it, `memory/` turns guest addresses into host
//! addresses, `exec/` are the helpers and the delivery of exceptions, `run.rs` is the loop around it all.

mod code;
mod counters;
mod cpu;
mod exec;
mod fault;
mod host;
mod idle;
mod memory;
mod mode;
mod run;
#[cfg(test)]
mod run_tests;
mod seat;
mod shared;
mod state;
#[cfg(test)]
mod test_support;
mod translate;
mod vm;

use std::sync::Arc;

use berth_cpu::VcpuId;
use berth_engine::{
    DirtyPages, Engine, EngineError, EventFd, InterruptControllers, LocalApic, StoodStill, Vcpu,
};
use berth_memory::{Faults, GuestMemory, GuestPhysAddr};

pub use code::cache::{CacheStats, MAX_CODE_CACHE, MIN_CODE_CACHE};
pub use exec::features::{FeatureSet, host_model};

/// Code cache size in bytes unless the user says otherwise.
pub const DEFAULT_CODE_CACHE: u64 = 64 << 20;

/// What the soft engine needs to know besides the memory.
#[derive(Clone, Debug)]
pub struct SoftOptions {
    /// Size of the code cache in bytes; brought into [`MIN_CODE_CACHE`] to [`MAX_CODE_CACHE`].
    pub code_cache_bytes: u64,
    /// Frequency of the host's time-stamp counter, which is the guest's too.
    pub tsc_hz: u64,
    /// Name of the VM, for log lines.
    pub vm_name: String,
    /// Number of vCPUs that will be created, 1 to 64.
    pub vcpus: u8,
}

/// What the environment variable `BERTH_SOFT` switches, a comma-separated list: optimisations off, for finding errors
/// and measuring, and help for profilers on.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct DebugFlags {
    /// `nochain`: every block returns to the run loop.
    pub no_chain: bool,
    /// `notlb`: every memory access takes the slow path.
    pub no_tlb: bool,
    /// `noslots`: every memory access searches the TLB.
    pub no_slots: bool,
    /// `nocalls`: calls and returns are jumps.
    pub no_calls: bool,
    /// `nodead`: flags are saved before every check, also where nothing reads them.
    pub no_dead_flags: bool,
    /// `nodirect`: the address of every memory operand is computed before its check.
    pub no_direct: bool,
    /// `nosuper`: every conditional jump ends its block.
    pub no_super: bool,
    /// `noinplace`: registers in the state block are always loaded and stored.
    pub no_in_place: bool,
    /// `noslotrate`: accesses give their slot up after many misses, however rare these are.
    pub no_slot_rate: bool,
    /// `nounshare`: accesses to the stack share slots for ever.
    pub no_unshare: bool,
    /// `perfmap`: the names of all blocks go to /tmp/perf-PID.map, for `perf`.
    pub perf_map: bool,
    /// `notrim`: translated code is kept while the VM is idle.
    pub no_trim: bool,
    /// `nogiveway`: a vCPU that waits in a loop never gives way to others.
    pub no_give_way: bool,
}

impl DebugFlags {
    const KNOWN: &str = "nochain, notlb, noslots, nocalls, nodead, nodirect, nosuper, noinplace, noslotrate, nounshare, notrim, nogiveway and perfmap";

    fn from_env() -> Self {
        let value = std::env::var("BERTH_SOFT").unwrap_or_default();
        let mut flags = Self::default();
        for word in value.split(',').filter(|w| !w.is_empty()) {
            match word {
                "nochain" => flags.no_chain = true,
                "notlb" => flags.no_tlb = true,
                "noslots" => flags.no_slots = true,
                "nocalls" => flags.no_calls = true,
                "nodead" => flags.no_dead_flags = true,
                "nodirect" => flags.no_direct = true,
                "nosuper" => flags.no_super = true,
                "noinplace" => flags.no_in_place = true,
                "noslotrate" => flags.no_slot_rate = true,
                "nounshare" => flags.no_unshare = true,
                "perfmap" => flags.perf_map = true,
                "notrim" => flags.no_trim = true,
                "nogiveway" => flags.no_give_way = true,
                other => {
                    tracing::warn!("BERTH_SOFT: unknown word {other:?}; known are {}", Self::KNOWN)
                }
            }
        }
        flags
    }
}

/// The soft engine of one VM.
pub struct SoftEngine {
    vm: Arc<vm::Vm>,
}

impl SoftEngine {
    /// Makes the engine for a VM with this memory.
    ///
    /// # Errors
    /// [`EngineError::Host`] when the host has no memory for the code cache.
    pub fn new(memory: GuestMemory, options: SoftOptions) -> Result<Self, EngineError> {
        let vm = vm::Vm::new(memory, &options)?;
        if vm.debug.perf_map
            && let Err(error) = vm.cache.start_perf_map()
        {
            tracing::warn!("BERTH_SOFT=perfmap: no names for perf: {error}");
        }
        Ok(Self { vm: Arc::new(vm) })
    }

    /// Counters of the code cache.
    pub fn cache_stats(&self) -> CacheStats {
        self.vm.cache.stats()
    }
}

impl Drop for SoftEngine {
    fn drop(&mut self) {
        tracing::debug!("counters: {:?}", self.counters());
    }
}

impl Engine for SoftEngine {
    fn name(&self) -> &'static str {
        "soft"
    }

    fn physical_bits(&self) -> u8 {
        self.vm.cpuid.physical_bits()
    }

    fn interrupt_controllers(&self) -> InterruptControllers {
        InterruptControllers::Devices
    }

    fn create_vcpu(
        &self,
        id: VcpuId,
        apic: Option<Arc<dyn LocalApic>>,
    ) -> Result<Box<dyn Vcpu>, EngineError> {
        let apic = apic.ok_or_else(|| EngineError::BadState("the soft engine needs a local APIC".into()))?;
        let cpu = cpu::Cpu::new(Arc::clone(&self.vm), id, apic);
        self.vm.add_vcpu(Arc::clone(&cpu.shared));
        Ok(Box::new(cpu))
    }

    fn counters(&self) -> Vec<(String, u64)> {
        counters::list(&self.vm)
    }

    fn skip_time(&self, time: StoodStill) {
        self.vm.pv.skip(time.ticks);
    }

    fn memory_written(&self, start: GuestPhysAddr, len: u64) {
        self.vm.memory_written(start, len);
    }

    /// A store to a device is a call of the bus here, which costs no more.
    fn add_doorbell(&self, _addr: GuestPhysAddr, _event: &EventFd) -> bool {
        false
    }

    fn remove_doorbell(&self, _addr: GuestPhysAddr, _event: &EventFd) {}

    /// The addresses in the software TLBs go, so that the next access to each page comes by `memory::HostMap`.
    fn begin_access_period(&self) -> bool {
        self.vm.begin_access_period();
        true
    }

    /// Guest code runs in user mode.
    fn page_faults(&self) -> Faults {
        Faults::User
    }

    fn start_dirty_log(&self) -> Result<(), EngineError> {
        self.vm.with_everyone_out(|| self.vm.dirty.switch(true));
        Ok(())
    }

    fn take_dirty(&self, region: usize) -> Result<DirtyPages, EngineError> {
        Ok(self.vm.with_everyone_out(|| self.vm.dirty.take(region)))
    }

    fn stop_dirty_log(&self) -> Result<(), EngineError> {
        self.vm.dirty.switch(false);
        Ok(())
    }

    fn clock(&self) -> Result<u64, EngineError> {
        Ok(self.vm.pv.clock())
    }

    fn set_clock(&self, nanos: u64) -> Result<(), EngineError> {
        self.vm.pv.set_clock(nanos);
        Ok(())
    }
}

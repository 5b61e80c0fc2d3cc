//! The kvm engine: the CPU's own virtualization, through the kernel's `/dev/kvm`.
//!
//! ```text
//!   KvmEngine ── device: /dev/kvm, one VM ── memory slots: one a region of RAM
//!       │           ├── interrupts: PIC, IOAPIC, PIT of the kernel ◄── devices   or
//!       │           ├── split: local APICs of the kernel ◄── PIC, IOAPIC of devices
//!       │           └── routes: pins, and messages by eventfd
//!       ├── dirty, ring: which pages were written
//!       └── vcpu: KVM_RUN ──exit──► Bus
//!             ├── handle: stopping it from other threads
//!             ├── cpuid: what KVM supports, cut down by the CPU model
//!             └── state: the engine-neutral CPU state, from and to KVM
//! ```
//!
//! Sections named `api.rst` are those of the kernel's Documentation/virt/kvm/api.rst. Interrupts, IPIs, timers,
//! HLT and the paravirtual interface (clock, steal time, and the rest of it) are the kernel's; only port and
//! memory-mapped I/O come out here. Nothing in this crate is called for an interrupt, and no lock is held while a
//! vCPU is in the guest except the kernel's own.

mod cpuid;
pub mod device;
mod dirty;
mod failure;
mod handle;
mod interrupts;
mod memory;
mod ring;
mod routes;
mod split;
mod state;
mod vcpu;

use std::io;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use berth_cpu::VcpuId;
use berth_cpu::cpuid::CpuidModel;
use berth_engine::{
    DirtyPages, Engine, EngineError, EventFd, InterruptControllers, LocalApic, StoodStill, Vcpu,
};
use berth_memory::{Faults, GuestMemory, GuestPhysAddr};
use kvm_bindings::{CpuId, kvm_clock_data};
use kvm_ioctls::{Cap, IoEventAddress, NoDatamatch, VmFd};
use tracing::warn;

use crate::device::{Device, NO_CHIPS, Refusal};
use crate::dirty::DirtyLog;
use crate::interrupts::KernelChips;
use crate::split::SplitChips;
use crate::vcpu::{KvmVcpu, VcpuParts};

/// The name of the engine in messages and for `--engine`.
const NAME: &str = "kvm";
/// Three pages that Intel's CPUs without unrestricted guest mode need for real mode, and one for its page table
/// (api.rst 4.21 and 4.41): in the hole below 4 GiB, where no device and no RAM is.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// What the engine needs to know besides the memory.
#[derive(Clone, Debug)]
pub struct KvmOptions {
    /// Number of vCPUs that will be created, 1 to 64.
    pub vcpus: u8,
    /// Take only the local APICs from the kernel, as where it has no other interrupt controllers.
    pub split: bool,
    /// Log written pages by rings, where the kernel has them, instead of bitmaps.
    pub dirty_rings: bool,
}

impl Default for KvmOptions {
    fn default() -> Self {
        Self { vcpus: 1, split: false, dirty_rings: false }
    }
}

impl KvmOptions {
    const KNOWN: &str = "split and rings";

    /// Adds what the environment variable `BERTH_KVM` says, a comma-separated list; for finding errors.
    #[must_use]
    pub fn with_environment(mut self) -> Self {
        let value = std::env::var("BERTH_KVM").unwrap_or_default();
        for word in value.split(',').filter(|word| !word.is_empty()) {
            match word {
                "split" => self.split = true,
                "rings" => self.dirty_rings = true,
                other => tracing::warn!("BERTH_KVM: unknown word {other:?}; known are {}", Self::KNOWN),
            }
        }
        self
    }
}

/// The kernel's interrupt controllers.
enum Chips {
    All(Arc<KernelChips>),
    Split(Arc<SplitChips>),
}

impl Chips {
    fn create(vm: &Arc<VmFd>, split: bool) -> Result<Self, EngineError> {
        let has = |cap| vm.check_extension(cap);
        Ok(match (has(Cap::Irqchip), has(Cap::SplitIrqchip)) {
            (true, _) if !split => Self::All(Arc::new(KernelChips::create(vm.clone())?)),
            (_, true) => Self::Split(Arc::new(SplitChips::create(vm.clone())?)),
            _ => return Err(unavailable(Refusal::Lacks(NO_CHIPS))),
        })
    }
}

/// The kvm engine of one VM.
pub struct KvmEngine {
    vm: Arc<VmFd>,
    chips: Chips,
    supported: CpuId,
    vcpus: u8,
    /// Made with the first vCPU, which knows the TSC's frequency.
    model: OnceLock<CpuidModel>,
    run_size: usize,
    memory: GuestMemory,
    dirty: Arc<DirtyLog>,
    /// KVM_RUN gives back the registers that are asked for.
    sync_regs: bool,
}

/// An error of an ioctl as the host's refusal of `what`.
fn refused<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> EngineError {
    move |error| EngineError::Host { what, source: error.into() }
}

fn unavailable(refusal: Refusal) -> EngineError {
    EngineError::Unavailable { engine: NAME, reason: refusal.to_string() }
}

impl KvmEngine {
    /// Makes the engine for a VM with this memory.
    ///
    /// # Errors
    /// [`EngineError::Unavailable`] when `/dev/kvm` cannot be used, and [`EngineError::Host`] when it refuses
    /// something.
    pub fn new(memory: GuestMemory, options: KvmOptions) -> Result<Self, EngineError> {
        let device = Device::open(Path::new("/dev/kvm")).map_err(unavailable)?;
        device.check().map_err(unavailable)?;
        let most = device.kvm().get_max_vcpus();
        if usize::from(options.vcpus) > most {
            let reason = format!("its KVM allows {most} vCPUs a VM, not {}", options.vcpus);
            return Err(EngineError::Unavailable { engine: NAME, reason });
        }
        let vm = Arc::new(device.create_vm().map_err(unavailable)?);
        vm.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(refused("an address for real mode"))?;
        vm.set_tss_address(TSS_ADDRESS).map_err(refused("an address for real mode"))?;
        memory::map(&vm, &memory)?;
        let chips = Chips::create(&vm, options.split)?;
        let dirty = Arc::new(DirtyLog::new(vm.clone(), memory.clone(), options.dirty_rings));
        let sync_regs = state::has_sync_regs(device.kvm());
        let supported =
            cpuid::supported(device.kvm()).map_err(refused("the CPU features that it supports"))?;
        let run_size = device.kvm().get_vcpu_mmap_size().map_err(refused("the size of its vCPUs"))?;
        Ok(Self {
            vm,
            chips,
            supported,
            vcpus: options.vcpus,
            model: OnceLock::new(),
            run_size,
            memory,
            dirty,
            sync_regs,
        })
    }
}

impl Engine for KvmEngine {
    fn name(&self) -> &'static str {
        NAME
    }

    /// Before the first vCPU is made there is no model yet: the most that there can be.
    fn physical_bits(&self) -> u8 {
        self.model.get().map_or(52, CpuidModel::physical_bits)
    }

    fn interrupt_controllers(&self) -> InterruptControllers {
        match &self.chips {
            Chips::All(chips) => InterruptControllers::Engine(chips.clone()),
            Chips::Split(chips) => InterruptControllers::LocalApics(chips.clone()),
        }
    }

    fn create_vcpu(
        &self,
        id: VcpuId,
        apic: Option<Arc<dyn LocalApic>>,
    ) -> Result<Box<dyn Vcpu>, EngineError> {
        if apic.is_some() {
            return Err(EngineError::BadState("the kvm engine has local APICs of its own".to_owned()));
        }
        let fd = self.vm.create_vcpu(id.0.into()).map_err(refused("a vCPU"))?;
        let tsc_khz = fd.get_tsc_khz().map_err(refused("the frequency of the TSC"))?;
        let model =
            self.model.get_or_init(|| cpuid::model(&self.supported, self.vcpus, u64::from(tsc_khz) * 1000));
        let entries = cpuid::entries(model, id)
            .map_err(|e| refused("the CPU model")(io::Error::other(format!("{e:?}"))))?;
        fd.set_cpuid2(&entries).map_err(refused("the CPU model"))?;
        self.dirty.add_vcpu(&fd)?;
        let parts = VcpuParts {
            run_size: self.run_size,
            split: match &self.chips {
                Chips::All(_) => None,
                Chips::Split(chips) => Some(chips.clone()),
            },
            memory: self.memory.clone(),
            dirty: self.dirty.clone(),
            sync_regs: self.sync_regs,
        };
        Ok(Box::new(KvmVcpu::new(id, fd, parts)))
    }

    /// KVM_SET_CLOCK (api.rst 4.30). The guest's clocks follow when their vCPUs enter it again.
    /// The kernel counts, and shows it in its own way (`/sys/kernel/debug/kvm`).
    fn counters(&self) -> Vec<(String, u64)> {
        Vec::new()
    }

    fn skip_time(&self, time: StoodStill) {
        let nanos = u64::try_from(time.time.as_nanos()).unwrap_or(u64::MAX);
        let set = self.vm.get_clock().and_then(|now| {
            let clock = now.clock.saturating_sub(nanos);
            self.vm.set_clock(&kvm_clock_data { clock, ..kvm_clock_data::default() })
        });
        if let Err(error) = set {
            warn!("the guest's clock jumps by {:?}: KVM does not set it: {error}", time.time);
        }
    }

    /// The CPU sees what is written.
    fn memory_written(&self, start: GuestPhysAddr, len: u64) {
        self.dirty.map().mark_range(start, len);
    }

    /// KVM_IOEVENTFD (api.rst 4.59) for stores of any length.
    fn add_doorbell(&self, addr: GuestPhysAddr, event: &EventFd) -> bool {
        self.vm.register_ioevent(event, &IoEventAddress::Mmio(addr.0), NoDatamatch).is_ok()
    }

    fn remove_doorbell(&self, addr: GuestPhysAddr, event: &EventFd) {
        if let Err(error) = self.vm.unregister_ioevent(event, &IoEventAddress::Mmio(addr.0), NoDatamatch) {
            tracing::warn!("KVM keeps the doorbell at {addr}: {error}");
        }
    }

    /// The CPU marks accesses in page tables that the kernel does not show.
    fn begin_access_period(&self) -> bool {
        false
    }

    /// The kernel brings pages in for the CPU.
    fn page_faults(&self) -> Faults {
        Faults::All
    }

    fn start_dirty_log(&self) -> Result<(), EngineError> {
        self.dirty.start()
    }

    fn take_dirty(&self, region: usize) -> Result<DirtyPages, EngineError> {
        self.dirty.take(region)
    }

    fn stop_dirty_log(&self) -> Result<(), EngineError> {
        self.dirty.stop()
    }

    /// KVM_GET_CLOCK (api.rst 4.29).
    fn clock(&self) -> Result<u64, EngineError> {
        self.vm.get_clock().map(|data| data.clock).map_err(refused("the paravirtual clock"))
    }

    /// KVM_SET_CLOCK (api.rst 4.30).
    fn set_clock(&self, nanos: u64) -> Result<(), EngineError> {
        let data = kvm_clock_data { clock: nanos, ..kvm_clock_data::default() };
        self.vm.set_clock(&data).map_err(refused("the paravirtual clock"))
    }
}

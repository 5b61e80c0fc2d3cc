//! What all vCPUs of a VM share.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use berth_cpu::VcpuId;
use berth_cpu::cpuid::CpuidModel;
use berth_engine::{DirtyMap, EngineError};
use berth_memory::layout::HIGH_RAM_START;
use berth_memory::{GuestMemory, GuestPhysAddr};
use parking_lot::{Mutex, RwLock, RwLockWriteGuard};

use crate::SoftOptions;
use crate::code::cache::CodeCache;
use crate::exec::features::FeatureSet;
use crate::exec::pv::PvShared;
use crate::memory::HostMap;
use crate::memory::slots::{Sites, SlotNumbers};
use crate::seat::somebody_stands_still;
use crate::shared::{VcpuShared, request};

/// The shared part of a VM on the soft engine.
pub struct Vm {
    /// RAM.
    pub memory: GuestMemory,
    pub(crate) host_map: HostMap,
    /// The physical address bits that this CPU model has.
    pub phys_mask: u64,
    /// Frequency of the time-stamp counter.
    pub tsc_hz: u64,
    /// Number of vCPUs that the VM was made for.
    pub vcpus: u8,
    /// What CPUID says.
    pub cpuid: CpuidModel,
    /// Which instructions exist.
    pub features: FeatureSet,
    /// Paravirtual state that vCPUs share.
    pub pv: PvShared,
    /// Which pages hold translated code.
    pub code_pages: CodePages,
    /// Which pages were written, while that is asked for.
    pub(crate) dirty: DirtyMap,
    /// Changes whenever vCPUs must forget which pages they may store to without being noticed.
    dirty_epoch: AtomicU64,
    pub(crate) cache: CodeCache,
    /// Slots for the memory accesses that are translated next.
    pub(crate) slot_numbers: SlotNumbers,
    /// Memory accesses that get none.
    pub(crate) slotless: Sites,
    /// Accesses to the stack that get a slot of their own.
    pub(crate) unshared: Sites,
    /// Held from marking a page as code until the others are asked to sweep it.
    pub(crate) marking: Mutex<()>,
    list: RwLock<Vec<Arc<VcpuShared>>>,
    /// Held for reading by every vCPU that may be inside translated code; for writing by one that must be
    /// alone.
    pub(crate) execution: RwLock<()>,
    /// Held by one that wants to be alone until it is: see [`Self::give_way`].
    exclusion: Mutex<()>,
    /// Optimisations that are switched off.
    pub(crate) debug: crate::DebugFlags,
    /// The host, and so the guest, is an AMD or Hygon CPU.
    pub(crate) is_amd: bool,
}

/// Physical address width that guests see.
pub const PHYS_BITS: u32 = 46;

impl Vm {
    pub(crate) fn new(memory: GuestMemory, options: &SoftOptions) -> Result<Self, EngineError> {
        let cpuid = crate::exec::features::host_model(options.vcpus, options.tsc_hz);
        let features = FeatureSet::of(&cpuid);
        Ok(Self {
            host_map: HostMap::new(&memory),
            phys_mask: (1 << PHYS_BITS) - 1,
            tsc_hz: options.tsc_hz,
            vcpus: options.vcpus,
            features,
            is_amd: cpuid.vendor() == berth_cpu::cpuid::Vendor::Amd,
            cpuid,
            pv: PvShared::new(options.tsc_hz),
            code_pages: CodePages::new(&memory),
            dirty: DirtyMap::new(&memory),
            dirty_epoch: AtomicU64::new(0),
            cache: CodeCache::new(options.code_cache_bytes)
                .map_err(|source| EngineError::Host { what: "memory for the code cache", source })?,
            slot_numbers: SlotNumbers::default(),
            slotless: Sites::new(),
            unshared: Sites::new(),
            marking: Mutex::new(()),
            list: RwLock::new(Vec::new()),
            execution: RwLock::new(()),
            exclusion: Mutex::new(()),
            debug: crate::DebugFlags::from_env(),
            memory,
        })
    }

    pub(crate) fn add_vcpu(&self, vcpu: Arc<VcpuShared>) {
        self.list.write().push(vcpu);
    }

    /// The vCPU with number `index`, if it exists.
    pub fn vcpu(&self, index: usize) -> Option<Arc<VcpuShared>> {
        self.list.read().get(index).cloned()
    }

    /// Asks all vCPUs to forget where pages are, so that they note which they access.
    pub(crate) fn begin_access_period(&self) {
        self.list.read().iter().for_each(|vcpu| vcpu.request_later(request::FORGET));
    }

    /// Whether a vCPU other than `me` wants to run and does not.
    pub(crate) fn somebody_lacks_a_cpu(&self, me: VcpuId) -> bool {
        let mut clocks = Vec::new();
        self.for_others(me, |vcpu| clocks.extend(vcpu.wants_a_cpu()));
        !self.debug.no_give_way && somebody_stands_still(&clocks)
    }

    /// Whether the vCPU with number `index` wants to run and does not.
    pub(crate) fn lacks_a_cpu(&self, index: usize) -> bool {
        let clock = self.vcpu(index).and_then(|vcpu| vcpu.wants_a_cpu());
        !self.debug.no_give_way && clock.is_some_and(|clock| somebody_stands_still(&[clock]))
    }

    /// All vCPUs.
    pub(crate) fn vcpu_list(&self) -> Vec<Arc<VcpuShared>> {
        self.list.read().clone()
    }

    fn for_others(&self, me: VcpuId, mut act: impl FnMut(&VcpuShared)) {
        for (i, vcpu) in self.list.read().iter().enumerate() {
            if i != usize::from(me.0) {
                act(vcpu);
            }
        }
    }

    fn request_others(&self, me: VcpuId, bits: u32) {
        self.for_others(me, |vcpu| vcpu.request(bits));
    }

    /// Whether every vCPU has done next to nothing for a while.
    pub(crate) fn all_idle(&self) -> bool {
        self.list.read().iter().all(|vcpu| vcpu.idle.load(Ordering::SeqCst))
    }

    /// Waits until no other vCPU is inside translated code, and keeps them out. The caller must not hold the
    /// execution lock.
    pub(crate) fn alone(&self, me: VcpuId) -> RwLockWriteGuard<'_, ()> {
        let exclusion = self.exclusion.lock();
        self.request_others(me, request::PAUSE);
        let alone = self.execution.write();
        drop(exclusion);
        alone
    }

    /// What a vCPU does for [`request::PAUSE`] once it has let go of the execution lock: it waits until the one that asked
    /// has that lock. If it took the lock again before, it might execute a loop for ever that nobody asks it to leave.
    pub(crate) fn give_way(&self) {
        drop(self.exclusion.lock());
    }

    /// Does `change` to the log of written pages while no vCPU is inside translated code; none of them stores to a page
    /// afterwards that it does not mark before.
    pub(crate) fn with_everyone_out<R>(&self, change: impl FnOnce() -> R) -> R {
        let exclusion = self.exclusion.lock();
        for vcpu in self.list.read().iter() {
            vcpu.request(request::PAUSE);
        }
        let alone = self.execution.write();
        drop(exclusion);
        self.dirty_epoch.fetch_add(1, Ordering::SeqCst);
        let result = change();
        drop(alone);
        result
    }

    /// See [`Self::with_everyone_out`]: looked at by each vCPU before it enters translated code.
    pub(crate) fn dirty_epoch(&self) -> u64 {
        self.dirty_epoch.load(Ordering::SeqCst)
    }

    /// Notes that the engine wrote to guest memory at `host`.
    pub(crate) fn mark_host(&self, host: u64) {
        if self.dirty.is_on()
            && let Some(addr) = self.host_map.guest(host)
        {
            self.dirty.mark(addr);
        }
    }

    /// Asks the other vCPUs to stop storing directly to the page at `addr`.
    pub(crate) fn sweep_others(&self, me: VcpuId, addr: GuestPhysAddr) {
        self.for_others(me, |vcpu| {
            vcpu.sweep.lock().push(addr.page_base().0);
            vcpu.request(request::SWEEP);
        });
    }

    /// Waits until the other vCPUs have done what [`Self::sweep_others`] asked of them: a translation that is made before
    /// could be executed after one of them has stored other code. Not for ever: one may be waiting to be alone.
    pub(crate) fn wait_for_sweeps(&self, me: VcpuId, addr: GuestPhysAddr) {
        let page = addr.page_base().0;
        let deadline = Instant::now() + LONGEST_SWEEP;
        self.for_others(me, |vcpu| {
            while vcpu.sweep.lock().contains(&page) && Instant::now() < deadline {
                std::thread::sleep(SWEEP_STEP);
            }
        });
    }

    /// A store to a page that is marked as holding code was found to hit none of it. A page that is stored to again
    /// and again has probably become data: then its translations are dropped, and it is like any other. Returns
    /// whether that was done.
    pub(crate) fn data_stored(&self, addr: GuestPhysAddr) -> bool {
        let release = self.code_pages.count_data_store(addr);
        if release {
            self.cache.release(addr, || self.code_pages.unmark(addr));
        }
        release
    }

    /// Drops all translations. No vCPU may be inside translated code.
    pub(crate) fn drop_translations(&self) {
        self.cache.evict_all(|page| self.code_pages.unmark(page));
        self.slotless.clear();
        self.unshared.clear();
    }

    /// Drops translations made from `len` bytes at `start`, which were just written.
    pub(crate) fn memory_written(&self, start: GuestPhysAddr, len: u64) -> bool {
        self.dirty.mark_range(start, len);
        let mut dropped = false;
        let mut at = start;
        let end = start.0.saturating_add(len);
        while at.0 < end {
            let next = (at.page_base().0 + 4096).min(end);
            if self.code_pages.has_code(at) {
                self.code_pages.written(at);
                dropped |= self.cache.invalidate(at, next - at.0);
            }
            at = GuestPhysAddr(next);
        }
        dropped
    }
}

/// How long a translation waits for vCPUs that may store to its page, and how long until it looks again.
const LONGEST_SWEEP: Duration = Duration::from_millis(20);
const SWEEP_STEP: Duration = Duration::from_micros(10);

const CODE: u8 = 1 << 7;
const MANY: u8 = CODE - 1;

/// For each page of RAM: whether it has translations, and which vCPU may store to it directly.
pub struct CodePages {
    pages: Box<[AtomicU8]>,
    low_pages: u64,
    /// Counts stores to pages with translations, by hash of the page: a translation that was begun before such
    /// a store must not be used.
    writes: Box<[AtomicU32]>,
    /// For each hash of a page: how many stores it takes until the page counts as data (upper half), and how many
    /// there were.
    data_stores: Box<[AtomicU32]>,
}

/// So many stores to a page with code, which hit none of it, make it a page of data, for the first time; each time
/// it takes twice as many.
const FIRST_DATA_STORES: u32 = 128;

impl CodePages {
    fn new(memory: &GuestMemory) -> Self {
        let pages = (memory.size() >> 12) as usize;
        let mut low_pages = 0;
        for region in memory.regions() {
            if region.start < HIGH_RAM_START {
                low_pages = region.len >> 12;
            }
        }
        // `vec![0; n]` asks for zeroed memory, which is not resident before it is touched.
        let zeroed = vec![0u8; pages].into_boxed_slice();
        // SAFETY: AtomicU8 has the same size, alignment and valid values as u8.
        let pages = unsafe { Box::from_raw(Box::into_raw(zeroed) as *mut [AtomicU8]) };
        let counters = |value| (0..1024).map(|_| AtomicU32::new(value)).collect();
        Self { pages, low_pages, writes: counters(0), data_stores: counters(FIRST_DATA_STORES << 16) }
    }

    fn page(&self, addr: GuestPhysAddr) -> Option<&AtomicU8> {
        let page = if addr < HIGH_RAM_START {
            addr.page()
        } else {
            addr.page() - HIGH_RAM_START.page() + self.low_pages
        };
        self.pages.get(page as usize)
    }

    fn write_count(&self, addr: GuestPhysAddr) -> &AtomicU32 {
        &self.writes[addr.page() as usize % self.writes.len()]
    }

    /// Whether the page may have translations.
    pub fn has_code(&self, addr: GuestPhysAddr) -> bool {
        self.page(addr).is_some_and(|p| p.load(Ordering::SeqCst) & CODE != 0)
    }

    /// Remembers that `vcpu` may store to the page without telling anyone.
    pub(crate) fn note_writer(&self, addr: GuestPhysAddr, vcpu: VcpuId) {
        let Some(page) = self.page(addr) else { return };
        let me = vcpu.0 + 1;
        let _ = page.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |old| {
            let writer = old & MANY;
            let new = if writer == 0 || writer == me { me } else { MANY };
            (new != writer).then_some(old & CODE | new)
        });
    }

    /// Marks the page as holding code. Returns whether it is new, and whether another vCPU than `me` may have
    /// TLB entries for storing to it.
    pub(crate) fn mark(&self, addr: GuestPhysAddr, me: VcpuId) -> (bool, bool) {
        let Some(page) = self.page(addr) else { return (false, false) };
        let old = page.fetch_or(CODE, Ordering::SeqCst);
        let writer = old & MANY;
        (old & CODE == 0, writer != 0 && writer != me.0 + 1)
    }

    /// The page has no translations any more.
    pub(crate) fn unmark(&self, addr: GuestPhysAddr) {
        if let Some(page) = self.page(addr) {
            // Who may store to it stays noted: a vCPU may be about to make an entry for that.
            page.fetch_and(!CODE, Ordering::SeqCst);
        }
    }

    /// Counts a store to data in a page with code. True: enough of them.
    fn count_data_store(&self, addr: GuestPhysAddr) -> bool {
        let counter = &self.data_stores[addr.page() as usize % self.data_stores.len()];
        let value = counter.fetch_add(1, Ordering::Relaxed) + 1;
        let limit = value >> 16;
        if value & 0xffff < limit {
            return false;
        }
        counter.store((limit * 2).min(0x8000) << 16, Ordering::Relaxed);
        true
    }

    /// Counts a store to the page.
    pub(crate) fn written(&self, addr: GuestPhysAddr) {
        self.write_count(addr).fetch_add(1, Ordering::SeqCst);
    }

    /// A number that changes with [`Self::written`].
    pub(crate) fn version(&self, addr: GuestPhysAddr) -> u32 {
        self.write_count(addr).load(Ordering::SeqCst)
    }
}

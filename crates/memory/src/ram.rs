//! RAM: regions of guest physical memory backed by anonymous host memory.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use crate::bits::PageBits;
use crate::cold::Ages;
use crate::layout::{HIGH_RAM_START, LOW_RAM_END, MAX_RAM};
use crate::store::{Evicted, Faults, Hold, Holds, Store, StoreCounters, StoreError};
use crate::{GuestPhysAddr, HostVirtAddr, PAGE_SHIFT, PAGE_SIZE};

/// Pages that are evicted before it is asked again whether to go on.
const EVICTED_AT_ONCE: usize = 1024;

/// Why guest memory could not be made or accessed.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size is not usable for a VM.
    #[error(
        "memory size {size} is not possible: it must be a multiple of 4096 from 1 MiB to {MAX_RAM} bytes"
    )]
    BadSize {
        /// What was asked for, in bytes.
        size: u64,
    },
    /// The host refused to map the memory.
    #[error("the host refused to reserve {size} bytes of address space for guest memory: {reason}")]
    Map {
        /// What was asked for, in bytes.
        size: u64,
        /// What the host said.
        reason: String,
    },
    /// The host refused to take memory back.
    #[error("the host does not take back {len} bytes of guest memory at {start}: {source}")]
    Discard {
        /// First address.
        start: GuestPhysAddr,
        /// Length in bytes.
        len: u64,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
    /// The host has no huge pages.
    #[error(
        "the host has no transparent huge pages for guest memory (see /sys/kernel/mm/transparent_hugepage): {0}"
    )]
    HugePages(#[source] std::io::Error),
    /// The access is not inside RAM.
    #[error("no RAM at guest physical {start} for {len} bytes")]
    OutOfRange {
        /// First address of the access.
        start: GuestPhysAddr,
        /// Length in bytes.
        len: u64,
    },
}

/// One contiguous piece of RAM.
#[derive(Clone, Copy, Debug)]
pub struct RamRegion {
    /// First guest physical address.
    pub start: GuestPhysAddr,
    /// Length in bytes, a multiple of 4096.
    pub len: u64,
    /// Where it is mapped in this process.
    pub host: HostVirtAddr,
}

impl RamRegion {
    /// The first address past the region.
    pub fn end(&self) -> GuestPhysAddr {
        self.start + self.len
    }
}

/// The RAM of one VM. Cheap to clone: clones share the memory.
#[derive(Clone)]
pub struct GuestMemory {
    pages: Arc<Pages>,
    regions: Arc<[RamRegion]>,
    size: u64,
    // Last: the store goes first.
    map: Arc<GuestMemoryMmap>,
}

/// What is known of the pages.
struct Pages {
    /// Pages that the guest gave back at some time.
    released: PageBits,
    /// Pages that were accessed of late.
    accessed: PageBits,
    holds: Arc<Holds>,
    store: OnceLock<Store>,
    store_begins: Mutex<()>,
}

impl std::fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestMemory").field("regions", &self.regions).finish()
    }
}

impl GuestMemory {
    /// Reserves `size` bytes of RAM, laid out around the hole below 4 GiB. Nothing is resident yet.
    ///
    /// # Errors
    /// [`MemoryError::BadSize`] unless `size` is a multiple of 4096 from 1 MiB to [`MAX_RAM`];
    /// [`MemoryError::Map`] when the host has no address space for it.
    pub fn new(size: u64) -> Result<Self, MemoryError> {
        if !size.is_multiple_of(PAGE_SIZE) || !(1 << 20..=MAX_RAM).contains(&size) {
            return Err(MemoryError::BadSize { size });
        }
        let low = size.min(LOW_RAM_END.0);
        let mut ranges = vec![(GuestAddress(0), low as usize)];
        if size > low {
            ranges.push((GuestAddress(HIGH_RAM_START.0), (size - low) as usize));
        }
        let map: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&ranges)
            .map_err(|e| MemoryError::Map { size, reason: e.to_string() })?;
        let regions = map
            .iter()
            .map(|r: &GuestRegionMmap| RamRegion {
                start: GuestPhysAddr(r.start_addr().0),
                len: r.len(),
                host: HostVirtAddr(r.as_ptr() as u64),
            })
            .collect();
        let count = (size >> PAGE_SHIFT) as usize;
        let pages = Pages {
            released: PageBits::new(count),
            accessed: PageBits::new(count),
            holds: Arc::new(Holds::new(count)),
            store: OnceLock::new(),
            store_begins: Mutex::new(()),
        };
        Ok(Self { pages: Arc::new(pages), regions, size, map: Arc::new(map) })
    }

    /// Size of all RAM in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The pieces of RAM, in ascending order of guest physical address.
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// Tells the host to use transparent huge pages wherever they fit, or never.
    ///
    /// # Errors
    /// [`MemoryError::HugePages`] when the host has none.
    pub fn use_huge_pages(&self, huge: bool) -> Result<(), MemoryError> {
        let advice = if huge { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
        for region in self.regions.iter() {
            let start = region.host.0 as *mut libc::c_void;
            // SAFETY: the range is a mapping of ours; the advice changes no content.
            if unsafe { libc::madvise(start, region.len as usize, advice) } != 0 && huge {
                return Err(MemoryError::HugePages(std::io::Error::last_os_error()));
            }
        }
        Ok(())
    }

    /// The same memory as rust-vmm's crates want it.
    pub fn map(&self) -> &GuestMemoryMmap {
        &self.map
    }

    /// Where `len` bytes from `start` on are mapped in this process, if all of them are RAM of one region.
    ///
    /// The pointer is valid as long as this `GuestMemory` or a clone lives. Others may write the memory at
    /// any time: use volatile or atomic accesses.
    pub fn host_address(&self, start: GuestPhysAddr, len: u64) -> Option<HostVirtAddr> {
        self.regions.iter().find_map(|r| {
            let offset = start.0.checked_sub(r.start.0)?;
            (offset < r.len && len <= r.len - offset).then(|| r.host + offset)
        })
    }

    /// The number of the page at `addr` among all pages of RAM, without the hole.
    pub(crate) fn page_index(&self, addr: GuestPhysAddr) -> Option<usize> {
        let mut before = 0;
        for region in self.regions.iter() {
            if (region.start..region.end()).contains(&addr) {
                return usize::try_from((before + (addr - region.start)) >> PAGE_SHIFT).ok();
            }
            before += region.len;
        }
        None
    }

    /// Whether the guest gave the page back at some time.
    pub(crate) fn is_released(&self, page: usize) -> bool {
        self.pages.released.get(page)
    }

    /// Whether the cold store has the page.
    pub(crate) fn is_stored(&self, page: usize) -> bool {
        self.pages.store.get().is_some_and(|store| store.has(page))
    }

    /// Notes that the guest, or a device for it, accesses the page at `addr`. Cheap if that was noted before.
    pub fn mark_accessed(&self, addr: GuestPhysAddr) {
        if let Some(page) = self.page_index(addr) {
            self.pages.accessed.set(page);
        }
    }

    /// As [`Self::mark_accessed`] for the page with this number among all pages of RAM, without the hole.
    pub fn mark_page_accessed(&self, page: usize) {
        self.pages.accessed.set(page);
    }

    /// The marks of 64 pages; clears them.
    pub(crate) fn take_accessed(&self, word: usize) -> u64 {
        self.pages.accessed.take_word(word)
    }

    /// Begins the cold store of this memory unless it has begun. `thread`: name of the thread that brings pages back.
    ///
    /// # Errors
    /// [`StoreError`] when the host lacks what it needs.
    pub fn begin_store(&self, faults: Faults, thread: &str) -> Result<(), StoreError> {
        let _one = self.pages.store_begins.lock();
        if self.pages.store.get().is_none() {
            let holds = self.pages.holds.clone();
            let store = Store::new(self.regions.clone(), holds, faults, thread.to_owned())?;
            // Nobody else sets it: that needs the lock.
            let _ = self.pages.store.set(store);
        }
        Ok(())
    }

    /// Takes pages that were not accessed for `min_age` periods out of memory, the coldest first, at most `bytes` of
    /// them. They come back when they are touched. Does nothing before [`Self::begin_store`].
    ///
    /// # Errors
    /// When the host does not tell what is resident.
    pub fn evict_cold(&self, ages: &Ages, bytes: u64, min_age: u8) -> std::io::Result<Evicted> {
        let Some(store) = self.pages.store.get() else { return Ok(Evicted::default()) };
        Ok(store.evict(&ages.coldest(self, bytes, min_age)?))
    }

    /// As [`Self::evict_cold`] with all that there is, as long as `go_on` says so.
    ///
    /// # Errors
    /// As [`Self::evict_cold`].
    pub fn evict_all(&self, ages: &Ages, bytes: u64, go_on: impl Fn() -> bool) -> std::io::Result<Evicted> {
        let mut all = Evicted::default();
        let Some(store) = self.pages.store.get() else { return Ok(all) };
        for pages in ages.coldest(self, bytes, 0)?.chunks(EVICTED_AT_ONCE) {
            if !go_on() {
                break;
            }
            let Evicted { pages, zero, kept } = store.evict(pages);
            all = Evicted { pages: all.pages + pages, zero: all.zero + zero, kept: all.kept + kept };
        }
        Ok(all)
    }

    /// Moves what the cold store has in memory to a file without a name in `directory`, the oldest first: at least `bytes`
    /// if there are as many, and as long as `go_on` says so. Returns how many. Only the first call's directory counts.
    ///
    /// # Errors
    /// What the host says: no room, or the disk fails. Nothing is lost then.
    pub fn move_store_to_file(
        &self,
        directory: &Path,
        bytes: u64,
        go_on: impl Fn() -> bool,
    ) -> std::io::Result<u64> {
        self.pages.store.get().map_or(Ok(0), |store| store.move_to_file(directory, bytes, go_on))
    }

    /// Tells the host that what is in the store's file will be wanted soon.
    pub fn store_file_will_be_read(&self) {
        if let Some(store) = self.pages.store.get() {
            store.will_be_read();
        }
    }

    /// How the cold store stands, if it has begun.
    pub fn store_counters(&self) -> Option<StoreCounters> {
        self.pages.store.get().map(Store::counters)
    }

    /// Keeps ranges of RAM (first address, length in bytes) in memory while a system call works on them. What is not
    /// RAM is left out.
    pub fn hold(&self, ranges: impl IntoIterator<Item = (GuestPhysAddr, u64)>) -> Hold {
        let ranges: Vec<_> = ranges
            .into_iter()
            .filter(|(_, len)| *len > 0)
            .filter_map(|(start, len)| {
                let host = self.host_address(start, len)?;
                let (first, last) = (self.page_index(start)?, self.page_index(start + (len - 1))?);
                Some((host, len, first..=last))
            })
            .collect();
        ranges.iter().flat_map(|(.., pages)| pages.clone()).for_each(|page| self.pages.accessed.set(page));
        let hold = Hold::new(self.pages.holds.clone(), ranges.iter().map(|(.., pages)| pages.clone()));
        // From here on they are not taken away; those that were come back at an access in user mode.
        if self.pages.store.get().is_some_and(Store::needs_holds) {
            for (host, len, _) in &ranges {
                for at in (host.page_base().0..host.0 + len).step_by(PAGE_SIZE as usize) {
                    // SAFETY: the byte is in RAM that is mapped as long as `self`; a volatile read of memory that
                    // others write.
                    unsafe { (at as *const u8).read_volatile() };
                }
            }
        }
        hold
    }

    /// Gives `len` bytes from `start` on back to the host; they read as zero from now on. Both are multiples of 4096.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`] when not all of it is RAM of one region or whole pages; [`MemoryError::Discard`]
    /// when the host refuses.
    pub fn discard(&self, start: GuestPhysAddr, len: u64) -> Result<(), MemoryError> {
        let whole = start.page_offset() == 0 && len.is_multiple_of(PAGE_SIZE);
        let Some(host) = self.host_address(start, len).filter(|_| whole) else {
            return Err(MemoryError::OutOfRange { start, len });
        };
        let Some(first) = self.page_index(start) else { return Err(MemoryError::OutOfRange { start, len }) };
        let pages = first..first + (len >> PAGE_SHIFT) as usize;
        let discard = || {
            // SAFETY: the range is inside a mapping of ours that is only memory of the guest; nobody has references
            // into it.
            match unsafe { libc::madvise(host.0 as *mut libc::c_void, len as usize, libc::MADV_DONTNEED) } {
                0 => Ok(()),
                _ => Err(MemoryError::Discard { start, len, source: std::io::Error::last_os_error() }),
            }
        };
        match self.pages.store.get() {
            Some(store) => store.discard(pages.clone(), discard)?,
            None => discard()?,
        }
        pages.for_each(|page| self.pages.released.set(page));
        Ok(())
    }

    /// Copies `data` to guest physical `start`.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`] when not all of it is RAM; then what comes before the end was written.
    pub fn write(&self, start: GuestPhysAddr, data: &[u8]) -> Result<(), MemoryError> {
        self.map
            .write_slice(data, GuestAddress(start.0))
            .map_err(|_| MemoryError::OutOfRange { start, len: data.len() as u64 })
    }

    /// Fills `data` from guest physical `start`.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`] when not all of it is RAM.
    pub fn read(&self, start: GuestPhysAddr, data: &mut [u8]) -> Result<(), MemoryError> {
        let len = data.len() as u64;
        self.map.read_slice(data, GuestAddress(start.0)).map_err(|_| MemoryError::OutOfRange { start, len })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_memory_is_one_region_from_zero() {
        let m = GuestMemory::new(64 << 20).unwrap();
        assert_eq!(m.regions().len(), 1);
        assert_eq!(m.regions()[0].start, GuestPhysAddr(0));
        assert_eq!(m.regions()[0].end(), GuestPhysAddr(64 << 20));
    }

    #[test]
    fn large_memory_leaves_the_hole_free() {
        let m = GuestMemory::new(4 << 30).unwrap();
        assert_eq!(m.regions().len(), 2);
        assert_eq!(m.regions()[0].end(), LOW_RAM_END);
        assert_eq!(m.regions()[1].start, HIGH_RAM_START);
        assert_eq!(m.regions().iter().map(|r| r.len).sum::<u64>(), 4 << 30);
        assert!(m.host_address(LOW_RAM_END, 1).is_none());
        assert!(m.host_address(GuestPhysAddr(LOW_RAM_END.0 - 1), 2).is_none());
    }

    #[test]
    fn impossible_sizes_are_refused() {
        for size in [0, 1024, 4096, (1 << 20) + 1, u64::MAX, MAX_RAM + PAGE_SIZE] {
            assert!(matches!(GuestMemory::new(size), Err(MemoryError::BadSize { .. })), "{size}");
        }
    }

    #[test]
    fn discarded_pages_are_zero() {
        let m = GuestMemory::new(1 << 20).unwrap();
        m.write(GuestPhysAddr(0x1ff8), &[7; 16]).unwrap();
        m.discard(GuestPhysAddr(0x2000), 0x1000).unwrap();
        let mut back = [1; 16];
        m.read(GuestPhysAddr(0x1ff8), &mut back).unwrap();
        assert_eq!(back, [[7; 8], [0; 8]].concat()[..]);
        for (start, len) in [(0x2001, 0x1000), (0x2000, 0x800), (0xf_f000, 0x2000), (1 << 20, 0x1000)] {
            assert!(m.discard(GuestPhysAddr(start), len).is_err(), "{start:#x}");
        }
    }

    #[test]
    fn reads_give_back_what_was_written() {
        let m = GuestMemory::new(1 << 20).unwrap();
        m.write(GuestPhysAddr(0xfff), b"across a page").unwrap();
        let mut back = [0; 13];
        m.read(GuestPhysAddr(0xfff), &mut back).unwrap();
        assert_eq!(&back, b"across a page");
        assert!(m.write(GuestPhysAddr((1 << 20) - 1), &[1, 2]).is_err());
    }
}

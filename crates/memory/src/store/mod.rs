//! The cold store: pages that the guest does not use are taken out of its memory, compressed, and come back when
//! somebody touches them.
//!
//! ```text
//!   guest memory ──UFFDIO_MOVE──► staging ──hash, compress──► contents.rs (equal pages once) ── log.rs (bytes)
//!        ▲                           │                            │
//!        └────────── UFFDIO_COPY ────┴────── fault.rs ◄───────────┘       who touches a missing page waits in the
//!                                                                         kernel until fault.rs has filled it
//! ```
//!
//! Guest memory is registered with userfaultfd at the first eviction; a VM that never evicts pays nothing.
//!
//! # Why no write is lost
//!
//! Each page has a *mark*: none, zeros, moving (with its place in the staging area), or the number of its content.
//!
//! 1. *A page leaves whole.* UFFDIO_MOVE takes the page itself away in one step of the kernel, with the TLBs of all CPUs
//!    flushed: a store before it is in the page, a store after it faults. There is no time at which the page can be
//!    written and a copy of it is already kept, so it does not matter who still has its address: the soft engine's
//!    TLBs, KVM's page tables (which the kernel empties), or a device. A page that the kernel itself is writing for
//!    somebody (pinned for direct I/O) is not moved.
//! 2. *Nobody else has the page in the staging area.* Its contents do not change any more; the compressor and fault.rs
//!    only read it.
//! 3. *Mark and page change together.* Whoever moves, fills or discards a page does it under the lock of the marks
//!    ([`Marks`]), and sets the mark before letting go. So fault.rs never takes a page that was just moved for one
//!    that was never there. Only fault.rs fills missing pages.
//! 4. *A content goes when its page is back.* The mark is taken away after UFFDIO_COPY, under the lock. A fault that was
//!    reported twice finds no mark: then the page is there, the page of zeros does not replace it, and the waiting
//!    thread looks again.
//!
//! # The file
//!
//! Contents are in memory first. [`Store::move_to_file`] moves the oldest ones to a file (`file.rs`): they are written
//! and flushed without the lock, and change their place under it, so a fault finds them at one place or the other.
//!
//! The lock is never held while guest memory is touched, so it cannot wait for itself; and fault.rs, which everybody
//! may wait for, waits for this lock and nothing else.

mod contents;
mod counters;
mod evict;
mod fault;
mod file;
mod hold;
mod log;
mod map;
#[cfg(test)]
mod tests;
mod uffd;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use parking_lot::{Mutex, MutexGuard};

pub use counters::{Latency, StoreCounters};
pub use hold::Hold;
pub(crate) use hold::Holds;

use self::contents::{ContentId, Contents};
use self::counters::LatencyCounter;
use self::evict::Evictor;
use self::fault::FaultHandler;
use self::file::StoreFile;
use self::map::AnonMap;
use self::uffd::Userfault;
use crate::{HostVirtAddr, PAGE_SHIFT, PAGE_SIZE, RamRegion};

/// Which page faults on guest memory the store must be able to handle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Faults {
    /// Those of this process in user mode; others only if the host allows it. System calls on guest memory then need a
    /// [`Hold`].
    User,
    /// As [`Self::User`], and never more than that (for tests).
    UserOnly,
    /// Those of the kernel too, as for KVM.
    All,
}

/// Why there is no cold store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The host lacks userfaultfd.
    #[error(
        "the cold store needs userfaultfd with UFFDIO_MOVE, which Linux has from 6.8 on (CONFIG_USERFAULTFD): {0}"
    )]
    Userfault(#[source] io::Error),
    /// Faults of the kernel are needed.
    #[error(
        "the cold store of this engine needs all page faults, and the host allows only those of user mode: \
         as root write 1 to /proc/sys/vm/unprivileged_userfaultfd, or give yourself access to /dev/userfaultfd"
    )]
    UserModeOnly,
    /// The host refuses something else.
    #[error("the host refuses {what} for the cold store: {source}")]
    Host {
        /// What was asked for.
        what: &'static str,
        /// What it said.
        #[source]
        source: io::Error,
    },
}

/// What an eviction did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Evicted {
    /// Pages that are in the store now.
    pub pages: u64,
    /// Those of them that are all zeros.
    pub zero: u64,
    /// Pages that stay: in use by a device, shared with a child process, or touched meanwhile.
    pub kept: u64,
}

/// Where a page is, if it is not in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mark {
    None,
    Zero,
    /// In this page of the staging area.
    Moving(usize),
    Content(ContentId),
}

const MOVING: u32 = 1 << 31;

impl Mark {
    fn encode(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Zero => 1,
            Self::Moving(place) => MOVING | place as u32,
            Self::Content(ContentId(id)) => id + 2,
        }
    }

    fn decode(value: u32) -> Self {
        match value {
            0 => Self::None,
            1 => Self::Zero,
            v if v & MOVING != 0 => Self::Moving((v & !MOVING) as usize),
            v => Self::Content(ContentId(v - 2)),
        }
    }
}

/// What the lock protects: the contents, and the right to change marks and pages.
struct Marks {
    contents: Contents,
    zero_pages: u64,
    moving: u64,
}

/// What the threads share.
struct Shared {
    userfault: Userfault,
    regions: Arc<[RamRegion]>,
    holds: Arc<Holds>,
    staging: AnonMap,
    /// A [`Mark`] for each page of RAM; changed only under `state`.
    marks: Box<[AtomicU32]>,
    state: Mutex<Marks>,
    evicted: AtomicU64,
    refaults: AtomicU64,
    zero_faults: AtomicU64,
    latency: LatencyCounter,
}

impl Shared {
    fn mark(&self, page: usize) -> Mark {
        self.marks.get(page).map_or(Mark::None, |mark| Mark::decode(mark.load(Ordering::Relaxed)))
    }

    /// Changes a mark. What the old one named is released.
    fn set_mark(&self, state: &mut MutexGuard<'_, Marks>, page: usize, new: Mark) {
        let Some(mark) = self.marks.get(page) else { return };
        match Mark::decode(mark.swap(new.encode(), Ordering::Relaxed)) {
            Mark::None => {}
            Mark::Zero => state.zero_pages -= 1,
            Mark::Moving(_) => state.moving -= 1,
            Mark::Content(id) => state.contents.release(id),
        }
        match new {
            Mark::None | Mark::Content(_) => {}
            Mark::Zero => state.zero_pages += 1,
            Mark::Moving(_) => state.moving += 1,
        }
    }

    fn staged(&self, place: usize) -> Option<&contents::Page> {
        self.staging.page(place)
    }

    /// Where page number `page` is mapped.
    fn host(&self, page: usize) -> Option<HostVirtAddr> {
        let mut offset = (page as u64) << PAGE_SHIFT;
        for region in self.regions.iter() {
            if offset < region.len {
                return Some(region.host + offset);
            }
            offset -= region.len;
        }
        None
    }

    /// The number of the page that is mapped at `host`, and how many pages of its region follow it, itself included.
    fn page_at(&self, host: HostVirtAddr) -> Option<(usize, usize)> {
        let mut before = 0;
        for region in self.regions.iter() {
            if let Some(offset) = host.0.checked_sub(region.host.0).filter(|offset| *offset < region.len) {
                return Some((
                    ((before + offset) >> PAGE_SHIFT) as usize,
                    ((region.len - offset) >> PAGE_SHIFT) as usize,
                ));
            }
            before += region.len;
        }
        None
    }
}

/// The cold store of one VM.
pub(crate) struct Store {
    shared: Arc<Shared>,
    evictor: Mutex<Evictor>,
    /// Made when it is needed first. Whoever moves contents there has the lock.
    file: Mutex<Option<Arc<StoreFile>>>,
    _handler: FaultHandler,
}

impl Store {
    /// Makes a store for the memory in `regions`, whose missing pages it fills from now on. `thread`: name of the
    /// thread that fills pages.
    ///
    /// # Errors
    /// [`StoreError`].
    pub(crate) fn new(
        regions: Arc<[RamRegion]>,
        holds: Arc<Holds>,
        faults: Faults,
        thread: String,
    ) -> Result<Self, StoreError> {
        let host = |what| move |source| StoreError::Host { what, source };
        let userfault = Userfault::open(faults != Faults::UserOnly).map_err(StoreError::Userfault)?;
        if faults == Faults::All && !userfault.kernel_faults() {
            return Err(StoreError::UserModeOnly);
        }
        let staging = AnonMap::new(evict::BATCH << PAGE_SHIFT).map_err(host("memory"))?;
        userfault
            .register(staging.start(), (evict::BATCH as u64) << PAGE_SHIFT)
            .map_err(host("userfaultfd of memory"))?;
        let pages = regions.iter().map(|r| r.len).sum::<u64>() / PAGE_SIZE;
        let zeroed = vec![0u32; pages as usize].into_boxed_slice();
        // SAFETY: AtomicU32 has the same size, alignment and valid values as u32.
        let marks = unsafe { Box::from_raw(Box::into_raw(zeroed) as *mut [AtomicU32]) };
        let shared = Arc::new(Shared {
            userfault,
            regions: regions.clone(),
            holds,
            staging,
            marks,
            state: Mutex::new(Marks { contents: Contents::new(), zero_pages: 0, moving: 0 }),
            evicted: AtomicU64::new(0),
            refaults: AtomicU64::new(0),
            zero_faults: AtomicU64::new(0),
            latency: LatencyCounter::new(),
        });
        // The handler first: from the registration on whoever touches a missing page waits for it.
        let handler = FaultHandler::start(shared.clone(), thread).map_err(host("a thread"))?;
        for region in regions.iter() {
            shared
                .userfault
                .register(region.host, region.len)
                .map_err(host("userfaultfd of guest memory"))?;
        }
        let hasher = shared.state.lock().contents.hasher();
        let evictor = Mutex::new(Evictor::new(hasher));
        Ok(Self { shared, evictor, file: Mutex::new(None), _handler: handler })
    }

    /// Takes `pages` out of guest memory, those that can be.
    pub(crate) fn evict(&self, pages: &[usize]) -> Evicted {
        self.evictor.lock().evict(&self.shared, pages)
    }

    /// Moves contents from memory to a file in `directory` (to the one that there is already), those first that have been
    /// here for longest: at least `bytes` of them if there are as many, and as long as `go_on` says so. Returns how many.
    ///
    /// # Errors
    /// What the host says; what was moved is in the file, all else in memory.
    pub(crate) fn move_to_file(
        &self,
        directory: &Path,
        bytes: u64,
        go_on: impl Fn() -> bool,
    ) -> io::Result<u64> {
        let mut file = self.file.lock();
        let file = match &*file {
            Some(file) => file.clone(),
            None => file.insert(Arc::new(StoreFile::create(directory)?)).clone(),
        };
        let mut moved = 0;
        while moved < bytes && go_on() {
            // All that is wanted may be less than a segment.
            let Some(movable) = self.shared.state.lock().contents.oldest(bytes == u64::MAX) else { break };
            let slot = file.write(movable.bytes())?;
            if self.shared.state.lock().contents.move_to_file(&movable, slot) {
                moved += movable.bytes().len() as u64;
            }
        }
        Ok(moved)
    }

    /// Has the host read what is in the file: it will be wanted.
    pub(crate) fn will_be_read(&self) {
        self.shared.state.lock().contents.will_be_read();
    }

    /// Whether the store has the page.
    pub(crate) fn has(&self, page: usize) -> bool {
        self.shared.mark(page) != Mark::None
    }

    /// Whether system calls on pages in the store fail.
    pub(crate) fn needs_holds(&self) -> bool {
        !self.shared.userfault.kernel_faults()
    }

    /// Forgets what it has of `pages`, and calls `discard`, which takes these pages from guest memory, without that any
    /// page of them comes back between.
    pub(crate) fn discard<T>(&self, pages: std::ops::Range<usize>, discard: impl FnOnce() -> T) -> T {
        let mut state = self.shared.state.lock();
        for page in pages {
            if self.shared.mark(page) != Mark::None {
                self.shared.set_mark(&mut state, page, Mark::None);
            }
        }
        discard()
    }

    /// How it stands.
    pub(crate) fn counters(&self) -> StoreCounters {
        let state = self.shared.state.lock();
        let (memory, file) = (state.contents.memory(), state.contents.file());
        StoreCounters {
            stored_pages: state.contents.pages() + state.zero_pages + state.moving,
            zero_pages: state.zero_pages,
            distinct_pages: state.contents.distinct(),
            compressed_bytes: memory.live + file.live,
            memory_bytes: memory.used,
            file_bytes: file.used,
            duplicates: state.contents.duplicates(),
            evicted: self.shared.evicted.load(Ordering::Relaxed),
            refaults: self.shared.refaults.load(Ordering::Relaxed),
            zero_faults: self.shared.zero_faults.load(Ordering::Relaxed),
            latency: self.shared.latency.get(),
        }
    }
}

//! Taking memory back from a running guest: its cold pages go to the cold store.
//!
//! ```text
//!   period ends: marks ──► ages      period begins: the engine forgets where pages are      limit exceeded?
//!        └──────────────────────────────── every PERIOD ────────────────────────────────────► coldest pages out
//! ```

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use berth_devices::thread_name;
use berth_engine::Engine;
use berth_memory::{Ages, Evicted, GuestMemory, StoreError};
use parking_lot::Mutex;
use tracing::{debug, warn};

use crate::config::MachineConfig;
use crate::freeze::Frozen;
use crate::options::{ByteSize, MemoryOptions, OptionError};

/// How often a VM with a limit is looked at.
const PERIOD: Duration = Duration::from_secs(5);
/// Pages that were used in one of so many periods are not taken.
const WARM_PERIODS: u8 = 2;
/// Share of the limit by which a VM is brought below it, as a divisor, so that the next look finds nothing to do.
const SLACK: u64 = 64;

/// Why no memory is taken back.
#[derive(Debug, thiserror::Error)]
pub enum ReclaimError {
    /// There is no store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The engine does not say which pages are in use.
    #[error(
        "the {engine} engine does not know which pages the guest uses: only all of them can be taken (idle time 0)"
    )]
    NoAccessInformation {
        /// Its name.
        engine: &'static str,
    },
    /// The store's file.
    #[error("the cold store's file in {}: {source}", directory.display())]
    File {
        /// Where it is, or should be.
        directory: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The host does not say what is resident.
    #[error("the host does not say which pages are resident: {0}")]
    Pages(#[from] io::Error),
}

/// What a VM may have of the host's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryShare {
    /// What stays in memory, in bytes.
    pub reserve: u64,
    /// What is to be in memory at most, in bytes.
    pub limit: Option<u64>,
    /// Who keeps memory when there is not enough for all: those with a lower number give way first.
    pub priority: u16,
}

/// Takes memory back from one VM.
pub(crate) struct Reclaimer {
    memory: GuestMemory,
    engine: Arc<dyn Engine>,
    vm_name: String,
    share: Mutex<MemoryShare>,
    store_dir: Option<PathBuf>,
    ages: Mutex<Ages>,
    /// The thread that keeps the VM below its limit, once it has had one.
    limit_thread: Mutex<Option<LimitThread>>,
    resident_before_freeze: AtomicU64,
}

impl Reclaimer {
    pub(crate) fn new(config: &MachineConfig, memory: GuestMemory, engine: Arc<dyn Engine>) -> Arc<Self> {
        let ages = Mutex::new(Ages::new(&memory));
        let MemoryOptions { reserve, limit, .. } = config.memory;
        let priority = config.memory.priority();
        Arc::new(Self {
            memory,
            engine,
            vm_name: config.name.clone(),
            share: Mutex::new(MemoryShare {
                reserve: reserve.0,
                limit: limit.map(|limit| limit.0),
                priority,
            }),
            store_dir: config.store_dir.clone(),
            ages,
            limit_thread: Mutex::new(None),
            resident_before_freeze: AtomicU64::new(0),
        })
    }

    pub(crate) fn share(&self) -> MemoryShare {
        *self.share.lock()
    }

    /// See [`crate::MachineControl::set_memory_share`].
    pub(crate) fn set_share(self: &Arc<Self>, share: MemoryShare) -> Result<(), OptionError> {
        let options = MemoryOptions {
            size: ByteSize(self.memory.size()),
            reserve: ByteSize(share.reserve),
            limit: share.limit.map(ByteSize),
            priority: Some(share.priority),
            hugepages: None,
        };
        options.check()?;
        *self.share.lock() = share;
        self.keep_limit().map_err(|e| OptionError(format!("limit: the host refuses a thread: {e}")))
    }

    /// Keeps the VM below its limit from now on, if it has one.
    ///
    /// # Errors
    /// When the host refuses a thread.
    pub(crate) fn keep_limit(self: &Arc<Self>) -> io::Result<()> {
        let mut thread = self.limit_thread.lock();
        if thread.is_none() && self.share().limit.is_some() {
            *thread = Some(LimitThread::start(self.clone())?);
        }
        Ok(())
    }

    /// The machine has ended: nobody takes anything back any more.
    pub(crate) fn end(&self) {
        let thread = self.limit_thread.lock().take();
        drop(thread);
    }

    fn begin_store(&self) -> Result<(), StoreError> {
        self.memory.begin_store(self.engine.page_faults(), &thread_name(&self.vm_name, "faults"))
    }

    /// What may be taken of `resident` bytes.
    fn above_reserve(&self, resident: u64) -> u64 {
        resident.saturating_sub(self.share().reserve)
    }

    pub(crate) fn resident_before_freeze(&self) -> u64 {
        self.resident_before_freeze.load(Ordering::Relaxed)
    }

    /// Takes all memory above the reserve, and moves the store to its file if there is one, as long as `go_on` says so. A
    /// file that cannot be written is no reason to give up.
    pub(crate) fn take_all(&self, go_on: impl Fn() -> bool) -> Result<Frozen, ReclaimError> {
        self.begin_store()?;
        let resident = self.memory.state_counts()?.resident;
        self.resident_before_freeze.store(resident, Ordering::Relaxed);
        let evicted = self.memory.evict_all(&self.ages.lock(), self.above_reserve(resident), &go_on)?;
        let to_file = self.move_to_file(u64::MAX, go_on).unwrap_or_else(|e| {
            warn!("{e}");
            0
        });
        Ok(Frozen { evicted, to_file })
    }

    /// See [`crate::MachineControl::move_store_to_file`].
    pub(crate) fn move_to_file(&self, bytes: u64, go_on: impl Fn() -> bool) -> Result<u64, ReclaimError> {
        let Some(directory) = &self.store_dir else { return Ok(0) };
        let moved = self.memory.move_store_to_file(directory, bytes, go_on);
        moved.map_err(|source| ReclaimError::File { directory: directory.clone(), source })
    }

    /// See [`crate::MachineControl::reclaim`].
    pub(crate) fn reclaim(&self, bytes: u64, idle: Duration) -> Result<Evicted, ReclaimError> {
        self.begin_store()?;
        if !idle.is_zero() {
            self.next_period()?;
            thread::sleep(idle);
            self.next_period()?;
        }
        let over = self.above_reserve(self.memory.state_counts()?.resident);
        let evicted =
            self.memory.evict_cold(&self.ages.lock(), bytes.min(over), u8::from(!idle.is_zero()))?;
        debug!("{evicted:?} of {bytes} bytes to take back");
        Ok(evicted)
    }

    fn next_period(&self) -> Result<(), ReclaimError> {
        // Marks first: what is accessed between the two counts for the period that begins.
        self.ages.lock().end_period(&self.memory);
        if self.engine.begin_access_period() {
            return Ok(());
        }
        Err(ReclaimError::NoAccessInformation { engine: self.engine.name() })
    }

    /// One look at a VM that has a limit.
    fn keep_below_limit(&self) -> Result<(), ReclaimError> {
        let Some(limit) = self.share().limit else { return Ok(()) };
        self.next_period()?;
        let resident = self.memory.state_counts()?.resident;
        if resident > limit {
            self.begin_store()?;
            let bytes = (resident - limit + limit / SLACK).min(self.above_reserve(resident));
            let evicted = self.memory.evict_cold(&self.ages.lock(), bytes, WARM_PERIODS)?;
            debug!(
                "{resident} bytes resident, limit {limit}: {evicted:?}; {:?}",
                self.memory.store_counters()
            );
        }
        Ok(())
    }
}

/// The thread that keeps a VM below its limit; dropping this ends it.
struct LimitThread {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl LimitThread {
    fn start(reclaimer: Arc<Reclaimer>) -> io::Result<Self> {
        let (stop, stopped) = channel();
        let thread = thread::Builder::new()
            .name(thread_name(&reclaimer.vm_name, "reclaim"))
            .spawn(move || watch(&reclaimer, &stopped))?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for LimitThread {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn watch(reclaimer: &Reclaimer, stopped: &Receiver<()>) {
    while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(PERIOD) {
        if let Err(error) = reclaimer.keep_below_limit() {
            warn!("the VM's memory is not kept below its limit: {error}");
            return;
        }
    }
}

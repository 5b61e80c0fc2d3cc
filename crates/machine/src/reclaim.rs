//! Taking memory back from a running guest: its cold pages go to the cold store.
//!
//! ```text
//!   period ends: marks ──► ages      period begins: the engine forgets where pages are      limit exceeded?
//!        └──────────────────────────────── every PERIOD ────────────────────────────────────► coldest pages out
//! ```

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use berth_devices::thread_name;
use berth_engine::Engine;
use berth_memory::{Ages, Evicted, GuestMemory, StoreError};
use parking_lot::Mutex;
use tracing::{debug, warn};

use crate::config::MachineConfig;

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
    /// The host does not say what is resident.
    #[error("the host does not say which pages are resident: {0}")]
    Pages(#[from] io::Error),
}

/// Takes memory back from one VM.
pub(crate) struct Reclaimer {
    memory: GuestMemory,
    engine: Arc<dyn Engine>,
    /// Name of the thread that brings pages back.
    thread: String,
    /// What stays in memory, in bytes.
    reserve: u64,
    ages: Mutex<Ages>,
}

impl Reclaimer {
    pub(crate) fn new(config: &MachineConfig, memory: GuestMemory, engine: Arc<dyn Engine>) -> Self {
        let ages = Mutex::new(Ages::new(&memory));
        Self {
            memory,
            engine,
            thread: thread_name(&config.name, "faults"),
            reserve: config.memory.reserve.0,
            ages,
        }
    }

    /// See [`crate::MachineControl::reclaim`].
    pub(crate) fn reclaim(&self, bytes: u64, idle: Duration) -> Result<Evicted, ReclaimError> {
        self.memory.begin_store(self.engine.page_faults(), &self.thread)?;
        if !idle.is_zero() {
            self.next_period()?;
            thread::sleep(idle);
            self.next_period()?;
        }
        let over = self.memory.state_counts()?.resident.saturating_sub(self.reserve);
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

    /// One look at a VM that is to have no more than `limit` bytes in memory.
    fn keep_below(&self, limit: u64) -> Result<(), ReclaimError> {
        self.next_period()?;
        let resident = self.memory.state_counts()?.resident;
        if resident > limit {
            self.memory.begin_store(self.engine.page_faults(), &self.thread)?;
            let bytes = (resident - limit + limit / SLACK).min(resident.saturating_sub(self.reserve));
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
pub(crate) struct LimitThread {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl LimitThread {
    /// # Errors
    /// When the host refuses a thread.
    pub(crate) fn start(vm_name: &str, reclaimer: Arc<Reclaimer>, limit: u64) -> io::Result<Self> {
        let (stop, stopped) = channel();
        let thread = thread::Builder::new()
            .name(thread_name(vm_name, "reclaim"))
            .spawn(move || watch(&reclaimer, limit, &stopped))?;
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

fn watch(reclaimer: &Reclaimer, limit: u64, stopped: &Receiver<()>) {
    while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(PERIOD) {
        if let Err(error) = reclaimer.keep_below(limit) {
            warn!("the VM's memory is not kept below its limit: {error}");
            return;
        }
    }
}

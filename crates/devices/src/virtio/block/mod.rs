//! Disks (virtio 1.2, 5.2).
//!
//! ```text
//!   queue thread NAME/DISK.N: pop ─► Request ─┬─► io_uring (raw images) ─► completion ─┐
//!        ▲                                    └─► Pool: threads that block ─► eventfd ──┤
//!        └──────────────── status byte, push, signal ◄──────────────────────────────────┘
//! ```
//! One thread a queue. Reads, writes and flushes of a raw image go to the host through io_uring; all else, and all
//! where the host has no io_uring, is done by a few threads that wait for the host.
//!
//! **What is durable when.** A flush that succeeded covers every write that had completed before. A driver that did
//! not take VIRTIO_BLK_F_FLUSH, and a disk in writethrough mode, get each write completed only when it is durable.

mod account;
mod pool;
mod request;
mod ring;
mod worker;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use berth_disk::{Image, SECTOR_SIZE};
use parking_lot::Mutex;
use tracing::error;
use virtio_bindings::bindings::virtio_blk as ids;

use super::device::{ConfigSignal, read_config_bytes};
use super::events::Worker;
use super::{DeviceKind, Session, VirtioDevice};
use account::{Account, ErrorSink};
use pool::Pool;
use worker::{Disk, QueueWorker};

pub use account::{BlockCounters, BlockError, BlockOperation};

const QUEUE_SIZE: u16 = 256;
/// Most buffers of one request: its queue's descriptors without header and status.
const MAX_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Most sectors that one discard or write-zeroes names, in all its segments: a bound on how long one takes.
const MAX_RANGE_SECTORS: u32 = 1 << 22;
const MAX_RANGE_SEGMENTS: u32 = 64;
/// Length of `virtio_blk_config` in bytes.
const CONFIG_SIZE: usize = 60;
/// Longest serial number in bytes.
pub const MAX_SERIAL: usize = 20;

/// How a disk is offered to the guest.
#[derive(Clone, Debug, Default)]
pub struct BlockOptions {
    /// Serial number, up to [`MAX_SERIAL`] bytes; more are cut off.
    pub serial: String,
    /// Whether writes are durable when they complete.
    pub writethrough: bool,
    /// Number of queues, 1 or more.
    pub queues: u16,
    /// Whether io_uring is not used even where the host has it.
    pub no_ring: bool,
}

/// A disk.
pub struct Block {
    disk: Arc<Disk>,
    options: BlockOptions,
    thread_names: Vec<String>,
    generation: AtomicU8,
    running: Mutex<Running>,
}

#[derive(Default)]
struct Running {
    workers: Vec<Worker>,
    config: Option<ConfigSignal>,
}

impl Block {
    /// A disk with the content of `image`. `thread_names` has a name for the thread of each queue.
    pub fn new(image: Arc<dyn Image>, options: BlockOptions, thread_names: Vec<String>) -> Self {
        let queues = options.queues.max(1);
        let mut thread_names = thread_names;
        thread_names.resize(queues.into(), "berth/disk".to_owned());
        let mut serial = options.serial.clone().into_bytes();
        serial.resize(MAX_SERIAL, 0);
        let pool = Pool::new(thread_names[0].clone());
        let disk =
            Disk { image, pool, serial, no_ring: options.no_ring, account: Arc::new(Account::default()) };
        Self {
            disk: Arc::new(disk),
            options: BlockOptions { queues, ..options },
            thread_names,
            generation: AtomicU8::new(0),
            running: Mutex::default(),
        }
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.disk.image.size()
    }

    /// What it has done since it was made.
    pub fn counters(&self) -> BlockCounters {
        self.disk.account.counters()
    }

    /// Calls `sink` on each request that the host cannot do, on the thread that found out. Only the first call counts.
    pub fn on_error(&self, sink: impl Fn(BlockError) + Send + Sync + 'static) {
        let sink: ErrorSink = Box::new(sink);
        self.disk.account.connect(sink);
    }

    /// Makes the disk larger, and tells the driver.
    ///
    /// # Errors
    /// As [`Image::grow`].
    pub fn grow(&self, size: u64) -> io::Result<()> {
        // Held, so that sizes change one after the other.
        let running = self.running.lock();
        self.disk.image.grow(size)?;
        self.generation.fetch_add(1, Ordering::AcqRel);
        if let Some(config) = &running.config {
            config.send();
        }
        Ok(())
    }

    fn config(&self) -> [u8; CONFIG_SIZE] {
        let mut config = [0; CONFIG_SIZE];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        let block = self.disk.image.block_size();
        put(0, &(self.disk.image.size() / SECTOR_SIZE).to_le_bytes());
        put(12, &MAX_SEGMENTS.to_le_bytes());
        put(20, &block.to_le_bytes());
        // Host pages are what files are kept in: one block, or this many.
        let exponent = (4096 / block.clamp(512, 4096)).trailing_zeros() as u8;
        put(24, &[exponent]);
        put(26, &1_u16.to_le_bytes());
        put(34, &self.options.queues.to_le_bytes());
        put(36, &MAX_RANGE_SECTORS.to_le_bytes());
        put(40, &MAX_RANGE_SEGMENTS.to_le_bytes());
        put(44, &(block / SECTOR_SIZE as u32).to_le_bytes());
        put(48, &MAX_RANGE_SECTORS.to_le_bytes());
        put(52, &MAX_RANGE_SEGMENTS.to_le_bytes());
        put(56, &[1]);
        config
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; self.options.queues.into()]
    }

    fn features(&self) -> u64 {
        let mut features = 1 << ids::VIRTIO_BLK_F_SEG_MAX
            | 1 << ids::VIRTIO_BLK_F_BLK_SIZE
            | 1 << ids::VIRTIO_BLK_F_TOPOLOGY
            | 1 << ids::VIRTIO_BLK_F_MQ;
        if self.disk.image.is_read_only() {
            features |= 1 << ids::VIRTIO_BLK_F_RO;
        } else {
            features |= 1 << ids::VIRTIO_BLK_F_DISCARD | 1 << ids::VIRTIO_BLK_F_WRITE_ZEROES;
        }
        if !self.options.writethrough {
            features |= 1 << ids::VIRTIO_BLK_F_FLUSH;
        }
        features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config(), offset, data);
    }

    fn config_generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }

    fn start(&self, mut session: Session) -> io::Result<()> {
        let flushes = session.has_feature(ids::VIRTIO_BLK_F_FLUSH);
        let mut running = self.running.lock();
        running.config = Some(session.config_signal());
        for (index, name) in self.thread_names.iter().enumerate() {
            let Some(queue) = session.take_queue(index) else { continue };
            let disk = self.disk.clone();
            let worker =
                Worker::spawn(name.clone(), move |poll| QueueWorker::new(queue, disk, !flushes)?.run(poll));
            match worker {
                Ok(worker) => running.workers.push(worker),
                Err(e) => {
                    *running = Running::default();
                    return Err(e);
                }
            }
        }
        Ok(())
    }

    fn stop(&self) {
        *self.running.lock() = Running::default();
        // A driver that goes away does not flush; what it wrote is to be there all the same.
        if !self.disk.image.is_read_only()
            && let Err(e) = self.disk.image.flush()
        {
            error!("{}: what was written last may be lost: {e}", self.thread_names[0]);
        }
    }
}

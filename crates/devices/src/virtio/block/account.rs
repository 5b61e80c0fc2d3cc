//! What a disk has done, and what went wrong.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use super::request::Action;

/// Requests of a disk's driver that were answered since the machine was made. Bytes are those of requests that succeeded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockCounters {
    /// Reads.
    pub reads: u64,
    /// Bytes that were read.
    pub read_bytes: u64,
    /// Writes.
    pub writes: u64,
    /// Bytes that were written.
    pub written_bytes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Discards, and writes of zeroes.
    pub discards: u64,
    /// Bytes that were discarded or zeroed.
    pub discarded_bytes: u64,
    /// Requests that the host could not do: the guest was told of an I/O error. Also counted above.
    pub errors: u64,
}

/// What a disk was to do when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BlockOperation {
    /// A read.
    Read,
    /// A write.
    Write,
    /// A flush.
    Flush,
    /// A discard.
    Discard,
    /// A write of zeroes.
    WriteZeroes,
}

/// A request that the host could not do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockError {
    /// What was to be done.
    pub operation: BlockOperation,
    /// Where on the disk, in bytes; 0 for a flush.
    pub offset: u64,
    /// How many bytes; 0 for a flush.
    pub len: u64,
    /// What the host said.
    pub reason: String,
}

/// Who is told of errors.
pub type ErrorSink = Box<dyn Fn(BlockError) + Send + Sync>;

/// The counters while queues count, and who hears of errors.
#[derive(Default)]
pub struct Account {
    reads: AtomicU64,
    read_bytes: AtomicU64,
    writes: AtomicU64,
    written_bytes: AtomicU64,
    flushes: AtomicU64,
    discards: AtomicU64,
    discarded_bytes: AtomicU64,
    errors: AtomicU64,
    sink: OnceLock<ErrorSink>,
}

impl Account {
    /// Errors go to `sink` from now on. Only the first call counts.
    pub fn connect(&self, sink: ErrorSink) {
        let _ = self.sink.set(sink);
    }

    /// A request has ended.
    pub fn count(&self, action: &Action, result: &io::Result<()>) {
        let Some((operation, offset, len)) = describe(action) else { return };
        let (requests, bytes) = match operation {
            BlockOperation::Read => (&self.reads, Some(&self.read_bytes)),
            BlockOperation::Write => (&self.writes, Some(&self.written_bytes)),
            BlockOperation::Flush => (&self.flushes, None),
            BlockOperation::Discard | BlockOperation::WriteZeroes => {
                (&self.discards, Some(&self.discarded_bytes))
            }
        };
        requests.fetch_add(1, Ordering::Relaxed);
        match (result, bytes) {
            (Ok(()), Some(bytes)) => {
                bytes.fetch_add(len, Ordering::Relaxed);
            }
            (Ok(()), None) => {}
            (Err(e), _) => {
                self.errors.fetch_add(1, Ordering::Relaxed);
                if let Some(sink) = self.sink.get() {
                    sink(BlockError { operation, offset, len, reason: e.to_string() });
                }
            }
        }
    }

    /// How it stands.
    pub fn counters(&self) -> BlockCounters {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        BlockCounters {
            reads: of(&self.reads),
            read_bytes: of(&self.read_bytes),
            writes: of(&self.writes),
            written_bytes: of(&self.written_bytes),
            flushes: of(&self.flushes),
            discards: of(&self.discards),
            discarded_bytes: of(&self.discarded_bytes),
            errors: of(&self.errors),
        }
    }
}

/// Operation, first byte and number of bytes; `None` for what needs no image.
fn describe(action: &Action) -> Option<(BlockOperation, u64, u64)> {
    let ranges = |ranges: &[super::request::Range]| {
        (ranges.first().map_or(0, |r| r.offset), ranges.iter().map(|r| r.len).sum())
    };
    Some(match action {
        Action::Read(buffers, offset) => (BlockOperation::Read, *offset, buffers.len()),
        Action::Write(buffers, offset) => (BlockOperation::Write, *offset, buffers.len()),
        Action::Flush => (BlockOperation::Flush, 0, 0),
        Action::Discard(all) => {
            let (offset, len) = ranges(all);
            (BlockOperation::Discard, offset, len)
        }
        Action::WriteZeroes(all) => {
            let (offset, len) = ranges(all);
            (BlockOperation::WriteZeroes, offset, len)
        }
        Action::Identify(_) | Action::Refuse(_) => return None,
    })
}

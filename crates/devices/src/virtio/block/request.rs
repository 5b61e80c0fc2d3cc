//! Requests of a disk's driver (virtio 1.2, 5.2.6).

use virtio_bindings::bindings::virtio_blk as ids;

use super::{MAX_RANGE_SECTORS, MAX_RANGE_SEGMENTS};
use berth_memory::Hold;

use crate::virtio::{Buffers, Chain, Dma};
use berth_disk::SECTOR_SIZE;

/// Bytes of `virtio_blk_outhdr`, and of one range of a discard.
const HEADER: usize = 16;
const RANGE: u64 = 16;
const UNMAP: u32 = 1;

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Ok = ids::VIRTIO_BLK_S_OK as isize,
    /// Not done.
    Error = ids::VIRTIO_BLK_S_IOERR as isize,
    /// There is no such request.
    Unsupported = ids::VIRTIO_BLK_S_UNSUPP as isize,
}

/// A range of a discard or write-zeroes, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// Whether zeroes need no space.
    pub unmap: bool,
}

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Fill the buffers from this offset on.
    Read(Buffers, u64),
    /// Write the buffers to this offset.
    Write(Buffers, u64),
    /// Make durable what was written.
    Flush,
    /// Forget these ranges.
    Discard(Vec<Range>),
    /// Zero these ranges.
    WriteZeroes(Vec<Range>),
    /// Say the serial number.
    Identify(Buffers),
    /// Nothing can be done but to say so.
    Refuse(Status),
}

/// A request with what is needed to answer it.
#[derive(Debug)]
pub struct Request {
    /// Names it.
    pub head: u16,
    /// The byte for the [`Status`].
    status: Buffers,
    /// Bytes that are written before the status, if it succeeds.
    data_len: u32,
    /// What to do.
    pub action: Action,
    /// Its buffers stay in memory until it is answered.
    _hold: Hold,
}

impl Request {
    /// Reads a request from a chain; `size` is that of the disk in bytes. `None` without a place for the status: such
    /// a chain cannot be answered.
    pub fn read(mut chain: Chain, dma: &Dma, size: u64, read_only: bool) -> Option<Self> {
        let status = chain.writable.take_last(1);
        if status.is_empty() {
            return None;
        }
        let data_len = u32::try_from(chain.writable.len()).ok()?;
        let head = chain.head;
        let action = parse(chain, dma, size, read_only).unwrap_or_else(Action::Refuse);
        let writes = matches!(action, Action::Read(..) | Action::Identify(_));
        let hold = match &action {
            Action::Read(buffers, _) | Action::Write(buffers, _) => dma.hold(buffers.as_slice()),
            _ => dma.hold(&[]),
        };
        Some(Self { head, status, data_len: if writes { data_len } else { 0 }, action, _hold: hold })
    }

    /// Writes the status; returns how many bytes of the chain were written.
    pub fn finish(&mut self, dma: &Dma, status: Status) -> u32 {
        self.status.write(dma, &[status as u8]);
        // The used length may only name bytes that were written (virtio 1.2, 2.7.8.2).
        1 + if status == Status::Ok { self.data_len } else { 0 }
    }
}

fn parse(mut chain: Chain, dma: &Dma, size: u64, read_only: bool) -> Result<Action, Status> {
    let mut header = [0; HEADER];
    if chain.readable.read(dma, &mut header) != HEADER {
        return Err(Status::Error);
    }
    let [kind, _, low, high] = [0, 4, 8, 12]
        .map(|at| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]));
    let offset = (u64::from(high) << 32 | u64::from(low)).checked_mul(SECTOR_SIZE).ok_or(Status::Error)?;
    let fits = |len: u64| {
        let inside = offset.checked_add(len).is_some_and(|end| end <= size);
        if inside && len.is_multiple_of(SECTOR_SIZE) { Ok(()) } else { Err(Status::Error) }
    };
    let writable = || if read_only { Err(Status::Error) } else { Ok(()) };
    match kind {
        ids::VIRTIO_BLK_T_IN => {
            fits(chain.writable.len())?;
            Ok(Action::Read(chain.writable, offset))
        }
        ids::VIRTIO_BLK_T_OUT => {
            writable()?;
            fits(chain.readable.len())?;
            Ok(Action::Write(chain.readable, offset))
        }
        ids::VIRTIO_BLK_T_FLUSH => Ok(Action::Flush),
        ids::VIRTIO_BLK_T_GET_ID => Ok(Action::Identify(chain.writable)),
        ids::VIRTIO_BLK_T_DISCARD => {
            writable()?;
            Ok(Action::Discard(ranges(&mut chain.readable, dma, size, false)?))
        }
        ids::VIRTIO_BLK_T_WRITE_ZEROES => {
            writable()?;
            Ok(Action::WriteZeroes(ranges(&mut chain.readable, dma, size, true)?))
        }
        _ => Err(Status::Unsupported),
    }
}

/// The ranges of a discard or write-zeroes; only the latter has flags.
fn ranges(data: &mut Buffers, dma: &Dma, size: u64, flags_allowed: bool) -> Result<Vec<Range>, Status> {
    let count = data.len() / RANGE;
    if !data.len().is_multiple_of(RANGE) || count == 0 || count > u64::from(MAX_RANGE_SEGMENTS) {
        return Err(Status::Error);
    }
    let mut ranges = Vec::new();
    let mut sectors_left = u64::from(MAX_RANGE_SECTORS);
    for _ in 0..count {
        let mut bytes = [0; RANGE as usize];
        data.read(dma, &mut bytes);
        let [low, high, sectors, flags] = [0, 4, 8, 12]
            .map(|at| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]));
        if flags & !UNMAP != 0 || flags != 0 && !flags_allowed {
            return Err(Status::Unsupported);
        }
        sectors_left = sectors_left.checked_sub(sectors.into()).ok_or(Status::Error)?;
        let len = u64::from(sectors) * SECTOR_SIZE;
        let offset =
            (u64::from(high) << 32 | u64::from(low)).checked_mul(SECTOR_SIZE).ok_or(Status::Error)?;
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(Status::Error);
        }
        if len > 0 {
            ranges.push(Range { offset, len, unmap: flags & UNMAP != 0 });
        }
    }
    Ok(ranges)
}

//! The store's second tier: a file, for what does not come back soon.
//!
//! The file has slots of one segment each. It has no name (it is gone with the process, however that ends), and nobody
//! but this process can open it. Contents that come from it are compared with their hash, because a disk is not memory.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;

use super::log::SEGMENT;

/// A file of segments.
pub(super) struct StoreFile {
    file: File,
    slots: Mutex<Slots>,
}

#[derive(Default)]
struct Slots {
    free: Vec<u64>,
    /// The first that was never used.
    next: u64,
}

/// A segment in the file; its place is free again when this is dropped.
pub(super) struct Slot {
    file: Arc<StoreFile>,
    number: u64,
}

impl StoreFile {
    /// A file without a name in `directory`.
    ///
    /// # Errors
    /// What the host says.
    pub(super) fn create(directory: &Path) -> io::Result<Self> {
        Ok(Self { file: tempfile::tempfile_in(directory)?, slots: Mutex::default() })
    }

    /// Writes a segment, and waits until it is on the disk and its copy in the host's page cache gone: otherwise it would
    /// take as much memory as before.
    ///
    /// # Errors
    /// What the host says: no room, or the disk fails.
    pub(super) fn write(self: &Arc<Self>, data: &[u8]) -> io::Result<Slot> {
        let number = {
            let mut slots = self.slots.lock();
            slots.free.pop().unwrap_or_else(|| {
                slots.next += 1;
                slots.next - 1
            })
        };
        // Given back at an error.
        let slot = Slot { file: self.clone(), number };
        self.file.write_all_at(data, slot.offset())?;
        let (fd, start, len) = (self.file.as_raw_fd(), slot.offset() as i64, SEGMENT as i64);
        let all = libc::SYNC_FILE_RANGE_WAIT_BEFORE
            | libc::SYNC_FILE_RANGE_WRITE
            | libc::SYNC_FILE_RANGE_WAIT_AFTER;
        // SAFETY: numbers only, and a descriptor that is open.
        if unsafe { libc::sync_file_range(fd, start, len, all) } != 0 {
            match io::Error::last_os_error() {
                // A file system without it has nothing to wait for.
                e if matches!(e.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL | libc::ESPIPE)) => {}
                e => return Err(e),
            }
        }
        // SAFETY: as above. It is advice: where it is not taken the page cache gives the memory back when it must.
        unsafe { libc::posix_fadvise(fd, start, len, libc::POSIX_FADV_DONTNEED) };
        Ok(slot)
    }
}

impl Slot {
    fn offset(&self) -> u64 {
        self.number * SEGMENT as u64
    }

    /// Fills `data` from `offset` in the segment on.
    ///
    /// # Errors
    /// What the host says.
    pub(super) fn read(&self, offset: u32, data: &mut [u8]) -> io::Result<()> {
        self.file.file.read_exact_at(data, self.offset() + u64::from(offset))
    }

    /// Has the host read the segment, soon: it will be wanted.
    pub(super) fn will_be_read(&self) {
        let (fd, start) = (self.file.file.as_raw_fd(), self.offset() as i64);
        // SAFETY: numbers only, and a descriptor that is open; it is advice.
        unsafe { libc::posix_fadvise(fd, start, SEGMENT as i64, libc::POSIX_FADV_WILLNEED) };
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let hole = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let (fd, start) = (self.file.file.as_raw_fd(), self.offset() as i64);
        // SAFETY: numbers only, and a descriptor that is open. Where holes are not possible the slot is used again.
        unsafe { libc::fallocate(fd, hole, start, SEGMENT as i64) };
        self.file.slots.lock().free.push(self.number);
    }
}

//! What a device does with an image.

use std::io;

use vm_memory::VolatileSlice;

use crate::RawImage;

/// The unit of sizes and offsets of a disk, in bytes.
pub const SECTOR_SIZE: u64 = 512;

/// An open image. Offsets and lengths are multiples of [`SECTOR_SIZE`]; requests outside of the image fail.
pub trait Image: Send + Sync {
    /// Size of the disk in bytes, a multiple of [`SECTOR_SIZE`].
    fn size(&self) -> u64;
    /// Smallest unit of requests that the host does without a detour, in bytes: a power of two from 512 on.
    fn block_size(&self) -> u32;
    /// Whether writes are refused.
    fn is_read_only(&self) -> bool;
    /// Fills `buffers` from `offset` on.
    ///
    /// # Errors
    /// What the host says.
    fn read(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()>;
    /// Writes `buffers` to `offset`. The data is durable after the next [`Self::flush`].
    ///
    /// # Errors
    /// What the host says.
    fn write(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()>;
    /// Makes everything durable that was written before.
    ///
    /// # Errors
    /// What the host says; then nothing is known of what was written.
    fn flush(&self) -> io::Result<()>;
    /// The guest does not need these bytes any more. They may read as anything; the image gives space back where
    /// it can.
    ///
    /// # Errors
    /// What the host says.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;
    /// These bytes read as zero from now on. With `unmap` they need not have space.
    ///
    /// # Errors
    /// What the host says.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;
    /// Makes the image larger; the new bytes read as zero.
    ///
    /// # Errors
    /// What the host says; [`io::ErrorKind::InvalidInput`] when `size` is smaller than the image or no size.
    fn grow(&self, size: u64) -> io::Result<()>;
    /// The image as a file whose bytes are the disk's, if it is that.
    fn as_raw(&self) -> Option<&RawImage> {
        None
    }
}

/// Checks that a request lies within an image of `size` bytes.
pub fn check_range(offset: u64, len: u64, size: u64) -> io::Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{len} bytes at {offset} are outside of the disk of {size} bytes"),
        )),
    }
}

/// Checks a new size of an image.
pub fn check_growth(new: u64, old: u64) -> io::Result<()> {
    let problem = if !new.is_multiple_of(SECTOR_SIZE) {
        "a disk's size is a multiple of 512 bytes"
    } else if new < old {
        "a disk in use cannot be made smaller"
    } else if i64::try_from(new).is_err() {
        "no file can be that large"
    } else {
        return Ok(());
    };
    Err(io::Error::new(io::ErrorKind::InvalidInput, problem))
}

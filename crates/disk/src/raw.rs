//! Raw images: a file or block device whose bytes are the disk's.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::VolatileSlice;

use crate::image::{check_growth, check_range};
use crate::lock::{Access, lock};
use crate::{DiskError, Image, SECTOR_SIZE};

/// Alignment for direct I/O where the host does not say one.
const SAFE_ALIGNMENT: u32 = 4096;
/// Most buffers in one system call (`IOV_MAX`).
const MAX_IOVECS: usize = 1024;
/// What is zeroed at a time where the host cannot do it.
const ZERO_CHUNK: usize = 64 << 10;

/// An open raw image.
pub struct RawImage {
    file: File,
    size: AtomicU64,
    read_only: bool,
    is_device: bool,
    /// Alignment of memory and of offsets that direct I/O needs; 1 and 1 without.
    memory_alignment: u32,
    offset_alignment: u32,
}

impl RawImage {
    /// Opens and locks it.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn open(path: &Path, read_only: bool, direct: bool) -> Result<Self, DiskError> {
        let flags = if direct { libc::O_DIRECT } else { 0 };
        let mut file = File::options()
            .read(true)
            .write(!read_only)
            .custom_flags(flags)
            .open(path)
            .map_err(DiskError::file("open", path))?;
        let kind = file.metadata().map_err(DiskError::file("examine", path))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::NotAFile { path: path.to_owned() });
        }
        lock(&file, path, if read_only { Access::Read } else { Access::Write })?;
        let size = file.seek(SeekFrom::End(0)).map_err(DiskError::file("find the size of", path))?;
        if !size.is_multiple_of(SECTOR_SIZE) {
            return Err(DiskError::BadLength { path: path.to_owned(), size });
        }
        let (memory_alignment, offset_alignment) = if direct { direct_alignment(&file) } else { (1, 1) };
        Ok(Self {
            file,
            size: size.into(),
            read_only,
            is_device: kind.is_block_device(),
            memory_alignment,
            offset_alignment,
        })
    }

    /// The file, for requests that go to the host without this type.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Whether a request can go to the host as it is: direct I/O needs aligned buffers and offsets.
    pub fn is_aligned(&self, buffers: impl IntoIterator<Item = (usize, usize)>, offset: u64) -> bool {
        let (memory, sectors) = (self.memory_alignment as usize, self.offset_alignment as usize);
        offset.is_multiple_of(sectors as u64)
            && buffers
                .into_iter()
                .all(|(start, len)| start.is_multiple_of(memory) && len.is_multiple_of(sectors))
    }

    /// Calls `transfer` until all bytes were moved.
    fn transfer(
        &self,
        buffers: &[VolatileSlice<'_>],
        offset: u64,
        transfer: impl Fn(&[libc::iovec], i64) -> isize,
    ) -> io::Result<()> {
        let mut iovecs: Vec<libc::iovec> = buffers
            .iter()
            .map(|b| libc::iovec { iov_base: b.ptr_guard_mut().as_ptr().cast(), iov_len: b.len() })
            .collect();
        let mut rest = iovecs.as_mut_slice();
        let mut at = offset as i64;
        while !rest.is_empty() {
            let n = transfer(&rest[..rest.len().min(MAX_IOVECS)], at);
            let mut done = match usize::try_from(n) {
                // The file was made shorter behind our back.
                Ok(0) if rest.iter().any(|v| v.iov_len > 0) => {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                Ok(n) => n,
                Err(_) => match io::Error::last_os_error() {
                    e if e.kind() == io::ErrorKind::Interrupted => continue,
                    e => return Err(e),
                },
            };
            at += n as i64;
            let whole = rest
                .iter()
                .take_while(|v| {
                    let fits = v.iov_len <= done;
                    if fits {
                        done -= v.iov_len;
                    }
                    fits
                })
                .count();
            rest = &mut rest[whole..];
            if let Some(first) = rest.first_mut() {
                first.iov_base = first.iov_base.cast::<u8>().wrapping_add(done).cast();
                first.iov_len -= done;
            }
        }
        Ok(())
    }

    /// Moves data through memory that is aligned for direct I/O.
    fn bounce(&self, buffers: &[VolatileSlice<'_>], offset: u64, write: bool) -> io::Result<()> {
        let len: usize = buffers.iter().map(VolatileSlice::len).sum();
        let mut memory = Aligned::new(len, self.memory_alignment.max(SAFE_ALIGNMENT) as usize)?;
        let bytes = memory.bytes();
        if write {
            let mut at = 0;
            for buffer in buffers {
                buffer.copy_to(&mut bytes[at..at + buffer.len()]);
                at += buffer.len();
            }
            self.file.write_all_at(bytes, offset)
        } else {
            self.file.read_exact_at(bytes, offset)?;
            let mut at = 0;
            for buffer in buffers {
                buffer.copy_from(&bytes[at..at + buffer.len()]);
                at += buffer.len();
            }
            Ok(())
        }
    }

    fn needs_bounce(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> bool {
        !self.is_aligned(buffers.iter().map(|b| (b.ptr_guard().as_ptr() as usize, b.len())), offset)
    }

    fn fallocate(&self, mode: libc::c_int, offset: u64, len: u64) -> io::Result<()> {
        // SAFETY: it takes numbers and an open descriptor.
        match unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset as i64, len as i64) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Image for RawImage {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn block_size(&self) -> u32 {
        self.offset_alignment.max(SECTOR_SIZE as u32)
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn read(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        check_range(offset, total(buffers), self.size())?;
        if self.needs_bounce(buffers, offset) {
            return self.bounce(buffers, offset, false);
        }
        self.transfer(buffers, offset, |iovecs, at| {
            // SAFETY: the iovecs are parts of slices of mapped memory that live through the call; nobody has
            // references to that memory, so that the host may write it.
            unsafe { libc::preadv(self.file.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int, at) }
        })
    }

    fn write(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        check_range(offset, total(buffers), self.size())?;
        if self.needs_bounce(buffers, offset) {
            return self.bounce(buffers, offset, true);
        }
        self.transfer(buffers, offset, |iovecs, at| {
            // SAFETY: as above; the host only reads.
            unsafe { libc::pwritev(self.file.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int, at) }
        })
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        check_range(offset, len, self.size())?;
        match self.fallocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, len) {
            // It is a hint.
            Err(e) if is_unsupported(&e) => Ok(()),
            result => result,
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        check_range(offset, len, self.size())?;
        let zero = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
        let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let modes = if unmap { [punch, zero] } else { [zero, zero] };
        for mode in modes {
            match self.fallocate(mode, offset, len) {
                Err(e) if is_unsupported(&e) => {}
                result => return result,
            }
        }
        let mut memory = Aligned::new(ZERO_CHUNK, SAFE_ALIGNMENT as usize)?;
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let n = (end - at).min(ZERO_CHUNK as u64);
            self.file.write_all_at(&memory.bytes()[..n as usize], at)?;
            at += n;
        }
        Ok(())
    }

    fn grow(&self, size: u64) -> io::Result<()> {
        check_growth(size, self.size())?;
        if self.is_device {
            let now = (&self.file).seek(SeekFrom::End(0))?;
            if now < size {
                let text = format!("the block device has {now} bytes: make it larger first");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
            }
        } else {
            self.file.set_len(size)?;
        }
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    fn as_raw(&self) -> Option<&RawImage> {
        Some(self)
    }
}

fn total(buffers: &[VolatileSlice<'_>]) -> u64 {
    buffers.iter().map(|b| b.len() as u64).sum()
}

fn is_unsupported(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::EINVAL))
}

/// What direct I/O needs (statx(2), `STATX_DIOALIGN`): alignment of memory and of offsets.
fn direct_alignment(file: &File) -> (u32, u32) {
    let mut status = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: statx fills the structure, for which all-zero bytes are a value too, should it fail; the empty
    // path means the open descriptor.
    let (result, status) = unsafe {
        let result = libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            status.as_mut_ptr(),
        );
        (result, status.assume_init())
    };
    let good = |alignment: u32| alignment.is_power_of_two() && alignment <= SAFE_ALIGNMENT;
    if result == 0 && good(status.stx_dio_mem_align) && good(status.stx_dio_offset_align) {
        (status.stx_dio_mem_align, status.stx_dio_offset_align)
    } else {
        (SAFE_ALIGNMENT, SAFE_ALIGNMENT)
    }
}

/// Zeroed memory with an alignment.
struct Aligned {
    start: *mut u8,
    layout: Layout,
}

impl Aligned {
    fn new(len: usize, alignment: usize) -> io::Result<Self> {
        let layout =
            Layout::from_size_align(len.max(1), alignment).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: the layout's size is not zero.
        let start = unsafe { alloc_zeroed(layout) };
        if start.is_null() { Err(io::ErrorKind::OutOfMemory.into()) } else { Ok(Self { start, layout }) }
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the memory is ours alone, as long as the layout says, and was zeroed.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.layout.size()) }
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.start, self.layout) }
    }
}

//! qcow2 images with their backing files, by the crate `imago`.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use imago::file::File as Storage;
use imago::format::PreallocateMode;
use imago::format::gate::ImplicitOpenGate;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, StorageOpenOptions};
use parking_lot::RwLock;
use vm_memory::VolatileSlice;

use crate::image::{check_growth, check_range};
use crate::lock::{Access, lock};
use crate::{DiskError, Image, SECTOR_SIZE};

/// What is zeroed at a time where the format cannot say it.
const ZERO_CHUNK: usize = 1 << 20;

/// An open qcow2 image.
pub struct Qcow2Image {
    /// Exclusive for what takes clusters away from requests that run.
    access: RwLock<FormatAccess<Storage>>,
    read_only: bool,
    backing: Option<(PathBuf, Option<String>)>,
}

impl Qcow2Image {
    /// Opens and locks the image, and its backing files for reading.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn open(path: &Path, read_only: bool, direct: bool) -> Result<Self, DiskError> {
        let failed = || DiskError::file("open", path);
        let access = if read_only { Access::Read } else { Access::Write };
        let storage = open_storage(path, access, direct).map_err(failed())?;
        let options = StorageOpenOptions::new().direct(direct);
        let image = Qcow2::<Storage>::builder(storage)
            .write(!read_only)
            .storage_open_options(options)
            .open(LockingGate { direct })
            .map_err(failed())?;
        let backing = image.implicit_backing_file().map(|file| {
            let directory = path.parent().unwrap_or(Path::new(""));
            (directory.join(file), image.implicit_backing_format().cloned())
        });
        let access = FormatAccess::new(image);
        let size = access.size();
        if !size.is_multiple_of(SECTOR_SIZE) {
            return Err(DiskError::BadLength { path: path.to_owned(), size });
        }
        Ok(Self { access: RwLock::new(access), read_only, backing })
    }

    /// The backing file and its format as the header names it.
    pub fn backing(&self) -> Option<&(PathBuf, Option<String>)> {
        self.backing.as_ref()
    }

    /// Makes the image smaller: what is behind `size` is lost.
    ///
    /// # Errors
    /// What the host says.
    pub fn shrink(&self, size: u64) -> io::Result<()> {
        let mut access = self.access.write();
        access.resize_shrink(size)?;
        access.flush()?;
        access.sync()
    }
}

/// Opens and locks one file of an image.
fn open_storage(path: &Path, access: Access, direct: bool) -> io::Result<Storage> {
    let writable = access == Access::Write;
    let flags = if direct { libc::O_DIRECT } else { 0 };
    let file = File::options().read(true).write(writable).custom_flags(flags).open(path)?;
    lock(&file, path, access).map_err(io::Error::other)?;
    Storage::from_open_file(file, StorageOpenOptions::new().filename(path).write(writable).direct(direct))
}

/// Lets imago open backing files, but locks them, and refuses data files beside the image: nothing that Berth makes
/// has them.
struct LockingGate {
    direct: bool,
}

impl ImplicitOpenGate<Storage> for LockingGate {
    fn open_format<F: FormatDriverBuilder<Storage>>(
        &mut self,
        builder: F,
    ) -> io::Result<FormatAccess<Storage>> {
        Ok(FormatAccess::new(builder.open(Self { direct: self.direct })?))
    }

    fn open_storage(&mut self, options: StorageOpenOptions) -> io::Result<Storage> {
        if options.get_writable() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "an external data file, which Berth does not support",
            ));
        }
        let path = options.get_filename().ok_or(io::ErrorKind::NotFound)?;
        open_storage(path, Access::Read, self.direct)
    }
}

impl Image for Qcow2Image {
    fn size(&self) -> u64 {
        self.access.read().size()
    }

    fn block_size(&self) -> u32 {
        SECTOR_SIZE as u32
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn read(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        let access = self.access.read();
        check_range(offset, buffers.iter().map(|b| b.len() as u64).sum(), access.size())?;
        let (vector, _guard) = IoVectorMut::from_volatile_slice(buffers);
        access.readv(vector, offset)
    }

    fn write(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        let (vector, _guard) = IoVector::from_volatile_slice(buffers);
        self.access.read().writev(vector, offset)
    }

    fn flush(&self) -> io::Result<()> {
        let access = self.access.read();
        access.flush()?;
        access.sync()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.access.write().discard_to_zero(offset, len) {
            // It is a hint.
            Err(e) if e.kind() == io::ErrorKind::Unsupported => Ok(()),
            result => result,
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if unmap {
            match self.access.write().discard_to_zero(offset, len) {
                Err(e) if e.kind() == io::ErrorKind::Unsupported => {}
                result => return result,
            }
        }
        let access = self.access.read();
        match access.write_zeroes(offset, len) {
            // Version 2 of the format knows no clusters of zeroes.
            Err(e) if e.kind() == io::ErrorKind::Unsupported => {}
            result => return result,
        }
        let zeroes = vec![0; ZERO_CHUNK.min(len as usize)];
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let n = (end - at).min(ZERO_CHUNK as u64);
            access.write(&zeroes[..n as usize], at)?;
            at += n;
        }
        Ok(())
    }

    fn grow(&self, size: u64) -> io::Result<()> {
        let access = self.access.write();
        check_growth(size, access.size())?;
        access.resize_grow(size, PreallocateMode::Zero)?;
        access.flush()?;
        access.sync()
    }
}

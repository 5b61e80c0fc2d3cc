//! Whole images at rest: create, look at, resize, convert.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use imago::file::File as Storage;
use imago::qcow2::Qcow2;
use imago::{FormatCreateBuilder, StorageOpenOptions};
use serde::Serialize;
use vm_memory::VolatileSlice;

use crate::lock::{Access, lock};
use crate::qcow2::Qcow2Image;
use crate::{CacheMode, DiskError, Format, Image, OpenOptions, RawImage, SECTOR_SIZE, open};

/// How much is copied at a time.
const CHUNK: usize = 1 << 20;
/// What is all zero is left out in units of this size.
const HOLE: usize = 64 << 10;

/// What to create.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Where; there must be nothing.
    pub path: PathBuf,
    /// As what.
    pub format: Format,
    /// Size of the disk in bytes; without one that of the backing file.
    pub size: Option<u64>,
    /// The image whose content shows where this one has none (qcow2 only). A relative path is relative to the
    /// current directory; the header gets it absolute.
    pub backing: Option<(PathBuf, Format)>,
}

/// Creates an empty image, durably.
///
/// # Errors
/// [`DiskError`].
pub fn create(options: &CreateOptions) -> Result<(), DiskError> {
    let path = &options.path;
    if options.format == Format::Raw && options.backing.is_some() {
        return Err(DiskError::RawWithBacking);
    }
    let backing =
        options.backing.as_ref().map(|(file, format)| describe_backing(file, *format)).transpose()?;
    let size = options.size.or(backing.as_ref().map(|(_, size)| *size)).ok_or(DiskError::NoSize)?;
    if size == 0 || !size.is_multiple_of(SECTOR_SIZE) || i64::try_from(size).is_err() {
        return Err(DiskError::BadSize { size });
    }
    let file = File::options().read(true).write(true).create_new(true).open(path).map_err(|e| {
        if e.kind() == std::io::ErrorKind::AlreadyExists {
            DiskError::Exists { path: path.clone() }
        } else {
            DiskError::file("create", path)(e)
        }
    })?;
    let result = fill(options, size, backing.map(|(name, _)| name), file);
    if result.is_err() {
        // Half an image is none. What made the first error tells more than what may go wrong here.
        let _ = fs::remove_file(path);
    }
    result
}

fn fill(options: &CreateOptions, size: u64, backing: Option<String>, file: File) -> Result<(), DiskError> {
    let path = &options.path;
    let failed = || DiskError::file("create", path);
    lock(&file, path, Access::Write)?;
    match options.format {
        Format::Raw => {
            file.set_len(size).map_err(failed())?;
            file.sync_all().map_err(failed())?;
        }
        Format::Qcow2 => {
            let again = file.try_clone().map_err(failed())?;
            let storage = Storage::from_open_file(file, StorageOpenOptions::new().filename(path).write(true))
                .map_err(failed())?;
            let mut builder = Qcow2::<Storage>::create_builder(storage).size(size);
            if let (Some(name), Some((_, format))) = (backing, &options.backing) {
                builder = builder.backing(name, format.name().to_owned());
            }
            builder.create().map_err(failed())?;
            again.sync_all().map_err(failed())?;
        }
    }
    Ok(())
}

/// Absolute name and size of a backing file, which must be usable.
fn describe_backing(path: &Path, format: Format) -> Result<(String, u64), DiskError> {
    let cache = CacheMode::Writeback;
    let image = open(&OpenOptions { path: path.to_owned(), format: Some(format), read_only: true, cache })?;
    let absolute = fs::canonicalize(path).map_err(DiskError::file("find", path))?;
    let name = absolute.into_os_string().into_string().map_err(|name| {
        let source = std::io::Error::new(std::io::ErrorKind::InvalidInput, "its path is not UTF-8");
        DiskError::File { doing: "use as a backing file", path: name.into(), source }
    })?;
    Ok((name, image.size()))
}

/// What an image is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Info {
    /// The file.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// Size of the disk in bytes.
    pub size: u64,
    /// What the file takes on the host in bytes.
    pub allocated: u64,
    /// Its backing file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing: Option<PathBuf>,
    /// Format of the backing file, as the header names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_format: Option<String>,
}

/// Looks at an image that nobody writes.
///
/// # Errors
/// [`DiskError`].
pub fn info(path: &Path, format: Option<Format>) -> Result<Info, DiskError> {
    let format = match format {
        Some(format) => format,
        None => crate::check_name(path)?,
    };
    let metadata = fs::metadata(path).map_err(DiskError::file("examine", path))?;
    let (size, backing) = match format {
        Format::Raw => (RawImage::open(path, true, false)?.size(), None),
        Format::Qcow2 => {
            let image = Qcow2Image::open(path, true, false)?;
            (image.size(), image.backing().cloned())
        }
    };
    let (backing, backing_format) = backing.map_or((None, None), |(file, format)| (Some(file), format));
    let allocated = metadata.blocks() * 512;
    Ok(Info { path: path.to_owned(), format, size, allocated, backing, backing_format })
}

/// Gives an image another size. A smaller one only with `shrink`.
///
/// # Errors
/// [`DiskError`].
pub fn resize(path: &Path, format: Option<Format>, size: u64, shrink: bool) -> Result<(), DiskError> {
    if size == 0 || !size.is_multiple_of(SECTOR_SIZE) || i64::try_from(size).is_err() {
        return Err(DiskError::BadSize { size });
    }
    let format = match format {
        Some(format) => format,
        None => crate::check_name(path)?,
    };
    let failed = || DiskError::file("resize", path);
    let refuse = |old: u64| DiskError::Shrink { path: path.to_owned(), old, new: size };
    match format {
        Format::Raw => {
            let image = RawImage::open(path, false, false)?;
            let metadata = image.file().metadata().map_err(failed())?;
            if !metadata.is_file() {
                return Err(DiskError::NotAFile { path: path.to_owned() });
            }
            if size < image.size() && !shrink {
                return Err(refuse(image.size()));
            }
            image.file().set_len(size).and_then(|()| image.file().sync_all()).map_err(failed())
        }
        Format::Qcow2 => {
            let image = Qcow2Image::open(path, false, false)?;
            match size < image.size() {
                true if !shrink => Err(refuse(image.size())),
                true => image.shrink(size).map_err(failed()),
                false => image.grow(size).map_err(failed()),
            }
        }
    }
}

/// Copies the content of `from` to a new image `to`, which gets no space for what is zero. `progress` is told after
/// each part how many bytes are done.
///
/// # Errors
/// [`DiskError`]; there is no new image then.
pub fn convert(
    from: &Path,
    from_format: Option<Format>,
    to: &Path,
    to_format: Format,
    mut progress: impl FnMut(u64, u64),
) -> Result<(), DiskError> {
    let cache = CacheMode::Writeback;
    let source = open(&OpenOptions { path: from.to_owned(), format: from_format, read_only: true, cache })?;
    let size = source.size();
    create(&CreateOptions { path: to.to_owned(), format: to_format, size: Some(size), backing: None })?;
    let options = OpenOptions { path: to.to_owned(), format: Some(to_format), read_only: false, cache };
    let result = open(&options).and_then(|target| {
        let mut memory = vec![0; CHUNK];
        let mut at = 0;
        while at < size {
            let n = (size - at).min(CHUNK as u64) as usize;
            let part = &mut memory[..n];
            source.read(&[VolatileSlice::from(&mut *part)], at).map_err(DiskError::file("read", from))?;
            for (i, piece) in part.chunks_mut(HOLE).enumerate() {
                if piece.iter().any(|&byte| byte != 0) {
                    let offset = at + (i * HOLE) as u64;
                    target
                        .write(&[VolatileSlice::from(piece)], offset)
                        .map_err(DiskError::file("write", to))?;
                }
            }
            at += n as u64;
            progress(at, size);
        }
        target.flush().map_err(DiskError::file("write", to))
    });
    if result.is_err() {
        let _ = fs::remove_file(to);
    }
    result
}

//! Disk images: raw files, block devices and qcow2.
//!
//! ```text
//!   open ──► lock (QEMU's bytes) ──► RawImage: the file itself, also for io_uring
//!                                └─► Qcow2Image: imago, with backing files
//!   create, convert, resize, info: whole images at rest
//! ```
//!
//! A write that was followed by a [`Image::flush`] that succeeded is on stable storage, whatever happens to this
//! process or the host. Requests may come from several threads at once; two that overlap and run at the same time
//! are in no order, as on a disk.

mod error;
mod image;
mod lock;
mod manage;
mod qcow2;
mod raw;

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use error::DiskError;
pub use image::{Image, SECTOR_SIZE};
pub use lock::Access;
pub use manage::{CreateOptions, Info, convert, create, info, resize};
pub use raw::RawImage;

/// First bytes of a qcow2 image, big-endian (QEMU's `docs/interop/qcow2.txt`).
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// How data lies in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The disk's bytes as they are.
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
}

impl Format {
    /// The format that a file's name promises: qcow2 for names that end in `.qcow2`, else raw.
    ///
    /// The content is not asked: a guest can write anything into a raw disk, and what looked like a qcow2 header
    /// there would at the next start open any file that the guest names as its backing file.
    pub fn of_name(path: &Path) -> Self {
        match path.extension() {
            Some(e) if e.eq_ignore_ascii_case("qcow2") => Self::Qcow2,
            _ => Self::Raw,
        }
    }

    /// The name that qcow2 headers and the command line use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Format {
    type Err = DiskError;

    fn from_str(text: &str) -> Result<Self, DiskError> {
        match text {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            _ => Err(DiskError::BadFormat(text.to_owned())),
        }
    }
}

/// How the host caches a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheMode {
    /// In the page cache; the guest's flushes make writes durable.
    #[default]
    Writeback,
    /// Not in the page cache (O_DIRECT); the guest's flushes make writes durable.
    None,
    /// In the page cache; every write is durable when it completes.
    Writethrough,
}

/// What to open and how.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// The file or block device.
    pub path: PathBuf,
    /// Its format; [`Format::of_name`] where none is given.
    pub format: Option<Format>,
    /// Only for reading: others may read it too.
    pub read_only: bool,
    /// How it is cached. [`CacheMode::Writethrough`] is the caller's matter: it flushes after each write.
    pub cache: CacheMode,
}

/// Opens an image and locks it and its backing files.
///
/// # Errors
/// [`DiskError`]: it cannot be opened, is in use, or is not what the options say.
pub fn open(options: &OpenOptions) -> Result<Box<dyn Image>, DiskError> {
    let format = match options.format {
        Some(format) => format,
        None => check_name(&options.path)?,
    };
    let direct = options.cache == CacheMode::None;
    Ok(match format {
        Format::Raw => Box::new(RawImage::open(&options.path, options.read_only, direct)?),
        Format::Qcow2 => Box::new(qcow2::Qcow2Image::open(&options.path, options.read_only, direct)?),
    })
}

/// The format by the name, unless the content makes one doubt.
fn check_name(path: &Path) -> Result<Format, DiskError> {
    let format = Format::of_name(path);
    let mut magic = [0; QCOW2_MAGIC.len()];
    let mut file = File::open(path).map_err(DiskError::file("open", path))?;
    let looks_like_qcow2 = file.read_exact(&mut magic).is_ok() && magic == QCOW2_MAGIC;
    if format == Format::Raw && looks_like_qcow2 {
        return Err(DiskError::Ambiguous { path: path.to_owned() });
    }
    Ok(format)
}

#[cfg(test)]
mod tests;

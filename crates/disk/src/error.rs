//! What can go wrong with images.

use std::io;
use std::path::{Path, PathBuf};

/// Why an image cannot be used. One line for people.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The host refuses.
    #[error("cannot {doing} {}: {source}", path.display())]
    File {
        /// What was tried.
        doing: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// Someone else has it.
    #[error("{} is in use {for_what} by {holder}", path.display())]
    InUse {
        /// The image.
        path: PathBuf,
        /// What the other does with it.
        for_what: &'static str,
        /// Who, for people.
        holder: String,
    },
    /// The name says raw, the content qcow2.
    #[error(
        "{} begins like a qcow2 image, but its name does not end in .qcow2: say format=qcow2, or format=raw if \
         the guest shall see the file as it is",
        path.display()
    )]
    Ambiguous {
        /// The image.
        path: PathBuf,
    },
    /// Not a whole number of sectors.
    #[error("{} has {size} bytes, which is not a multiple of 512 as a disk's size is", path.display())]
    BadLength {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// A size that no image can have.
    #[error("{size} bytes are not possible for a disk: a multiple of 512 from 512 bytes to 8 EiB")]
    BadSize {
        /// What was asked for.
        size: u64,
    },
    /// Data would be lost.
    #[error(
        "{} has {old} bytes: making it smaller loses what is behind {new}; say --shrink if that is what you want",
        path.display()
    )]
    Shrink {
        /// The image.
        path: PathBuf,
        /// Its size.
        old: u64,
        /// The size asked for.
        new: u64,
    },
    /// A block device, or something that is no file.
    #[error("{} is no ordinary file: it cannot be resized", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// The file exists.
    #[error("{} exists already: choose another name, or delete it first", path.display())]
    Exists {
        /// The path.
        path: PathBuf,
    },
    /// No such format.
    #[error("there is no image format {0:?}: possible are raw and qcow2")]
    BadFormat(String),
    /// A raw image cannot have a backing file.
    #[error("a raw image has no backing file: use the format qcow2")]
    RawWithBacking,
    /// A new image needs a size.
    #[error("how large shall the image be? Only one with a backing file takes its size from that")]
    NoSize,
}

impl DiskError {
    /// For `map_err`: `doing` with `path` failed.
    pub(crate) fn file(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| match in_use(source) {
            Ok(error) => error,
            Err(source) => Self::File { doing, path, source },
        }
    }
}

/// Takes an error of ours out of an I/O error that carried it through a library.
fn in_use(error: io::Error) -> Result<DiskError, io::Error> {
    if error.get_ref().is_some_and(|inner| inner.is::<DiskError>()) {
        let kind = error.kind();
        return match error.into_inner().map(|inner| inner.downcast::<DiskError>()) {
            Some(Ok(inner)) => Ok(*inner),
            Some(Err(other)) => Err(io::Error::new(kind, other)),
            None => Err(kind.into()),
        };
    }
    Err(error)
}

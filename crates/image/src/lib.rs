//! Images: root disks that VMs start from, and the disks of the VMs that started from them.
//!
//! ```text
//!   mmdebstrap ──► debian ──┐                     ┌──► boot_files: kernel and initrd out of the disk
//!   a disk file ─► import ──┴─► store: a new image ┘
//!
//!   DATA/images/NAME/image.toml    what the image is, with checksums
//!                    disk.raw      the root disk, read-only
//!                    kernel        what Berth boots; initrd if there is one
//!   DATA/images/.lock              held while an image appears, is taken into use or goes away
//! ```
//! A directory appears under its name only when it is complete: it is made as a hidden one beside it
//! (module `scratch`). What a build leaves that was killed, the next one removes.
//!
//! An image does not change once it is there, because disks of VMs are written on top of it (module `vm_disk`).

mod boot_files;
mod debian;
mod import;
mod name;
mod scratch;
mod store;
mod vm_disk;

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

pub use debian::{DEFAULT_SUITE, DebianOptions, MIN_SIZE};
pub use import::ImportOptions;
pub use name::{Name, NameError};
pub use store::{Image, Images, Manifest};
pub use vm_disk::VmDisk;

/// Why there is no image. One line for people that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// No such image.
    #[error("there is no image {name}: {}", hint(existing))]
    Unknown {
        /// What was asked for.
        name: Name,
        /// What there is.
        existing: Vec<Name>,
    },
    /// The name is taken.
    #[error(
        "there is an image {name} already: remove it with `berth image rm {name}`, or choose another --name"
    )]
    Exists {
        /// The name.
        name: Name,
    },
    /// A file of an image is not what it was when the image was made.
    #[error(
        "image {name}: {} was changed or removed after the image was made, so that VMs cannot rely on it: \
         remove the image and make it again", path.display()
    )]
    Damaged {
        /// The image.
        name: Name,
        /// The file.
        path: PathBuf,
    },
    /// The description of an image cannot be understood.
    #[error("image {name}: {} is not a description that this Berth understands: {reason}", path.display())]
    BadManifest {
        /// The image.
        name: Name,
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A program is missing.
    #[error(
        "building an image needs {program}, which this host does not have: install the package {package}"
    )]
    MissingProgram {
        /// The program.
        program: &'static str,
        /// Debian's package with it.
        package: &'static str,
    },
    /// The user has no users of their own to build with.
    #[error(
        "building an image without being root needs a range of user IDs for {user} in {file}, and there is none: \
         have root run `usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}`, or build as root"
    )]
    NoSubordinateIds {
        /// Name of the user.
        user: String,
        /// The file without an entry.
        file: &'static str,
    },
    /// A program failed.
    #[error("{program} failed: {said}")]
    Program {
        /// The program.
        program: &'static str,
        /// What it complained about.
        said: String,
    },
    /// The disk has no kernel that can be found.
    #[error("{}: {reason}; name a kernel with --kernel FILE (and --initrd FILE)", disk.display())]
    NoKernel {
        /// The disk.
        disk: PathBuf,
        /// Why.
        reason: String,
    },
    /// The file is none that can be a disk.
    #[error("{}: {reason}", path.display())]
    NotADisk {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// No name was given, and none can be made up.
    #[error("{what:?} cannot be the name of an image: choose one with --name NAME")]
    NoName {
        /// What the name would be.
        what: String,
    },
    /// Disks are on top of the image.
    #[error("image {name} is in use by {}{}", users.join(", "), removal(users))]
    InUse {
        /// The image.
        name: Name,
        /// The VMs, for people.
        users: Vec<String>,
    },
    /// No such VM.
    #[error("there is no VM {name} with a disk{}", there_are(existing))]
    UnknownVm {
        /// What was asked for.
        name: Name,
        /// What there is.
        existing: Vec<Name>,
    },
    /// The VM's disk is in use.
    #[error("a VM {name} is running: choose another --name, or end it first")]
    VmRuns {
        /// The VM.
        name: Name,
    },
    /// The VM's disk is on top of another image.
    #[error(
        "the disk of the VM {vm} was started from another image {image}: remove the VM with `berth rm {vm}`, or choose \
         another --name"
    )]
    OtherImage {
        /// The VM.
        vm: Name,
        /// The image's name.
        image: Name,
    },
    /// A disk file.
    #[error(transparent)]
    Disk(#[from] berth_disk::DiskError),
    /// There is nowhere to keep images.
    #[error("there is no place for images: set XDG_DATA_HOME or HOME")]
    NoDataDirectory,
    /// A file could not be read or written.
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
}

impl ImageError {
    /// For `map_err`: `doing` with `path` failed.
    fn file(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { doing, path, source }
    }
}

fn hint(existing: &[Name]) -> String {
    if existing.is_empty() {
        "make one with `berth image build debian`".to_owned()
    } else {
        format!("there is {}", join(existing))
    }
}

fn there_are(existing: &[Name]) -> String {
    if existing.is_empty() { String::new() } else { format!(": there is {}", join(existing)) }
}

fn join(names: &[Name]) -> String {
    names.iter().map(Name::as_str).collect::<Vec<_>>().join(", ")
}

/// How VMs are removed that have a name.
fn removal(users: &[String]) -> String {
    let named: Vec<&str> = users.iter().map(String::as_str).filter(|u| !u.contains(' ')).collect();
    if named.is_empty() {
        String::new()
    } else {
        format!(": remove them first, with `berth rm {}`", named.join(" "))
    }
}

/// Where Berth keeps what must not be lost: `$XDG_DATA_HOME/berth`, else `$HOME/.local/share/berth` (XDG Base
/// Directory Specification; a relative path counts as unset).
///
/// # Errors
/// [`ImageError::NoDataDirectory`] when neither variable is set.
pub fn data_directory() -> Result<PathBuf, ImageError> {
    data_directory_from(std::env::var_os("XDG_DATA_HOME"), std::env::var_os("HOME"))
}

fn data_directory_from(xdg: Option<OsString>, home: Option<OsString>) -> Result<PathBuf, ImageError> {
    let absolute = |path: Option<OsString>| path.map(PathBuf::from).filter(|p| p.is_absolute());
    absolute(xdg)
        .or_else(|| Some(absolute(home)?.join(".local/share")))
        .map(|p| p.join("berth"))
        .ok_or(ImageError::NoDataDirectory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_directory_follows_the_specification() {
        let dir = |xdg: Option<&str>, home: Option<&str>| {
            data_directory_from(xdg.map(Into::into), home.map(Into::into)).ok()
        };
        assert_eq!(dir(Some("/d"), Some("/h")), Some("/d/berth".into()));
        assert_eq!(dir(None, Some("/h")), Some("/h/.local/share/berth".into()));
        assert_eq!(dir(Some("relative"), Some("/h")), Some("/h/.local/share/berth".into()));
        assert_eq!(dir(None, None), None);
    }
}

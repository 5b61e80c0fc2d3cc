//! The default guest: a kernel and an initramfs for a VM that names none.
//!
//! ```text
//!   apt: kernel, modules, busybox ──► packages ──► modules ──► userland.cpio ─┐
//!                                        └──► vmlinuz ──► vmlinux             ├─► initramfs-….cpio
//!   guest/init (our source, built into this crate) ───────────────────────────┘
//! ```
//!
//! Everything is the host distribution's own, fetched and verified by apt without installing anything and
//! without privilege, and kept in a cache whose files are checked at every start. A second start needs no
//! network. Kernel and initramfs are not compressed: unpacking would cost each guest CPU time and memory at
//! each boot.

mod apt;
mod cache;
pub mod decompress;
mod initramfs;
mod modules;
mod packages;
pub mod progress;
pub mod record;
pub mod vmlinux;

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

/// Kernel parameters for the default guest. The guest runs alone in its VM and trusts its own programs, so the
/// kernel's mitigations against them would only cost time.
pub const KERNEL_PARAMETERS: &str = "console=ttyS0 quiet mitigations=off";

/// The guest's init program; empty if it could not be built ([`GuestImageError::NoInit`]).
const INIT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest-init"));

/// The guest's agent for images, a static program that is to be called `berth-agent`; `None` if this Berth was built
/// without it. It is the default guest's init program, which is both.
pub fn agent() -> Option<&'static [u8]> {
    (!INIT.is_empty()).then_some(INIT)
}

/// What a VM needs to start the default guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DefaultGuest {
    /// The kernel to boot: an ELF file with a PVH entry, or the bzImage if there is none in that.
    pub kernel: PathBuf,
    /// The same kernel as it is distributed, a bzImage.
    pub bzimage: PathBuf,
    /// The initramfs, an uncompressed cpio archive.
    pub initrd: PathBuf,
    /// The kernel's release, such as `6.1.0-56-cloud-amd64`.
    pub kernel_release: String,
}

/// Why there is no default guest. The texts are for people and say what to do.
#[derive(Debug, thiserror::Error)]
pub enum GuestImageError {
    /// The host has no apt.
    #[error(
        "the default guest needs Debian's or Ubuntu's package tools, and this host has no {missing}; \
         name a guest yourself with --kernel FILE and --initrd FILE"
    )]
    NoApt {
        /// The program that is missing.
        missing: &'static str,
    },
    /// None of the kernel packages that would do is on offer.
    #[error(
        "apt offers no kernel for the default guest (looked for {looked_for}){detail}; \
         check the network and the host's apt sources, or name a guest with --kernel FILE and --initrd FILE"
    )]
    NoKernelPackage {
        /// Names of packages.
        looked_for: String,
        /// What apt complained about, if anything.
        detail: String,
    },
    /// A program failed.
    #[error("{program} failed while {doing}: {said}")]
    Program {
        /// The program.
        program: &'static str,
        /// What it was to do.
        doing: &'static str,
        /// The last lines of its complaints.
        said: String,
    },
    /// A package is not as expected.
    #[error("the package {package} is not usable for the default guest: {reason}")]
    Package {
        /// File name of the package.
        package: String,
        /// What is wrong.
        reason: String,
    },
    /// There is nowhere to keep the default guest.
    #[error("there is no place for the default guest's files: set XDG_CACHE_HOME or HOME")]
    NoCacheDirectory,
    /// This Berth was built without the guest's init.
    #[error(
        "this Berth was built on a host without a static C library and so without its default guest; \
         install it (glibc-static, libc6-dev) and build again, or name a guest with --kernel FILE and --initrd FILE"
    )]
    NoInit,
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

impl GuestImageError {
    /// For `map_err`: `doing` with `path` failed.
    fn file(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { doing, path, source }
    }
}

/// Where Berth keeps its caches: `$XDG_CACHE_HOME/berth`, else `$HOME/.cache/berth` (XDG Base Directory
/// Specification; a relative path counts as unset).
///
/// # Errors
/// [`GuestImageError::NoCacheDirectory`] when neither variable is set.
pub fn cache_directory() -> Result<PathBuf, GuestImageError> {
    cache_directory_from(std::env::var_os("XDG_CACHE_HOME"), std::env::var_os("HOME"))
}

fn cache_directory_from(xdg: Option<OsString>, home: Option<OsString>) -> Result<PathBuf, GuestImageError> {
    let absolute = |path: Option<OsString>| path.map(PathBuf::from).filter(|p| p.is_absolute());
    absolute(xdg)
        .or_else(|| Some(absolute(home)?.join(".cache")))
        .map(|p| p.join("berth"))
        .ok_or(GuestImageError::NoCacheDirectory)
}

/// The default guest from the cache in `cache`, made first if it is missing, damaged or of another version.
/// Shows progress on standard error. Safe to call from several processes at once.
///
/// # Errors
/// Any [`GuestImageError`].
pub fn default_guest(cache: &Path) -> Result<DefaultGuest, GuestImageError> {
    if INIT.is_empty() {
        return Err(GuestImageError::NoInit);
    }
    cache::Cache::new(cache, INIT).guest(&apt::Apt)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cache_directory_follows_the_specification() {
        let dir = |xdg: Option<&str>, home: Option<&str>| {
            cache_directory_from(xdg.map(Into::into), home.map(Into::into)).ok()
        };
        assert_eq!(dir(Some("/c"), Some("/h")), Some("/c/berth".into()));
        assert_eq!(dir(None, Some("/h")), Some("/h/.cache/berth".into()));
        assert_eq!(dir(Some("relative"), Some("/h")), Some("/h/.cache/berth".into()));
        assert_eq!(dir(None, None), None);
    }

    #[test]
    fn the_init_program_is_a_static_executable() {
        use object::read::elf::{ElfFile64, FileHeader, ProgramHeader};
        let file = ElfFile64::<object::Endianness>::parse(INIT).unwrap();
        assert_eq!(file.elf_header().e_type(object::Endianness::Little), object::elf::ET_EXEC);
        let endian = object::Endianness::Little;
        assert!(file.elf_program_headers().iter().all(|p| p.p_type(endian) != object::elf::PT_INTERP));
    }
}

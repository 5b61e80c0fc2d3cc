//! Whole boots of Debian's kernel in the real `berth` command, and what runs in them.
//!
//! ```text
//!   programs/*.c ──gcc──► static programs ──► cpio ─┐
//!   default guest: kernel, initramfs ───────────────┴─► berth run --initrd … ──► console ──► checks
//! ```
//! The guest's command (`berth.run=`) is one of the small shell scripts of the tests. Each test boots a VM of its
//! own. A test that this host cannot do prints a line that begins with `skipped:` and passes.

mod berth;
mod console;
mod guest;
mod initrd;
mod programs;

pub use berth::{BuildError, berth};
pub use console::Console;
pub use guest::{Ended, Guest, GuestError};
pub use initrd::{InitrdError, initrd_with};
pub use programs::{PROGRAMS, ProgramError, compile_all};

use std::path::{Path, PathBuf};
use std::process::Command;

use berth_guest_image::GuestImageError;

/// What a test needs on this host.
pub struct Setup {
    /// The `berth` command, built with optimisation.
    pub berth: PathBuf,
    /// The default guest's initramfs with the test programs in `/tests`.
    pub initrd: tempfile::NamedTempFile,
}

/// Why there is nothing to test with.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The host lacks something: the test is to be skipped.
    #[error("{0}")]
    Lacking(String),
    /// The command does not build.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// A test program does not build.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// No default guest.
    #[error(transparent)]
    Guest(GuestImageError),
    /// No initramfs.
    #[error(transparent)]
    Initrd(#[from] InitrdError),
}

/// Builds everything that a boot needs, or takes it from where an earlier test left it:
/// `programs` is a directory for test programs.
///
/// # Errors
/// Any [`SetupError`].
pub fn set_up(programs: &Path) -> Result<Setup, SetupError> {
    if Command::new("gcc").arg("--version").output().is_err() {
        return Err(SetupError::Lacking("the test programs need gcc".to_owned()));
    }
    let cache = berth_guest_image::cache_directory().map_err(SetupError::Guest)?;
    let guest = berth_guest_image::default_guest(&cache).map_err(|e| match e {
        GuestImageError::NoApt { .. } => SetupError::Lacking(e.to_string()),
        e => SetupError::Guest(e),
    })?;
    let berth = berth()?;
    let initrd = initrd_with(&guest.initrd, &compile_all(programs)?)?;
    Ok(Setup { berth, initrd })
}

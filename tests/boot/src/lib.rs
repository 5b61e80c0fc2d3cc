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
mod host_programs;
mod in_process;
mod initrd;
pub mod kills;
mod namespace;
mod noise;
pub mod overcommit;
mod programs;
mod small_disk;

pub use berth::{BuildError, berth};
pub use console::Console;
pub use guest::{Ended, Guest, GuestError};
pub use host_programs::host_program;
pub use in_process::InProcess;
pub use initrd::{File, InitrdError, initrd_with};
pub use namespace::Namespace;
pub use noise::Noise;
pub use programs::{PROGRAMS, ProgramError, compile_all, scripts};
pub use small_disk::SmallDisk;

use std::path::{Path, PathBuf};
use std::process::Command;

use berth_guest_image::GuestImageError;

/// Bytes that tests send through sockets and networks: 12 MiB, enough for many rounds of every buffer, or as many MiB as
/// the environment variable `BERTH_TEST_TRANSFER_MIB` says.
pub fn transfer() -> u64 {
    let mib = std::env::var("BERTH_TEST_TRANSFER_MIB").ok().and_then(|text| text.parse().ok());
    mib.unwrap_or(12_u64) << 20
}

/// So long may a guest of a test live that sends [`transfer`] bytes: generous, hosts may be busy.
pub fn transfer_limit() -> std::time::Duration {
    std::time::Duration::from_secs(150 + (transfer() >> 20))
}

/// What a test needs on this host.
pub struct Setup {
    /// The `berth` command, built with optimisation.
    pub berth: PathBuf,
    /// The default guest's kernel.
    pub kernel: PathBuf,
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
    /// A program of the host cannot be read.
    #[error("cannot read a program for the guest: {0}")]
    HostProgram(#[source] std::io::Error),
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
    set_up_with(programs, &[])
}

/// For tests: [`set_up_with`] in the test program's own directory, `env!("CARGO_TARGET_TMPDIR")`. `None`: the host cannot
/// do this test, and the reason was printed.
///
/// # Panics
/// With the reason, for all else that fails.
pub fn set_up_or_skip(target: &str, of_host: &[&str]) -> Option<Setup> {
    match set_up_with(&Path::new(target).join("boot-programs"), of_host) {
        Ok(setup) => Some(setup),
        Err(SetupError::Lacking(what)) => {
            println!("skipped: {what}");
            None
        }
        Err(e) => panic!("{e}"),
    }
}

/// [`set_up`] with programs of the host in the guest too.
///
/// # Errors
/// Any [`SetupError`].
pub fn set_up_with(programs: &Path, of_host: &[&str]) -> Result<Setup, SetupError> {
    if Command::new("gcc").arg("--version").output().is_err() {
        return Err(SetupError::Lacking("the test programs need gcc".to_owned()));
    }
    let cache = berth_guest_image::cache_directory().map_err(SetupError::Guest)?;
    let guest = berth_guest_image::default_guest(&cache).map_err(|e| match e {
        GuestImageError::NoApt { .. } => SetupError::Lacking(e.to_string()),
        e => SetupError::Guest(e),
    })?;
    let berth = berth()?;
    let mut files = compile_all(programs)?;
    for name in of_host {
        let found = host_program(name).map_err(SetupError::HostProgram)?;
        files.extend(found.ok_or_else(|| SetupError::Lacking(format!("{name} is not installed")))?);
    }
    let initrd = initrd_with(&guest.initrd, &files)?;
    Ok(Setup { berth, kernel: guest.kernel, initrd })
}

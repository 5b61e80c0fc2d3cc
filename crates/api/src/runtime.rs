//! The directories by which VMs are found.
//!
//! ```text
//!   $XDG_RUNTIME_DIR/berth/NAME/lock          flock'ed while the VM's process lives; its process number
//!   or /run/user/UID/berth      vm.json       what the VM is (VmDescription)
//!   or /tmp/berth-UID           api.sock      its control API
//!                               console.log   what its console printed last; console.log.1 what was before that
//!                               log           what Berth says, of a detached VM
//!                               ending.json   how it ended, where somebody may want to know
//! ```
//! # Why it is right
//! - The kernel gives the lock back when the process ends, however that happens. So a VM whose lock is free is dead,
//!   and no process number has to be trusted.
//! - The directory of a VM is claimed, cleaned and removed only by who has its lock. Who gets the lock looks whether
//!   the file is still the one in the directory, because another may have removed it in between.
//! - Files appear under their names only when they are complete.
//! - The directory of all VMs belongs to this user and nobody else may enter it; otherwise it is not used.

mod claim;
mod directory;
mod root;
pub mod socket;

use std::io;
use std::path::{Path, PathBuf};

pub use claim::Claim;
pub use directory::VmDirectory;

/// Why a VM is not found, or cannot have its directory. One line for people.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// There is no VM of this name.
    #[error("there is no VM {name}: {}", hint(existing))]
    Unknown {
        /// What was asked for.
        name: String,
        /// What there is.
        existing: Vec<String>,
    },
    /// The name is taken.
    #[error(
        "the VM {name} runs already{}: choose another --name, or end it with `berth stop {name}`",
        process(*pid)
    )]
    Runs {
        /// Its name.
        name: String,
        /// Its process, if it is known.
        pid: Option<u32>,
    },
    /// What cannot be the name of a directory.
    #[error("{name:?} is no name of a VM")]
    BadName {
        /// What was asked for.
        name: String,
    },
    /// The directory of all VMs is not safe.
    #[error("{} cannot be used for the VMs of this user: {reason}", path.display())]
    Unsafe {
        /// The directory.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The host.
    #[error("cannot {what} {}: {source}", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

fn hint(existing: &[String]) -> String {
    match existing {
        [] => "none runs".to_owned(),
        names => format!("there is {}", names.join(", ")),
    }
}

fn process(pid: Option<u32>) -> String {
    pid.map_or(String::new(), |pid| format!(" (process {pid})"))
}

impl RuntimeError {
    pub(crate) fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { what, path, source }
    }
}

/// All VMs of this user.
#[derive(Clone, Debug)]
pub struct Vms {
    root: PathBuf,
}

impl Vms {
    /// The directory of this user's VMs, made if it is not there.
    ///
    /// # Errors
    /// [`RuntimeError::Unsafe`] when it is another user's or open to others.
    pub fn open() -> Result<Self, RuntimeError> {
        Self::at(root::choose())
    }

    /// As [`Self::open`], at this place.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn at(root: PathBuf) -> Result<Self, RuntimeError> {
        root::prepare(&root)?;
        Ok(Self { root })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// All VMs that have a directory, dead ones too, sorted by name.
    pub fn all(&self) -> Vec<VmDirectory> {
        let entries = std::fs::read_dir(&self.root).into_iter().flatten().flatten();
        let names = entries.filter_map(|e| e.file_name().into_string().ok());
        let mut names: Vec<String> = names.filter(|name| is_name(name)).collect();
        names.sort_unstable();
        names.into_iter().map(|name| VmDirectory::new(&self.root, name)).collect()
    }

    /// Where the VM `name` is, or will be once it starts.
    ///
    /// # Errors
    /// [`RuntimeError::BadName`].
    pub fn place(&self, name: &str) -> Result<VmDirectory, RuntimeError> {
        if !is_name(name) {
            return Err(RuntimeError::BadName { name: name.to_owned() });
        }
        Ok(VmDirectory::new(&self.root, name.to_owned()))
    }

    /// The VM `name`, dead or alive.
    ///
    /// # Errors
    /// [`RuntimeError::Unknown`].
    pub fn get(&self, name: &str) -> Result<VmDirectory, RuntimeError> {
        let directory = is_name(name).then(|| VmDirectory::new(&self.root, name.to_owned()));
        directory.filter(VmDirectory::exists).ok_or_else(|| RuntimeError::Unknown {
            name: name.to_owned(),
            existing: self.all().into_iter().map(|vm| vm.name().to_owned()).collect(),
        })
    }

    /// Takes the name `name` for a VM of this process, and removes what a dead VM of this name left.
    ///
    /// # Errors
    /// [`RuntimeError::Runs`] when a VM has it.
    pub fn claim(&self, name: &str) -> Result<Claim, RuntimeError> {
        if !is_name(name) {
            return Err(RuntimeError::BadName { name: name.to_owned() });
        }
        Claim::new(VmDirectory::new(&self.root, name.to_owned()))
    }
}

/// What can be a file's name and does not leave the directory.
fn is_name(name: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    name.len() <= 63 && name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.chars().all(good)
}

#[cfg(test)]
mod tests;

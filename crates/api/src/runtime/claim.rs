//! The directory of the VM of this process.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::time::Duration;

use super::directory::{DESCRIPTION, ENDING};
use super::{RuntimeError, VmDirectory};
use crate::types::{Ending, VmDescription};

/// Who looks whether a VM lives has its lock for a moment: it is tried again this often before the VM counts as alive.
const TRIES: usize = 25;
const PAUSE: Duration = Duration::from_millis(4);

/// A VM's directory for as long as this process runs the VM. When it is dropped the directory is removed.
#[derive(Debug)]
pub struct Claim {
    directory: VmDirectory,
    lock: File,
    keep: bool,
}

impl Claim {
    pub(super) fn new(directory: VmDirectory) -> Result<Self, RuntimeError> {
        for _ in 0..TRIES {
            match fs::DirBuilder::new().mode(0o700).create(directory.path()) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(RuntimeError::file("make the directory", directory.path())(e));
                }
                _ => {}
            }
            match directory.try_lock(true) {
                Ok(Some(mut lock)) => {
                    directory.remove_contents(&lock)?;
                    let pid = std::process::id();
                    lock.set_len(0)
                        .and_then(|()| writeln!(lock, "{pid}"))
                        .map_err(RuntimeError::file("write", directory.path()))?;
                    return Ok(Self { directory, lock, keep: false });
                }
                // Removed between two steps, by who had the lock before.
                Err(RuntimeError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(e),
                Ok(None) => {}
            }
            std::thread::sleep(PAUSE);
        }
        Err(RuntimeError::Runs { name: directory.name().to_owned(), pid: directory.pid() })
    }

    /// The directory.
    pub fn directory(&self) -> &VmDirectory {
        &self.directory
    }

    /// Says what the VM is.
    ///
    /// # Errors
    /// What the host says.
    pub fn describe(&self, description: &VmDescription) -> Result<(), RuntimeError> {
        write(&self.directory.path().join(DESCRIPTION), description)
    }

    /// Keeps the directory after the end, which was `ending`, for those who want to know.
    ///
    /// # Errors
    /// What the host says.
    pub fn keep(&mut self, ending: &Ending) -> Result<(), RuntimeError> {
        write(&self.directory.path().join(ENDING), ending)?;
        self.keep = true;
        Ok(())
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.keep {
            // What remains is found and removed by the next who lists VMs.
            let _ = self.directory.remove_all(&self.lock);
        }
    }
}

/// Writes a file that appears when it is complete.
fn write(path: &Path, value: &impl serde::Serialize) -> Result<(), RuntimeError> {
    let error = RuntimeError::file("write", path);
    let new = path.with_extension("new");
    let text = serde_json::to_vec_pretty(value).map_err(|e| error_of(e, path))?;
    fs::write(&new, text).and_then(|()| fs::rename(&new, path)).map_err(error)
}

fn error_of(error: serde_json::Error, path: &Path) -> RuntimeError {
    RuntimeError::file("write", path)(error.into())
}

//! The directory of one VM, as other programs see it.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::RuntimeError;
use crate::types::{Ending, VmDescription, VmInfo, VmState};

pub(super) const LOCK: &str = "lock";
pub(super) const DESCRIPTION: &str = "vm.json";
pub(super) const ENDING: &str = "ending.json";
/// How often it is looked whether a VM has ended that another thread or program ends.
const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// Most bytes of a file that is read.
const MAX_FILE: u64 = 1 << 20;

/// The directory of a VM, which may be dead.
#[derive(Clone, Debug)]
pub struct VmDirectory {
    name: String,
    path: PathBuf,
}

impl VmDirectory {
    pub(super) fn new(root: &Path, name: String) -> Self {
        Self { path: root.join(&name), name }
    }

    /// The VM's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn exists(&self) -> bool {
        self.path.join(LOCK).exists()
    }

    /// What the VM is, as far as it has come to say so.
    pub fn description(&self) -> Option<VmDescription> {
        read(&self.path.join(DESCRIPTION))
    }

    /// How it ended, if that was kept.
    pub fn ending(&self) -> Option<Ending> {
        read(&self.path.join(ENDING))
    }

    /// The socket of its API, unless it has been moved.
    pub fn default_api_socket(&self) -> PathBuf {
        self.path.join("api.sock")
    }

    /// The socket of its API.
    pub fn api_socket(&self) -> PathBuf {
        self.description().map_or_else(|| self.default_api_socket(), |d| d.api_socket)
    }

    /// The socket at which host programs reach ports of the guest, unless it has another.
    pub fn default_vsock(&self) -> PathBuf {
        self.path.join("vsock.sock")
    }

    /// What its console printed last.
    pub fn console_log(&self) -> PathBuf {
        self.path.join("console.log")
    }

    /// What its console printed before [`Self::console_log`] was begun; may not be there.
    pub fn older_console_log(&self) -> PathBuf {
        self.path.join("console.log.1")
    }

    /// What Berth itself says of a detached VM.
    pub fn log(&self) -> PathBuf {
        self.path.join("log")
    }

    /// Its process, if it has said so.
    pub fn pid(&self) -> Option<u32> {
        fs::read_to_string(self.path.join(LOCK)).ok()?.trim().parse().ok()
    }

    /// Whether its process lives.
    pub fn is_alive(&self) -> bool {
        // Nobody has a lock that is not there.
        let Ok(file) = File::open(self.path.join(LOCK)) else { return false };
        matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock))
    }

    /// Waits for the end of its process, at most until `deadline`; returns whether it has come.
    pub fn wait_for_end(&self, deadline: Option<Instant>) -> bool {
        while self.is_alive() {
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return false;
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        true
    }

    /// What is known of a VM without asking it.
    pub fn info(&self) -> Option<VmInfo> {
        let description = self.description()?;
        let (state, ending) = match self.is_alive() {
            true => (VmState::Starting, None),
            false => match self.ending() {
                Some(ending) => (VmState::Ended, Some(ending)),
                None => (VmState::Killed, None),
            },
        };
        Some(VmInfo { state, ending, description })
    }

    /// The lock, if nobody has it: its file is the one that is in the directory now.
    pub(super) fn try_lock(&self, create: bool) -> Result<Option<File>, RuntimeError> {
        let path = self.path.join(LOCK);
        let error = RuntimeError::file("lock", &path);
        let opened = File::options().read(true).write(true).create(create).truncate(false).open(&path);
        let file = match opened {
            Ok(file) => file,
            Err(e) => return Err(error(e)),
        };
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(e)) => return Err(error(e)),
        }
        let same = |a: &fs::Metadata, b: &fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
        match (file.metadata(), fs::symlink_metadata(&path)) {
            (Ok(mine), Ok(there)) if same(&mine, &there) => Ok(Some(file)),
            _ => Err(error(io::Error::from(io::ErrorKind::NotFound))),
        }
    }

    /// Removes what a dead VM left but what tells of it: sockets. Does nothing to a VM that lives.
    ///
    /// # Errors
    /// What the host says.
    pub fn sweep(&self) -> Result<(), RuntimeError> {
        let Some(_lock) = self.try_lock(false)? else { return Ok(()) };
        self.remove_sockets();
        Ok(())
    }

    /// Removes a dead VM's directory with all that it left.
    ///
    /// # Errors
    /// [`RuntimeError::Runs`], and what the host says.
    pub fn remove(&self) -> Result<(), RuntimeError> {
        match self.try_lock(false)? {
            Some(lock) => self.remove_all(&lock),
            None => Err(RuntimeError::Runs { name: self.name.clone(), pid: self.pid() }),
        }
    }

    /// The VM's sockets may be elsewhere.
    fn remove_sockets(&self) {
        let mut sockets = vec![self.default_api_socket(), self.default_vsock()];
        if let Some(description) = self.description() {
            sockets.push(description.api_socket);
            sockets.extend(description.vsock.map(|vsock| vsock.path));
        }
        for socket in sockets {
            super::socket::remove(&socket);
        }
    }

    /// All but the lock.
    pub(super) fn remove_contents(&self, _lock: &File) -> Result<(), RuntimeError> {
        self.remove_sockets();
        let entries = fs::read_dir(&self.path).map_err(RuntimeError::file("read", &self.path))?;
        for entry in entries.flatten().filter(|e| e.file_name() != LOCK) {
            match fs::remove_file(entry.path()) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(RuntimeError::file("remove", &entry.path())(e));
                }
                _ => {}
            }
        }
        Ok(())
    }

    pub(super) fn remove_all(&self, lock: &File) -> Result<(), RuntimeError> {
        self.remove_contents(lock)?;
        let path = self.path.join(LOCK);
        fs::remove_file(&path).map_err(RuntimeError::file("remove", &path))?;
        match fs::remove_dir(&self.path) {
            // Somebody who starts a VM of this name has made its own lock already.
            Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
            result => result.map_err(RuntimeError::file("remove", &self.path)),
        }
    }
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Option<T> {
    use std::io::Read;
    let mut text = Vec::new();
    File::open(path).ok()?.take(MAX_FILE).read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}

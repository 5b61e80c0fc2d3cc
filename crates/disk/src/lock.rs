//! Locks, so that no two programs write one image.
//!
//! They are those of QEMU (`block/file-posix.c`: `RAW_LOCK_PERM_BASE`), so that its tools respect a disk of ours and we
//! theirs: a byte range of open-file-description locks (fcntl(2)), all shared. Byte `100 + n` is locked by who
//! has permission `n`, byte `200 + n` by who does not let others have it. The kernel drops them with the last
//! descriptor, also of a process that was killed.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::DiskError;

const HELD: i64 = 100;
const DENIED: i64 = 200;
/// Permissions by QEMU's numbers.
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const WRITE_UNCHANGED: i64 = 2;
const RESIZE: i64 = 3;

/// Longest command line of a lock's holder that is shown.
const MAX_COMMAND: usize = 160;

/// What the image is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Others may read too.
    Read,
    /// Nobody else may have it.
    Write,
}

impl Access {
    fn held(self) -> &'static [i64] {
        match self {
            Self::Read => &[CONSISTENT_READ],
            Self::Write => &[CONSISTENT_READ, WRITE, WRITE_UNCHANGED, RESIZE],
        }
    }

    /// What others may not have.
    fn denied(self) -> &'static [i64] {
        match self {
            Self::Read => &[WRITE, RESIZE],
            Self::Write => &[CONSISTENT_READ, WRITE, WRITE_UNCHANGED, RESIZE],
        }
    }
}

/// Locks `file` until its last descriptor is closed.
///
/// # Errors
/// [`DiskError::InUse`] that names the holder; [`DiskError::File`] when the file system has no locks.
pub fn lock(file: &File, path: &Path, access: Access) -> Result<(), DiskError> {
    let failed = || DiskError::file("lock", path);
    // First all of ours, then the look at those of others: of two at the same time at least one sees the other.
    for &n in access.held() {
        set(file, HELD + n).map_err(failed())?;
    }
    for &n in access.denied() {
        set(file, DENIED + n).map_err(failed())?;
    }
    for &n in access.held() {
        if is_locked(file, DENIED + n).map_err(failed())? {
            return Err(in_use(file, path, if n == CONSISTENT_READ { Access::Write } else { Access::Read }));
        }
    }
    for &n in access.denied() {
        if is_locked(file, HELD + n).map_err(failed())? {
            return Err(in_use(file, path, if n == CONSISTENT_READ { Access::Read } else { Access::Write }));
        }
    }
    Ok(())
}

fn flock(kind: libc::c_int, start: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: 1,
        l_pid: 0,
    }
}

fn set(file: &File, byte: i64) -> io::Result<()> {
    let lock = flock(libc::F_RDLCK, byte);
    // SAFETY: fcntl reads a flock that lives through the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether another open file description has the byte locked.
fn is_locked(file: &File, byte: i64) -> io::Result<bool> {
    let mut lock = flock(libc::F_WRLCK, byte);
    // SAFETY: fcntl reads and writes a flock that lives through the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) } {
        0 => Ok(i32::from(lock.l_type) != libc::F_UNLCK),
        _ => Err(io::Error::last_os_error()),
    }
}

fn in_use(file: &File, path: &Path, theirs: Access) -> DiskError {
    let for_what = match theirs {
        Access::Read => "for reading",
        Access::Write => "for writing",
    };
    let holder = holder(file).unwrap_or_else(|| "a process that cannot be seen from here".to_owned());
    DiskError::InUse { path: path.to_owned(), for_what, holder }
}

/// Who else has locks on the file. The kernel does not say it of this kind of lock, but shows them with each
/// descriptor (proc(5), `/proc/PID/fdinfo`).
fn holder(file: &File) -> Option<String> {
    let wanted = file.metadata().ok()?;
    let own = (std::process::id(), file.as_raw_fd());
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        // A process that ended meanwhile, or of another user.
        let Ok(descriptors) = fs::read_dir(process.path().join("fd")) else { continue };
        for descriptor in descriptors.flatten() {
            let Ok(number) = descriptor.file_name().to_string_lossy().parse() else { continue };
            let same = fs::metadata(descriptor.path())
                .is_ok_and(|m| (m.dev(), m.ino()) == (wanted.dev(), wanted.ino()));
            let info = process.path().join("fdinfo").join(descriptor.file_name());
            if same
                && (pid, number) != own
                && fs::read_to_string(info).is_ok_and(|info| info.contains("OFDLCK"))
            {
                return Some(describe(pid));
            }
        }
    }
    None
}

fn describe(pid: u32) -> String {
    if pid == std::process::id() {
        return "this process itself".to_owned();
    }
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let command = String::from_utf8_lossy(&command).trim_end_matches('\0').replace('\0', " ");
    let shown: String = command.chars().filter(|c| !c.is_control()).take(MAX_COMMAND).collect();
    let dots = if shown.len() < command.len() { "…" } else { "" };
    format!("process {pid} ({shown}{dots})")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &Path) -> File {
        File::options().read(true).write(true).open(path).unwrap()
    }

    #[test]
    fn one_writer_or_many_readers() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let path = image.path();
        let (a, b, c) = (open(path), open(path), open(path));
        lock(&a, path, Access::Read).unwrap();
        lock(&b, path, Access::Read).unwrap();
        let error = lock(&c, path, Access::Write).unwrap_err().to_string();
        assert!(error.contains("for reading by this process itself"), "{error}");
        drop((a, b, c));
        let (a, b) = (open(path), open(path));
        lock(&a, path, Access::Write).unwrap();
        for access in [Access::Read, Access::Write] {
            let error = lock(&b, path, access).unwrap_err().to_string();
            assert!(error.contains("for writing") || error.contains("for reading"), "{error}");
        }
        drop(b);
        drop(a);
        lock(&open(path), path, Access::Write).unwrap();
    }

    #[test]
    fn a_process_is_described_by_its_command() {
        let text = describe(1);
        assert!(text.starts_with("process 1 ("), "{text}");
    }
}

//! Unix sockets at paths of any length. The kernel takes 107 bytes; a longer path is reached through a descriptor of
//! its directory (unix(7), proc(5)).

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

const MAX_PATH: usize = 107;

/// A path to the same file that is short enough, and what must stay open while it is used.
fn short(path: &Path) -> io::Result<(PathBuf, Option<File>)> {
    if path.as_os_str().len() <= MAX_PATH {
        return Ok((path.to_owned(), None));
    }
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let directory = File::open(parent)?;
    let short = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name);
    Ok((short, Some(directory)))
}

/// Listens at `path`, which only this user may connect to. A socket that nobody listens at any more is replaced.
///
/// # Errors
/// What the host says; [`io::ErrorKind::AddrInUse`] when somebody listens there, or it is no socket.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    let (at, _directory) = short(path)?;
    let is_socket = fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    if is_socket && UnixStream::connect(&at).is_err() {
        fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(&at)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Connects to `path`.
///
/// # Errors
/// What the host says.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    let (at, _directory) = short(path)?;
    UnixStream::connect(at)
}

/// Removes a socket, if it is one. What cannot be removed stays.
pub(super) fn remove(path: &Path) {
    if fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket()) {
        let _ = fs::remove_file(path);
    }
}

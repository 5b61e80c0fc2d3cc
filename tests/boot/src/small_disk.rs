//! A small file system of the host's, to be filled up. It needs root.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;

/// A file system in memory with room for a given number of bytes, that only the thread that made it sees, and the threads
/// that this one starts afterwards. It goes when they have ended.
pub struct SmallDisk {
    directory: tempfile::TempDir,
    place: CString,
}

impl SmallDisk {
    /// Mounts one.
    ///
    /// # Errors
    /// What the host says: `PermissionDenied` where this user may not mount anything.
    pub fn mount(bytes: u64) -> io::Result<Self> {
        let directory = tempfile::tempdir()?;
        let place = CString::new(directory.path().as_os_str().as_bytes())?;
        // SAFETY: it takes a number. Only this thread sees other mounts, and another working directory, from now on.
        if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the one string lives, and null pointers stand for what this flag does not need.
        let private = unsafe {
            libc::mount(ptr::null(), c"/".as_ptr(), ptr::null(), libc::MS_REC | libc::MS_PRIVATE, ptr::null())
        };
        if private != 0 {
            return Err(io::Error::last_os_error());
        }
        let this = Self { directory, place };
        this.mount_with(0, bytes)?;
        Ok(this)
    }

    /// Gives it room for `bytes` bytes.
    ///
    /// # Errors
    /// What the host says.
    pub fn resize(&self, bytes: u64) -> io::Result<()> {
        self.mount_with(libc::MS_REMOUNT, bytes)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    fn mount_with(&self, flags: libc::c_ulong, bytes: u64) -> io::Result<()> {
        let options = CString::new(format!("size={bytes}"))?;
        let (kind, place) = (c"tmpfs".as_ptr(), self.place.as_ptr());
        // SAFETY: all four strings live, and end with a NUL.
        match unsafe { libc::mount(kind, place, kind, flags, options.as_ptr().cast()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Else the directory could not be removed. Open files keep what is in it.
        // SAFETY: the string lives, and ends with a NUL.
        unsafe { libc::umount2(self.place.as_ptr(), libc::MNT_DETACH) };
    }
}

//! userfaultfd: page faults handled in user space (the kernel's `Documentation/admin-guide/mm/userfaultfd.rst`).

use std::fs::OpenOptions;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;

use serde::Serialize;

use crate::read;

/// `UFFD_USER_MODE_ONLY` of linux/userfaultfd.h: faults from inside the kernel are not handled.
const UFFD_USER_MODE_ONLY: libc::c_int = 1;

/// In which ways this process may use userfaultfd.
#[derive(Clone, Debug, Serialize)]
pub struct Userfaultfd {
    /// By the system call, for all faults.
    pub all_faults: bool,
    /// By the system call, for faults of user mode only.
    pub user_faults: bool,
    /// By opening `/dev/userfaultfd`.
    pub device: bool,
    /// The sysctl `vm.unprivileged_userfaultfd`.
    pub unprivileged: Option<bool>,
}

impl Userfaultfd {
    /// Tries the system call, and the files below `root`.
    pub fn probe(root: &Path) -> Self {
        let device = OpenOptions::new().read(true).write(true).open(root.join("dev/userfaultfd"));
        Self {
            all_faults: try_call(0),
            user_faults: try_call(UFFD_USER_MODE_ONLY),
            device: device.is_ok(),
            unprivileged: read::number(root, "proc/sys/vm/unprivileged_userfaultfd").map(|n| n == 1),
        }
    }

    /// Whether there is any way.
    pub fn usable(&self) -> bool {
        self.all_faults || self.user_faults || self.device
    }
}

fn try_call(flags: libc::c_int) -> bool {
    // SAFETY: the call takes flags and no pointer.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags | libc::O_CLOEXEC) };
    let Ok(fd) = libc::c_int::try_from(fd) else { return false };
    if fd < 0 {
        return false;
    }
    // SAFETY: the call returned a new descriptor that nobody else owns.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_may_handle_all_faults_may_handle_some() {
        let u = Userfaultfd::probe(Path::new("/"));
        assert!(u.user_faults || !u.all_faults);
    }
}

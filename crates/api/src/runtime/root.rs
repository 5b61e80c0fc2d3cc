//! Where the directories of all VMs are.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::RuntimeError;

const OWN: &str = "berth";
/// Permission bits of group and others.
const OTHERS: u32 = 0o077;

fn uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// The place for this user's VMs.
pub fn choose() -> PathBuf {
    if let Some(directory) =
        std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|d| d.is_absolute())
    {
        return directory.join(OWN);
    }
    let of_user = PathBuf::from(format!("/run/user/{}", uid()));
    let ours = fs::symlink_metadata(&of_user).is_ok_and(|m| m.is_dir() && m.uid() == uid());
    if ours { of_user.join(OWN) } else { PathBuf::from(format!("/tmp/berth-{}", uid())) }
}

/// Makes the directory, or makes sure that nobody else can do anything in the one that is there.
pub fn prepare(root: &Path) -> Result<(), RuntimeError> {
    match fs::DirBuilder::new().mode(0o700).create(root) {
        Ok(()) => return Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(RuntimeError::file("make the directory", root)(e)),
    }
    let found = fs::symlink_metadata(root).map_err(RuntimeError::file("look at", root))?;
    let reason = if !found.is_dir() {
        "it is no directory (a symbolic link is none)".to_owned()
    } else if found.uid() != uid() {
        format!("it belongs to user {}; set XDG_RUNTIME_DIR to a directory of your own", found.uid())
    } else if found.mode() & OTHERS != 0 {
        format!("others may enter it; chmod 700 {}", root.display())
    } else {
        return Ok(());
    };
    Err(RuntimeError::Unsafe { path: root.to_owned(), reason })
}

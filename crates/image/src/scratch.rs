//! Directories for what is being made or is used only once. They go away with their owner, at the latest when the
//! next one is made after their owner was killed.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::ImageError;

/// What the names of the directories begin with: hidden, so that no image or VM has such a name.
const PREFIX: &str = ".scratch-";
/// The file in each that its owner has locked.
const LOCK: &str = "lock";

/// A directory that is removed when this is dropped.
pub struct Scratch {
    directory: TempDir,
    /// Holds the lock while the owner lives.
    _lock: File,
}

impl Scratch {
    /// A new directory in `parent`, for this user only. Those without a living owner are removed first.
    pub fn new(parent: &Path) -> Result<Self, ImageError> {
        fs::create_dir_all(parent).map_err(ImageError::file("make the directory", parent))?;
        sweep(parent);
        let directory = tempfile::Builder::new()
            .prefix(PREFIX)
            .permissions(fs::Permissions::from_mode(0o700))
            .tempdir_in(parent)
            .map_err(ImageError::file("make a directory in", parent))?;
        // The file gets its name when it is locked: before that nobody may take it for one without an owner.
        let (path, new) = (directory.path().join(LOCK), directory.path().join("lock.new"));
        let lock = File::create(&new).map_err(ImageError::file("create", &new))?;
        lock.lock().map_err(ImageError::file("lock", &new))?;
        fs::rename(&new, &path).map_err(ImageError::file("put in place", &path))?;
        Ok(Self { directory, _lock: lock })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Makes it a directory like any other, called `path` from now on, which must not exist.
    pub fn keep_as(self, path: &Path) -> Result<(), ImageError> {
        let lock = self.path().join(LOCK);
        fs::remove_file(&lock).map_err(ImageError::file("remove", &lock))?;
        fs::rename(self.path(), path).map_err(ImageError::file("put in place", path))?;
        // It is not there any more; only its name is to be forgotten.
        let _ = self.directory.keep();
        Ok(())
    }
}

/// The scratch directories in `parent`.
pub fn all(parent: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    entries.filter(|e| e.file_name().to_string_lossy().starts_with(PREFIX)).map(|e| e.path()).collect()
}

/// Removes the scratch directories whose owners are gone.
pub fn sweep(parent: &Path) {
    for directory in all(parent) {
        // One without a lock file was made a moment ago, or is being removed.
        let Ok(lock) = File::open(directory.join(LOCK)) else { continue };
        if lock.try_lock().is_ok() {
            // What cannot be removed is tried again next time.
            let _ = fs::remove_dir_all(directory);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_lives_as_long_as_its_owner() {
        let parent = tempfile::tempdir().unwrap();
        let one = Scratch::new(parent.path()).unwrap();
        let two = Scratch::new(parent.path()).unwrap();
        fs::write(one.path().join("file"), b"").unwrap();
        assert_eq!(all(parent.path()).len(), 2);
        // Others have no business in it, whatever the user's umask.
        assert_eq!(fs::metadata(one.path()).unwrap().permissions().mode() & 0o777, 0o700);
        drop(one);
        assert_eq!(all(parent.path()), [two.path().to_owned()]);
    }

    #[test]
    fn what_a_killed_owner_left_is_removed() {
        let parent = tempfile::tempdir().unwrap();
        let Scratch { directory, _lock: lock } = Scratch::new(parent.path()).unwrap();
        let left = directory.keep();
        drop(lock);
        let next = Scratch::new(parent.path()).unwrap();
        assert!(!left.exists() && next.path().exists());
    }

    #[test]
    fn a_kept_directory_has_its_content_and_no_lock() {
        let parent = tempfile::tempdir().unwrap();
        let scratch = Scratch::new(parent.path()).unwrap();
        fs::write(scratch.path().join("file"), b"x").unwrap();
        let path = parent.path().join("kept");
        scratch.keep_as(&path).unwrap();
        let names: Vec<_> = fs::read_dir(&path).unwrap().flatten().map(|e| e.file_name()).collect();
        assert_eq!(names, ["file"]);
        assert!(all(parent.path()).is_empty());
    }
}

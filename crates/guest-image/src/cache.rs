//! The cache: files of the default guest, checked at every start.
//!
//! ```text
//!   CACHE/guest-2.lock          held while something is made
//!   CACHE/guest-2/manifest.json  size, time and SHA-256 of the others
//!                 vmlinuz        the bzImage
//!                 vmlinux        the kernel in it, if it can be booted by itself
//!                 userland.cpio  what comes from packages
//!                 initramfs-….cpio  userland.cpio and the init with that checksum
//! ```
//!
//! A directory or file appears under its name only when it is complete, so readers need no lock. A file whose
//! size and modification time are those of the manifest is taken as it is; one with another time is compared
//! by its checksum; one that differs is made again.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::progress::Progress;
use crate::record::{FileRecord, sha256};
use crate::{DefaultGuest, GuestImageError, initramfs};

/// Name of the cache's directory. The number changes whenever what is in it would be made differently.
const NAME: &str = "guest-2";
const MANIFEST: &str = "manifest.json";
const BZIMAGE: &str = "vmlinuz";
const VMLINUX: &str = "vmlinux";
const USERLAND: &str = "userland.cpio";
/// An initramfs with an init that is not ours is kept so long, for another Berth that may use the cache too.
const KEEP_OTHERS: Duration = Duration::from_secs(7 * 24 * 3600);

/// What a default guest is made of, apart from our init.
pub struct Material {
    /// The kernel's release.
    pub kernel_release: String,
    /// Where it comes from, for people.
    pub package: String,
    /// The bzImage.
    pub bzimage: Vec<u8>,
    /// The kernel in it, if it can be booted by itself.
    pub vmlinux: Option<Vec<u8>>,
    /// The cpio archive of all that comes from packages.
    pub userland: Vec<u8>,
}

/// Where the material comes from.
pub trait Supplier {
    /// Gets it; `work` is an empty directory that is deleted afterwards.
    fn supply(&self, work: &Path, progress: &Progress) -> Result<Material, GuestImageError>;
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Manifest {
    kernel_release: String,
    package: String,
    /// By name in the directory.
    files: BTreeMap<String, FileRecord>,
}

/// One user's cache.
pub struct Cache {
    root: PathBuf,
    directory: PathBuf,
    init: &'static [u8],
    /// Name of the initramfs with our init.
    initramfs: String,
}

impl Cache {
    /// The cache below `root` for this init program. Touches nothing yet.
    pub fn new(root: &Path, init: &'static [u8]) -> Self {
        let digest = sha256(init);
        let initramfs = format!("initramfs-{}.cpio", digest.get(..16).unwrap_or_default());
        Self { root: root.to_owned(), directory: root.join(NAME), init, initramfs }
    }

    /// The guest, made by `supplier` as far as it is missing or damaged.
    pub fn guest(&self, supplier: &dyn Supplier) -> Result<DefaultGuest, GuestImageError> {
        if let Some(guest) = self.intact() {
            return Ok(guest);
        }
        fs::create_dir_all(&self.root).map_err(GuestImageError::file("make the directory", &self.root))?;
        let progress = Progress::default();
        let _lock = self.lock(&progress)?;
        // Another process may have made it while we waited.
        if let Some(guest) = self.intact() {
            return Ok(guest);
        }
        if let Some(manifest) = self.read_manifest()
            && self.has_intact_kernel(&manifest)
            && self.is_intact(&manifest, USERLAND)
        {
            self.add_initramfs(manifest)?;
        } else {
            self.remove_leftovers();
            self.make(supplier, &progress)?;
        }
        self.intact().ok_or_else(|| GuestImageError::File {
            doing: "use the cache in",
            path: self.directory.clone(),
            source: std::io::Error::other("its files change while they are made"),
        })
    }

    /// The guest, if all of it is there and as it was made.
    fn intact(&self) -> Option<DefaultGuest> {
        let manifest = self.read_manifest()?;
        if !self.has_intact_kernel(&manifest) || !self.is_intact(&manifest, &self.initramfs) {
            return None;
        }
        let kernel = if manifest.files.contains_key(VMLINUX) { VMLINUX } else { BZIMAGE };
        Some(DefaultGuest {
            kernel: self.directory.join(kernel),
            bzimage: self.directory.join(BZIMAGE),
            initrd: self.directory.join(&self.initramfs),
            kernel_release: manifest.kernel_release,
        })
    }

    /// Whether the kernel is as it was made, in all its forms.
    fn has_intact_kernel(&self, manifest: &Manifest) -> bool {
        let vmlinux = !manifest.files.contains_key(VMLINUX) || self.is_intact(manifest, VMLINUX);
        vmlinux && self.is_intact(manifest, BZIMAGE)
    }

    fn read_manifest(&self) -> Option<Manifest> {
        serde_json::from_slice(&fs::read(self.directory.join(MANIFEST)).ok()?).ok()
    }

    fn is_intact(&self, manifest: &Manifest, name: &str) -> bool {
        manifest.files.get(name).is_some_and(|record| record.is_intact(&self.directory.join(name)))
    }

    /// Waits until this process alone makes things. The lock ends with the file.
    fn lock(&self, progress: &Progress) -> Result<File, GuestImageError> {
        let path = self.root.join(format!("{NAME}.lock"));
        let file = File::create(&path).map_err(GuestImageError::file("create", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                progress.step("waiting for another Berth that prepares the default guest");
                file.lock().map_err(GuestImageError::file("lock", &path))?;
            }
            Err(TryLockError::Error(e)) => return Err(GuestImageError::file("lock", &path)(e)),
        }
        Ok(file)
    }

    /// Deletes what processes left that were killed. Only with the lock.
    fn remove_leftovers(&self) {
        for entry in fs::read_dir(&self.root).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(&format!("{NAME}.tmp")) {
                // What cannot be deleted is in nobody's way.
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }

    /// Makes everything in a new directory and puts it in place.
    fn make(&self, supplier: &dyn Supplier, progress: &Progress) -> Result<(), GuestImageError> {
        let temporary = self.root.join(format!("{NAME}.tmp"));
        let (work, new, old) = (temporary.join("work"), temporary.join("new"), temporary.join("old"));
        for dir in [&work, &new] {
            fs::create_dir_all(dir).map_err(GuestImageError::file("make the directory", dir))?;
        }
        let made = supplier.supply(&work, progress).and_then(|material| {
            let mut files = BTreeMap::new();
            let initramfs = self.with_init(material.userland.clone())?;
            let vmlinux = material.vmlinux.iter().map(|content| (VMLINUX, content));
            let others =
                [(BZIMAGE, &material.bzimage), (USERLAND, &material.userland), (&self.initramfs, &initramfs)];
            for (name, content) in vmlinux.chain(others) {
                files.insert(name.to_owned(), write_file(&new.join(name), content)?);
            }
            let Material { kernel_release, package, .. } = material;
            write_manifest(&new, &Manifest { kernel_release: kernel_release.clone(), package, files })?;
            // A damaged one gives way first: a directory cannot be replaced by rename.
            if self.directory.exists() {
                fs::rename(&self.directory, &old)
                    .map_err(GuestImageError::file("move away", &self.directory))?;
            }
            fs::rename(&new, &self.directory)
                .map_err(GuestImageError::file("put in place", &self.directory))?;
            Ok(kernel_release)
        });
        // The next one who makes something deletes what stays.
        let _ = fs::remove_dir_all(&temporary);
        let release = made?;
        progress
            .done(&format!("default guest ready: Linux {release} (kept in {})", self.directory.display()));
        Ok(())
    }

    /// Makes the initramfs for our init from what is there.
    fn add_initramfs(&self, mut manifest: Manifest) -> Result<(), GuestImageError> {
        let path = self.directory.join(USERLAND);
        let userland = fs::read(&path).map_err(GuestImageError::file("read", &path))?;
        let record = write_file(&self.directory.join(&self.initramfs), &self.with_init(userland)?)?;
        manifest.files.insert(self.initramfs.clone(), record);
        let now = SystemTime::now();
        manifest.files.retain(|name, _| {
            let path = self.directory.join(name);
            let age =
                fs::metadata(&path).and_then(|m| m.modified()).ok().and_then(|m| now.duration_since(m).ok());
            let old = name.starts_with("initramfs-") && age.is_some_and(|a| a > KEEP_OTHERS);
            !old || fs::remove_file(&path).is_err()
        });
        write_manifest(&self.directory, &manifest)
    }

    fn with_init(&self, userland: Vec<u8>) -> Result<Vec<u8>, GuestImageError> {
        initramfs::with_init(userland, self.init)
            .map_err(GuestImageError::file("build the initramfs in", &self.directory))
    }
}

fn write_manifest(directory: &Path, manifest: &Manifest) -> Result<(), GuestImageError> {
    let path = directory.join(MANIFEST);
    let text =
        serde_json::to_vec_pretty(manifest).map_err(|e| GuestImageError::file("write", &path)(e.into()))?;
    write_file(&path, &text).map(|_| ())
}

/// Writes a file that appears under its name only when it is complete.
fn write_file(path: &Path, content: &[u8]) -> Result<FileRecord, GuestImageError> {
    let temporary = path.with_extension("tmp");
    let write = || -> std::io::Result<fs::Metadata> {
        let mut file = File::create(&temporary)?;
        file.write_all(content)?;
        // A host that crashes must not leave the name with a file that is only half there.
        file.sync_all()?;
        file.metadata()
    };
    let metadata = write().map_err(GuestImageError::file("write", &temporary))?;
    fs::rename(&temporary, path).map_err(GuestImageError::file("put in place", path))?;
    Ok(FileRecord::of_content(content, &metadata))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    struct Counting {
        calls: Cell<u32>,
        vmlinux: bool,
    }

    impl Default for Counting {
        fn default() -> Self {
            Self { calls: Cell::new(0), vmlinux: true }
        }
    }

    impl Supplier for Counting {
        fn supply(&self, _work: &Path, _progress: &Progress) -> Result<Material, GuestImageError> {
            self.calls.set(self.calls.get() + 1);
            Ok(Material {
                kernel_release: "6.1".to_owned(),
                package: "test".to_owned(),
                bzimage: b"bzImage".to_vec(),
                vmlinux: self.vmlinux.then(|| b"kernel".to_vec()),
                userland: b"userland".to_vec(),
            })
        }
    }

    struct Failing;

    impl Supplier for Failing {
        fn supply(&self, _work: &Path, _progress: &Progress) -> Result<Material, GuestImageError> {
            Err(GuestImageError::NoApt { missing: "apt-get" })
        }
    }

    #[test]
    fn a_second_start_uses_what_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let supplier = Counting::default();
        let first = Cache::new(dir.path(), b"init").guest(&supplier).unwrap();
        let second = Cache::new(dir.path(), b"init").guest(&Failing).unwrap();
        assert_eq!(first, second);
        assert_eq!(supplier.calls.get(), 1);
        assert_eq!(fs::read(first.kernel).unwrap(), b"kernel");
        assert_eq!(first.kernel_release, "6.1");
        assert!(!dir.path().join("guest-2.tmp").exists());
    }

    #[test]
    fn another_init_makes_only_another_initramfs() {
        let dir = tempfile::tempdir().unwrap();
        let one = Cache::new(dir.path(), b"init one").guest(&Counting::default()).unwrap();
        let two = Cache::new(dir.path(), b"init two").guest(&Failing).unwrap();
        assert_ne!(one.initrd, two.initrd);
        assert!(fs::read(&two.initrd).unwrap().windows(8).any(|w| w == b"init two"));
        // The first is still there for the Berth that made it.
        assert_eq!(Cache::new(dir.path(), b"init one").guest(&Failing).unwrap(), one);
    }

    #[test]
    fn damage_is_noticed_and_repaired() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path(), b"init");
        let supplier = Counting::default();
        let guest = cache.guest(&supplier).unwrap();

        fs::write(&guest.kernel, b"lenrek").unwrap();
        cache.guest(&supplier).unwrap();
        assert_eq!(fs::read(&guest.kernel).unwrap(), b"kernel");
        assert_eq!(supplier.calls.get(), 2);
        fs::remove_file(&guest.bzimage).unwrap();
        cache.guest(&supplier).unwrap();
        assert_eq!(supplier.calls.get(), 3);

        fs::write(&guest.initrd, b"short").unwrap();
        cache.guest(&Failing).unwrap();
        assert_ne!(fs::read(&guest.initrd).unwrap(), b"short");

        for manifest in ["", "{", "{\"kernel_release\": 6}"] {
            fs::write(dir.path().join("guest-2/manifest.json"), manifest).unwrap();
            cache.guest(&supplier).unwrap();
        }
        assert_eq!(supplier.calls.get(), 6);
    }

    #[test]
    fn another_time_with_the_same_content_is_no_damage() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path(), b"init");
        let guest = cache.guest(&Counting::default()).unwrap();
        let file = File::options().write(true).open(&guest.kernel).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000)).unwrap();
        assert_eq!(cache.guest(&Failing).unwrap(), guest);
    }

    #[test]
    fn a_kernel_that_must_unpack_itself_is_booted_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let supplier = Counting { vmlinux: false, ..Counting::default() };
        let guest = Cache::new(dir.path(), b"init").guest(&supplier).unwrap();
        assert_eq!(guest.kernel, guest.bzimage);
        assert_eq!(fs::read(guest.kernel).unwrap(), b"bzImage");
        assert_eq!(Cache::new(dir.path(), b"init").guest(&Failing).unwrap().kernel, guest.bzimage);
    }

    #[test]
    fn a_failure_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Cache::new(dir.path(), b"init").guest(&Failing).is_err());
        let names: Vec<_> = fs::read_dir(dir.path()).unwrap().flatten().map(|e| e.file_name()).collect();
        assert_eq!(names, ["guest-2.lock"]);
    }

    #[test]
    fn many_at_once_make_it_once() {
        let dir = tempfile::tempdir().unwrap();
        let made: u32 = std::thread::scope(|scope| {
            let start = || {
                let supplier = Counting::default();
                Cache::new(dir.path(), b"init").guest(&supplier).unwrap();
                supplier.calls.get()
            };
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(start)).collect();
            threads.into_iter().map(|t| t.join().unwrap()).sum()
        });
        assert_eq!(made, 1);
    }
}

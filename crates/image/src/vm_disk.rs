//! Disks of VMs that started from an image: what a VM writes goes there, and the image stays as it is.
//!
//! ```text
//!   DATA/vms/NAME/disk.qcow2   what the VM NAME has written, on top of the image's disk
//!                 vm.toml      which image that is
//!                 lock         locked while the VM runs
//!   DATA/vms/.scratch-…        the same for a VM without a name: it goes away with the VM
//! ```
//! A named VM keeps its disk until it is removed. An image stays as long as a disk on top of it.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use berth_disk::{CreateOptions, Format};
use serde::{Deserialize, Serialize};

use crate::scratch::{self, Scratch};
use crate::store::{Image, Images};
use crate::{ImageError, Name};

const RECORD: &str = "vm.toml";
const DISK: &str = "disk.qcow2";
const LOCK: &str = "lock";

/// Which image a VM's disk is on top of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    image: Name,
    /// SHA-256 of the image's disk: a name may be used again for another image.
    sha256: String,
}

/// The disk of a VM that runs or is about to. Keep it as long as the VM runs.
pub struct VmDisk {
    path: PathBuf,
    _owner: Owner,
}

/// What keeps others away from the disk.
enum Owner {
    /// The disk goes away with it.
    Scratch { _directory: Scratch },
    /// The disk stays.
    Vm { _lock: File },
}

impl VmDisk {
    /// The disk, a qcow2 image.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Images {
    /// The disk of the VM `vm` on top of `image`: the one that it has, else a new one. For `None` a new one that
    /// goes away when it is dropped.
    ///
    /// # Errors
    /// [`ImageError::VmRuns`], [`ImageError::OtherImage`], and what the host says.
    pub fn vm_disk(&self, image: &Image, vm: Option<&Name>) -> Result<VmDisk, ImageError> {
        // The image must not go away before it is recorded that it is used.
        let _lock = self.lock()?;
        let record = Record { image: image.name.clone(), sha256: image.manifest.disk.sha256.clone() };
        let new = || -> Result<Scratch, ImageError> {
            let scratch = Scratch::new(self.vms())?;
            make(scratch.path(), image, &record)?;
            Ok(scratch)
        };
        let Some(name) = vm else {
            let directory = new()?;
            return Ok(VmDisk {
                path: directory.path().join(DISK),
                _owner: Owner::Scratch { _directory: directory },
            });
        };
        let directory = self.vms().join(name.as_str());
        if !directory.exists() {
            new()?.keep_as(&directory)?;
        }
        let lock = lock_vm(&directory, name)?;
        let has = read_record(&directory)?;
        if has != record {
            return Err(ImageError::OtherImage { vm: name.clone(), image: has.image });
        }
        Ok(VmDisk { path: directory.join(DISK), _owner: Owner::Vm { _lock: lock } })
    }

    /// Names of the VMs that have a disk, sorted.
    pub fn vm_names(&self) -> Vec<Name> {
        let entries = fs::read_dir(self.vms()).into_iter().flatten().flatten();
        let mut names: Vec<Name> = entries.filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
        names.sort();
        names
    }

    /// Removes the VM `name` with its disk.
    ///
    /// # Errors
    /// [`ImageError::UnknownVm`], [`ImageError::VmRuns`], and what the host says.
    pub fn remove_vm(&self, name: &Name) -> Result<(), ImageError> {
        let _lock = self.lock()?;
        let directory = self.vms().join(name.as_str());
        if !directory.exists() {
            return Err(ImageError::UnknownVm { name: name.clone(), existing: self.vm_names() });
        }
        let _lock = lock_vm(&directory, name)?;
        // Its name goes first, so that nobody finds half a VM.
        let scratch = Scratch::new(self.vms())?;
        let gone = scratch.path().join(name.as_str());
        fs::rename(&directory, &gone).map_err(ImageError::file("remove", &directory))?;
        fs::remove_dir_all(&gone).map_err(ImageError::file("remove", &gone))
    }

    /// The VMs with a disk on top of the image `name`, for people.
    pub(crate) fn users(&self, name: &Name) -> Vec<String> {
        let uses = |directory: &Path| read_record(directory).is_ok_and(|record| record.image == *name);
        let named = self.vm_names().into_iter().filter(|vm| uses(&self.vms().join(vm.as_str())));
        let mut users: Vec<String> = named.map(String::from).collect();
        scratch::sweep(self.vms());
        if scratch::all(self.vms()).iter().any(|directory| uses(directory)) {
            users.push("a running VM without a name".to_owned());
        }
        users
    }
}

/// Makes the files of a VM in its new directory.
fn make(directory: &Path, image: &Image, record: &Record) -> Result<(), ImageError> {
    let path = directory.join(RECORD);
    let text = toml::to_string(record).map_err(|e| std::io::Error::other(e.to_string()));
    text.and_then(|text| fs::write(&path, text)).map_err(ImageError::file("write", &path))?;
    berth_disk::create(&CreateOptions {
        path: directory.join(DISK),
        format: Format::Qcow2,
        size: None,
        backing: Some((image.disk(), Format::Raw)),
    })?;
    Ok(())
}

fn read_record(directory: &Path) -> Result<Record, ImageError> {
    let path = directory.join(RECORD);
    let text = fs::read_to_string(&path);
    let record = text
        .and_then(|text| toml::from_str(&text).map_err(|e| std::io::Error::other(e.message().to_owned())));
    record.map_err(ImageError::file("read", &path))
}

/// The lock of the VM's owner, unless somebody has it.
fn lock_vm(directory: &Path, name: &Name) -> Result<File, ImageError> {
    let path = directory.join(LOCK);
    let file = File::create(&path).map_err(ImageError::file("create", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(ImageError::VmRuns { name: name.clone() }),
        Err(TryLockError::Error(e)) => Err(ImageError::file("lock", &path)(e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ImportOptions;

    struct Setup {
        dir: tempfile::TempDir,
        images: Images,
        image: Image,
    }

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    impl Setup {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let images = Images::new(dir.path());
            let image = import(&dir, &images, "one", 7);
            Self { dir, images, image }
        }

        fn disk(&self, vm: Option<&str>) -> Result<VmDisk, ImageError> {
            self.images.vm_disk(&self.image, vm.map(name).as_ref())
        }
    }

    fn import(dir: &tempfile::TempDir, images: &Images, image: &str, content: u8) -> Image {
        let (disk, kernel) = (dir.path().join("d"), dir.path().join("k"));
        fs::write(&disk, [content; 4096]).unwrap();
        fs::write(&kernel, b"kernel").unwrap();
        let options = ImportOptions { disk, kernel: Some(kernel), initrd: None, cmdline: None };
        images.import(&name(image), &options).unwrap()
    }

    #[test]
    fn a_named_vm_keeps_its_disk() {
        let setup = Setup::new();
        let disk = setup.disk(Some("web")).unwrap();
        let path = disk.path().to_owned();
        let info = berth_disk::info(&path, Some(Format::Qcow2)).unwrap();
        assert_eq!((info.size, info.backing), (4096, Some(fs::canonicalize(setup.image.disk()).unwrap())));
        assert!(matches!(setup.disk(Some("web")), Err(ImageError::VmRuns { .. })));
        assert!(matches!(setup.images.remove_vm(&name("web")), Err(ImageError::VmRuns { .. })));
        drop(disk);
        let mark = fs::metadata(&path).unwrap();
        assert_eq!(setup.disk(Some("web")).unwrap().path(), path);
        use std::os::unix::fs::MetadataExt;
        assert_eq!(fs::metadata(&path).unwrap().ino(), mark.ino(), "it is another disk");

        assert_eq!(setup.images.vm_names(), [name("web")]);
        setup.images.remove_vm(&name("web")).unwrap();
        assert!(!path.exists());
        assert!(matches!(setup.images.remove_vm(&name("web")), Err(ImageError::UnknownVm { .. })));
    }

    #[test]
    fn a_vm_without_a_name_leaves_nothing() {
        let setup = Setup::new();
        let (one, two) = (setup.disk(None).unwrap(), setup.disk(None).unwrap());
        assert_ne!(one.path(), two.path());
        let path = one.path().to_owned();
        drop((one, two));
        assert!(!path.exists() && setup.images.vm_names().is_empty());
    }

    #[test]
    fn an_image_stays_while_a_disk_is_on_top_of_it() {
        let setup = Setup::new();
        let error = |setup: &Setup| setup.images.remove(&name("one")).unwrap_err().to_string();
        drop(setup.disk(Some("web")).unwrap());
        assert!(error(&setup).contains("berth rm web"), "{}", error(&setup));
        setup.images.remove_vm(&name("web")).unwrap();
        let running = setup.disk(None).unwrap();
        assert!(error(&setup).contains("running"), "{}", error(&setup));
        drop(running);
        setup.images.remove(&name("one")).unwrap();
    }

    #[test]
    fn a_disk_is_only_used_with_its_image() {
        let setup = Setup::new();
        drop(setup.disk(Some("web")).unwrap());
        let other = import(&setup.dir, &setup.images, "two", 8);
        let error = setup.images.vm_disk(&other, Some(&name("web"))).err().unwrap().to_string();
        assert!(error.contains("image one") && error.contains("berth rm web"), "{error}");
        // Not even if the other has the same name.
        let renamed = Image { name: name("one"), ..other };
        assert!(matches!(
            setup.images.vm_disk(&renamed, Some(&name("web"))),
            Err(ImageError::OtherImage { .. })
        ));
    }
}

//! All images of a user.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use berth_guest_image::record::FileRecord;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::scratch::Scratch;
use crate::{ImageError, Name};

const MANIFEST: &str = "image.toml";
const DISK: &str = "disk.raw";
const KERNEL: &str = "kernel";
const INITRD: &str = "initrd";
const LOCK: &str = ".lock";
/// Version of [`Manifest`]. Another one is not understood.
const VERSION: u32 = 1;

/// What an image is: its `image.toml`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    version: u32,
    /// What it was made from, for people.
    pub source: String,
    /// When, in RFC 3339's form.
    pub created: String,
    /// What the kernel's command line must say for this disk, such as `root=/dev/vda`.
    pub cmdline: String,
    /// The disk's file, whose size is that of the disk.
    pub disk: FileRecord,
    /// The kernel's file.
    pub kernel: FileRecord,
    /// The initrd's file, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd: Option<FileRecord>,
}

/// An image whose files are there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Its name.
    pub name: Name,
    /// Its directory.
    pub directory: PathBuf,
    /// What it is.
    pub manifest: Manifest,
}

impl Image {
    /// The root disk, a raw image. It is never written.
    pub fn disk(&self) -> PathBuf {
        self.directory.join(DISK)
    }

    /// The kernel.
    pub fn kernel(&self) -> PathBuf {
        self.directory.join(KERNEL)
    }

    /// The initrd, if there is one.
    pub fn initrd(&self) -> Option<PathBuf> {
        self.manifest.initrd.as_ref().map(|_| self.directory.join(INITRD))
    }

    /// Bytes that its files occupy on the host.
    pub fn disk_usage(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let files = [Some(self.disk()), Some(self.kernel()), self.initrd()];
        // st_blocks counts 512 bytes, whatever the file system's blocks are (stat(2)).
        files.into_iter().flatten().filter_map(|p| fs::metadata(p).ok()).map(|m| m.blocks() * 512).sum()
    }

    fn check(&self) -> Result<(), ImageError> {
        let Manifest { disk, kernel, initrd, .. } = &self.manifest;
        let initrd = self.initrd().zip(initrd.as_ref());
        let files = [(self.disk(), disk), (self.kernel(), kernel)].into_iter().chain(initrd);
        for (path, record) in files {
            if !record.is_intact(&path) {
                return Err(ImageError::Damaged { name: self.name.clone(), path });
            }
        }
        Ok(())
    }
}

/// What a new image is made of. Its disk is made in place: [`Draft::disk`].
pub struct Draft {
    scratch: Scratch,
}

/// What a new image is besides its disk.
pub struct Description {
    /// What it was made from, for people.
    pub source: String,
    /// What the kernel's command line must say.
    pub cmdline: String,
    /// The kernel.
    pub kernel: Vec<u8>,
    /// The initrd, if there is one.
    pub initrd: Option<Vec<u8>>,
}

impl Draft {
    /// Where the disk is to be made.
    pub fn disk(&self) -> PathBuf {
        self.scratch.path().join(DISK)
    }

    /// Writes the other files and the description.
    fn finish(&self, description: Description) -> Result<(), ImageError> {
        let Description { source, cmdline, kernel, initrd } = description;
        let write = |name: &str, content: &[u8]| {
            let path = self.scratch.path().join(name);
            fs::write(&path, content).map_err(ImageError::file("write", &path))?;
            seal(&path)
        };
        let created =
            OffsetDateTime::now_utc().replace_nanosecond(0).ok().and_then(|t| t.format(&Rfc3339).ok());
        let manifest = Manifest {
            version: VERSION,
            source,
            created: created.unwrap_or_default(),
            cmdline,
            disk: seal(&self.disk())?,
            kernel: write(KERNEL, &kernel)?,
            initrd: initrd.map(|content| write(INITRD, &content)).transpose()?,
        };
        let path = self.scratch.path().join(MANIFEST);
        let text = toml::to_string(&manifest).map_err(|e| std::io::Error::other(e.to_string()));
        let written =
            text.and_then(|text| fs::write(&path, text)).and_then(|()| File::open(&path)?.sync_all());
        written.map_err(ImageError::file("write", &path))
    }
}

/// Makes a finished file read-only and safe on the disk, and records it.
fn seal(path: &Path) -> Result<FileRecord, ImageError> {
    use std::os::unix::fs::PermissionsExt;
    let seal = || {
        let file = File::open(path)?;
        file.set_permissions(fs::Permissions::from_mode(0o444))?;
        // A host that crashes must not leave an image with a file that is only half there.
        file.sync_all()?;
        FileRecord::of(path)
    };
    seal().map_err(ImageError::file("complete", path))
}

/// The images of a user.
pub struct Images {
    root: PathBuf,
    vms: PathBuf,
}

impl Images {
    /// Those in the data directory `data` (see [`crate::data_directory`]).
    pub fn new(data: &Path) -> Self {
        Self { root: data.join("images"), vms: data.join("vms") }
    }

    /// Names of all images, sorted.
    pub fn names(&self) -> Vec<Name> {
        let entries = fs::read_dir(&self.root).into_iter().flatten().flatten();
        let is_image = |name: &Name| self.directory(name).join(MANIFEST).is_file();
        let names = entries.filter_map(|e| e.file_name().to_str()?.parse().ok());
        let mut names: Vec<Name> = names.filter(is_image).collect();
        names.sort();
        names
    }

    /// The image `name`, with its description but without a look at its files.
    ///
    /// # Errors
    /// [`ImageError::Unknown`], [`ImageError::BadManifest`].
    pub fn describe(&self, name: &Name) -> Result<Image, ImageError> {
        let directory = self.directory(name);
        let path = directory.join(MANIFEST);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(ImageError::Unknown { name: name.clone(), existing: self.names() });
            }
            Err(e) => return Err(ImageError::file("read", &path)(e)),
        };
        let bad = |reason: String| ImageError::BadManifest { name: name.clone(), path: path.clone(), reason };
        let manifest: Manifest = toml::from_str(&text).map_err(|e| bad(e.message().replace('\n', ", ")))?;
        if manifest.version != VERSION {
            return Err(bad(format!("it has version {} instead of {VERSION}", manifest.version)));
        }
        Ok(Image { name: name.clone(), directory, manifest })
    }

    /// The image `name`, if all its files are as they were made.
    ///
    /// # Errors
    /// As [`Self::describe`], and [`ImageError::Damaged`].
    pub fn get(&self, name: &Name) -> Result<Image, ImageError> {
        let image = self.describe(name)?;
        image.check()?;
        Ok(image)
    }

    /// Makes the image `name`: `make` makes its disk in the given draft and says what the rest is.
    ///
    /// # Errors
    /// [`ImageError::Exists`], [`ImageError::File`], and what `make` returns.
    pub fn create(
        &self,
        name: &Name,
        make: impl FnOnce(&Draft) -> Result<Description, ImageError>,
    ) -> Result<Image, ImageError> {
        // Better now than after minutes of work.
        self.check_absent(name)?;
        let draft = Draft { scratch: Scratch::new(&self.root)? };
        let description = make(&draft)?;
        draft.finish(description)?;
        let _lock = self.lock()?;
        self.check_absent(name)?;
        draft.scratch.keep_as(&self.directory(name))?;
        self.describe(name)
    }

    /// Removes the image `name`.
    ///
    /// # Errors
    /// [`ImageError::Unknown`], [`ImageError::InUse`], [`ImageError::File`].
    pub fn remove(&self, name: &Name) -> Result<(), ImageError> {
        let _lock = self.lock()?;
        let directory = self.directory(name);
        if !directory.exists() {
            return Err(ImageError::Unknown { name: name.clone(), existing: self.names() });
        }
        let users = self.users(name);
        if !users.is_empty() {
            return Err(ImageError::InUse { name: name.clone(), users });
        }
        // Its name goes first, so that nobody finds half an image.
        let scratch = Scratch::new(&self.root)?;
        let gone = scratch.path().join(name.as_str());
        fs::rename(&directory, &gone).map_err(ImageError::file("remove", &directory))?;
        fs::remove_dir_all(&gone).map_err(ImageError::file("remove", &gone))
    }

    fn check_absent(&self, name: &Name) -> Result<(), ImageError> {
        if self.directory(name).exists() { Err(ImageError::Exists { name: name.clone() }) } else { Ok(()) }
    }

    fn directory(&self, name: &Name) -> PathBuf {
        self.root.join(name.as_str())
    }

    /// Where the disks of VMs are kept.
    pub(crate) fn vms(&self) -> &Path {
        &self.vms
    }

    /// Waits until this process alone lets images appear, go away or be used. The lock ends with the file.
    pub(crate) fn lock(&self) -> Result<File, ImageError> {
        fs::create_dir_all(&self.root).map_err(ImageError::file("make the directory", &self.root))?;
        let path = self.root.join(LOCK);
        let file = File::create(&path).map_err(ImageError::file("create", &path))?;
        file.lock().map_err(ImageError::file("lock", &path))?;
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    fn create(images: &Images, text: &str) -> Result<Image, ImageError> {
        images.create(&name(text), |draft| {
            fs::write(draft.disk(), b"the disk").unwrap();
            Ok(Description {
                source: "a test".to_owned(),
                cmdline: "root=/dev/vda".to_owned(),
                kernel: b"the kernel".to_vec(),
                initrd: None,
            })
        })
    }

    #[test]
    fn what_is_created_can_be_found_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let images = Images::new(dir.path());
        assert!(images.names().is_empty());
        let made = create(&images, "b").unwrap();
        create(&images, "a").unwrap();
        assert_eq!(images.names(), [name("a"), name("b")]);
        assert_eq!(images.get(&name("b")).unwrap(), made);
        assert_eq!(fs::read(made.disk()).unwrap(), b"the disk");
        assert_eq!(fs::read(made.kernel()).unwrap(), b"the kernel");
        assert_eq!(made.initrd(), None);
        assert!(made.disk_usage() > 0);
        assert!(made.manifest.created.starts_with("20") && made.manifest.created.ends_with('Z'));

        images.remove(&name("b")).unwrap();
        assert_eq!(images.names(), [name("a")]);
        let error = images.get(&name("b")).unwrap_err().to_string();
        assert_eq!(error, "there is no image b: there is a");
        assert!(matches!(images.remove(&name("b")), Err(ImageError::Unknown { .. })));
        assert!(crate::scratch::all(&dir.path().join("images")).is_empty());
    }

    #[test]
    fn a_name_is_taken_once() {
        let dir = tempfile::tempdir().unwrap();
        let images = Images::new(dir.path());
        create(&images, "a").unwrap();
        let again = images.create(&name("a"), |_| panic!("nothing is made"));
        assert!(matches!(again, Err(ImageError::Exists { .. })));
    }

    #[test]
    fn a_failure_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let images = Images::new(dir.path());
        let failed = images.create(&name("a"), |_| Err(ImageError::NoDataDirectory));
        assert!(matches!(failed, Err(ImageError::NoDataDirectory)));
        assert!(images.names().is_empty());
        assert!(crate::scratch::all(&dir.path().join("images")).is_empty());
    }

    #[test]
    fn damage_is_noticed() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let images = Images::new(dir.path());
        let image = create(&images, "a").unwrap();
        fs::set_permissions(image.disk(), fs::Permissions::from_mode(0o644)).unwrap();
        fs::write(image.disk(), b"eht disk").unwrap();
        let error = images.get(&name("a")).unwrap_err();
        assert!(matches!(&error, ImageError::Damaged { path, .. } if *path == image.disk()), "{error}");
        fs::remove_file(image.disk()).unwrap();
        assert!(images.get(&name("a")).is_err());
        // It can still be listed and removed.
        images.describe(&name("a")).unwrap();
        images.remove(&name("a")).unwrap();
    }

    #[test]
    fn descriptions_of_another_version_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let images = Images::new(dir.path());
        let image = create(&images, "a").unwrap();
        let path = image.directory.join(MANIFEST);
        let text = fs::read_to_string(&path).unwrap();
        for (text, said) in [
            (text.replace("version = 1", "version = 2"), "it has version 2"),
            (text.replace("source", "sauce"), "sauce"),
            ("]".to_owned(), ""),
        ] {
            fs::write(&path, text).unwrap();
            let error = images.get(&name("a")).unwrap_err();
            assert!(matches!(error, ImageError::BadManifest { .. }));
            assert!(error.to_string().contains(said), "{error}");
        }
    }
}

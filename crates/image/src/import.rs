//! Images from disk files that exist.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use berth_disk::Format;
use berth_guest_image::progress::Progress;

use crate::boot_files::{self, BootFiles};
use crate::store::{Description, Image, Images};
use crate::{ImageError, Name};

/// Disks have whole sectors.
const SECTOR: u64 = 512;
/// First bytes of a qcow2 disk, which is converted.
const QCOW2: &[u8] = b"QFI\xfb";
/// Formats of disks and archives that a guest would see as garbage, by their first bytes.
const OTHERS: [(&[u8], &str); 7] = [
    (b"KDMV", "a VMDK file"),
    (b"vhdxfile", "a VHDX file"),
    (b"conectix", "a VHD file"),
    (b"<<< ", "a VirtualBox disk"),
    (b"\x1f\x8b", "compressed with gzip"),
    (b"\xfd7zXZ", "compressed with xz"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd"),
];

/// What to import.
#[derive(Clone, Debug)]
pub struct ImportOptions {
    /// The disk: raw or qcow2, also with backing files.
    pub disk: PathBuf,
    /// The kernel to boot it with; without it the one in the disk.
    pub kernel: Option<PathBuf>,
    /// Its initrd; only with a kernel.
    pub initrd: Option<PathBuf>,
    /// What the kernel's command line says; without it the root file system that the kernel was found in, or the
    /// whole disk.
    pub cmdline: Option<String>,
}

impl Images {
    /// Makes the image `name` of a copy of a disk.
    ///
    /// # Errors
    /// [`ImageError`]: a disk or kernel that cannot be used, or a name that is taken.
    pub fn import(&self, name: &Name, options: &ImportOptions) -> Result<Image, ImageError> {
        let source = &options.disk;
        let mut file = File::open(source).map_err(ImageError::file("open", source))?;
        let format = format(&mut file, source)?;
        let named = match &options.kernel {
            Some(kernel) => Some(BootFiles {
                release: String::new(),
                kernel: read(kernel)?,
                initrd: options.initrd.as_deref().map(read).transpose()?,
                partition: None,
            }),
            None => None,
        };
        let progress = Progress::default();
        let image = self.create(name, |draft| {
            progress.step(&format!("copying {}", source.display()));
            let disk = draft.disk();
            match format {
                Format::Raw => copy_sparse(&mut file, &disk, &progress)
                    .map_err(ImageError::file("copy the disk to", &disk))?,
                Format::Qcow2 => {
                    berth_disk::convert(source, Some(format), &disk, Format::Raw, |done, size| {
                        progress.fraction(done as f64 / size as f64);
                    })?
                }
            }
            let boot = match named {
                Some(files) => files,
                None => {
                    progress.step("taking kernel and initrd out of the disk");
                    boot_files::find(&disk)
                        .map_err(|reason| ImageError::NoKernel { disk: source.clone(), reason })?
                }
            };
            progress.step("computing checksums");
            let partition = boot.partition.map(|n| n.to_string()).unwrap_or_default();
            let linux =
                if boot.release.is_empty() { String::new() } else { format!(", Linux {}", boot.release) };
            Ok(Description {
                source: format!("{}{linux}", source.display()),
                cmdline: options.cmdline.clone().unwrap_or_else(|| format!("root=/dev/vda{partition} rw")),
                kernel: boot.kernel,
                initrd: boot.initrd,
            })
        })?;
        progress.done(&format!("image {name} ready (kept in {})", image.directory.display()));
        Ok(image)
    }
}

fn read(path: &Path) -> Result<Vec<u8>, ImageError> {
    fs::read(path).map_err(ImageError::file("read", path))
}

/// The disk's format; refuses what is no disk.
///
/// That the content decides is right only here, where it comes from no guest that runs: see [`Format::of_name`].
fn format(file: &mut File, path: &Path) -> Result<Format, ImageError> {
    let bad = |reason: String| Err(ImageError::NotADisk { path: path.to_owned(), reason });
    let mut head = Vec::new();
    Read::by_ref(file).take(SECTOR).read_to_end(&mut head).map_err(ImageError::file("read", path))?;
    let size = file.seek(SeekFrom::End(0)).map_err(ImageError::file("read", path))?;
    if head.starts_with(QCOW2) {
        return Ok(Format::Qcow2);
    }
    if let Some((_, what)) = OTHERS.iter().find(|(magic, _)| head.starts_with(magic)) {
        return bad(format!(
            "it is {what}: make a raw disk of it first, such as with `qemu-img convert -O raw`"
        ));
    }
    if size == 0 || !size.is_multiple_of(SECTOR) {
        return bad(format!(
            "a raw disk has whole sectors of {SECTOR} bytes, and this file has {size} bytes"
        ));
    }
    Ok(Format::Raw)
}

/// Copies a file without its holes, and without its data where the file system can share that.
fn copy_sparse(from: &mut File, to: &Path, progress: &Progress) -> std::io::Result<()> {
    use rustix::fs::{SeekFrom, ftruncate, ioctl_ficlone, seek};
    let mut to = File::create_new(to)?;
    // A file system that cannot share data says so.
    if ioctl_ficlone(&to, &from).is_ok() {
        return Ok(());
    }
    let size = from.metadata()?.len();
    ftruncate(&to, size)?;
    let mut position = 0;
    while position < size {
        let start = match seek(&from, SeekFrom::Data(position)) {
            Ok(start) => start,
            // Nothing but a hole is left.
            Err(rustix::io::Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        let end = seek(&from, SeekFrom::Hole(start))?;
        seek(&from, SeekFrom::Start(start))?;
        seek(&to, SeekFrom::Start(start))?;
        let copied = std::io::copy(&mut from.by_ref().take(end.saturating_sub(start)), &mut to)?;
        if copied == 0 {
            return Err(std::io::Error::other("the file becomes shorter while it is copied"));
        }
        position = start + copied;
        progress.fraction(position as f64 / size as f64);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_disk::CreateOptions;
    use std::os::unix::fs::{FileExt, MetadataExt};

    struct Setup {
        dir: tempfile::TempDir,
        images: Images,
    }

    impl Setup {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let images = Images::new(dir.path());
            Self { dir, images }
        }

        fn file(&self, name: &str, content: &[u8]) -> PathBuf {
            let path = self.dir.path().join(name);
            fs::write(&path, content).unwrap();
            path
        }

        fn import(&self, disk: &Path, kernel: Option<PathBuf>) -> Result<Image, ImageError> {
            let initrd = kernel.as_ref().map(|_| self.file("initrd", b"the initrd"));
            let options = ImportOptions { disk: disk.to_owned(), kernel, initrd, cmdline: None };
            self.images.import(&"test".parse().unwrap(), &options)
        }
    }

    #[test]
    fn a_raw_disk_is_copied_with_its_holes() {
        let setup = Setup::new();
        let disk = setup.dir.path().join("disk");
        let file = File::create(&disk).unwrap();
        file.set_len(64 << 20).unwrap();
        for offset in [0, 20 << 20, (64 << 20) - 1] {
            file.write_all_at(b"x", offset).unwrap();
        }
        let image = setup.import(&disk, Some(setup.file("kernel", b"the kernel"))).unwrap();
        assert_eq!(image.manifest.disk.size, 64 << 20);
        assert_eq!(image.manifest.cmdline, "root=/dev/vda rw");
        assert!(fs::read(image.disk()).unwrap() == fs::read(&disk).unwrap(), "the copy differs");
        assert!(fs::metadata(image.disk()).unwrap().blocks() * 512 < 4 << 20, "the copy has no holes");
        assert_eq!(fs::read(image.kernel()).unwrap(), b"the kernel");
        assert_eq!(fs::read(image.initrd().unwrap()).unwrap(), b"the initrd");
    }

    #[test]
    fn a_qcow2_disk_is_converted_with_what_it_is_on_top_of() {
        let setup = Setup::new();
        let base = setup.file("base", &[7; 65536]);
        let top = setup.dir.path().join("top");
        let backing = Some((base, Format::Raw));
        berth_disk::create(&CreateOptions { path: top.clone(), format: Format::Qcow2, size: None, backing })
            .unwrap();
        let image = setup.import(&top, Some(setup.file("kernel", b"k"))).unwrap();
        assert!(fs::read(image.disk()).unwrap() == [7; 65536]);
    }

    #[test]
    fn files_that_are_no_disks_are_refused() {
        let setup = Setup::new();
        for (content, said) in [
            (&b""[..], "0 bytes"),
            (&[0; 513], "513 bytes"),
            (b"QFI\xfb", "qcow2"),
            (&[&b"KDMV"[..], &[0; 508]].concat(), "VMDK"),
            (&[&b"\xfd7zXZ"[..], &[0; 507]].concat(), "xz"),
        ] {
            let kernel = setup.file("kernel", b"k");
            let error = setup.import(&setup.file("disk", content), Some(kernel)).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
        assert!(setup.images.names().is_empty());
    }

    #[test]
    fn without_a_kernel_the_disk_must_have_one() {
        let setup = Setup::new();
        let error = setup.import(&setup.file("disk", &[0; 4096]), None).unwrap_err().to_string();
        assert!(error.contains("ext4") && error.contains("--kernel"), "{error}");
        assert!(setup.images.names().is_empty());
    }
}

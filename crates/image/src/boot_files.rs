//! Kernel and initrd out of a disk, without mounting it: Berth boots them itself, as no firmware and no boot loader
//! is there to do it.
//!
//! The disk is one ext4 file system, or has a GPT with such a partition. The kernel is the one that the links
//! `/vmlinuz` or `/boot/vmlinuz` name, else the newest of `/boot/vmlinuz-*`. Both files are kept unpacked if their
//! compression is known: unpacking would cost each VM CPU time and memory at each boot.

use std::cmp::Ordering;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use berth_guest_image::decompress::Format;
use berth_guest_image::vmlinux;
use ext4_view::{Ext4, Ext4Error, Ext4Read};
use gpt::disk::LogicalBlockSize;

/// Most bytes of a kernel or initrd.
const MAX_FILE: u64 = 1 << 30;
/// Where a link to the kernel may be.
const LINKS: [&str; 2] = ["/vmlinuz", "/boot/vmlinuz"];
/// Names of an initrd, before and after the kernel's release: Debian's, Fedora's, openSUSE's.
const INITRDS: [(&str, &str); 3] =
    [("/boot/initrd.img-", ""), ("/boot/initramfs-", ".img"), ("/boot/initrd-", "")];

/// What is booted from a disk.
#[derive(Debug, PartialEq, Eq)]
pub struct BootFiles {
    /// The kernel's release, such as `6.1.0-56-cloud-amd64`.
    pub release: String,
    /// The kernel.
    pub kernel: Vec<u8>,
    /// Its initrd, if there is one.
    pub initrd: Option<Vec<u8>>,
    /// Number of the partition that they are in, from 1; `None` if the disk has no partitions.
    pub partition: Option<u32>,
}

/// Finds kernel and initrd in a raw disk.
///
/// # Errors
/// For people: no file system or kernel that is understood, or one that is damaged.
pub fn find(disk: &Path) -> Result<BootFiles, String> {
    let open = || File::open(disk).map_err(|e| format!("cannot be opened: {e}"));
    if let Ok(root) = Ext4::load(Box::new(Partition { disk: open()?, start: 0 })) {
        return in_file_system(&root, None);
    }
    let block = LogicalBlockSize::Lb512;
    let table = gpt::GptConfig::new()
        .logical_block_size(block)
        .open_from_device(open()?)
        .map_err(|_| "it has neither an ext4 file system nor a partition table of the kind GPT".to_owned())?;
    let mut reasons = Vec::new();
    for (number, partition) in table.partitions() {
        let Ok(start) = partition.bytes_start(block) else { continue };
        let Ok(root) = Ext4::load(Box::new(Partition { disk: open()?, start })) else { continue };
        match in_file_system(&root, Some(*number)) {
            Ok(found) => return Ok(found),
            Err(e) => reasons.push(format!("partition {number}: {e}")),
        }
    }
    Err(if reasons.is_empty() {
        "no partition has an ext4 file system".to_owned()
    } else {
        reasons.join("; ")
    })
}

/// A disk from some byte on.
struct Partition {
    disk: File,
    start: u64,
}

impl Ext4Read for Partition {
    fn read(
        &mut self,
        offset: u64,
        into: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        let position = self.start.checked_add(offset).ok_or("an offset is too large")?;
        self.disk.read_exact_at(into, position)?;
        Ok(())
    }
}

fn in_file_system(root: &Ext4, partition: Option<u32>) -> Result<BootFiles, String> {
    let release = kernel_release(root).map_err(|e| e.to_string())?.ok_or("there is no /boot/vmlinuz-*")?;
    let path = format!("/boot/vmlinuz-{release}");
    let bzimage = read(root, &path).map_err(|e| format!("{path}: {e}"))?;
    let kernel = vmlinux::extract(&bzimage).unwrap_or(bzimage);
    let names = INITRDS.iter().map(|(before, after)| format!("{before}{release}{after}"));
    let initrd = match names.into_iter().find(|n| root.exists(n.as_str()).unwrap_or(false)) {
        Some(name) => {
            let packed = read(root, &name).map_err(|e| format!("{name}: {e}"))?;
            Some(unpack(packed))
        }
        None => None,
    };
    Ok(BootFiles { release, kernel, initrd, partition })
}

fn unpack(packed: Vec<u8>) -> Vec<u8> {
    let unpacked = Format::of(&packed).and_then(|format| format.unpack(&packed, MAX_FILE).ok());
    unpacked.unwrap_or(packed)
}

fn kernel_release(root: &Ext4) -> Result<Option<String>, Ext4Error> {
    for link in LINKS {
        // A link that leads nowhere is as good as none.
        let Ok(target) = root.canonicalize(link) else { continue };
        let release = target.to_str().ok().and_then(|t| t.strip_prefix("/boot/vmlinuz-"));
        if let Some(release) = release {
            return Ok(Some(release.to_owned()));
        }
    }
    let mut releases = Vec::new();
    for entry in root.read_dir("/boot")? {
        let entry = entry?;
        if let Some(release) = entry.file_name().as_str().ok().and_then(|n| n.strip_prefix("vmlinuz-")) {
            releases.push(release.to_owned());
        }
    }
    Ok(releases.into_iter().max_by(|a, b| compare_releases(a, b)))
}

/// Orders releases by their numbers: 6.10 is after 6.9.
fn compare_releases(a: &str, b: &str) -> Ordering {
    let parts = |text: &str| -> Vec<(u64, String)> {
        let mut parts = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
            let (number, tail) = rest.split_at(digits);
            let word = tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len());
            let (word, tail) = tail.split_at(word);
            parts.push((number.parse().unwrap_or(0), word.to_owned()));
            rest = tail;
        }
        parts
    };
    parts(a).cmp(&parts(b))
}

fn read(root: &Ext4, path: &str) -> Result<Vec<u8>, String> {
    let size = root.metadata(path).map_err(|e| e.to_string())?.len();
    if size > MAX_FILE {
        return Err(format!("it has more than {MAX_FILE} bytes"));
    }
    root.read(path).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::process::Command;

    /// An ext4 file system with these files; `None` where there is no mke2fs.
    fn file_system(dir: &Path, files: &[(&str, &[u8])]) -> Option<std::path::PathBuf> {
        let root = dir.join("root");
        fs::create_dir_all(root.join("boot")).unwrap();
        for (path, content) in files {
            fs::write(root.join(path), content).unwrap();
        }
        let image = dir.join("image");
        File::create(&image).unwrap().set_len(8 << 20).unwrap();
        let made = crate::debian::mke2fs().arg("-d").arg(&root).arg(&image).output();
        match made {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                println!("skipped: there is no mke2fs (package e2fsprogs)");
                None
            }
            made => {
                let made = made.unwrap();
                assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
                Some(image)
            }
        }
    }

    #[test]
    fn the_newest_kernel_and_its_initrd_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let files: [(&str, &[u8]); 4] = [
            ("boot/vmlinuz-6.9.0-1", b"old"),
            ("boot/vmlinuz-6.10.0-1", b"new"),
            ("boot/initrd.img-6.9.0-1", b"old initrd"),
            ("boot/initrd.img-6.10.0-1", b"new initrd"),
        ];
        let Some(image) = file_system(dir.path(), &files) else { return };
        let expected = BootFiles {
            release: "6.10.0-1".to_owned(),
            kernel: b"new".to_vec(),
            initrd: Some(b"new initrd".to_vec()),
            partition: None,
        };
        assert_eq!(find(&image), Ok(expected));
    }

    #[test]
    fn a_link_decides_which_kernel_it_is() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("root/boot")).unwrap();
        std::os::unix::fs::symlink("boot/vmlinuz-1", dir.path().join("root/vmlinuz")).unwrap();
        let files: [(&str, &[u8]); 2] = [("boot/vmlinuz-1", b"one"), ("boot/vmlinuz-2", b"two")];
        let Some(image) = file_system(dir.path(), &files) else { return };
        let found = find(&image).unwrap();
        assert_eq!((found.kernel, found.initrd), (b"one".to_vec(), None));
    }

    #[test]
    fn a_partition_of_a_gpt_is_searched() {
        let dir = tempfile::tempdir().unwrap();
        let Some(image) = file_system(dir.path(), &[("boot/vmlinuz-1", b"kernel")]) else { return };
        let disk = dir.path().join("disk");
        File::create(&disk).unwrap().set_len(16 << 20).unwrap();
        let mut table = gpt::GptConfig::new().writable(true).create(&disk).unwrap();
        table.add_partition("boot", 1 << 20, gpt::partition_types::BIOS, 0, None).unwrap();
        let number = table.add_partition("root", 8 << 20, gpt::partition_types::LINUX_FS, 0, None).unwrap();
        let start = table.partitions()[&number].bytes_start(LogicalBlockSize::Lb512).unwrap();
        table.write().unwrap();
        let file = File::options().write(true).open(&disk).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &fs::read(image).unwrap(), start).unwrap();
        let found = find(&disk).unwrap();
        assert_eq!((found.partition, found.kernel), (Some(number), b"kernel".to_vec()));
    }

    #[test]
    fn disks_without_a_kernel_say_so() {
        let dir = tempfile::tempdir().unwrap();
        let empty = dir.path().join("empty");
        fs::write(&empty, vec![0; 1 << 20]).unwrap();
        assert!(find(&empty).unwrap_err().contains("neither an ext4 file system nor"));
        fs::write(&empty, b"").unwrap();
        assert!(find(&empty).is_err());
        let Some(image) = file_system(dir.path(), &[]) else { return };
        assert_eq!(find(&image), Err("there is no /boot/vmlinuz-*".to_owned()));
    }

    #[test]
    fn initrds_are_unpacked_if_that_is_possible() {
        assert_eq!(unpack(b"\x1f\x8b\x08 damaged".to_vec()), b"\x1f\x8b\x08 damaged");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("initrd");
        fs::write(&path, b"070701 cpio").unwrap();
        let packed = Command::new("gzip").arg("-c").arg(&path).output().unwrap().stdout;
        assert_eq!(unpack(packed), b"070701 cpio");
    }

    #[test]
    fn releases_are_ordered_by_number() {
        for (older, newer) in [
            ("6.9.0-1", "6.10.0-1"),
            ("6.1.0-9-amd64", "6.1.0-10-amd64"),
            ("5.10", "5.10.1"),
            ("6.1", "6.1-rt"),
        ] {
            assert_eq!(compare_releases(older, newer), Ordering::Less, "{older} {newer}");
        }
    }
}

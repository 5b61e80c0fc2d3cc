//! The initramfs: cpio archives in the format `newc` (the kernel's
//! `Documentation/driver-api/early-userspace/buffer-format.rst`).
//!
//! The kernel unpacks archives that follow each other one after the other. So the part that comes from
//! packages ([`userland`]) is made once, and the part with our init ([`with_init`]) is appended to it.

use std::io;

use cpio::newc::Builder;

use crate::modules::ModuleSet;

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// Applets that must not hide Berth's own init, and package tools without a package system.
const NOT_LINKED: [&str; 6] = ["busybox", "init", "linuxrc", "dpkg", "dpkg-deb", "rpm"];

const DIRECTORIES: [&str; 18] = [
    "bin",
    "dev",
    "etc",
    "lib",
    "lib/modules",
    "mnt",
    "proc",
    "root",
    "run",
    "sbin",
    "sys",
    "tmp",
    "usr",
    "usr/bin",
    "usr/sbin",
    "var",
    "var/lib",
    "var/log",
];

/// Files of a small Unix system: path and content.
const FILES: [(&str, &str); 5] = [
    ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"),
    ("etc/group", "root:x:0:\nnogroup:x:65534:\n"),
    ("etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"),
    ("etc/profile", "export PS1='\\h:\\w\\$ '\n"),
    ("etc/shells", "/bin/sh\n"),
];

/// A cpio archive that is being written.
struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    fn new() -> Self {
        Self { bytes: Vec::new(), inode: 1 }
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) -> io::Result<()> {
        let size =
            u32::try_from(content.len()).map_err(|_| io::Error::other(format!("{path} is too large")))?;
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        let mut writer = Builder::new(path)
            .ino(self.inode)
            .mode(mode)
            .nlink(links)
            .rdev_major(device.0)
            .rdev_minor(device.1)
            .write(&mut self.bytes, size);
        io::Write::write_all(&mut writer, content)?;
        writer.finish()?;
        self.inode += 1;
        Ok(())
    }

    fn directory(&mut self, path: &str) -> io::Result<()> {
        self.entry(path, DIRECTORY | 0o755, (0, 0), b"")
    }

    fn file(&mut self, path: &str, permissions: u32, content: &[u8]) -> io::Result<()> {
        self.entry(path, FILE | permissions, (0, 0), content)
    }

    fn link(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.entry(path, LINK | 0o777, (0, 0), target.as_bytes())
    }

    fn finish(mut self) -> io::Result<Vec<u8>> {
        cpio::newc::trailer(&mut self.bytes)?;
        Ok(self.bytes)
    }
}

/// The part of the initramfs that comes from packages: a small Unix system around busybox, and the modules.
/// `applets` are busybox's own paths of its commands, such as `bin/ls`.
///
/// # Errors
/// Only for a file above 4 GiB, which the format cannot hold.
pub fn userland(
    busybox: &[u8],
    applets: &[String],
    release: &str,
    modules: &ModuleSet,
) -> io::Result<Vec<u8>> {
    let mut archive = Archive::new();
    for path in DIRECTORIES {
        archive.directory(path)?;
    }
    // The kernel opens the console before init has mounted anything.
    archive.entry("dev/console", CHARACTER_DEVICE | 0o600, (5, 1), b"")?;
    archive.entry("dev/null", CHARACTER_DEVICE | 0o666, (1, 3), b"")?;
    for (path, content) in FILES {
        archive.file(path, 0o644, content.as_bytes())?;
    }
    archive.file("bin/busybox", 0o755, busybox)?;
    for path in applets {
        let name = path.rsplit('/').next().unwrap_or(path);
        if !NOT_LINKED.contains(&name) {
            archive.link(path, "/bin/busybox")?;
        }
    }
    let base = format!("lib/modules/{release}");
    archive.directory(&base)?;
    let mut made = std::collections::BTreeSet::new();
    for module in modules.iter() {
        for (i, _) in module.path.match_indices('/') {
            if made.insert(&module.path[..i]) {
                archive.directory(&format!("{base}/{}", &module.path[..i]))?;
            }
        }
        archive.file(&format!("{base}/{}", module.path), 0o644, &module.content)?;
    }
    archive.file(&format!("{base}/modules.dep"), 0o644, modules.dependency_file().as_bytes())?;
    archive.file(&format!("{base}/modules.alias"), 0o644, modules.alias_file().as_bytes())?;
    archive.finish()
}

/// The whole initramfs: `userland` and our init.
///
/// # Errors
/// As [`userland`].
pub fn with_init(mut userland: Vec<u8>, init: &[u8]) -> io::Result<Vec<u8>> {
    let mut archive = Archive::new();
    archive.file("init", 0o755, init)?;
    // The kernel skips zeroes between archives, and an archive begins at a multiple of 4.
    userland.resize(userland.len().next_multiple_of(4), 0);
    userland.extend(archive.finish()?);
    Ok(userland)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::modules::Module;
    use std::io::Read;

    /// (path, mode, content) of all entries of archives that follow each other.
    fn list(bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        let mut rest = bytes;
        while !rest.is_empty() {
            let mut reader = cpio::newc::Reader::new(rest).unwrap();
            let (name, mode) = (reader.entry().name().to_owned(), reader.entry().mode());
            let mut content = Vec::new();
            reader.read_to_end(&mut content).unwrap();
            if !reader.entry().is_trailer() {
                entries.push((name, mode, content));
            }
            rest = reader.finish().unwrap();
            while rest.first() == Some(&0) {
                rest = &rest[1..];
            }
        }
        entries
    }

    #[test]
    fn the_archive_holds_what_the_guest_needs() {
        let module = Module { path: "kernel/a/b.ko".into(), content: b"elf".into(), ..Module::default() };
        let set = ModuleSet::collect(&["b"], |_| Ok::<_, ()>(Some(module.clone()))).unwrap();
        let applets = ["bin/sh".to_owned(), "sbin/init".to_owned()];
        let archive = with_init(userland(b"BB", &applets, "6.1", &set).unwrap(), b"INIT").unwrap();

        let entries = list(&archive);
        let find =
            |path: &str| entries.iter().find(|(p, ..)| p == path).map(|(_, mode, c)| (*mode, c.as_slice()));
        assert_eq!(find("init"), Some((0o100_755, &b"INIT"[..])));
        assert_eq!(find("bin/busybox"), Some((0o100_755, &b"BB"[..])));
        assert_eq!(find("bin/sh"), Some((0o120_777, &b"/bin/busybox"[..])));
        assert_eq!(find("sbin/init"), None);
        assert_eq!(find("dev/console"), Some((0o020_600, &b""[..])));
        assert_eq!(find("lib/modules/6.1/kernel/a"), Some((0o040_755, &b""[..])));
        assert_eq!(find("lib/modules/6.1/kernel/a/b.ko"), Some((0o100_644, &b"elf"[..])));
        assert_eq!(find("lib/modules/6.1/modules.dep"), Some((0o100_644, &b"kernel/a/b.ko:\n"[..])));
    }

    #[test]
    fn directories_come_before_what_is_in_them() {
        let archive = userland(b"", &[], "6.1", &ModuleSet::default()).unwrap();
        let mut seen = vec![String::new()];
        for (path, mode, _) in list(&archive) {
            let parent = path.rsplit_once('/').map_or("", |(p, _)| p);
            assert!(seen.iter().any(|s| s == parent), "{path} comes before {parent}");
            if mode & DIRECTORY != 0 {
                seen.push(path);
            }
        }
    }
}

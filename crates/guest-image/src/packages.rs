//! What the default guest takes out of Debian packages.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::GuestImageError;
use crate::modules::{Module, ModuleSet, WANTED, name_of};

/// Most bytes that one file taken from a package may have.
const MAX_FILE: u64 = 256 << 20;
/// Most bytes that all modules of a kernel, as packed, may have together.
const MAX_MODULES: u64 = 2 << 30;

/// A kernel out of its packages.
pub struct Kernel {
    /// The release, as the directory of its modules is called.
    pub release: String,
    /// The bzImage.
    pub image: Vec<u8>,
    /// What the guest gets of its modules.
    pub modules: ModuleSet,
}

/// The shell and tools out of their package.
pub struct Busybox {
    /// The static program.
    pub program: Vec<u8>,
    /// Where its commands belong, such as `bin/ls`.
    pub applets: Vec<String>,
}

/// Where a file of a kernel package belongs.
#[derive(Debug, PartialEq, Eq)]
enum KernelFile<'a> {
    Image { release: &'a str },
    Module { release: &'a str, path: &'a str },
}

/// Recognises the files of a kernel package that matter. Newer distributions put all below `usr`, and the
/// image beside the modules.
fn kernel_file(path: &str) -> Option<KernelFile<'_>> {
    let path = path.trim_start_matches("./");
    if let Some(release) = path.strip_prefix("boot/vmlinuz-") {
        return Some(KernelFile::Image { release });
    }
    let rest = path.strip_prefix("usr/").unwrap_or(path).strip_prefix("lib/modules/")?;
    let (release, path) = rest.split_once('/')?;
    if path == "vmlinuz" {
        return Some(KernelFile::Image { release });
    }
    let is_module = [".ko", ".ko.xz", ".ko.zst"].iter().any(|suffix| path.ends_with(suffix));
    is_module.then_some(KernelFile::Module { release, path })
}

/// Takes image and modules from the packages of one kernel.
///
/// # Errors
/// [`GuestImageError::Package`] when something is missing or damaged, [`GuestImageError::Program`] when
/// `dpkg-deb` fails.
pub fn read_kernel(packages: &[PathBuf]) -> Result<Kernel, GuestImageError> {
    let mut image = None;
    let mut packed: BTreeMap<String, (String, Vec<u8>)> = BTreeMap::new();
    let mut total = 0;
    for package in packages {
        for_each_file(package, |path, size, content| {
            match kernel_file(path) {
                Some(KernelFile::Image { release }) => image = Some((release.to_owned(), read_all(content)?)),
                Some(KernelFile::Module { path, .. }) => {
                    total += size;
                    if total > MAX_MODULES {
                        return Err("its modules are too large".to_owned());
                    }
                    packed.insert(name_of(path), (path.to_owned(), read_all(content)?));
                }
                None => {}
            }
            Ok(())
        })?;
    }
    let names = || packages.iter().map(|p| file_name(p)).collect::<Vec<_>>().join(", ");
    let bad = |reason: String| GuestImageError::Package { package: names(), reason };
    let (release, image) = image.ok_or_else(|| bad("there is no kernel in it".to_owned()))?;
    let modules = ModuleSet::collect(&WANTED, |name| {
        packed.get(name).map(|(path, content)| Module::read(path, content)).transpose()
    })
    .map_err(bad)?;
    Ok(Kernel { release, image, modules })
}

/// Takes busybox from its package. `work` is a directory for the program, which is run once to name its
/// commands.
///
/// # Errors
/// As [`read_kernel`].
pub fn read_busybox(package: &Path, work: &Path) -> Result<Busybox, GuestImageError> {
    let mut program = None;
    for_each_file(package, |path, _, content| {
        if matches!(path.trim_start_matches("./"), "bin/busybox" | "usr/bin/busybox") {
            program = Some(read_all(content)?);
        }
        Ok(())
    })?;
    let program = program.ok_or_else(|| GuestImageError::Package {
        package: file_name(package),
        reason: "there is no busybox in it".to_owned(),
    })?;
    let path = work.join("busybox-program");
    fs::write(&path, &program).map_err(GuestImageError::file("write", &path))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
        .map_err(GuestImageError::file("make executable", &path))?;
    let output =
        Command::new(&path).arg("--list-full").output().map_err(GuestImageError::file("run", &path))?;
    if !output.status.success() {
        return Err(GuestImageError::Program {
            program: "busybox",
            doing: "naming its commands",
            said: last_lines(&output.stderr),
        });
    }
    let applets = String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(|line| line.trim().trim_start_matches('/').to_owned())
        .filter(|path| is_applet_path(path))
        .collect();
    Ok(Busybox { program, applets })
}

/// Whether the path is in one of the directories for programs and nowhere else.
fn is_applet_path(path: &str) -> bool {
    let Some((directory, name)) = path.rsplit_once('/') else { return false };
    matches!(directory, "bin" | "sbin" | "usr/bin" | "usr/sbin") && !matches!(name, "" | "." | "..")
}

/// Calls `take` with path, size and content of every ordinary file of a package.
fn for_each_file(
    package: &Path,
    mut take: impl FnMut(&str, u64, &mut dyn Read) -> Result<(), String>,
) -> Result<(), GuestImageError> {
    let bad = |reason: String| GuestImageError::Package { package: file_name(package), reason };
    let mut dpkg = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(package)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|_| GuestImageError::NoApt { missing: "dpkg-deb" })?;
    let walked = dpkg.stdout.take().map_or(Ok(()), |tar| walk(tar, &mut take));
    // Whoever fails first makes the other fail too: dpkg-deb's own complaint is the better one.
    let output = dpkg.wait_with_output().map_err(|e| bad(e.to_string()))?;
    let complaint = last_lines(&output.stderr);
    if !output.status.success() && (walked.is_ok() || !complaint.contains("roken pipe")) {
        let doing = "unpacking a package";
        return Err(GuestImageError::Program { program: "dpkg-deb", doing, said: complaint });
    }
    walked.map_err(bad)
}

fn walk(
    tar: impl Read,
    take: &mut impl FnMut(&str, u64, &mut dyn Read) -> Result<(), String>,
) -> Result<(), String> {
    let mut archive = tar::Archive::new(tar);
    for entry in archive.entries().map_err(|e| e.to_string())? {
        let mut entry = entry.map_err(|e| e.to_string())?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let path = entry.path().map_err(|e| e.to_string())?.to_string_lossy().into_owned();
        let size = entry.size();
        take(&path, size, &mut entry)?;
    }
    // What follows the last entry must be read too, or dpkg-deb stops at a closed pipe.
    std::io::copy(&mut archive.into_inner(), &mut std::io::sink()).map_err(|e| e.to_string())?;
    Ok(())
}

fn read_all(content: &mut dyn Read) -> Result<Vec<u8>, String> {
    let mut data = Vec::new();
    content.take(MAX_FILE + 1).read_to_end(&mut data).map_err(|e| e.to_string())?;
    if data.len() as u64 > MAX_FILE {
        return Err(format!("a file in it has more than {MAX_FILE} bytes"));
    }
    Ok(data)
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// The last lines of what a program said, on one line.
pub fn last_lines(said: &[u8]) -> String {
    let text = String::from_utf8_lossy(said);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    match lines.get(lines.len().saturating_sub(3)..) {
        Some(last) if !last.is_empty() => last.join("; "),
        _ => "it did not say why".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_files_are_found_in_old_and_new_places() {
        let image = |release| Some(KernelFile::Image { release });
        let module = |release, path| Some(KernelFile::Module { release, path });
        assert_eq!(kernel_file("./boot/vmlinuz-6.1.0-1-cloud-amd64"), image("6.1.0-1-cloud-amd64"));
        assert_eq!(kernel_file("usr/lib/modules/6.17/vmlinuz"), image("6.17"));
        assert_eq!(kernel_file("./lib/modules/6.1/kernel/a/b.ko"), module("6.1", "kernel/a/b.ko"));
        assert_eq!(kernel_file("usr/lib/modules/6.17/kernel/c.ko.zst"), module("6.17", "kernel/c.ko.zst"));
        assert_eq!(kernel_file("./lib/modules/6.1/modules.order"), None);
        assert_eq!(kernel_file("./etc/passwd"), None);
    }

    #[test]
    fn applets_cannot_leave_their_directories() {
        assert!(is_applet_path("usr/bin/awk"));
        assert!(!is_applet_path("etc/passwd"));
        assert!(!is_applet_path("bin/../etc/passwd"));
        assert!(!is_applet_path("bin/"));
        assert!(!is_applet_path("init"));
    }

    #[test]
    fn a_package_that_is_none_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fake.deb");
        fs::write(&path, b"no archive").unwrap();
        assert!(read_kernel(&[path]).is_err());
    }

    #[test]
    fn complaints_are_cut_to_the_last_lines() {
        assert_eq!(last_lines(b"a\nb\n\nc\nd\n"), "b; c; d");
        assert_eq!(last_lines(b"\n"), "it did not say why");
    }
}

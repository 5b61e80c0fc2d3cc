//! The files that are measured with: Berth, the program for the guest, and its initramfs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::debian::Debian;
use crate::cargo;

const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Path of busybox in the guest's initramfs, without the first slash.
const BUSYBOX: &str = "bin/busybox";
/// Path of our program in the guest.
pub const PROGRAM: &str = "/bin/berth-guest-bench";
/// The initramfs is a few MiB; one above this is not the default guest's.
const MAX_INITRAMFS: u64 = 256 << 20;

/// Where everything is.
pub struct Files {
    /// The program that works, as it is in the guest.
    pub program: PathBuf,
    /// The guest's busybox.
    pub busybox: PathBuf,
    /// The default guest's kernel.
    pub kernel: PathBuf,
    /// The default guest's initramfs.
    pub plain_initrd: PathBuf,
    /// The same with our program.
    pub initrd: PathBuf,
    /// The kernel's release.
    pub kernel_release: String,
    /// A Debian with real programs; without one a text that says why.
    pub debian: Result<Debian, String>,
    /// Holds what was made here; deletes it at the end.
    _directory: tempfile::TempDir,
}

impl Files {
    /// Builds what is missing; Debian only if it is wanted.
    ///
    /// # Errors
    /// A text that names what could not be made, unless that is Debian.
    pub fn make(with_debian: bool) -> Result<Self, String> {
        let target = target_directory()?.join("bench");
        let program = build_program(&target)?;
        let debian = if with_debian { Debian::make(&target) } else { Err("it was not asked for".to_owned()) };
        let cache = berth_guest_image::cache_directory().map_err(|e| e.to_string())?;
        let guest = berth_guest_image::default_guest(&cache).map_err(|e| e.to_string())?;

        let directory = tempfile::tempdir().map_err(|e| format!("no temporary directory: {e}"))?;
        let (busybox, initrd) = (directory.path().join("busybox"), directory.path().join("initramfs"));
        let base = read(&guest.initrd)?;
        let content = find_in_initramfs(&base, BUSYBOX)
            .ok_or_else(|| format!("{} has no {BUSYBOX}", guest.initrd.display()))?;
        write(&busybox, &content)?;
        make_executable(&busybox)?;
        write(&initrd, &with_program(base, &read(&program)?)?)?;
        Ok(Self {
            program,
            busybox,
            kernel: guest.kernel,
            plain_initrd: guest.initrd,
            initrd,
            kernel_release: guest.kernel_release,
            debian,
            _directory: directory,
        })
    }
}

/// Builds Berth, and tells which one it is, for people.
///
/// # Errors
/// A text when it cannot be built.
pub fn build_berth() -> Result<(PathBuf, String), String> {
    cargo::run("Berth", cargo::command().args(["build", "--release", "--package", "berth"]))?;
    let revision = revision().unwrap_or_else(|| "unknown revision".to_owned());
    Ok((target_directory()?.join("release/berth"), revision))
}

/// Where this program's cargo puts what it builds: it is in `TARGET/PROFILE/` itself.
fn target_directory() -> Result<PathBuf, String> {
    let this = std::env::current_exe().map_err(|e| format!("this program has no path: {e}"))?;
    this.ancestors()
        .nth(2)
        .map(Path::to_owned)
        .ok_or_else(|| format!("{} is in no directory", this.display()))
}

/// Builds `guest/bench` as a static program, the same for guest and host.
fn build_program(target: &Path) -> Result<PathBuf, String> {
    let mut command = cargo::command();
    command
        .args(["build", "--quiet", "--release", "--package", "berth-guest-bench", "--target", TARGET])
        .arg("--target-dir")
        .arg(target)
        .env("RUSTFLAGS", "-C target-feature=+crt-static -C relocation-model=static -C strip=symbols");
    cargo::run("programs for the guest", &mut command)?;
    Ok(target.join(TARGET).join("release/berth-guest-bench"))
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    let len = fs::metadata(path).map_err(|e| format!("{}: {e}", path.display()))?.len();
    if len > MAX_INITRAMFS {
        return Err(format!("{} has {len} bytes", path.display()));
    }
    fs::read(path).map_err(|e| format!("{}: {e}", path.display()))
}

fn write(path: &Path, content: &[u8]) -> Result<(), String> {
    fs::write(path, content).map_err(|e| format!("{}: {e}", path.display()))
}

fn make_executable(path: &Path) -> Result<(), String> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
        .map_err(|e| format!("{}: {e}", path.display()))
}

/// The content of a file in the first archive of an initramfs.
fn find_in_initramfs(initramfs: &[u8], path: &str) -> Option<Vec<u8>> {
    let mut rest = initramfs;
    loop {
        let mut reader = cpio::newc::Reader::new(rest).ok()?;
        if reader.entry().is_trailer() {
            return None;
        }
        if reader.entry().name() == path {
            let mut content = Vec::new();
            std::io::Read::read_to_end(&mut reader, &mut content).ok()?;
            return Some(content);
        }
        rest = reader.finish().ok()?;
    }
}

/// `base` and behind it an archive with our program.
fn with_program(mut base: Vec<u8>, program: &[u8]) -> Result<Vec<u8>, String> {
    let made = || -> std::io::Result<Vec<u8>> {
        let len = u32::try_from(program.len()).map_err(std::io::Error::other)?;
        let builder = cpio::newc::Builder::new(PROGRAM.trim_start_matches('/')).mode(0o100_755);
        let mut writer = builder.write(Vec::new(), len);
        std::io::Write::write_all(&mut writer, program)?;
        cpio::newc::trailer(writer.finish()?)
    };
    let archive = made().map_err(|e| format!("the guest's initramfs: {e}"))?;
    base.resize(base.len().next_multiple_of(4), 0);
    base.extend(archive);
    Ok(base)
}

/// The state of this workspace's sources.
fn revision() -> Option<String> {
    let output = Command::new("git").args(["describe", "--always", "--dirty"]).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    (output.status.success() && !text.is_empty()).then_some(text)
}

#[cfg(test)]
impl Files {
    /// With a program of the test's own on the host, and nothing else.
    pub fn with_script(script: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("program");
        write(&program, script.as_bytes()).unwrap();
        make_executable(&program).unwrap();
        Self {
            program,
            busybox: PathBuf::new(),
            kernel: PathBuf::new(),
            plain_initrd: PathBuf::new(),
            initrd: PathBuf::new(),
            kernel_release: String::new(),
            debian: Err("a test has none".to_owned()),
            _directory: directory,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_added_to_an_initramfs_leaves_the_rest_readable() {
        let busybox = cpio::newc::Builder::new(BUSYBOX).mode(0o100_755);
        let mut writer = busybox.write(Vec::new(), 3);
        std::io::Write::write_all(&mut writer, b"box").unwrap();
        let base = cpio::newc::trailer(writer.finish().unwrap()).unwrap();
        let both = with_program(base.clone(), b"program").unwrap();
        assert_eq!(find_in_initramfs(&both, BUSYBOX).unwrap(), b"box");
        assert_eq!(find_in_initramfs(&both[base.len()..], "bin/berth-guest-bench").unwrap(), b"program");
        assert_eq!(find_in_initramfs(&both, "bin/absent"), None);
    }
}

//! Debian for the work of real programs and for a boot to the login: an image as `berth image build debian` makes it,
//! kept between benches.
//!
//! ```text
//!   berth-image ──► TARGET/bench/data/berth/images/bench-1: disk, kernel, initrd   for guests
//!                     └── debugfs rdump ──► TARGET/bench/debian-1                  for the host
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use berth_image::{DEFAULT_SUITE, DebianOptions, Image, Images, Name};

/// Name of the image. Another set of [`PACKAGES`] is another number.
const IMAGE: &str = "bench-1";
/// What the work of `guest/bench` needs.
const PACKAGES: [&str; 5] = ["gcc", "libc6-dev", "python3", "sqlite3", "lua5.4"];
/// Size of the disk in bytes.
const SIZE: u64 = 4 << 30;

/// A Debian with the programs.
pub struct Debian {
    /// Disk, kernel and initrd for guests.
    pub image: Image,
    /// `XDG_DATA_HOME` with the image.
    pub data: PathBuf,
    /// The root file system as a directory, for the host.
    pub root: PathBuf,
}

impl Debian {
    /// Takes it from `directory`, or makes it there, which takes minutes.
    ///
    /// # Errors
    /// A text that says what this host lacks.
    pub fn make(directory: &Path) -> Result<Self, String> {
        let data = directory.join("data");
        let images = Images::new(&data.join("berth"));
        let name: Name = IMAGE.parse().map_err(|e| format!("{IMAGE}: {e}"))?;
        let image = if images.names().contains(&name) {
            images.get(&name)
        } else {
            let packages = PACKAGES.map(str::to_owned).to_vec();
            let suite = DEFAULT_SUITE.to_owned();
            images.build_debian(&name, &DebianOptions { suite, packages, size: SIZE, mirror: None })
        };
        let image = image.map_err(|e| e.to_string())?;
        let root = directory.join(format!("debian-{}", IMAGE.trim_start_matches("bench-")));
        if !root.exists() {
            unpack(&image.disk(), &root)?;
        }
        Ok(Self { image, data, root })
    }
}

/// Copies the file system of `disk` to the directory `to`, which appears when it is complete.
fn unpack(disk: &Path, to: &Path) -> Result<(), String> {
    let failed = |e: std::io::Error| format!("{}: {e}", to.display());
    let parent = to.parent().ok_or_else(|| format!("{} has no parent", to.display()))?;
    let part = tempfile::tempdir_in(parent).map_err(failed)?;
    // In its search path ordinary users have no system programs.
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/sbin:/sbin");
    let request = format!("rdump / \"{}\"", part.path().display());
    let status = Command::new("debugfs")
        .env("PATH", path)
        .args(["-R", &request])
        .arg(disk)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        // For other users it complains about each owner that it cannot set.
        .stderr(Stdio::null())
        .status()
        .map_err(|e| format!("debugfs (package e2fsprogs): {e}"))?;
    if !status.success() || !part.path().join("usr/bin").is_dir() {
        return Err(format!("debugfs could not copy the file system of {} ({status})", disk.display()));
    }
    fs::rename(part.keep(), to).map_err(failed)
}

//! Debian from its packages: `mmdebstrap` installs them into a directory, and `mke2fs` makes a disk of that.
//!
//! ```text
//!   mmdebstrap (as root, or in a user name space) ──► directory ──disk.sh──► mke2fs ──► disk.raw
//!                                                                                           │
//!                                                  boot_files: kernel, initrd ◄─────────────┘
//! ```
//! The disk is made inside mmdebstrap's name space, where all files have their right owners whoever builds. It is
//! handed in as standard input: the users in that name space cannot enter the directory that it is in.

mod output;

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use berth_guest_image::progress::Progress;

use crate::store::{Description, Draft, Image, Images};
use crate::{ImageError, Name, boot_files};
use output::Output;

/// The suite that is built unless another is asked for.
pub const DEFAULT_SUITE: &str = "bookworm";
/// Smallest disk in bytes.
pub const MIN_SIZE: u64 = 1 << 30;
/// What every image has, besides the essential packages: a kernel, an init, a network and what a shell needs.
const PACKAGES: [&str; 14] = [
    "linux-image-cloud-amd64",
    "initramfs-tools",
    "systemd-sysv",
    "systemd-resolved",
    "systemd-timesyncd",
    "libpam-systemd",
    "dbus",
    "udev",
    "iproute2",
    "iputils-ping",
    "kmod",
    "ca-certificates",
    "less",
    "e2fsprogs",
];
/// Where the agent is in the guest; `disk.sh` knows it too.
const AGENT: &str = "/usr/sbin/berth-agent";
/// What mmdebstrap runs before and after it installs [`PACKAGES`]; the second makes the disk.
const SCRIPTS: [&str; 2] = [include_str!("before.sh"), include_str!("disk.sh")];
/// Features that older guests' e2fsck does not know, and the e2fsprogs since which they are a default.
const NEW_FEATURES: (&str, (u32, u32)) = ("^orphan_file,^metadata_csum_seed", (1, 47));

/// What to build.
#[derive(Clone, Debug)]
pub struct DebianOptions {
    /// The suite, such as `bookworm`.
    pub suite: String,
    /// Packages besides those that every image has.
    pub packages: Vec<String>,
    /// Size of the disk in bytes, [`MIN_SIZE`] or more. What is not used occupies nothing.
    pub size: u64,
    /// Where packages come from; without it Debian's servers, with updates and security updates.
    pub mirror: Option<String>,
}

impl Images {
    /// Builds the image `name`. Shows progress on standard error; takes a minute or two, and 1 GiB or more in
    /// `$TMPDIR`.
    ///
    /// # Errors
    /// Programs or rights that are missing, and what mmdebstrap complains about: [`ImageError`].
    pub fn build_debian(&self, name: &Name, options: &DebianOptions) -> Result<Image, ImageError> {
        let mode = Mode::of_this_user()?;
        let progress = Progress::default();
        let image = self.create(name, |draft| build(name, options, mode, draft, &progress))?;
        progress.done(&format!(
            "image {name} ready: {} (kept in {})",
            image.manifest.source,
            image.directory.display()
        ));
        Ok(image)
    }
}

/// How mmdebstrap becomes root of what it builds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// It is root.
    Root,
    /// In a user name space.
    Unshare,
}

impl Mode {
    /// What this user can do, after a look at all that is needed.
    fn of_this_user() -> Result<Self, ImageError> {
        // mke2fs is where ordinary users do not look for programs.
        for (program, package) in
            [("mmdebstrap", "mmdebstrap"), ("mke2fs", "e2fsprogs"), ("unshare", "util-linux")]
        {
            need(program, package)?;
        }
        // The owner of a process's own directory in /proc is its effective user.
        if fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0) {
            return Ok(Self::Root);
        }
        need("newuidmap", "uidmap")?;
        let user = std::env::var("USER").unwrap_or_default();
        for file in ["/etc/subuid", "/etc/subgid"] {
            let table = fs::read_to_string(file).unwrap_or_default();
            if !user.is_empty() && !has_range(&table, &user) {
                return Err(ImageError::NoSubordinateIds { user, file });
            }
        }
        Ok(Self::Unshare)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Root => "root",
            Self::Unshare => "unshare",
        }
    }
}

/// Whether the table, as subuid(5) has it, gives the user a range.
fn has_range(table: &str, user: &str) -> bool {
    table.lines().any(|line| line.split(':').next() == Some(user))
}

fn need(program: &'static str, package: &'static str) -> Result<(), ImageError> {
    let path = search_path();
    let found = std::env::split_paths(&path).any(|directory| {
        fs::metadata(directory.join(program))
            .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
    });
    if found { Ok(()) } else { Err(ImageError::MissingProgram { program, package }) }
}

/// The search path, and the directories of system programs, which ordinary users do not have in it.
fn search_path() -> std::ffi::OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/sbin:/sbin");
    path
}

fn build(
    name: &Name,
    options: &DebianOptions,
    mode: Mode,
    draft: &Draft,
    progress: &Progress,
) -> Result<Description, ImageError> {
    let disk = draft.disk();
    let file = new_disk(&disk, options.size)?;
    let [before, after] = SCRIPTS;
    // Neither value has a character that a shell minds.
    let after = format!("set -- \"$1\" '{name}' '{}'\n{after}", mke2fs_options().join(" "));
    let agent = Agent::beside(&disk)?;
    let mut command = Command::new("mmdebstrap");
    let packages = PACKAGES.into_iter().chain(options.packages.iter().map(String::as_str));
    command
        .args(["--verbose", "--variant=minbase", "--format=null", &format!("--mode={}", mode.name())])
        .arg(format!("--include={}", packages.collect::<Vec<_>>().join(",")))
        .arg(format!("--essential-hook={before}"))
        .args(agent.iter().map(Agent::hook))
        .arg(format!("--customize-hook={after}"))
        .args(["--aptopt=Acquire::Retries \"3\"", "--", &options.suite, "-"])
        .args(&options.mirror)
        .env("PATH", search_path())
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::from(file));
    let mut output = Output::new(progress);
    progress.step(&format!("building Debian {} with mmdebstrap", options.suite));
    output.run(command, "mmdebstrap")?;
    fs::set_permissions(&disk, fs::Permissions::from_mode(0o600))
        .map_err(ImageError::file("change the mode of", &disk))?;

    progress.step("taking kernel and initrd out of the disk");
    let found =
        boot_files::find(&disk).map_err(|reason| ImageError::NoKernel { disk: disk.clone(), reason })?;
    progress.step("computing checksums");
    Ok(Description {
        source: format!("Debian {}, Linux {}", options.suite, found.release),
        cmdline: "root=/dev/vda rw".to_owned(),
        kernel: found.kernel,
        initrd: found.initrd,
    })
}

/// The guest's agent as a file, for as long as mmdebstrap needs it.
struct Agent(PathBuf);

impl Agent {
    /// Beside the file `disk`; none if this Berth has none.
    fn beside(disk: &Path) -> Result<Option<Self>, ImageError> {
        let Some(program) = berth_guest_image::agent() else { return Ok(None) };
        let path = disk.with_file_name("agent");
        fs::write(&path, program).map_err(ImageError::file("write", &path))?;
        Ok(Some(Self(path)))
    }

    /// What makes mmdebstrap copy it into the guest, out of a directory that the users in its name space cannot enter.
    fn hook(&self) -> String {
        // It takes words apart as a shell does.
        let path = self.0.display().to_string().replace('\'', r"'\''");
        format!("--customize-hook=upload '{path}' {AGENT}")
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // What stays goes with the draft, or is a file that nobody reads.
        let _ = fs::remove_file(&self.0);
    }
}

/// An empty file of `size` bytes, opened for the builder.
fn new_disk(path: &Path, size: u64) -> Result<File, ImageError> {
    let make = || {
        let file = File::options().read(true).write(true).create_new(true).open(path)?;
        file.set_len(size)?;
        // The builder is another user to the host and opens the file once more, by /proc. The directory that the
        // file is in keeps all others out.
        file.set_permissions(fs::Permissions::from_mode(0o666))?;
        Ok(file)
    };
    make().map_err(ImageError::file("make the disk", path))
}

/// Options for mke2fs, so that guests of all suites understand the file system.
fn mke2fs_options() -> Vec<String> {
    let mut options: Vec<String> =
        ["-q", "-F", "-t", "ext4", "-m", "1", "-L", "root"].map(str::to_owned).to_vec();
    let version = Command::new("mke2fs").arg("-V").env("PATH", search_path()).output();
    let version = version.ok().and_then(|o| parse_version(&String::from_utf8_lossy(&o.stderr)));
    if version.is_some_and(|v| v >= NEW_FEATURES.1) {
        options.extend(["-O".to_owned(), NEW_FEATURES.0.to_owned()]);
    }
    options
}

/// Major and minor version in `mke2fs 1.47.0 (5-Feb-2023)`.
fn parse_version(said: &str) -> Option<(u32, u32)> {
    let mut numbers = said.strip_prefix("mke2fs ")?.split(['.', ' ']);
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// mke2fs as images are made with.
#[cfg(test)]
pub fn mke2fs() -> Command {
    let mut command = Command::new("mke2fs");
    command.args(mke2fs_options()).env("PATH", search_path());
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_of_user_ids_belongs_to_its_user() {
        let table = "root:100000:65536\nann:165536:65536\n";
        assert!(has_range(table, "ann") && !has_range(table, "an") && !has_range("", "ann"));
    }

    #[test]
    fn the_agents_path_may_hold_anything() {
        let hook = Agent("/no such/it's".into()).hook();
        assert_eq!(hook, r"--customize-hook=upload '/no such/it'\''s' /usr/sbin/berth-agent");
        assert!(SCRIPTS[1].contains(AGENT));
    }

    #[test]
    fn the_version_of_mke2fs_is_read() {
        assert_eq!(parse_version("mke2fs 1.47.0 (5-Feb-2023)\n\tUsing EXT2FS Library"), Some((1, 47)));
        assert_eq!(parse_version("mke2fs 1.43-WIP (1-Jan-2016)"), None);
        assert_eq!(parse_version("what?"), None);
    }

    #[test]
    fn a_missing_program_is_named_with_its_package() {
        let error = need("no-such-program", "its-package").unwrap_err().to_string();
        assert!(
            error.contains("no-such-program") && error.ends_with("install the package its-package"),
            "{error}"
        );
        need("sh", "dash").unwrap();
    }
}

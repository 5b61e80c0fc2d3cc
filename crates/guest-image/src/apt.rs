//! Packages from the host's own distribution through apt, without installing and without privilege.
//!
//! apt gets directories of its own for package lists and archives, so that the host's lists may be missing,
//! old or not writable. Sources, keys and proxies are the host's. apt checks signatures and checksums.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::cache::{Material, Supplier};
use crate::packages::{last_lines, read_busybox, read_kernel};
use crate::progress::Progress;
use crate::{GuestImageError, initramfs, vmlinux};

/// Packages whose only purpose is to depend on the current kernel for virtual machines: Debian's, then
/// Ubuntu's. The first that is on offer is taken.
const KERNELS: [&str; 3] = ["linux-image-cloud-amd64", "linux-image-virtual", "linux-image-kvm"];
const BUSYBOX: &str = "busybox-static";
/// Most packages that one kernel may consist of.
const MAX_PACKAGES: usize = 8;

/// The supplier for hosts with apt.
pub struct Apt;

impl Supplier for Apt {
    fn supply(&self, work: &Path, progress: &Progress) -> Result<Material, GuestImageError> {
        let tools = Tools::new(work)?;
        progress.step("fetching package lists with apt (into Berth's own cache)");
        let complaints = tools.update(progress)?;
        let meta = tools.find(&KERNELS)?;
        let meta = meta.into_iter().min_by_key(|p| KERNELS.iter().position(|k| *k == p.name));
        let Some(meta) = meta else {
            let detail =
                if complaints.is_empty() { String::new() } else { format!("; apt says: {complaints}") };
            return Err(GuestImageError::NoKernelPackage { looked_for: KERNELS.join(", "), detail });
        };
        let names = tools.kernel_packages(&meta)?;
        progress.step(&format!("downloading {}", names.join(", ")));
        let kernel_packages = tools.download(&names, &work.join("kernel"), progress)?;
        progress.step(&format!("downloading {BUSYBOX}"));
        let busybox_packages = tools.download(&[BUSYBOX.to_owned()], &work.join("busybox"), progress)?;

        progress.step("taking kernel and modules out of the packages");
        let kernel = read_kernel(&kernel_packages)?;
        let vmlinux = vmlinux::extract(&kernel.image)
            .inspect_err(|e| progress.step(&format!("the kernel must unpack itself at each start: {e}")))
            .ok();
        let [busybox_package] = &busybox_packages[..] else {
            let reason = format!("apt downloaded {} files for it instead of one", busybox_packages.len());
            return Err(GuestImageError::Package { package: BUSYBOX.to_owned(), reason });
        };
        let busybox = read_busybox(busybox_package, work)?;
        let userland =
            initramfs::userland(&busybox.program, &busybox.applets, &kernel.release, &kernel.modules)
                .map_err(GuestImageError::file("build the initramfs in", work))?;
        let package = format!("{} {}", meta.name, meta.version);
        Ok(Material { kernel_release: kernel.release, package, bzimage: kernel.image, vmlinux, userland })
    }
}

/// A package as apt describes it.
#[derive(Debug, PartialEq, Eq)]
struct Description {
    name: String,
    version: String,
    /// Names of the packages that it depends on, of alternatives all.
    depends: Vec<String>,
}

/// apt with directories of its own.
struct Tools {
    options: Vec<String>,
}

impl Tools {
    fn new(work: &Path) -> Result<Self, GuestImageError> {
        let (lists, cache) = (work.join("lists"), work.join("apt"));
        for dir in [lists.join("partial"), cache.join("archives/partial")] {
            fs::create_dir_all(&dir).map_err(GuestImageError::file("make the directory", &dir))?;
        }
        let mut settings = vec![
            format!("Dir::State::Lists={}", lists.display()),
            format!("Dir::Cache={}", cache.display()),
            // Container images often switch apt's own cache off; without it each call parses all lists again.
            "Dir::Cache::pkgcache=pkgcache.bin".to_owned(),
            "Dir::Cache::srcpkgcache=srcpkgcache.bin".to_owned(),
            "Debug::NoLocking=1".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::Retries=2".to_owned(),
            "Acquire::http::Timeout=30".to_owned(),
            "Acquire::https::Timeout=30".to_owned(),
        ];
        // Lists that package managers with a screen want, and we do not.
        for index in ["DEP-11", "CNF", "Contents-deb"] {
            settings.push(format!("Acquire::IndexTargets::deb::{index}::DefaultEnabled=false"));
        }
        if is_root() {
            // The user that apt would change to cannot enter a private cache directory.
            settings.push("APT::Sandbox::User=root".to_owned());
        }
        let options = settings.into_iter().flat_map(|s| ["-o".to_owned(), s]).collect();
        Ok(Self { options })
    }

    fn command(&self, program: &'static str) -> Command {
        let mut command = Command::new(program);
        command.args(&self.options).env("LC_ALL", "C").stdin(Stdio::null());
        command
    }

    /// Fetches the package lists. A source that cannot be reached is no error yet, others may do: returns what
    /// apt complained about.
    fn update(&self, progress: &Progress) -> Result<String, GuestImageError> {
        let mut command = self.command("apt-get");
        command.arg("update");
        let (_, complaints) = run_with_progress(command, progress)?;
        Ok(complaints)
    }

    /// Descriptions of those of `names` that are on offer.
    fn find(&self, names: &[&str]) -> Result<Vec<Description>, GuestImageError> {
        let output = self
            .command("apt-cache")
            .args(["--no-all-versions", "show"])
            .args(names)
            .output()
            .map_err(|_| GuestImageError::NoApt { missing: "apt-cache" })?;
        // It fails when one of the names is unknown; what it prints counts.
        Ok(parse_descriptions(&String::from_utf8_lossy(&output.stdout)))
    }

    /// The packages with image and modules of the kernel that `meta` depends on.
    fn kernel_packages(&self, meta: &Description) -> Result<Vec<String>, GuestImageError> {
        let mut found: Vec<String> = Vec::new();
        let mut open: Vec<String> = meta.depends.iter().filter(|n| is_kernel_part(n)).cloned().collect();
        while let Some(name) = open.pop() {
            if found.contains(&name) || found.len() >= MAX_PACKAGES {
                continue;
            }
            for package in self.find(&[&name])? {
                open.extend(package.depends.into_iter().filter(|n| is_kernel_part(n)));
                found.push(package.name);
            }
        }
        if found.is_empty() {
            let reason = "it depends on no kernel image".to_owned();
            return Err(GuestImageError::Package { package: meta.name.clone(), reason });
        }
        Ok(found)
    }

    /// Downloads packages into the new directory `into`.
    fn download(
        &self,
        names: &[String],
        into: &Path,
        progress: &Progress,
    ) -> Result<Vec<PathBuf>, GuestImageError> {
        fs::create_dir_all(into).map_err(GuestImageError::file("make the directory", into))?;
        let mut command = self.command("apt-get");
        command.arg("download").args(names).current_dir(into);
        let (success, complaints) = run_with_progress(command, progress)?;
        if !success {
            let doing = "downloading packages";
            return Err(GuestImageError::Program { program: "apt-get", doing, said: complaints });
        }
        let entries = fs::read_dir(into).map_err(GuestImageError::file("read", into))?;
        Ok(entries
            .flatten()
            .map(|e| e.path())
            .filter(|p| p.extension().is_some_and(|e| e == "deb"))
            .collect())
    }
}

/// Runs apt-get and shows its progress. Returns whether it succeeded, and its complaints.
fn run_with_progress(mut command: Command, progress: &Progress) -> Result<(bool, String), GuestImageError> {
    command.args(["-qq", "-o", "APT::Status-Fd=1"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|_| GuestImageError::NoApt { missing: "apt-get" })?;
    let stderr = child.stderr.take();
    let complaints = std::thread::spawn(move || {
        let mut text = Vec::new();
        if let Some(mut stderr) = stderr {
            // What was read until an error is all there is to say.
            let _ = std::io::Read::read_to_end(&mut stderr, &mut text);
        }
        text
    });
    for line in child.stdout.take().into_iter().flat_map(|s| BufReader::new(s).lines()).map_while(Result::ok)
    {
        if let Some(percent) = parse_status(&line) {
            progress.fraction(percent / 100.0);
        }
    }
    let status = child.wait().map_err(GuestImageError::file("wait for", Path::new("apt-get")))?;
    let complaints = complaints.join().unwrap_or_default();
    let text = if complaints.iter().all(u8::is_ascii_whitespace) && status.success() {
        String::new()
    } else {
        last_lines(&complaints)
    };
    Ok((status.success(), text))
}

/// The percentage in a line such as `dlstatus:1:12.5:Retrieving file 1 of 3`.
fn parse_status(line: &str) -> Option<f64> {
    line.strip_prefix("dlstatus:")?.split(':').nth(1)?.parse().ok()
}

/// Parses what `apt-cache show` prints (deb822(5)): paragraphs of `Field: value`.
fn parse_descriptions(text: &str) -> Vec<Description> {
    text.split("\n\n")
        .filter_map(|paragraph| {
            let field = |name: &str| {
                paragraph
                    .lines()
                    .find_map(|l| Some(l.strip_prefix(name)?.strip_prefix(':')?.trim().to_owned()))
            };
            let depends = [field("Pre-Depends"), field("Depends")].into_iter().flatten();
            Some(Description {
                name: field("Package")?,
                version: field("Version")?,
                depends: depends.flat_map(|d| parse_relations(&d)).collect(),
            })
        })
        .collect()
}

/// The names in `a (= 1), b | c:any`.
fn parse_relations(text: &str) -> Vec<String> {
    text.split([',', '|'])
        .filter_map(|r| r.split_whitespace().next())
        .map(|name| name.split(':').next().unwrap_or(name).to_owned())
        .collect()
}

/// Whether a package holds a kernel's image or modules. Ubuntu's extra modules are drivers for hardware.
fn is_kernel_part(name: &str) -> bool {
    let versioned = ["linux-image-", "linux-image-unsigned-", "linux-binary-", "linux-modules-"]
        .iter()
        .filter_map(|prefix| name.strip_prefix(prefix))
        .any(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    versioned && !name.starts_with("linux-modules-extra")
}

fn is_root() -> bool {
    // The owner of a process's own directory in /proc is its effective user.
    use std::os::unix::fs::MetadataExt;
    fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHOWN: &str = "\
Package: linux-image-cloud-amd64
Source: linux-signed-amd64 (6.1.192+2)
Version: 6.1.192-2
Depends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)
Description: Linux for x86-64 cloud (meta-package)

Package: linux-image-6.8.0-31-generic
Version: 6.8.0-31.31
Pre-Depends: dpkg:any (>= 1)
Depends: kmod, linux-base (>= 4.5) | other, linux-modules-6.8.0-31-generic
";

    #[test]
    fn descriptions_are_read_as_apt_prints_them() {
        let packages = parse_descriptions(SHOWN);
        assert_eq!(packages.len(), 2);
        assert_eq!(packages[0].version, "6.1.192-2");
        assert_eq!(packages[0].depends, ["linux-image-6.1.0-56-cloud-amd64"]);
        assert_eq!(
            packages[1].depends,
            ["dpkg", "kmod", "linux-base", "other", "linux-modules-6.8.0-31-generic"]
        );
        assert!(parse_descriptions("").is_empty());
    }

    #[test]
    fn only_image_and_modules_belong_to_a_kernel() {
        for part in [
            "linux-image-6.1.0-56-cloud-amd64",
            "linux-image-unsigned-6.8.0-31-generic",
            "linux-modules-6.8.0",
            "linux-binary-7.2.13+deb14-cloud-amd64",
        ] {
            assert!(is_kernel_part(part), "{part}");
        }
        for other in [
            "linux-base",
            "kmod",
            "linux-modules-extra-6.8.0",
            "linux-image-cloud-amd64",
            "linux-headers-6.8",
        ] {
            assert!(!is_kernel_part(other), "{other}");
        }
    }

    #[test]
    fn progress_is_the_third_field() {
        assert_eq!(parse_status("dlstatus:7:90.1212:Retrieving file 7 of 9"), Some(90.1212));
        assert_eq!(parse_status("pmstatus:a:1:b"), None);
        assert_eq!(parse_status("dlstatus:x"), None);
    }
}

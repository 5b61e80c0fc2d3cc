//! Kernel modules: only those for devices that are there.
//!
//! The image brings `modules.alias` and `modules.dep` in depmod's text form (depmod(8)); a device names itself
//! in its `modalias` file, and the alias whose pattern matches names the module.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::fd::AsRawFd;

use crate::complain;
use crate::filesystem::{c_string, kernel_release};

/// The modules of the image and which of them are loaded.
pub struct Modules {
    directory: String,
    aliases: Vec<(String, String)>,
    /// Module name to its path and the paths that it needs, in the order of loading.
    files: BTreeMap<String, Vec<String>>,
    loaded: BTreeSet<String>,
}

impl Modules {
    /// The modules of the kernel that runs; an image without any has none.
    pub fn for_running_kernel() -> Self {
        let directory = format!("/lib/modules/{}", kernel_release());
        let read = |name| fs::read_to_string(format!("{directory}/{name}")).unwrap_or_default();
        let (aliases, files) =
            (parse_aliases(&read("modules.alias")), parse_dependencies(&read("modules.dep")));
        Self { directory, aliases, files, loaded: BTreeSet::new() }
    }

    /// Loads the drivers of all devices of a bus, such as `pci`.
    pub fn load_for_bus(&mut self, bus: &str) {
        let Ok(devices) = fs::read_dir(format!("/sys/bus/{bus}/devices")) else { return };
        for device in devices.flatten() {
            let Ok(id) = fs::read_to_string(device.path().join("modalias")) else { continue };
            let wanted: Vec<String> = self.matching(id.trim()).map(str::to_owned).collect();
            for module in wanted {
                self.load(&module);
            }
        }
    }

    fn matching(&self, id: &str) -> impl Iterator<Item = &str> {
        let id = c_string(id);
        self.aliases.iter().filter_map(move |(pattern, module)| {
            let pattern = c_string(pattern)?;
            // SAFETY: both are NUL-terminated strings that live through the call.
            let result = unsafe { libc::fnmatch(pattern.as_ptr(), id.as_ref()?.as_ptr(), 0) };
            (result == 0).then_some(module.as_str())
        })
    }

    fn load(&mut self, module: &str) {
        for path in self.files.get(module).into_iter().flatten() {
            if self.loaded.insert(path.clone())
                && let Err(e) = insert(&format!("{}/{path}", self.directory))
            {
                complain(&format!("cannot load the kernel module {path}: {e}"));
            }
        }
    }
}

/// Gives one module file to the kernel; one that is already in is fine.
fn insert(path: &str) -> std::io::Result<()> {
    let file = fs::File::open(path)?;
    // SAFETY: finit_module(2) takes a descriptor, here an open one, a NUL-terminated string and flags.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    match std::io::Error::last_os_error() {
        _ if result == 0 => Ok(()),
        e if e.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        e => Err(e),
    }
}

/// Lines `alias PATTERN MODULE`.
fn parse_aliases(text: &str) -> Vec<(String, String)> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.strip_prefix("alias ")?.split_whitespace();
            Some((words.next()?.to_owned(), words.next()?.to_owned()))
        })
        .collect()
}

/// Lines `PATH: PATH…`, where what is needed first stands last.
fn parse_dependencies(text: &str) -> BTreeMap<String, Vec<String>> {
    text.lines()
        .filter_map(|line| {
            let (path, needs) = line.split_once(':')?;
            let mut files: Vec<String> = needs.split_whitespace().rev().map(str::to_owned).collect();
            files.push(path.to_owned());
            Some((module_name(path), files))
        })
        .collect()
}

/// The name under which the kernel knows a module file: no directory, no suffix, `_` for `-`.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Modules {
        Modules {
            directory: String::new(),
            aliases: parse_aliases(
                "# comment\nalias pci:v00001AF4d*sv*sd*bc*sc*i* virtio_pci\nalias virtio:d00000004v* virtio_rng\n",
            ),
            files: parse_dependencies("kernel/a/virtio-rng.ko: kernel/b/virtio_ring.ko kernel/b/virtio.ko\n"),
            loaded: BTreeSet::new(),
        }
    }

    #[test]
    fn a_device_finds_its_module() {
        let m = sample();
        let of = |id| m.matching(id).collect::<Vec<_>>();
        assert_eq!(of("pci:v00001AF4d00001041sv00001AF4sd00001100bc02sc00i00"), ["virtio_pci"]);
        assert_eq!(of("virtio:d00000004v00001AF4"), ["virtio_rng"]);
        assert!(of("pci:v00008086d00001237sv0sd0bc06sc00i00").is_empty());
    }

    #[test]
    fn what_a_module_needs_comes_before_it() {
        assert_eq!(
            sample().files["virtio_rng"],
            ["kernel/b/virtio.ko", "kernel/b/virtio_ring.ko", "kernel/a/virtio-rng.ko"]
        );
    }
}

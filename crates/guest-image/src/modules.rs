//! Kernel modules: what they are called, what they need, which devices they are for.
//!
//! Distribution packages bring no `modules.dep`, which depmod(8) makes at installation. It follows from the
//! modules themselves: the section `.modinfo` holds `key=value` strings ended by NUL.

use std::collections::{BTreeMap, BTreeSet};

use object::{Object, ObjectSection};

use crate::decompress::Format;

/// Modules for the devices that a VM of Berth may have. What they depend on comes by itself; what is missing
/// is built into the kernel.
pub const WANTED: [&str; 12] = [
    "af_packet",
    "button",
    "pvpanic_mmio",
    "virtio_balloon",
    "virtio_blk",
    "virtio_console",
    "virtio_mem",
    "virtio_net",
    "virtio_pci",
    "virtio_rng",
    "virtiofs",
    "vmw_vsock_virtio_transport",
];

/// Most bytes that a compressed module may unpack to.
const MAX_MODULE: u64 = 64 << 20;

/// One kernel module.
#[derive(Clone, Debug, Default)]
pub struct Module {
    /// Path below `/lib/modules/RELEASE`, without a suffix of compression.
    pub path: String,
    /// The ELF file, not compressed.
    pub content: Vec<u8>,
    /// Names of the modules that must be loaded before it.
    pub depends: Vec<String>,
    /// Patterns of the device identifiers that it is for.
    pub aliases: Vec<String>,
}

/// The name under which the kernel knows a module file: no directory, no suffix, `_` for `-`.
pub fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

impl Module {
    /// Reads a module file as packages contain it, plain or in one of the [formats](Format).
    ///
    /// # Errors
    /// Says for people what is wrong with the file.
    pub fn read(path: &str, packed: &[u8]) -> Result<Self, String> {
        let bad = |e: &dyn std::fmt::Display| format!("kernel module {path}: {e}");
        let content = match Format::of(packed) {
            Some(format) => format.unpack(packed, MAX_MODULE).map_err(|e| bad(&e))?,
            None => packed.to_vec(),
        };
        let file = object::File::parse(&*content).map_err(|e| bad(&e))?;
        let section = file.section_by_name(".modinfo").ok_or_else(|| bad(&"it has no .modinfo section"))?;
        let (depends, aliases) = parse_modinfo(section.data().map_err(|e| bad(&e))?);
        let plain = [".xz", ".zst", ".gz"].iter().find_map(|suffix| path.strip_suffix(suffix));
        Ok(Self { path: plain.unwrap_or(path).to_owned(), content, depends, aliases })
    }
}

/// The values of `depends` and `alias`.
fn parse_modinfo(section: &[u8]) -> (Vec<String>, Vec<String>) {
    let (mut depends, mut aliases) = (Vec::new(), Vec::new());
    for entry in section.split(|b| *b == 0) {
        let entry = String::from_utf8_lossy(entry);
        match entry.split_once('=') {
            Some(("depends", names)) => {
                depends.extend(names.split(',').filter(|n| !n.is_empty()).map(|n| n.replace('-', "_")));
            }
            Some(("alias", pattern)) => aliases.push(pattern.to_owned()),
            _ => {}
        }
    }
    (depends, aliases)
}

/// The modules of a kernel that the guest gets, each before those that need it.
#[derive(Debug, Default)]
pub struct ModuleSet {
    /// By name.
    modules: BTreeMap<String, Module>,
}

impl ModuleSet {
    /// Takes `wanted` and all that they need; `read` gives a module by name, or `None` where the kernel has it
    /// built in.
    ///
    /// # Errors
    /// What `read` returns.
    pub fn collect<E>(
        wanted: &[&str],
        mut read: impl FnMut(&str) -> Result<Option<Module>, E>,
    ) -> Result<Self, E> {
        let mut modules = BTreeMap::new();
        let mut seen = BTreeSet::new();
        let mut open: Vec<String> = wanted.iter().map(|&n| n.to_owned()).collect();
        while let Some(name) = open.pop() {
            if !seen.insert(name.clone()) {
                continue;
            }
            if let Some(module) = read(&name)? {
                open.extend(module.depends.iter().cloned());
                modules.insert(name, module);
            }
        }
        Ok(Self { modules })
    }

    /// All modules, by name.
    pub fn iter(&self) -> impl Iterator<Item = &Module> {
        self.modules.values()
    }

    /// `modules.dep` as depmod writes it: what must be loaded first stands last.
    pub fn dependency_file(&self) -> String {
        let mut text = String::new();
        for (name, module) in &self.modules {
            let mut order = Vec::new();
            self.visit(name, &mut BTreeSet::new(), &mut order);
            let needs = order.iter().rev().skip(1).map(|m| format!(" {}", m.path)).collect::<String>();
            text.push_str(&format!("{}:{needs}\n", module.path));
        }
        text
    }

    /// Appends `name` after all that it needs. A cycle, which the kernel could not load, ends at `seen`.
    fn visit<'a>(&'a self, name: &'a str, seen: &mut BTreeSet<&'a str>, order: &mut Vec<&'a Module>) {
        let Some(module) = self.modules.get(name) else { return };
        if !seen.insert(name) {
            return;
        }
        for needed in &module.depends {
            self.visit(needed, seen, order);
        }
        order.push(module);
    }

    /// `modules.alias` as depmod writes it.
    pub fn alias_file(&self) -> String {
        self.modules
            .iter()
            .flat_map(|(name, m)| m.aliases.iter().map(move |pattern| format!("alias {pattern} {name}\n")))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(path: &str, depends: &[&str]) -> Module {
        Module {
            path: path.to_owned(),
            depends: depends.iter().map(|&d| d.to_owned()).collect(),
            ..Module::default()
        }
    }

    fn sample(name: &str) -> Result<Option<Module>, String> {
        Ok(match name {
            "net" => Some(module("net.ko", &["failover", "virtio"])),
            "failover" => Some(module("failover.ko", &["virtio"])),
            "virtio" => Some(module("virtio.ko", &["built_in"])),
            _ => None,
        })
    }

    #[test]
    fn modinfo_is_strings_ended_by_nul() {
        let (depends, aliases) = parse_modinfo(
            b"license=GPL\0alias=pci:v00001AF4d*\0alias=fs-virtiofs\0depends=virtio,virtio-ring\0",
        );
        assert_eq!(depends, ["virtio", "virtio_ring"]);
        assert_eq!(aliases, ["pci:v00001AF4d*", "fs-virtiofs"]);
        assert_eq!(parse_modinfo(b"depends=\0"), (vec![], vec![]));
    }

    #[test]
    fn a_set_holds_what_its_modules_need() {
        let set = ModuleSet::collect(&["net", "absent"], sample).unwrap();
        assert_eq!(set.iter().map(|m| &*m.path).collect::<Vec<_>>(), ["failover.ko", "net.ko", "virtio.ko"]);
        assert_eq!(
            set.dependency_file(),
            "failover.ko: virtio.ko\nnet.ko: failover.ko virtio.ko\nvirtio.ko:\n"
        );
    }

    #[test]
    fn a_cycle_ends() {
        let cycle = |name: &str| -> Result<Option<Module>, String> {
            Ok(Some(module(name, &[if name == "a" { "b" } else { "a" }])))
        };
        let set = ModuleSet::collect(&["a"], cycle).unwrap();
        assert_eq!(set.dependency_file(), "a: b\nb: a\n");
    }

    #[test]
    fn names_are_those_of_the_kernel() {
        assert_eq!(name_of("kernel/drivers/char/hw_random/virtio-rng.ko.xz"), "virtio_rng");
    }

    #[test]
    fn damaged_modules_are_refused() {
        for path in ["a.ko", "a.ko.xz", "a.ko.zst"] {
            let error = Module::read(path, b"not a module at all").unwrap_err();
            assert!(error.contains(path), "{error}");
        }
    }
}

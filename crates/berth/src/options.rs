//! What a VM is made of: the options that the command line and a VM file have in common.
//!
//! An option that nobody names is `None`, so that one source can override the other; what holds then is said by
//! the methods of [`VmOptions`]. A new option is a field of [`VmOptions`], a line in [`VmOptions::or`], and one in
//! docs/vm-file.md.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use berth_image::Name;
use berth_machine::options::{
    BalloonOptions, ConsoleKind, CpusOptions, DeviceOptions, DiskOptions, MemoryOptions, NetOptions,
    OptionError, VsockOptions, size,
};
use clap::{Args, ValueEnum};
use clap_complete::engine::ArgValueCandidates;
use serde::de::Error;
use serde::{Deserialize, Deserializer};

use crate::image::image_names;

/// Bounds of the code cache in bytes.
const CODE_CACHE: std::ops::RangeInclusive<u64> = 1 << 20..=16 << 30;

/// Options of `berth run` that describe the VM. In a VM file each is a key of the same name.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct VmOptions {
    /// Name of the VM: letters, digits, '-', '_' and '.' [default: vm- and the process number]
    #[arg(long)]
    pub name: Option<Name>,
    /// What executes the guest [default: auto]
    #[arg(long, value_enum)]
    pub engine: Option<Engine>,
    /// Number of virtual CPUs, 1 to 64 [default: 1]. OPTIONS: the number, then weight=W (100 is usual), limit=L (most host
    /// CPUs, such as 1.5), pin=LIST (host CPUs, such as 0-1), with commas between
    #[arg(long, value_name = "OPTIONS")]
    pub cpus: Option<CpusOptions>,
    /// Memory, such as 512M or 2G [default: 512M]; then reserve=SIZE (stays in memory), limit=SIZE (what is in memory
    /// at most: colder pages are compressed), priority=N (0 to 1000; lower ones give way first [default: 100]),
    /// hugepages=thp|none, with commas between
    #[arg(long, value_name = "SIZE")]
    #[serde(deserialize_with = "memory")]
    pub memory: Option<MemoryOptions>,
    /// Image to start from (see `berth image ls`)
    #[arg(long, value_name = "NAME", add = ArgValueCandidates::new(image_names))]
    pub image: Option<Name>,
    /// With --image: throw away at the end of the VM what it writes to its root disk, as for a VM without --name
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub ephemeral: Option<bool>,
    /// With --image: no network but what --net names; without this it has one through passt, if that is installed
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub no_network: Option<bool>,
    /// Kernel: a bzImage, or an ELF file with a PVH note or a multiboot header
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line; for an image and the default guest added to its own, else instead of `console=ttyS0`
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub append: Option<String>,
    /// Fail if no kernel is named
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub no_default_guest: Option<bool>,
    /// End the VM when the guest reboots
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub no_reboot: Option<bool>,
    /// Give the guest a port 0xf4: a value written there ends the VM with exit code value*2+1
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub debug_exit: Option<bool>,
    /// Directory for a file (without a name) that takes guest memory which is not in use, when there is not enough memory
    /// for it compressed [default: that of the host configuration, or none]
    #[arg(long, value_name = "DIRECTORY")]
    pub store_dir: Option<PathBuf>,
    /// Most memory for translated code (soft engine) [default: 64M]
    #[arg(long, value_name = "SIZE", value_parser = parse_code_cache)]
    #[serde(deserialize_with = "code_cache")]
    pub code_cache: Option<u64>,
    /// Disk; several possible. OPTIONS: FILE, then format=raw|qcow2, ro, cache=writeback|none|writethrough,
    /// serial=S, id=ID, with commas between
    #[arg(long, value_name = "OPTIONS")]
    pub disk: Vec<DiskOptions>,
    /// Network interface; several possible. OPTIONS: user with forward=tcp:8080:80 (repeatable), or tap=NAME, or
    /// bridge=NAME; then mac=ADDRESS, id=ID
    #[arg(long, value_name = "OPTIONS")]
    pub net: Vec<NetOptions>,
    /// Sockets between host and guest. OPTIONS: path of a Unix socket, then cid=N
    #[arg(long, value_name = "OPTIONS")]
    pub vsock: Option<VsockOptions>,
    /// Memory balloon; images and the default guest always have one. OPTIONS: size=SIZE, deflate-on-oom=on|off, reporting=on|off, hinting=on|off
    #[arg(long, value_name = "OPTIONS", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    pub balloon: Option<BalloonOptions>,
    /// Give the guest a source of random numbers
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub rng: Option<bool>,
    /// What the terminal is connected to: serial (ttyS0) or virtio (hvc0) [default: serial]
    #[arg(long, value_name = "KIND")]
    pub console: Option<ConsoleKind>,
}

impl VmOptions {
    /// These options, and those of `others` where these say nothing.
    pub fn or(self, others: Self) -> Self {
        // No `..`: whoever adds an option is told to add it here.
        let Self {
            name,
            engine,
            cpus,
            memory,
            image,
            ephemeral,
            no_network,
            kernel,
            initrd,
            append,
            no_default_guest,
            no_reboot,
            debug_exit,
            store_dir,
            code_cache,
            disk,
            net,
            vsock,
            balloon,
            rng,
            console,
        } = self;
        Self {
            name: name.or(others.name),
            engine: engine.or(others.engine),
            cpus: cpus.or(others.cpus),
            memory: memory.or(others.memory),
            image: image.or(others.image),
            ephemeral: ephemeral.or(others.ephemeral),
            no_network: no_network.or(others.no_network),
            kernel: kernel.or(others.kernel),
            initrd: initrd.or(others.initrd),
            append: append.or(others.append),
            no_default_guest: no_default_guest.or(others.no_default_guest),
            no_reboot: no_reboot.or(others.no_reboot),
            debug_exit: debug_exit.or(others.debug_exit),
            store_dir: store_dir.or(others.store_dir),
            code_cache: code_cache.or(others.code_cache),
            disk: if disk.is_empty() { others.disk } else { disk },
            net: if net.is_empty() { others.net } else { net },
            vsock: vsock.or(others.vsock),
            balloon: balloon.or(others.balloon),
            rng: rng.or(others.rng),
            console: console.or(others.console),
        }
    }

    /// Refuses options that make no sense together.
    ///
    /// # Errors
    /// [`OptionError`] that names both.
    pub fn check(&self) -> Result<(), OptionError> {
        let devices = self.devices();
        devices.check()?;
        if self.ephemeral == Some(true) && self.image.is_none() {
            // What a disk keeps against its user's belief is worse than no start.
            return Err(OptionError(
                "--ephemeral needs --image: what a VM writes to a --disk is always kept".to_owned(),
            ));
        }
        let (memory, balloon) = (self.memory().size.0, devices.balloon.map_or(0, |b| b.size.0));
        if balloon > memory {
            return Err(OptionError(format!(
                "--balloon=size={} is more than --memory {}",
                size::show(balloon),
                size::show(memory)
            )));
        }
        Ok(())
    }

    /// Relative paths are taken from `directory` from now on.
    pub fn relative_to(&mut self, directory: &Path) {
        let boot = [&mut self.kernel, &mut self.initrd, &mut self.store_dir].into_iter().flatten();
        let disks = self.disk.iter_mut().map(|disk| &mut disk.path);
        let sockets = self.net.iter_mut().filter_map(|net| net.socket.as_mut());
        let vsock = self.vsock.iter_mut().map(|vsock| &mut vsock.path);
        for path in boot.chain(disks).chain(sockets).chain(vsock) {
            *path = directory.join(&path);
        }
    }

    /// What executes the guest.
    pub fn engine(&self) -> Engine {
        self.engine.unwrap_or(Engine::Auto)
    }

    /// Number of vCPUs, 1 to `MAX_VCPUS`.
    pub fn cpus(&self) -> u8 {
        self.cpus.as_ref().map_or(1, |cpus| cpus.count)
    }

    /// Memory, and how the host keeps it.
    pub fn memory(&self) -> MemoryOptions {
        self.memory.unwrap_or_default()
    }

    /// Disks, network and the other devices that not every VM has.
    pub fn devices(&self) -> DeviceOptions {
        DeviceOptions {
            disk: self.disk.clone(),
            net: self.net.clone(),
            vsock: self.vsock.clone(),
            balloon: self.balloon.clone(),
            rng: self.rng.unwrap_or(false),
            console: self.console.unwrap_or_default(),
        }
    }

    /// Most memory for translated code in bytes.
    pub fn code_cache(&self) -> u64 {
        self.code_cache.unwrap_or(64 << 20)
    }
}

/// What executes the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Engine {
    /// What suits this host (see `berth host`)
    Auto,
    /// Berth's translator: needs nothing
    Soft,
    /// The CPU's virtualization through /dev/kvm
    Kvm,
}

fn parse_code_cache(text: &str) -> Result<u64, size::SizeError> {
    size::parse_pages(text, CODE_CACHE)
}

fn memory<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<MemoryOptions>, D::Error> {
    text(deserializer, str::parse)
}

fn code_cache<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    text(deserializer, parse_code_cache)
}

/// A value that is written as text, as on the command line.
fn text<'de, D: Deserializer<'de>, T, E: Display>(
    deserializer: D,
    parse: impl FnOnce(&str) -> Result<T, E>,
) -> Result<Option<T>, D::Error> {
    parse(&String::deserialize(deserializer)?).map(Some).map_err(D::Error::custom)
}

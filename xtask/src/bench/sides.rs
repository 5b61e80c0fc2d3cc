//! Who does the work, and the commands for it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::debian::Debian;
use super::guest::{self, Files, PROGRAM};
use super::process;
use super::works::Work;

/// RAM of the guests.
const MEMORY: &str = "256M";
/// RAM of a guest that boots a distribution.
const DEBIAN_MEMORY: &str = "512M";

/// Who does the work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Side {
    /// The host, without a VM.
    Native,
    /// A guest.
    Guest(Emulator),
}

/// What runs a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Emulator {
    /// QEMU's translator.
    Qemu {
        /// Its program.
        program: PathBuf,
        /// What it says of itself.
        version: String,
    },
    /// Berth.
    Berth {
        /// Its program.
        program: PathBuf,
        /// Which one it is, for people.
        revision: String,
        /// Its `--engine`.
        engine: String,
    },
}

/// The emulators, as the command line names them.
#[derive(clap::Args)]
pub struct EmulatorArguments {
    /// A Berth that is built already, instead of this workspace's
    #[arg(long, value_name = "FILE")]
    berth: Option<PathBuf>,
    /// Berth's engine
    #[arg(long, value_name = "ENGINE", default_value = "soft")]
    engine: String,
    /// QEMU's system emulator; left out if it is not there
    #[arg(long, value_name = "PROGRAM", default_value = "qemu-system-x86_64")]
    qemu: PathBuf,
}

impl EmulatorArguments {
    /// Berth, which is built if none is named.
    ///
    /// # Errors
    /// A text when it cannot be built.
    pub fn berth(&self) -> Result<Emulator, String> {
        let (program, revision) = match &self.berth {
            Some(path) => (path.clone(), path.display().to_string()),
            None => guest::build_berth()?,
        };
        Ok(Emulator::Berth { program, revision, engine: self.engine.clone() })
    }

    /// QEMU. Says so if there is none.
    pub fn qemu(&self) -> Option<Emulator> {
        let version = process::version(&self.qemu);
        if version.is_none() {
            eprintln!("{} is not installed: no comparison with it", self.qemu.display());
        }
        version.map(|version| Emulator::Qemu { program: self.qemu.clone(), version })
    }
}

/// A [`Side`] without what it needs; in the order of reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum SideName {
    /// The host itself
    Native,
    /// QEMU's translator
    Tcg,
    /// Berth
    Berth,
}

/// Which one it is.
impl fmt::Display for Emulator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Qemu { version, .. } => f.write_str(version),
            Self::Berth { revision, engine, .. } => write!(f, "{revision}, {engine} engine"),
        }
    }
}

impl fmt::Display for SideName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Native => "native",
            Self::Tcg => "TCG",
            Self::Berth => "Berth",
        })
    }
}

impl Side {
    pub fn name(&self) -> SideName {
        match self {
            Self::Native => SideName::Native,
            Self::Guest(Emulator::Qemu { .. }) => SideName::Tcg,
            Self::Guest(Emulator::Berth { .. }) => SideName::Berth,
        }
    }

    /// How much of `work` this side does.
    pub fn count(&self, work: &Work) -> u32 {
        match self {
            Self::Native => work.count.saturating_mul(work.native),
            Self::Guest(Emulator::Qemu { .. }) => (work.count / work.tcg).max(1),
            Self::Guest(Emulator::Berth { .. }) => work.count,
        }
    }

    /// A command that does all of `work` with so many CPUs; the host itself is kept on one or may use all.
    pub fn program(&self, files: &Files, cpus: u32, work: &[Work]) -> Command {
        let orders: Vec<_> = work.iter().map(|w| format!("{}={}", w.name, self.count(w))).collect();
        match self {
            Self::Native => {
                let mut command = Command::new(&files.program);
                if cpus == 1 {
                    command.arg("--one-cpu");
                }
                if let Ok(debian) = &files.debian {
                    command.arg(format!("--debian={}", debian.root.display()));
                }
                command.arg(&files.busybox).args(orders);
                command
            }
            Self::Guest(emulator) => emulator.program(files, cpus, &orders.join(" ")),
        }
    }
}

impl Emulator {
    /// A guest that runs `guest/bench` with `orders` and powers off.
    pub fn program(&self, files: &Files, cpus: u32, orders: &str) -> Command {
        self.program_with(files, &cpus.to_string(), orders)
    }

    /// As [`Self::program`], with what `--cpus` (QEMU: `-smp`) takes.
    pub fn program_with(&self, files: &Files, cpus: &str, orders: &str) -> Command {
        let debian = files.debian.as_ref().ok();
        let disk = if debian.is_some() { "--debian=/dev/vda " } else { "" };
        let parameters = format!(" panic=-1 berth.run=\"{PROGRAM} {disk}/bin/busybox {orders}\"");
        let mut command = self.machine(files, cpus, &files.initrd, &parameters);
        if let Some(debian) = debian {
            let disk = debian.image.disk();
            match self {
                Self::Qemu { .. } => command
                    .arg("-drive")
                    .arg(format!("file={},format=raw,if=virtio,readonly=on", disk.display())),
                Self::Berth { .. } => command.arg("--disk").arg(format!("{},ro", disk.display())),
            };
        }
        command
    }

    /// Debian from its disk, which boots to a login on the console; what it writes is thrown away.
    pub fn debian(&self, debian: &Debian) -> Command {
        let image = &debian.image;
        match self {
            Self::Qemu { program, .. } => {
                let mut command = Self::qemu(program, "1", DEBIAN_MEMORY);
                let disk = format!("file={},format=raw,if=virtio,snapshot=on", image.disk().display());
                command.args(["-drive", &disk]).arg("-kernel").arg(image.kernel());
                if let Some(initrd) = image.initrd() {
                    command.arg("-initrd").arg(initrd);
                }
                command.args(["-append", &format!("{} console=ttyS0", image.manifest.cmdline)]);
                command
            }
            Self::Berth { program, engine, .. } => {
                let mut command = Self::berth(program, engine, "1", DEBIAN_MEMORY);
                command.env("XDG_DATA_HOME", &debian.data);
                command.args(["--image", image.name.as_str(), "--no-network", "--ephemeral"]);
                command
            }
        }
    }

    fn qemu(program: &Path, cpus: &str, memory: &str) -> Command {
        let mut command = Command::new(program);
        command.args(["-M", "pc", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", cpus]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"]);
        command.args(["-no-reboot", "-m", memory]);
        command
    }

    fn berth(program: &Path, engine: &str, cpus: &str, memory: &str) -> Command {
        let mut command = Command::new(program);
        command.args(["run", "--engine", engine, "--no-reboot", "--memory", memory, "--cpus", cpus]);
        command
    }

    /// The default guest as it is, which boots to its shell.
    pub fn default_guest(&self, files: &Files) -> Command {
        self.machine(files, "1", &files.plain_initrd, "")
    }

    /// A VM with `parameters` for its kernel and init. It ends when the guest powers off or resets.
    fn machine(&self, files: &Files, cpus: &str, initrd: &Path, parameters: &str) -> Command {
        let (mut command, dashes) = match self {
            Self::Qemu { program, .. } => (Self::qemu(program, cpus, MEMORY), "-"),
            Self::Berth { program, engine, .. } => (Self::berth(program, engine, cpus, MEMORY), "--"),
        };
        command.arg(format!("{dashes}kernel")).arg(&files.kernel);
        command.arg(format!("{dashes}initrd")).arg(initrd);
        command
            .arg(format!("{dashes}append"))
            .arg(format!("{}{parameters}", berth_guest_image::KERNEL_PARAMETERS));
        command
    }
}

//! The command line.

use std::path::PathBuf;

use berth_cpu::MAX_VCPUS;
use berth_memory::layout::MAX_RAM;
use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use crate::size;

/// Smallest RAM of a VM in bytes.
const MIN_RAM: u64 = 1 << 20;
/// Bounds of the code cache in bytes.
const CODE_CACHE: std::ops::RangeInclusive<u64> = 1 << 20..=16 << 30;
/// Longest name of a VM: what a host name may have (RFC 1123).
const MAX_NAME: usize = 63;

/// Runs virtual machines on any x86-64 Linux host.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true, max_term_width = 100)]
#[command(
    after_help = "BERTH_LOG=info (or debug, trace, MODULE=LEVEL) in the environment makes Berth say more."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a virtual machine with its serial console on this terminal
    Run(Box<RunArguments>),
    /// Say what this host offers and which engine `--engine auto` takes
    Host {
        /// As JSON, for programs
        #[arg(long)]
        json: bool,
    },
    /// Print completions for a shell
    Completions {
        /// The shell
        shell: Shell,
    },
}

/// Arguments of `berth run`.
#[derive(Debug, Args)]
#[command(long_about = "\
Starts a virtual machine with its serial console on this terminal.

Without --kernel it is Berth's default guest: the distribution's own cloud kernel with a small root file system \
in memory. The first start fetches it with apt (nothing is installed) into $XDG_CACHE_HOME/berth.")]
#[command(after_help = "\
Keys: Ctrl-A x ends the VM, Ctrl-A p presses its power button, Ctrl-A h lists all keys.

Signals: SIGTERM, SIGINT and SIGHUP press the power button. A guest that is not off 10 seconds later is ended, \
and at once by a second signal.

Exit code: 0 when the guest powered off or you ended the VM, 1 when something failed, 2 for bad arguments; \
with --debug-exit what the guest asks for.")]
pub struct RunArguments {
    /// Name of the VM: letters, digits, '-', '_' and '.' [default: vm- and the process number]
    #[arg(long, value_parser = parse_name)]
    pub name: Option<String>,
    /// What executes the guest
    #[arg(long, value_enum, default_value_t = Engine::Auto)]
    pub engine: Engine,
    /// Number of virtual CPUs, 1 to 64
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u8).range(1..=i64::from(MAX_VCPUS)))]
    pub cpus: u8,
    /// Memory, such as 512M or 2G
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_memory)]
    pub memory: u64,
    /// Kernel: a bzImage, or an ELF file with a PVH note or a multiboot header
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line; for the default guest added to its own, else instead of `console=ttyS0`
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub append: Option<String>,
    /// Fail if no kernel is named
    #[arg(long)]
    pub no_default_guest: bool,
    /// End the VM when the guest reboots
    #[arg(long)]
    pub no_reboot: bool,
    /// Give the guest a port 0xf4: a value written there ends the VM with exit code value*2+1
    #[arg(long)]
    pub debug_exit: bool,
    /// Most memory for translated code (soft engine)
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = parse_code_cache)]
    pub code_cache: u64,
}

/// What executes the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// What suits this host (see `berth host`)
    Auto,
    /// Berth's translator: needs nothing
    Soft,
    /// The CPU's virtualization through /dev/kvm
    Kvm,
}

fn parse_memory(text: &str) -> Result<u64, size::SizeError> {
    size::parse_pages(text, MIN_RAM..=MAX_RAM)
}

fn parse_code_cache(text: &str) -> Result<u64, size::SizeError> {
    size::parse_pages(text, CODE_CACHE)
}

/// The name becomes the guest's host name and part of names on the host.
fn parse_name(text: &str) -> Result<String, String> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if text.len() > MAX_NAME {
        Err(format!("it has more than {MAX_NAME} characters"))
    } else if !text.starts_with(|c: char| c.is_ascii_alphanumeric()) || !text.chars().all(good) {
        Err("a name begins with a letter or digit, and '-', '_' and '.' may follow".to_owned())
    } else {
        Ok(text.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn run(arguments: &[&str]) -> Result<RunArguments, String> {
        match Cli::try_parse_from(["berth", "run"].iter().chain(arguments))
            .map_err(|e| e.to_string())?
            .command
        {
            Command::Run(arguments) => Ok(*arguments),
            other => Err(format!("{other:?}")),
        }
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn defaults() {
        let a = run(&[]).unwrap();
        assert_eq!((a.cpus, a.memory, a.engine), (1, 512 << 20, Engine::Auto));
        assert!(a.kernel.is_none() && !a.no_reboot && !a.debug_exit);
    }

    #[test]
    fn all_options() {
        let a = run(&[
            "--name",
            "web.1",
            "--engine",
            "soft",
            "--cpus",
            "64",
            "--memory",
            "2G",
            "--kernel",
            "k",
            "--initrd",
            "i",
            "--append",
            "-x quiet",
            "--no-default-guest",
            "--no-reboot",
            "--debug-exit",
            "--code-cache",
            "16M",
        ])
        .unwrap();
        assert_eq!(a.name.as_deref(), Some("web.1"));
        assert_eq!((a.cpus, a.memory, a.code_cache), (64, 2 << 30, 16 << 20));
        assert_eq!(a.append.as_deref(), Some("-x quiet"));
    }

    #[test]
    fn impossible_values_are_named_with_what_is_possible() {
        for (arguments, value, range) in [
            (["--memory", "0"], "'0'", "1 MiB to 511 GiB"),
            (["--memory", "1K"], "'1K'", "1 MiB to 511 GiB"),
            (["--memory", "1P"], "'1P'", "1 MiB to 511 GiB"),
            (["--cpus", "0"], "0 is not in 1..=64", ""),
            (["--cpus", "65"], "65 is not in 1..=64", ""),
            (["--name", "../x"], "'../x'", "begins with"),
            (["--code-cache", "1"], "'1'", "1 MiB to 16 GiB"),
        ] {
            let error = run(&arguments).unwrap_err();
            assert!(error.contains(value) && error.contains(range), "{arguments:?}: {error}");
        }
    }
}

//! The command line.

use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::{Args, Parser, Subcommand};
use clap_complete::env::Shells;

use crate::disk::DiskCommand;
use crate::exec::ExecArguments;
use crate::image::ImageCommand;
use crate::keeper::KeeperArguments;
use crate::options::VmOptions;
use crate::rehearse::RehearseArguments;
use crate::top::TopArguments;
use crate::vms::VmCommand;

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
    /// Start a virtual machine, with its console on this terminal or in the background
    Run(Box<RunArguments>),
    /// Make, look at and change disk images
    Disk {
        /// What to do.
        #[command(subcommand)]
        command: DiskCommand,
    },
    /// Run a command in a VM's guest
    Exec(Box<ExecArguments>),
    /// Say what this host offers and which engine `--engine auto` takes
    Host {
        /// As JSON, for programs
        #[arg(long)]
        json: bool,
    },
    /// Make, list and remove images: root disks that VMs start from
    #[command(subcommand)]
    Image(ImageCommand),
    #[command(flatten)]
    Vms(VmCommand),
    /// Move memory between VMs: take what they do not use, and as the last step freeze some
    Keeper(KeeperArguments),
    /// Try how many VMs this host has room for, with guests that work
    Rehearse(RehearseArguments),
    /// Show what all VMs do, live
    Top(TopArguments),
    /// Print what makes a shell complete `berth`, for its start-up file
    Completions {
        /// The shell
        #[arg(value_parser = PossibleValuesParser::new(Shells::builtins().names()))]
        shell: String,
    },
}

/// Arguments of `berth run`.
#[derive(Debug, Args)]
#[command(long_about = "\
Starts a virtual machine with its console on this terminal, or with --detach in the background.

With --image it starts from an image (see `berth image`), and what it writes is kept under its --name. Without \
--image and --kernel it is Berth's default guest: the distribution's own cloud kernel with a small root file system \
in memory. The first start fetches it with apt (nothing is installed) into $XDG_CACHE_HOME/berth.")]
#[command(after_help = "\
Keys: Ctrl-A x ends the VM, Ctrl-A p presses its power button, Ctrl-A h lists all keys.

Signals: SIGTERM, SIGINT and SIGHUP press the power button. A guest that is not off 10 seconds later is ended, \
and at once by a second signal.

Exit code: 0 when the guest powered off or you ended the VM, 1 when something failed, 2 for bad arguments, 3 when \
the VM is refused because it does not fit on the host beside the others; \
with --debug-exit what the guest asks for. With --detach 0 when the VM runs; `berth wait` has its exit code.")]
pub struct RunArguments {
    /// Start it in the background: print its name as soon as it runs (then see `berth ps`, `berth console`)
    #[arg(short, long)]
    pub detach: bool,
    /// This process was started by `berth run --detach`
    #[arg(long, hide = true)]
    pub background: bool,
    /// Where the socket of its control API is [default: api.sock in the VM's runtime directory]
    #[arg(long, value_name = "PATH")]
    pub api_socket: Option<PathBuf>,
    /// Start it although VMs are promised more than the host configuration allows (max-overcommit)
    #[arg(long)]
    pub force: bool,
    /// Take options from a VM file (TOML); those on the command line override it
    #[arg(short, long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// What describes the VM.
    #[command(flatten)]
    pub vm: VmOptions,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Engine;
    use berth_machine::options::MemoryOptions;
    use clap::CommandFactory;

    fn run(arguments: &[&str]) -> Result<VmOptions, String> {
        match Cli::try_parse_from(["berth", "run"].iter().chain(arguments))
            .map_err(|e| e.to_string())?
            .command
        {
            Command::Run(arguments) => Ok(arguments.vm),
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
        assert_eq!(
            (a.cpus(), a.memory(), a.code_cache(), a.engine()),
            (1, MemoryOptions::of_size(512 << 20), 64 << 20, Engine::Auto)
        );
        assert_eq!(a, VmOptions::default());
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
        assert_eq!(a.name, Some("web.1".parse().unwrap()));
        assert_eq!((a.cpus(), a.memory(), a.code_cache()), (64, MemoryOptions::of_size(2 << 30), 16 << 20));
        assert_eq!((a.no_reboot, a.debug_exit, a.no_default_guest), (Some(true), Some(true), Some(true)));
        assert_eq!(a.append.as_deref(), Some("-x quiet"));
    }

    #[test]
    fn the_command_line_overrides_a_vm_file() {
        let file: VmOptions =
            toml::from_str("name = 'file'\ncpus = 8\nno-reboot = true\ndebug-exit = true").unwrap();
        let all = run(&["--name", "line", "--no-reboot=false", "--memory", "1G"]).unwrap().or(file);
        assert_eq!(
            (all.name.clone().map(String::from), all.cpus(), all.memory()),
            (Some("line".to_owned()), 8, MemoryOptions::of_size(1 << 30))
        );
        assert_eq!((all.no_reboot, all.debug_exit), (Some(false), Some(true)));
    }

    #[test]
    fn impossible_values_are_named_with_what_is_possible() {
        for (arguments, value, range) in [
            (["--memory", "0"], "'0'", "1 MiB to 511 GiB"),
            (["--memory", "1K"], "'1K'", "1 MiB to 511 GiB"),
            (["--memory", "1P"], "'1P'", "1 MiB to 511 GiB"),
            (["--cpus", "0"], "0 vCPUs", "from 1 to 64"),
            (["--cpus", "65"], "65 vCPUs", "from 1 to 64"),
            (["--name", "../x"], "'../x'", "begins with"),
            (["--code-cache", "1"], "'1'", "1 MiB to 16 GiB"),
        ] {
            let error = run(&arguments).unwrap_err();
            assert!(error.contains(value) && error.contains(range), "{arguments:?}: {error}");
        }
    }
}

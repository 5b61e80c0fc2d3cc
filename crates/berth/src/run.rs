//! `berth run`: one VM from its arguments to its exit code.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use berth_guest_image::{GuestImageError, KERNEL_PARAMETERS};
use berth_machine::options::{ConsoleKind, size};
use berth_machine::{EngineKind, Machine, MachineConfig, MachineControl, MachineError, Outcome};

use crate::cli::{Cli, RunArguments};
use crate::console::{self, Guest};
use crate::escape::{HELP, Key};
use crate::options::{Engine, VmOptions};
use crate::terminal::RawTerminal;
use crate::vm_file::{self, VmFileError};
use crate::{log, shutdown, terminal};

/// Command line for a kernel that the user names without one.
const DEFAULT_CMDLINE: &str = "console=ttyS0";

/// Why there is no VM.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The engine is not there.
    #[error("the kvm engine is not available yet in this version of Berth: use --engine soft")]
    NoKvm,
    /// The VM file.
    #[error(transparent)]
    File(#[from] VmFileError),
    /// The default guest.
    #[error(transparent)]
    Guest(#[from] GuestImageError),
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The terminal, or signals.
    #[error("cannot set up {what}: {source}")]
    Host {
        /// What.
        what: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

impl RunError {
    /// The exit code of the command: 2 when the user's description of the VM makes no sense, else 1.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::File(VmFileError::Content { .. }) => ExitCode::from(2),
            _ => ExitCode::FAILURE,
        }
    }

    fn host(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }
}

/// What the guest boots.
struct Boot {
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    cmdline: String,
}

/// Runs a VM to its end.
///
/// # Errors
/// [`RunError`] when it cannot be started.
pub fn run(arguments: &RunArguments) -> Result<ExitCode, RunError> {
    let mut options = arguments.vm.clone();
    if let Some(path) = &arguments.file {
        options = options.or(vm_file::read(path)?);
    }
    let engine = match options.engine() {
        Engine::Kvm => return Err(RunError::NoKvm),
        // The kvm engine does not exist yet, so there is nothing to choose from.
        Engine::Auto | Engine::Soft => EngineKind::Soft,
    };
    let on_terminal = terminal::is_terminal();
    let name = options.name.clone().map_or_else(|| format!("vm-{}", std::process::id()), String::from);
    let boot = choose_boot(&options, &name, on_terminal)?;
    let config = MachineConfig {
        name: name.clone(),
        engine,
        vcpus: options.cpus(),
        memory_bytes: options.memory(),
        kernel: boot.kernel,
        initrd: boot.initrd,
        cmdline: boot.cmdline,
        debug_exit: options.debug_exit.unwrap_or(false),
        no_reboot: options.no_reboot.unwrap_or(false),
        code_cache_bytes: options.code_cache(),
        devices: options.devices(),
    };
    tracing::info!(?config, "starting");

    terminal::end_at_panics();
    let output = console::Output::new().map_err(RunError::host("standard output"))?;
    let mut machine = Machine::new(config, Box::new(output))?;
    let control = machine.control();
    let ending = shutdown::watch_signals(control.clone()).map_err(RunError::host("signals"))?;
    let raw = if on_terminal {
        let s = if options.cpus() == 1 { "" } else { "s" };
        let memory = size::show(options.memory());
        log::message(&format!(
            "{name}: {} vCPU{s}, {memory}, soft engine; Ctrl-A h lists keys",
            options.cpus()
        ));
        Some(RawTerminal::enter().map_err(RunError::host("the terminal"))?)
    } else {
        None
    };
    machine.start()?;
    forward_input_on_thread(control, on_terminal).map_err(RunError::host("a thread for the console"))?;

    let outcome = machine.wait();
    drop(raw);
    if on_terminal && outcome != Outcome::PoweredOff {
        // The guest left the cursor anywhere.
        eprintln!();
    }
    Ok(exit_code(outcome, &ending))
}

/// Kernel, initrd and command line: the user's, or those of the default guest where the user names none.
fn choose_boot(options: &VmOptions, name: &str, on_terminal: bool) -> Result<Boot, RunError> {
    if let Some(kernel) = &options.kernel {
        return Ok(Boot {
            kernel: kernel.clone(),
            initrd: options.initrd.clone(),
            cmdline: options.append.clone().unwrap_or_else(|| DEFAULT_CMDLINE.to_owned()),
        });
    }
    if options.no_default_guest.unwrap_or(false) {
        use clap::CommandFactory;
        let text = "no kernel is named: pass --kernel FILE, or leave --no-default-guest out";
        Cli::command().error(clap::error::ErrorKind::MissingRequiredArgument, text).exit();
    }
    let guest = berth_guest_image::default_guest(&berth_guest_image::cache_directory()?)?;
    let term = std::env::var("TERM").ok();
    let window = on_terminal.then(terminal::size).flatten();
    Ok(Boot {
        kernel: guest.kernel,
        initrd: Some(options.initrd.clone().unwrap_or(guest.initrd)),
        cmdline: default_guest_cmdline(name, window, term.as_deref(), options.append.as_deref())
            + console_parameters(options.console.unwrap_or_default()),
    })
}

/// What the default guest's kernel must know of a console that is not the serial port. The last one named is the one of
/// its programs.
fn console_parameters(console: ConsoleKind) -> &'static str {
    match console {
        ConsoleKind::Serial => "",
        ConsoleKind::Virtio => " console=hvc0",
    }
}

/// The default guest's command line: what its kernel and its init take, then what the user adds.
fn default_guest_cmdline(
    name: &str,
    window: Option<(u16, u16)>,
    term: Option<&str>,
    append: Option<&str>,
) -> String {
    let mut cmdline = format!("{KERNEL_PARAMETERS} berth.name={name}");
    if let Some((columns, rows)) = window {
        cmdline.push_str(&format!(" berth.winsize={columns}x{rows}"));
        // The kernel passes a parameter that it does not know to init as a variable.
        let plain =
            |t: &&str| !t.is_empty() && t.chars().all(|c| c.is_ascii_alphanumeric() || "-+_".contains(c));
        if let Some(term) = term.filter(plain) {
            cmdline.push_str(&format!(" TERM={term}"));
        }
    }
    if let Some(append) = append {
        cmdline.push(' ');
        cmdline.push_str(append);
    }
    cmdline
}

/// What the console's input does to the machine.
struct ConsoleGuest(MachineControl);

impl Guest for ConsoleGuest {
    fn input(&mut self, bytes: &[u8]) -> usize {
        if bytes.is_empty() { 0 } else { self.0.console_input(bytes) }
    }

    fn wait_for_room(&mut self, timeout: Duration) {
        // Whether there is room shows when input is offered again.
        let _ = self.0.wait_for_console_room(timeout);
    }

    fn key(&mut self, key: Key) {
        match key {
            Key::End => shutdown::stop(&self.0),
            Key::PowerButton if self.0.hears_power_button() => self.0.power_button(),
            Key::PowerButton => log::message("the guest does not watch its power button (yet)"),
            Key::Help => {
                for line in HELP.lines() {
                    log::message(line);
                }
            }
        }
    }
}

/// The thread ends with the process: nothing can interrupt its read.
fn forward_input_on_thread(control: MachineControl, on_terminal: bool) -> io::Result<()> {
    thread::Builder::new().name("console".to_owned()).spawn(move || {
        if let Err(e) = console::forward_input(on_terminal, &mut ConsoleGuest(control)) {
            tracing::warn!("no more console input: {e}");
        }
    })?;
    Ok(())
}

fn exit_code(outcome: Outcome, ending: &shutdown::Ending) -> ExitCode {
    match outcome {
        Outcome::PoweredOff | Outcome::Reset => ExitCode::SUCCESS,
        // An exit code has 8 bits: the guest's value is cut as by exit(3).
        Outcome::DebugExit(code) => ExitCode::from(code as u8),
        Outcome::Stopped if ending.timed_out() => {
            let grace = shutdown::GRACE.as_secs();
            log::message(&format!(
                "the guest did not power off within {grace} s of the signal and was ended"
            ));
            ExitCode::FAILURE
        }
        Outcome::Stopped => {
            log::message("the VM was ended");
            ExitCode::SUCCESS
        }
        Outcome::Failed(account) => {
            log::message(&format!("the VM cannot go on: {account}"));
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_guests_command_line_ends_with_the_users() {
        let line = default_guest_cmdline("web", Some((80, 24)), Some("xterm-256color"), Some("loglevel=7"));
        assert_eq!(
            line,
            "console=ttyS0 quiet mitigations=off berth.name=web berth.winsize=80x24 TERM=xterm-256color loglevel=7"
        );
        assert_eq!(
            default_guest_cmdline("web", None, Some("xterm"), None),
            "console=ttyS0 quiet mitigations=off berth.name=web"
        );
    }

    #[test]
    fn a_strange_term_is_left_out() {
        for term in ["", "a b", "x\" init=/bin/sh", "a=b"] {
            assert!(!default_guest_cmdline("web", Some((1, 1)), Some(term), None).contains("TERM"), "{term}");
        }
    }
}

//! `berth run`: one VM from its arguments to its exit code.

use std::io;
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use berth_disk::Format;
use berth_guest_image::GuestImageError;
use berth_host::{Cpu, EngineChoice, EngineName};
use berth_image::ImageError;
use berth_machine::options::{DiskOptions, size};
use berth_machine::{
    BoardError, EngineKind, Machine, MachineConfig, MachineControl, MachineError, Outcome, VirtioError,
};

use crate::boot::{self, Boot};
use crate::cli::RunArguments;
use crate::console::{self, Guest};
use crate::escape::{HELP, Key};
use crate::options::Engine;
use crate::terminal::RawTerminal;
use crate::vm_file::{self, VmFileError};
use crate::{log, shutdown, terminal};

/// Why there is no VM.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The VM file.
    #[error(transparent)]
    File(#[from] VmFileError),
    /// The default guest.
    #[error(transparent)]
    Guest(#[from] GuestImageError),
    /// The image.
    #[error(transparent)]
    Image(#[from] ImageError),
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
            Self::File(VmFileError::Content { .. })
            | Self::Machine(MachineError::Board(BoardError::Virtio(
                VirtioError::Options(_) | VirtioError::TooMany,
            ))) => ExitCode::from(2),
            _ => ExitCode::FAILURE,
        }
    }

    fn host(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }
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
    let engine = choose_engine(options.engine());
    let on_terminal = terminal::is_terminal();
    let name = options.name.clone().map_or_else(|| format!("vm-{}", std::process::id()), String::from);
    let Boot { kernel, initrd, cmdline, root_disk } = boot::choose(&options, &name, on_terminal)?;
    let mut devices = options.devices();
    devices.net.extend(boot::default_network(&options));
    if let Some(disk) = &root_disk {
        let (path, format) = (disk.path().to_owned(), Some(Format::Qcow2));
        devices.disk.insert(0, DiskOptions { path, format, ..DiskOptions::default() });
    }
    let config = MachineConfig {
        name: name.clone(),
        engine,
        vcpus: options.cpus(),
        memory_bytes: options.memory(),
        kernel,
        initrd,
        cmdline,
        debug_exit: options.debug_exit.unwrap_or(false),
        no_reboot: options.no_reboot.unwrap_or(false),
        code_cache_bytes: options.code_cache(),
        devices,
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
            "{name}: {} vCPU{s}, {memory}, {engine} engine; Ctrl-A h lists keys",
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

/// The engine that the user wants, or what suits this host.
fn choose_engine(wanted: Engine) -> EngineKind {
    match wanted {
        Engine::Soft => EngineKind::Soft,
        Engine::Kvm => {
            if !Cpu::virtualization(Path::new("/")).virtualizes() {
                log::message(
                    "warning: this CPU shows no vmx or svm: if /dev/kvm works at all it emulates guest kernels, \
                     slower than --engine soft and not completely",
                );
            }
            EngineKind::Kvm
        }
        Engine::Auto => {
            let choice = EngineChoice::of_this_host();
            tracing::info!("engine {:?}: {}", choice.engine, choice.reason);
            match choice.engine {
                EngineName::Kvm => EngineKind::Kvm,
                EngineName::Soft => EngineKind::Soft,
            }
        }
    }
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

//! `berth run`: one VM from its arguments to its exit code.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use berth_api::types::Ending;
use berth_api::{RuntimeError, VmDirectory};
use berth_api_server::{Console, ConsoleWriter, Server, Vm};
use berth_disk::Format;
use berth_guest_image::GuestImageError;
use berth_host::{Cpu, EngineChoice, EngineName};
use berth_image::{ImageError, VmDisk};
use berth_machine::options::{DiskOptions, OptionError, size};
use berth_machine::{
    BoardError, CpuTimeError, EngineKind, Machine, MachineConfig, MachineControl, MachineError, Outcome,
    VirtioError,
};

use crate::admission::{self, AdmissionError, Promise};
use crate::boot::{self, Boot};
use crate::cli::RunArguments;
use crate::console::{self, Guest};
use crate::escape::{EscapeFilter, HELP, Key};
use crate::host_config::{HostConfig, HostConfigError};
use crate::options::{Engine, VmOptions};
use crate::shutdown::Shutdown;
use crate::terminal::RawTerminal;
use crate::vm_file::{self, VmFileError};
use crate::{cpu, detach, log, shutdown, terminal, vm_home};

/// Why there is no VM.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The VM file.
    #[error(transparent)]
    File(#[from] VmFileError),
    /// Options that make no sense together.
    #[error(transparent)]
    Options(#[from] OptionError),
    /// The default guest.
    #[error(transparent)]
    Guest(#[from] GuestImageError),
    /// The image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Its share of CPU time.
    #[error(transparent)]
    CpuTime(#[from] CpuTimeError),
    /// It does not fit on the host beside the others.
    #[error(transparent)]
    Admission(#[from] AdmissionError),
    /// The host configuration.
    #[error(transparent)]
    HostConfig(#[from] HostConfigError),
    /// Where the cold store's file is to be made.
    #[error("no file for guest memory can be made in {}: {source}", path.display())]
    StoreDir {
        /// The directory.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The VM's directory.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The socket of the control API.
    #[error("the control API cannot listen at {}: {source}", path.display())]
    Api {
        /// The socket.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
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
    /// The exit code of the command: 2 when the user's description of the VM makes no sense, 3 when the VM is refused
    /// because it does not fit on the host, else 1.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::File(VmFileError::Content { .. })
            | Self::Options(_)
            | Self::Machine(MachineError::Board(BoardError::Virtio(
                VirtioError::Options(_) | VirtioError::TooMany,
            ))) => ExitCode::from(2),
            Self::Admission(e) if e.is_refusal() => ExitCode::from(3),
            _ => ExitCode::FAILURE,
        }
    }

    fn host(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }
}

/// Runs a VM to its end, or starts it in the background.
///
/// # Errors
/// [`RunError`] when it cannot be started.
pub fn run(arguments: &RunArguments) -> Result<ExitCode, RunError> {
    if arguments.detach && !arguments.background {
        return detach::start().map_err(RunError::host("a process in the background"));
    }
    let mut options = arguments.vm.clone();
    if let Some(path) = &arguments.file {
        options = options.or(vm_file::read(path)?);
    }
    // Before anything is fetched for a VM that cannot be.
    options.check()?;
    let name = options.name.clone().map_or_else(|| format!("vm-{}", std::process::id()), String::from);
    let home = vm_home::enter(&name, arguments.background)?;
    let result = run_as(&name, home.as_ref(), options, arguments);
    vm_home::leave();
    result
}

/// [`run`], with the VM's name taken.
fn run_as(
    name: &str,
    home: Option<&VmDirectory>,
    options: VmOptions,
    arguments: &RunArguments,
) -> Result<ExitCode, RunError> {
    let detached = arguments.background;
    let on_terminal = terminal::is_terminal() && !detached;
    let (config, _root_disk) = configure(name, home, &options, on_terminal)?;
    tracing::info!(?config, "starting");

    terminal::end_at_panics();
    let console =
        Console::new(home.map(VmDirectory::console_log)).map_err(RunError::host("the console's log"))?;
    let output: Option<Box<dyn Write + Send>> = match detached {
        true => None,
        false => Some(Box::new(console::Output::new().map_err(RunError::host("standard output"))?)),
    };
    let api = arguments.api_socket.clone().or(home.map(VmDirectory::default_api_socket));
    let image = options.image.clone().map(String::from);
    let description = vm_home::description(&config, image, detached, api.clone().unwrap_or_default());
    let has_store_dir = config.store_dir.is_some();
    if home.is_some() {
        let memory = &config.memory;
        let promise = Promise::new(name, memory.reserve.0, memory.size.0, config.vcpus);
        let _admitted = admission::admit(&promise, arguments.force)?;
        vm_home::describe(&description)?;
    }
    if let Some(list) = options.cpus.as_ref().and_then(|cpus| cpus.pin.as_ref()) {
        // Before there are threads: all of them inherit it.
        cpu::pin(list).map_err(RunError::host("the host CPUs that the VM may use"))?;
    }
    let mut machine = Machine::new(config, Box::new(ConsoleWriter::new(console.clone(), output)))?;
    let control = machine.control();
    if let Some(cpus) = &options.cpus {
        control.set_cpu_time(Some(cpus.weight), Some(cpus.limit))?;
    }
    let shutdown = Shutdown::new(control.clone());
    shutdown.watch_signals().map_err(RunError::host("signals"))?;
    let listener = match &api {
        Some(path) => {
            let failed = |source| RunError::Api { path: path.clone(), source };
            Some(vm_home::listen(path).map_err(failed)?)
        }
        None => None,
    };
    let raw = if on_terminal {
        let s = if options.cpus() == 1 { "" } else { "s" };
        let memory = size::show(options.memory().size.0);
        let engine = &description.engine;
        log::message(&format!(
            "{name}: {} vCPU{s}, {memory}, {engine} engine; Ctrl-A h lists keys",
            options.cpus()
        ));
        Some(RawTerminal::enter().map_err(RunError::host("the terminal"))?)
    } else {
        None
    };
    machine.start()?;
    let owner = Box::new(shutdown.clone());
    let vm = Vm { description, control: control.clone(), has_store_dir, console, owner };
    let server = listener.map(|listener| Server::start(vm, listener)).transpose();
    let server = server.map_err(RunError::host("the control API"))?;
    if detached {
        detach::leave_terminal(name, home).map_err(RunError::host("the background"))?;
    } else {
        forward_input_on_thread(control, on_terminal).map_err(RunError::host("a thread for the console"))?;
    }

    crate::residence::release_code();
    let outcome = machine.wait();
    drop(raw);
    if on_terminal && outcome != Outcome::PoweredOff {
        // The guest left the cursor anywhere.
        eprintln!();
    }
    let (exit_code, reason) = judge(&outcome, shutdown.ending());
    if !matches!(outcome, Outcome::PoweredOff | Outcome::Reset | Outcome::DebugExit(_)) {
        log::message(&reason);
    }
    let ending = Ending { at: vm_home::now(), exit_code, reason };
    if detached && !shutdown.ending().was_asked_for() {
        vm_home::keep(&ending);
    }
    if let Some(server) = server {
        server.end(ending);
    }
    if let Some(path) = &arguments.api_socket {
        // It is not in the directory that is removed. If it is gone there is nothing to do.
        let _ = std::fs::remove_file(path);
    }
    Ok(ExitCode::from(exit_code))
}

/// The machine that `options` describe, and its root disk if that comes from an image: keep it while the machine runs.
fn configure(
    name: &str,
    home: Option<&VmDirectory>,
    options: &VmOptions,
    on_terminal: bool,
) -> Result<(MachineConfig, Option<VmDisk>), RunError> {
    let engine = choose_engine(options.engine());
    let Boot { kernel, initrd, cmdline, root_disk, has_agent } = boot::choose(options, name, on_terminal)?;
    let mut devices = options.devices();
    devices.net.extend(boot::default_network(options));
    if let Some(disk) = &root_disk {
        let (path, format) = (disk.path().to_owned(), Some(Format::Qcow2));
        devices.disk.insert(0, DiskOptions { path, format, ..DiskOptions::default() });
    }
    if has_agent && devices.vsock.is_none() {
        devices.vsock = home.and_then(vm_home::default_vsock);
    }
    if options.kernel.is_none() {
        // Guests of ours have the driver, and give free memory back by themselves.
        devices.balloon.get_or_insert_default();
    }
    let config = MachineConfig {
        name: name.to_owned(),
        engine,
        vcpus: options.cpus(),
        memory: options.memory(),
        kernel,
        initrd,
        cmdline,
        debug_exit: options.debug_exit.unwrap_or(false),
        no_reboot: options.no_reboot.unwrap_or(false),
        code_cache_bytes: options.code_cache(),
        store_dir: store_dir(options)?,
        devices,
    };
    Ok((config, root_disk))
}

/// Where the cold store's file is made, if it is to have one: it must be possible now, not only when memory is short.
fn store_dir(options: &VmOptions) -> Result<Option<PathBuf>, RunError> {
    let wanted = match &options.store_dir {
        Some(path) => Some(path.clone()),
        None => HostConfig::read()?.store_dir,
    };
    let Some(path) = wanted else { return Ok(None) };
    match tempfile::tempfile_in(&path) {
        Ok(_) => Ok(Some(path)),
        Err(source) => Err(RunError::StoreDir { path, source }),
    }
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
            // There is nothing that it could detach from.
            Key::Detach => {}
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
        if let Err(e) =
            console::forward_input(on_terminal.then(EscapeFilter::default), &mut ConsoleGuest(control))
        {
            tracing::warn!("no more console input: {e}");
        }
    })?;
    Ok(())
}

/// The exit code of a VM that ended so, and what happened, for people.
fn judge(outcome: &Outcome, ending: &shutdown::Ending) -> (u8, String) {
    match outcome {
        Outcome::PoweredOff => (0, "the guest powered off".to_owned()),
        Outcome::Reset => (0, "the guest was to be reset, and --no-reboot is set".to_owned()),
        // An exit code has 8 bits: the guest's value is cut as by exit(3).
        Outcome::DebugExit(code) => (*code as u8, "the guest wrote to the debug-exit port".to_owned()),
        Outcome::Stopped => match ending.timed_out() {
            Some(limit) => {
                (1, format!("the guest did not power off within {} s and was ended", limit.as_secs()))
            }
            None => (0, "the VM was ended".to_owned()),
        },
        Outcome::Failed(account) => (1, format!("the VM cannot go on: {account}")),
    }
}

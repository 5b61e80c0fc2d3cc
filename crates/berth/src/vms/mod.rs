//! The commands to VMs that are there: they find a VM by its directory and ask it through its control API.

mod console;
mod list;
mod logs;
mod look;
mod memory;
mod set;
mod show;
mod steer;

use std::io;
use std::process::ExitCode;

use berth_api::{Client, ClientError, RuntimeError, VmDirectory, Vms};
use berth_image::{ImageError, Name};
use clap::{Args, Subcommand};
use clap_complete::engine::{ArgValueCandidates, CompletionCandidate};

use crate::admission::AdmissionError;
use crate::{image, log};

/// What to do with VMs.
#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// List the VMs, with what they were promised and what they use
    Ps(list::PsArguments),
    /// Attach this terminal to a VM's console; Ctrl-A d detaches
    Console(console::ConsoleArguments),
    /// Print what a VM's console has printed
    Logs(logs::LogsArguments),
    /// Ask VMs to power off, and end those that do not in time
    Stop(steer::StopArguments),
    /// End VMs at once; what their guests have written to disks is kept
    Kill(Names),
    /// Let VMs stand still: vCPUs, devices and the guest's clock
    Pause(Names),
    /// Let paused VMs go on; their guests do not see that time has passed
    Resume(Names),
    /// Press the reset button of VMs: they boot again
    Reset(Names),
    /// Let VMs stand still with their memory in the cold store, until they are used
    Freeze(Names),
    /// Let frozen VMs go on
    Thaw(Names),
    /// Take memory that guests do not use to the cold store: compressed, until it is touched
    Reclaim(memory::ReclaimArguments),
    /// Wait until a VM ends, and end with its exit code
    Wait(OneName),
    /// Remove VMs that have ended: their records, and what they wrote to their disks
    Rm(steer::RmArguments),
    /// Print all that is known of VMs, as JSON
    Inspect(Names),
    /// Change what a VM gets while it runs: its share of CPU time and of memory
    Set(set::SetArguments),
    /// Explain where an address of a guest leads: page tables, guest memory, host memory, machine frame
    Explain(look::ExplainArguments),
    /// Draw guest physical memory by page state
    Map(look::MapArguments),
    /// Show what a VM uses
    Stats(show::StatsArguments),
    /// Show what happens to a VM
    Events(show::EventsArguments),
}

/// Names of VMs.
#[derive(Debug, Args)]
pub struct Names {
    /// Their names
    #[arg(required = true, value_name = "NAME", add = ArgValueCandidates::new(live_names))]
    pub names: Vec<Name>,
}

/// The name of one VM.
#[derive(Debug, Args)]
pub struct OneName {
    /// Its name
    #[arg(add = ArgValueCandidates::new(live_names))]
    pub name: Name,
}

/// Why it cannot be done. One line for people.
#[derive(Debug, thiserror::Error)]
pub enum VmsError {
    /// There is no such VM, or it is in the way.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// It does not answer, or says no.
    #[error("{name}: {error}")]
    Client {
        /// The VM.
        name: String,
        /// What is wrong.
        #[source]
        error: ClientError,
    },
    /// Many VMs cannot be asked.
    #[error(transparent)]
    Ask(#[from] ClientError),
    /// It may not have that.
    #[error(transparent)]
    Admission(#[from] AdmissionError),
    /// Its process is gone.
    #[error("{name} does not run: {}", fate)]
    Dead {
        /// The VM.
        name: String,
        /// What is known.
        fate: &'static str,
    },
    /// Disks that were kept.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The host.
    #[error("cannot {what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

impl VmsError {
    fn host(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }

    fn client(name: &str) -> impl FnOnce(ClientError) -> Self {
        let name = name.to_owned();
        move |error| Self::Client { name, error }
    }
}

/// Does what `command` says; returns the exit code.
///
/// # Errors
/// [`VmsError`].
pub fn run(command: &VmCommand) -> Result<ExitCode, VmsError> {
    match command {
        VmCommand::Ps(arguments) => list::ps(arguments),
        VmCommand::Console(arguments) => console::attach(arguments),
        VmCommand::Logs(arguments) => logs::logs(arguments),
        VmCommand::Stop(arguments) => steer::stop(arguments),
        VmCommand::Kill(names) => steer::kill(&names.names),
        VmCommand::Pause(names) => with_each(&names.names, |vm| vm.ask(Client::pause)),
        VmCommand::Resume(names) => with_each(&names.names, |vm| vm.ask(Client::resume)),
        VmCommand::Reset(names) => with_each(&names.names, |vm| vm.ask(Client::reset)),
        VmCommand::Freeze(names) => memory::freeze(names),
        VmCommand::Thaw(names) => with_each(&names.names, |vm| vm.ask(Client::thaw)),
        VmCommand::Reclaim(arguments) => memory::reclaim(arguments),
        VmCommand::Wait(name) => steer::wait(&name.name),
        VmCommand::Rm(arguments) => steer::rm(arguments),
        VmCommand::Inspect(names) => show::inspect(&names.names),
        VmCommand::Set(arguments) => set::set(arguments),
        VmCommand::Explain(arguments) => look::explain(arguments),
        VmCommand::Map(arguments) => look::map(arguments),
        VmCommand::Stats(arguments) => show::stats(arguments),
        VmCommand::Events(arguments) => show::events(arguments),
    }
}

/// A VM that lives.
pub struct LiveVm {
    directory: VmDirectory,
    client: Client,
}

impl LiveVm {
    /// The VM `name`.
    ///
    /// # Errors
    /// [`VmsError`] when there is none, or it is dead.
    pub fn find(name: &Name) -> Result<Self, VmsError> {
        let directory = Vms::open()?.get(name.as_str())?;
        if !directory.is_alive() {
            let fate = match directory.ending() {
                Some(_) => "it has ended (`berth inspect` says how, `berth rm` removes it)",
                None => "its process was killed (`berth rm` removes what it left)",
            };
            return Err(VmsError::Dead { name: name.as_str().to_owned(), fate });
        }
        let client = Client::new(directory.api_socket()).map_err(VmsError::client(name.as_str()))?;
        Ok(Self { directory, client })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        self.directory.name()
    }

    /// Where it keeps its files.
    pub fn directory(&self) -> &VmDirectory {
        &self.directory
    }

    /// Its API.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Asks it for something.
    ///
    /// # Errors
    /// [`VmsError::Client`].
    pub fn ask<T>(&self, request: impl FnOnce(&Client) -> Result<T, ClientError>) -> Result<T, VmsError> {
        request(&self.client).map_err(VmsError::client(self.name()))
    }
}

/// Does something with each VM, although it fails with some.
fn with_each(names: &[Name], act: impl Fn(&LiveVm) -> Result<(), VmsError>) -> Result<ExitCode, VmsError> {
    for_each(names, |name| act(&LiveVm::find(name)?))
}

/// Does something for each name, although it fails for some.
fn for_each(
    names: &[Name],
    mut act: impl FnMut(&Name) -> Result<(), VmsError>,
) -> Result<ExitCode, VmsError> {
    let mut code = ExitCode::SUCCESS;
    for name in names {
        if let Err(e) = act(name) {
            log::message(&format!("error: {e}"));
            code = ExitCode::FAILURE;
        }
    }
    Ok(code)
}

/// Names of VMs that have a directory, for shells that complete them.
pub fn live_names() -> Vec<CompletionCandidate> {
    let vms = Vms::open().map(|vms| vms.all()).unwrap_or_default();
    vms.iter().map(|vm| CompletionCandidate::new(vm.name())).collect()
}

/// Names of VMs that have a directory or a disk.
fn all_names() -> Vec<CompletionCandidate> {
    let mut names = live_names();
    names.extend(image::vm_names());
    names.sort_by(|a, b| a.get_value().cmp(b.get_value()));
    names.dedup_by(|a, b| a.get_value() == b.get_value());
    names
}

//! The guests of a rehearsal: they are started, stand still while others start, and end with it.

use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use berth_agent_protocol::load::Kind;
use berth_api::{Client, ClientError, RuntimeError, Vms};
use clap::ValueEnum;

use super::probe::{Probe, ProbeError};
use super::{Interrupt, RehearseArguments};

/// How long guests have to begin their work, and how much longer for each that starts at the same time.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
const BOOT_LIMIT_EACH: Duration = Duration::from_secs(20);
/// Pause before it is tried again.
const TRY_AGAIN: Duration = Duration::from_millis(100);
/// How long a VM has to end after it was told to.
const END_LIMIT: Duration = Duration::from_secs(5);
/// Most bytes of what a VM that failed had to say.
const MAX_COMPLAINT: u64 = 4096;

/// Why a guest does not do what it is there for. One line for people.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The user had enough.
    #[error("interrupted")]
    Interrupted,
    /// Its process.
    #[error("cannot start a VM: {0}")]
    Start(#[source] io::Error),
    /// It ended.
    #[error("{name} ended ({status}){}", with_colon(said))]
    Ended {
        /// The VM.
        name: String,
        /// How.
        status: String,
        /// What it said last.
        said: String,
    },
    /// Its load does not begin.
    #[error("the load in {name} did not begin within {} s", limit.as_secs())]
    Silent {
        /// The VM.
        name: String,
        /// How long it had.
        limit: Duration,
    },
    /// Its load does not answer.
    #[error("the load in {name} does not answer any more: {source}")]
    Probe {
        /// The VM.
        name: String,
        /// Why.
        #[source]
        source: ProbeError,
    },
    /// Its control API.
    #[error("{name}: {source}")]
    Api {
        /// The VM.
        name: String,
        /// Why.
        #[source]
        source: ClientError,
    },
    /// Where VMs are found.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
}

fn with_colon(said: &str) -> String {
    if said.is_empty() { String::new() } else { format!(": {said}") }
}

/// A VM with a load.
pub struct Guest {
    /// Its name.
    pub name: String,
    process: Child,
    client: Client,
    /// The way to its load, since that has begun.
    pub probe: Option<Probe>,
    vsock: PathBuf,
    api: PathBuf,
}

/// All of them.
pub struct Guests {
    list: Vec<Guest>,
    vms: Vms,
    program: PathBuf,
    engine: String,
    cpus: u8,
    memory: u64,
    load: Kind,
    interrupt: Interrupt,
}

impl Guests {
    /// None yet.
    ///
    /// # Errors
    /// [`GuestError`] when there can be none.
    pub fn new(arguments: &RehearseArguments, interrupt: Interrupt) -> Result<Self, GuestError> {
        let engine = arguments.engine.to_possible_value();
        Ok(Self {
            list: Vec::new(),
            vms: Vms::open()?,
            program: std::env::current_exe().map_err(GuestError::Start)?,
            engine: engine.map_or_else(String::new, |value| value.get_name().to_owned()),
            cpus: arguments.cpus_per_vm,
            memory: arguments.memory_per_vm,
            load: arguments.load,
            interrupt,
        })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// All of them.
    pub fn list(&mut self) -> &mut [Guest] {
        &mut self.list
    }

    /// vCPUs of each.
    pub fn cpus(&self) -> u8 {
        self.cpus
    }

    /// What each was promised, in bytes.
    pub fn memory(&self) -> u64 {
        self.memory
    }

    /// Where their control APIs are.
    pub fn sockets(&self) -> Vec<PathBuf> {
        self.list.iter().map(|guest| guest.api.clone()).collect()
    }

    /// Starts guests until there are so many, and waits until all of them work. Those that are there stand still
    /// meanwhile: they would only make the start longer.
    ///
    /// # Errors
    /// [`GuestError`].
    pub fn grow(&mut self, to: usize) -> Result<(), GuestError> {
        let old = self.list.len();
        if to <= old {
            return Ok(());
        }
        self.each_of(old, Client::pause)?;
        for number in old..to {
            let guest = self.start(number + 1)?;
            self.list.push(guest);
        }
        let new = u32::try_from(to - old).unwrap_or(u32::MAX);
        let limit = BOOT_LIMIT.saturating_add(BOOT_LIMIT_EACH.saturating_mul(new));
        let deadline = Instant::now() + limit;
        while !self.all_ready()? {
            if let Some(late) = self.list.iter().find(|g| g.probe.is_none())
                && Instant::now() > deadline
            {
                return Err(GuestError::Silent { name: late.name.clone(), limit });
            }
            thread::sleep(TRY_AGAIN);
            self.check()?;
        }
        self.each_of(old, Client::resume)
    }

    fn each_of(
        &self,
        first: usize,
        act: impl Fn(&Client) -> Result<(), ClientError>,
    ) -> Result<(), GuestError> {
        self.list.iter().take(first).try_for_each(|guest| {
            act(&guest.client).map_err(|source| GuestError::Api { name: guest.name.clone(), source })
        })
    }

    fn start(&self, number: usize) -> Result<Guest, GuestError> {
        let name = format!("rehearse-{}-{number}", std::process::id());
        let mut command = Command::new(&self.program);
        command.args(["run", "--name", &name, "--engine", &self.engine]);
        command.args(["--cpus", &self.cpus.to_string(), "--memory", &self.memory.to_string()]);
        command.args(["--append", &format!("berth.load={}", self.load)]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        // Ctrl-C is for this process, which ends them in order.
        command.process_group(0);
        // SAFETY: between fork and exec it makes one system call that takes numbers, and allocates nothing.
        unsafe {
            command.pre_exec(|| {
                // However this process ends: nobody else would end its guests.
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let process = command.spawn().map_err(GuestError::Start)?;
        // Its directory does not exist before it has begun; where that will be is known.
        let directory = self.vms.place(&name)?;
        let api = directory.default_api_socket();
        let client =
            Client::new(api.clone()).map_err(|source| GuestError::Api { name: name.clone(), source })?;
        Ok(Guest { name, process, client, probe: None, vsock: directory.default_vsock(), api })
    }

    /// Whether the loads of all guests work; connects to those that begin.
    fn all_ready(&mut self) -> Result<bool, GuestError> {
        for guest in &mut self.list {
            if guest.probe.is_none() {
                guest.probe = Probe::connect(&guest.vsock).filter(|probe| probe.last().ready);
            }
            if guest.probe.is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Looks whether all guests live and the user wants to go on.
    ///
    /// # Errors
    /// [`GuestError::Interrupted`], [`GuestError::Ended`].
    pub fn check(&mut self) -> Result<(), GuestError> {
        if self.interrupt.requested() {
            return Err(GuestError::Interrupted);
        }
        for guest in &mut self.list {
            if let Ok(Some(status)) = guest.process.try_wait() {
                let mut said = Vec::new();
                if let Some(errors) = guest.process.stderr.take() {
                    // What cannot be read is not said.
                    let _ = errors.take(MAX_COMPLAINT).read_to_end(&mut said);
                }
                let said = String::from_utf8_lossy(&said);
                let last = said.lines().last().unwrap_or_default().trim_start_matches("berth: ").to_owned();
                return Err(GuestError::Ended {
                    name: guest.name.clone(),
                    status: status.to_string(),
                    said: last,
                });
            }
        }
        Ok(())
    }
}

impl Drop for Guests {
    /// Ends all of them.
    fn drop(&mut self) {
        for guest in &self.list {
            // One that has no API yet, or none any more, is killed below.
            let _ = guest.client.kill();
        }
        let deadline = Instant::now() + END_LIMIT;
        for guest in &mut self.list {
            while matches!(guest.process.try_wait(), Ok(None)) && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(10));
            }
            // It may have ended already.
            let _ = guest.process.kill();
            let _ = guest.process.wait();
            if let Ok(directory) = self.vms.get(&guest.name) {
                // Of one that was killed; nobody will miss it.
                let _ = directory.remove();
            }
        }
    }
}

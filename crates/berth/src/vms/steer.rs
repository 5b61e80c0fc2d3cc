//! Ending VMs, and what is left of them.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use berth_api::types::EventKind;
use berth_api::{Client, RuntimeError, VmDirectory, Vms};
use berth_image::{ImageError, Images, Name, data_directory};
use clap::Args;
use clap_complete::engine::ArgValueCandidates;

use super::{LiveVm, Names, VmsError, all_names, for_each};
use crate::log;

/// How long a VM that was told to end may take to write its disks out, besides the time for its guest.
const LAST_WRITES: Duration = Duration::from_secs(15);
/// When it is said what is waited for.
const SAY_SO: Duration = Duration::from_secs(1);

/// Arguments of `berth stop`.
#[derive(Debug, Args)]
pub struct StopArguments {
    #[command(flatten)]
    names: Names,
    /// Seconds until a guest that has not powered off is ended; 0 ends it at once
    #[arg(short, long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u32).range(0..=86_400))]
    timeout: u32,
}

/// Arguments of `berth rm`.
#[derive(Debug, Args)]
pub struct RmArguments {
    /// Their names
    #[arg(required = true, value_name = "NAME", add = ArgValueCandidates::new(all_names))]
    names: Vec<Name>,
    /// End those that run
    #[arg(short, long)]
    force: bool,
}

/// `berth stop`: all guests have their time at once.
pub fn stop(arguments: &StopArguments) -> Result<ExitCode, VmsError> {
    let guests_time = Duration::from_secs(arguments.timeout.into());
    end(&arguments.names.names, guests_time, |client| client.stop(arguments.timeout))
}

/// `berth kill`. A VM that does not answer is killed as a process.
pub fn kill(names: &[Name]) -> Result<ExitCode, VmsError> {
    end(names, Duration::ZERO, Client::kill)
}

/// Tells all to end, and waits for it.
fn end(
    names: &[Name],
    guests_time: Duration,
    tell: impl Fn(&Client) -> Result<(), berth_api::ClientError>,
) -> Result<ExitCode, VmsError> {
    let mut told = Vec::new();
    let telling = for_each(names, |name| {
        let vm = LiveVm::find(name)?;
        let answer = vm.ask(&tell);
        if let Err(e) = answer
            && vm.directory().is_alive()
        {
            if !guests_time.is_zero() {
                return Err(e);
            }
            log::message(&format!("{e}: its process is killed"));
            kill_process(vm.directory())?;
        }
        told.push(vm);
        Ok(())
    })?;
    let told_at = Instant::now();
    let mut code = telling;
    for vm in told {
        let directory = vm.directory();
        if !directory.wait_for_end(Some(told_at + SAY_SO)) {
            let waiting =
                format!("waiting until {} has ended (at most {} s)", vm.name(), guests_time.as_secs());
            log::message(&waiting);
        }
        if !directory.wait_for_end(Some(told_at + guests_time + LAST_WRITES)) {
            log::message(&format!("error: {} does not end: `berth kill {0}` ends it", vm.name()));
            if guests_time.is_zero() {
                kill_process(directory)?;
            }
            code = ExitCode::FAILURE;
        }
        // A VM that ended at the same moment by itself left a record; who ended it has seen the end.
        match directory.remove() {
            Err(RuntimeError::Runs { .. } | RuntimeError::File { .. }) | Ok(()) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(code)
}

/// SIGKILL, and waits until the process is gone.
fn kill_process(directory: &VmDirectory) -> Result<(), VmsError> {
    let pid = directory.pid().and_then(|pid| rustix::process::Pid::from_raw(pid.cast_signed()));
    // The number is that of a process that has the lock.
    if let Some(pid) = pid.filter(|_| directory.is_alive()) {
        let killed = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        killed.map_err(|e| VmsError::host("kill the VM's process")(e.into()))?;
        directory.wait_for_end(Some(Instant::now() + LAST_WRITES));
    }
    Ok(())
}

/// `berth wait`: the VM's exit code.
pub fn wait(name: &Name) -> Result<ExitCode, VmsError> {
    let directory = Vms::open()?.get(name.as_str())?;
    if directory.is_alive() {
        let client = Client::new(directory.api_socket()).map_err(VmsError::client(name.as_str()))?;
        // A VM that is about to start or to end does not answer: the record decides.
        for event in client.events(0, true).into_iter().flatten().map_while(Result::ok) {
            if let EventKind::Ended(ending) = event.kind {
                directory.wait_for_end(Some(Instant::now() + LAST_WRITES));
                return Ok(ExitCode::from(ending.exit_code));
            }
        }
        directory.wait_for_end(None);
    }
    match directory.ending() {
        Some(ending) => Ok(ExitCode::from(ending.exit_code)),
        None => Err(VmsError::Dead {
            name: name.as_str().to_owned(),
            fate: "its process was killed, and has no exit code",
        }),
    }
}

/// `berth rm`: the record of a VM that has ended, and its disk.
pub fn rm(arguments: &RmArguments) -> Result<ExitCode, VmsError> {
    let vms = Vms::open()?;
    let images = Images::new(&data_directory()?);
    for_each(&arguments.names, |name| {
        let directory = vms.get(name.as_str()).ok();
        if let Some(directory) = &directory {
            if arguments.force && directory.is_alive() {
                kill(std::slice::from_ref(name))?;
            }
            match directory.remove() {
                // Who ends a VM removes its record.
                Err(RuntimeError::File { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
                result => result?,
            }
        }
        match images.remove_vm(name) {
            Err(ImageError::UnknownVm { .. }) if directory.is_some() => Ok(()),
            result => Ok(result?),
        }
    })
}

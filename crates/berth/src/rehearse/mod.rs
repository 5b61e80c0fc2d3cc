//! `berth rehearse`: tries a ratio of vCPUs and memory to the host's before anybody relies on it.
//!
//! ```text
//!   steps (plan) ─► more guests start, the others stand still (guests) ─► all work ─► measured (measure, probe)
//!                                                                                        │
//!        table, rehearsal.json, rehearsal.svg, rehearsal.html (report, chart) ◄── knee, advice (knee)
//! ```
//! The guests are ordinary VMs of this user, which `berth top` shows, with the load of the default guest
//! (`guest/load`) instead of a shell. Whatever ends the rehearsal ends them: Ctrl-C, an error, the death of this
//! process.

mod chart;
mod guests;
mod knee;
mod measure;
mod plan;
mod probe;
mod report;

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use berth_agent_protocol::load::Kind;
use berth_guest_image::progress::Progress;
use berth_host::Memory;
use berth_machine::options::size;
use clap::Args;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::log;
use crate::options::Engine;
use guests::{GuestError, Guests};
use measure::Step;
use plan::Counts;
use report::Report;

/// Exit code after a signal, as of a shell (128 and the number of SIGINT).
const INTERRUPTED: u8 = 130;
/// So much of the host's memory is to be left when more guests start: one part of so many.
const LEAVE_FREE: u64 = 20;
/// Sizes of a guest's memory in bytes that the default guest boots with.
const MEMORY: std::ops::RangeInclusive<u64> = 96 << 20..=64 << 30;

/// Arguments of `berth rehearse`.
#[derive(Debug, Args)]
#[command(long_about = "\
Starts guests with a load, a few more at each step, and measures what each of them still gets: throughput, latency of a \
small request, steal time, pressure and memory. It prints a table, and writes a report with a picture (rehearsal.html, \
rehearsal.svg, rehearsal.json) that marks the knee: where more guests bring no more work, and where they begin to do harm.

Let the host do nothing else meanwhile, or what it always does.")]
#[command(after_help = "\
Loads: cpu computes, lock works in the kernel under locks, memory checks and rewrites half of the guest's memory, mixed \
is some of all that ten times a second with pauses between, idle is next to nothing. The first three take all that they get, so the knee of \
their throughput is where the host is full; mixed and idle show how many guests with pauses fit.

Ctrl-C ends all guests, and still writes the report.

Exit code: 0 when all steps were made or the memory was enough for no more, 1 when a guest failed or saw wrong data, 2 for \
bad arguments, 130 after Ctrl-C.")]
pub struct RehearseArguments {
    /// How many VMs there are: from A to B in steps that grow, or a list such as 1,2,8
    #[arg(long, value_name = "A..B", default_value = "1..16")]
    vms: Counts,
    /// vCPUs of each VM
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
    cpus_per_vm: u8,
    /// Memory of each VM
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = |text: &str| size::parse_pages(text, MEMORY))]
    memory_per_vm: u64,
    /// What the guests do: cpu, lock, memory, mixed or idle
    #[arg(long, value_name = "LOAD", default_value_t = Kind::Mixed)]
    load: Kind,
    /// What executes the guests
    #[arg(long, value_enum, default_value_t = Engine::Auto)]
    engine: Engine,
    /// How long each step is measured, in seconds
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: u32,
    /// The longest that 99 of 100 requests may take, in milliseconds: what is slower is past the knee
    #[arg(long, value_name = "MS", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=60_000))]
    latency: u32,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
    /// Where the report is written
    #[arg(long, value_name = "DIR", default_value = "rehearsal")]
    out: PathBuf,
}

/// Why there is no rehearsal. One line for people.
#[derive(Debug, thiserror::Error)]
pub enum RehearseError {
    /// A guest.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The default guest.
    #[error(transparent)]
    Image(#[from] berth_guest_image::GuestImageError),
    /// The report.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// Which file or directory.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The picture.
    #[error("cannot draw the picture: {0}")]
    Draw(String),
    /// Signals.
    #[error("cannot listen for signals: {0}")]
    Signals(#[source] io::Error),
}

/// Whether the user has had enough.
#[derive(Clone, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Listens from now on. A second signal ends this process at once, and with it the guests.
    fn listen() -> io::Result<Self> {
        let interrupt = Self::default();
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            // In this order: the first signal finds the flag unset and goes on to set it.
            signal_hook::flag::register_conditional_shutdown(
                signal,
                INTERRUPTED.into(),
                interrupt.0.clone(),
            )?;
            signal_hook::flag::register(signal, interrupt.0.clone())?;
        }
        Ok(interrupt)
    }

    /// Whether a signal has come.
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// How the steps ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// All were made.
    Complete,
    /// The host has no memory for more guests.
    NoMemory(String),
    /// The user had enough.
    Interrupted,
    /// A guest failed.
    Failed(String),
}

/// Rehearses; returns the exit code.
///
/// # Errors
/// [`RehearseError`]. A guest that fails after the first step is in the report instead.
pub fn rehearse(arguments: &RehearseArguments) -> Result<ExitCode, RehearseError> {
    // Before minutes of work rather than after them.
    report::prepare(&arguments.out)?;
    // All guests would make it otherwise, and none would show that.
    berth_guest_image::default_guest(&berth_guest_image::cache_directory()?)?;
    let interrupt = Interrupt::listen().map_err(RehearseError::Signals)?;
    let progress = Progress::default();
    let mut steps = Vec::new();
    let ended = match run(arguments, &interrupt, &progress, &mut steps) {
        Ok(ended) => ended,
        Err(GuestError::Interrupted) => Ended::Interrupted,
        Err(e) if steps.is_empty() => return Err(e.into()),
        Err(e) => Ended::Failed(e.to_string()),
    };
    drop(progress);
    let code = match &ended {
        Ended::Interrupted => INTERRUPTED,
        Ended::Failed(_) => 1,
        _ if steps.iter().any(|step| step.errors > 0) => 1,
        Ended::Complete | Ended::NoMemory(_) => 0,
    };
    if steps.is_empty() {
        log::message("no step was measured to its end: there is no report");
        return Ok(ExitCode::from(code));
    }
    let report = Report::new(arguments, steps, &ended);
    report.write(&arguments.out)?;
    let text = if arguments.json { report.json() } else { report.table() };
    let printed = crate::print(&text);
    log::message(&format!("the report is {}", arguments.out.join(report::HTML).display()));
    Ok(if code == 0 { printed } else { ExitCode::from(code) })
}

/// Makes one step after the other. The guests end with it.
fn run(
    arguments: &RehearseArguments,
    interrupt: &Interrupt,
    progress: &Progress,
    steps: &mut Vec<Step>,
) -> Result<Ended, GuestError> {
    let mut guests = Guests::new(arguments, interrupt.clone())?;
    let all = arguments.vms.steps();
    for (done, &vms) in all.iter().enumerate() {
        let new = u64::from(vms).saturating_sub(guests.len() as u64);
        if let Some(reason) = lacks_memory(steps.last(), arguments.memory_per_vm, new) {
            return Ok(Ended::NoMemory(reason));
        }
        let s = if vms == 1 { "" } else { "s" };
        let of = format!("step {} of {}, {vms} VM{s}", done + 1, all.len());
        let fraction = |part: f64| progress.fraction((done as f64 + part) / all.len() as f64);
        progress.step(&format!("{of}: starting"));
        fraction(0.0);
        guests.grow(usize::from(vms))?;
        progress.step(&format!("{of}: measuring"));
        let time = Duration::from_secs(arguments.seconds.into());
        let step = measure::measure(&mut guests, time, &|part| fraction(0.5 + part / 2.0))?;
        steps.push(step);
    }
    Ok(Ended::Complete)
}

/// Why the host cannot have so many guests more, if it cannot. What a guest needs is known from those that run.
fn lacks_memory(last: Option<&Step>, memory_per_vm: u64, new: u64) -> Option<String> {
    let memory = Memory::read(Path::new("/"));
    let (total, available) = (memory.total?, memory.available?);
    let each = last.map_or(memory_per_vm, |step| step.resident_bytes / u64::from(step.vms.max(1)));
    let needed = each.saturating_mul(new).saturating_add(total / LEAVE_FREE);
    (needed > available).then(|| {
        format!(
            "{new} more VMs of {} each need more than the {} of memory that the host has left ({} of it are not touched)",
            size::show(each),
            size::show(available),
            size::show(total / LEAVE_FREE)
        )
    })
}

//! `berth inspect`, `berth stats` and `berth events`: what a VM says of itself.

use std::fmt::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use berth_api::types::{EngineStats, Event, EventKind, VmStats};
use berth_api::{Client, ClientError, Vms};
use berth_image::Name;
use berth_machine::options::size;
use clap::Args;
use serde::Serialize;
use serde_json::json;

use super::{LiveVm, OneName, VmsError};
use crate::{log, vm_home};

/// Arguments of `berth stats`.
#[derive(Debug, Args)]
pub struct StatsArguments {
    #[command(flatten)]
    name: OneName,
    /// Again and again, until the VM ends
    #[arg(short, long)]
    follow: bool,
    /// Seconds between two measurements
    #[arg(short, long, value_name = "SECONDS", default_value_t = 1.0, requires = "follow", value_parser = parse_interval)]
    interval: f64,
    /// What the engine counted, which explains its speed
    #[arg(long)]
    engine: bool,
    /// As JSON, for programs: one line each time
    #[arg(long)]
    json: bool,
}

fn parse_interval(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.05..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("from 0.05 to 3600 are possible".to_owned()),
    }
}

/// Arguments of `berth events`.
#[derive(Debug, Args)]
pub struct EventsArguments {
    #[command(flatten)]
    name: OneName,
    /// As JSON, for programs: one line an event
    #[arg(long)]
    json: bool,
    /// Only what has happened, not what will
    #[arg(long)]
    no_follow: bool,
}

/// `berth inspect`: an array with what is known of each.
pub fn inspect(names: &[Name]) -> Result<ExitCode, VmsError> {
    let vms = Vms::open()?;
    let mut all = Vec::new();
    let code = super::for_each(names, |name| {
        let directory = vms.get(name.as_str())?;
        let asked =
            directory.is_alive().then(|| Client::new(directory.api_socket()).and_then(|c| c.vm()).ok());
        let info = asked.flatten().or_else(|| vm_home::state_of_silent(&directory));
        let info = match info {
            Some(info) => json!(info),
            None => {
                json!({ "name": name, "pid": directory.pid(), "state": if directory.is_alive() { "starting" } else { "killed" } })
            }
        };
        let mut info = info;
        info["runtime_directory"] = json!(directory.path());
        info["console_log"] = json!(directory.console_log());
        all.push(info);
        Ok(())
    })?;
    crate::print(&format!("{:#}\n", serde_json::Value::from(all)));
    Ok(code)
}

/// `berth stats`.
pub fn stats(arguments: &StatsArguments) -> Result<ExitCode, VmsError> {
    match arguments.engine {
        true => watch(arguments, Client::engine, show_engine),
        false => watch(arguments, Client::stats, show),
    }
}

/// Asks the VM and prints the answer, once or again and again. `show` is given the answer before, too.
fn watch<T: Serialize>(
    arguments: &StatsArguments,
    ask: impl Fn(&Client) -> Result<T, ClientError>,
    show: impl Fn(&T, Option<&T>) -> String,
) -> Result<ExitCode, VmsError> {
    let vm = LiveVm::find(&arguments.name.name)?;
    let mut before: Option<T> = None;
    loop {
        let began = Instant::now();
        let stats = match vm.ask(&ask) {
            // It has ended meanwhile.
            Err(_) if before.is_some() && !vm.directory().is_alive() => return Ok(ExitCode::SUCCESS),
            result => result?,
        };
        let text = match arguments.json {
            true => format!("{}\n", json!(stats)),
            false => show(&stats, before.as_ref()),
        };
        crate::print(&text);
        if !arguments.follow {
            return Ok(ExitCode::SUCCESS);
        }
        before = Some(stats);
        std::thread::sleep(Duration::from_secs_f64(arguments.interval).saturating_sub(began.elapsed()));
    }
}

/// The engine's counters, each with what came since the measurement before; all that are not 0.
fn show_engine(stats: &EngineStats, before: Option<&EngineStats>) -> String {
    if stats.counters.is_empty() {
        return format!("the engine {} counts nothing\n", stats.engine);
    }
    let mut text = String::new();
    for counter in stats.counters.iter().filter(|c| c.value > 0) {
        // Writing to a string cannot fail.
        let _ = write!(text, "{:32} {:>16}", counter.name, counter.value);
        if let Some(before) = before {
            let was = before.counters.iter().find(|c| c.name == counter.name).map_or(0, |c| c.value);
            let _ = write!(text, " {:>+16}", i128::from(counter.value) - i128::from(was));
        }
        text.push('\n');
    }
    text
}

/// Shares of CPUs are since the measurement before, else since the start.
fn show(stats: &VmStats, before: Option<&VmStats>) -> String {
    let mut text = String::new();
    let (since, elapsed) = match before {
        Some(before) => (before.cpu_seconds, stats.at - before.at),
        None => (0.0, stats.uptime_seconds),
    };
    let share = |seconds: f64| if elapsed > 0.0 { seconds / elapsed * 100.0 } else { 0.0 };
    // Writing to a string cannot fail.
    let _ = writeln!(
        text,
        "{:9} up {:.1} s, host CPU {:.1} %, CPU time {:.2} s",
        stats.state,
        stats.uptime_seconds,
        share(stats.cpu_seconds - since),
        stats.cpu_seconds
    );
    for vcpu in &stats.vcpus {
        let was = before.and_then(|b| b.vcpus.iter().find(|v| v.id == vcpu.id));
        let (cpu, wait) = was.map_or((0.0, 0.0), |v| (v.thread.cpu_seconds, v.thread.run_queue_wait_seconds));
        let t = &vcpu.thread;
        let _ = writeln!(
            text,
            "vcpu{:<5} {} {:5.1} %, steal {:5.1} %, CPU time {:.2} s, waited {:.2} s, host CPU {}, thread {}",
            vcpu.id,
            t.state,
            share(t.cpu_seconds - cpu),
            share(t.run_queue_wait_seconds - wait),
            t.cpu_seconds,
            t.run_queue_wait_seconds,
            t.host_cpu,
            t.tid
        );
    }
    let m = &stats.memory;
    let _ = writeln!(
        text,
        "memory    {} promised, {} resident, {} swapped",
        size::show(m.size_bytes),
        size::show(m.resident_bytes),
        size::show(m.swapped_bytes)
    );
    if let Some(g) = &m.guest {
        let _ = writeln!(
            text,
            "guest     {} resident, {} stored, {} shared, {} given back, {} untouched; {} for the VM itself",
            size::show(g.resident_bytes),
            size::show(g.stored_bytes),
            size::show(g.shared_bytes),
            size::show(g.released_bytes),
            size::show(g.untouched_bytes),
            size::show(m.overhead_bytes)
        );
    }
    if let Some(s) = &m.store {
        let _ = writeln!(
            text,
            "store     {} pages in {} of memory and {} of file: {} different, {} zero; {} came back, 99 % of them in {:.0} us",
            s.pages,
            size::show(s.memory_bytes),
            size::show(s.file_bytes),
            s.distinct_pages,
            s.zero_pages,
            s.refaults,
            s.latency_p99_seconds * 1e6
        );
    }
    if let Some(b) = &stats.balloon {
        let (target, actual) = (size::show(b.target_bytes), size::show(b.actual_bytes));
        let _ =
            writeln!(text, "balloon   {actual} of {target}, {} reported free", size::show(b.reported_bytes));
    }
    for d in &stats.disks {
        let (read, written) = (size::show(d.read_bytes), size::show(d.written_bytes));
        let _ = writeln!(
            text,
            "{:9} {} reads ({read}), {} writes ({written}), {} flushes, {} errors",
            d.id, d.reads, d.writes, d.flushes, d.errors
        );
    }
    for n in &stats.nets {
        let (received, sent) = (size::show(n.received_bytes), size::show(n.sent_bytes));
        let _ = writeln!(
            text,
            "{:9} received {} packets ({received}), sent {} ({sent})",
            n.id, n.received_packets, n.sent_packets
        );
    }
    text
}

/// `berth events`.
pub fn events(arguments: &EventsArguments) -> Result<ExitCode, VmsError> {
    let vm = LiveVm::find(&arguments.name.name)?;
    let events = vm.client().events(0, !arguments.no_follow).map_err(VmsError::client(vm.name()))?;
    for event in events {
        let event = event.map_err(VmsError::client(vm.name()))?;
        let text = match arguments.json {
            true => format!("{}\n", json!(event)),
            false => describe(&event),
        };
        crate::print(&text);
        if let EventKind::Ended(_) = event.kind {
            return Ok(ExitCode::SUCCESS);
        }
    }
    if !arguments.no_follow {
        log::message("the VM's process is gone");
    }
    Ok(ExitCode::SUCCESS)
}

fn describe(event: &Event) -> String {
    let what = match &event.kind {
        EventKind::State { state } => format!("state: {state}"),
        EventKind::Reset { by_guest: true } => "reset by the guest".to_owned(),
        EventKind::Reset { by_guest: false } => "reset by the owner".to_owned(),
        EventKind::GuestPanic { crash_loaded: true } => {
            "the guest's kernel panicked, and writes a dump".to_owned()
        }
        EventKind::GuestPanic { crash_loaded: false } => "the guest's kernel panicked".to_owned(),
        EventKind::Balloon { target_bytes, actual_bytes } => {
            format!("balloon: {} of {}", size::show(*actual_bytes), size::show(*target_bytes))
        }
        EventKind::IoError { device, message } => format!("{device}: {message}"),
        EventKind::Missed { count } => format!("{count} events were missed"),
        EventKind::Ended(ending) => format!("ended with exit code {}: {}", ending.exit_code, ending.reason),
    };
    format!("{}  {what}\n", time_of_day(event.at))
}

/// In UTC, as the host's logs can be told to show it too.
fn time_of_day(at: f64) -> String {
    let whole = at.max(0.0) as u64;
    let (h, m, s) = (whole / 3600 % 24, whole / 60 % 60, whole % 60);
    format!("{h:02}:{m:02}:{s:02}.{:03}Z", (at.fract() * 1000.0) as u32)
}

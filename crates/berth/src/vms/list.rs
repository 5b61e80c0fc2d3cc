//! `berth ps`.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use berth_api::types::{VmInfo, VmState, VmStats};
use berth_api::{VmDirectory, Vms, ask_all};
use berth_host::{Cpu, Memory};
use berth_machine::options::size;
use clap::Args;
use serde_json::json;

use super::VmsError;
use crate::vm_home;

/// How long a VM has to answer before it counts as unresponsive.
const PATIENCE: Duration = Duration::from_secs(2);

/// Arguments of `berth ps`.
#[derive(Debug, Args)]
#[command(after_help = "\
The last line is what overcommit is about: vCPUs and memory that VMs were promised, and what the host has.

States: starting, running, paused, frozen (its memory was wanted: it goes on when it is used), unresponsive (its process is there and does not answer within 2 s), ended (by \
itself, after `berth run --detach`), killed (its process is gone and said nothing).")]
pub struct PsArguments {
    /// Those that have ended or were killed too, until `berth rm`
    #[arg(short, long)]
    all: bool,
    /// Each VM's process and vCPU threads as the host's scheduler sees them
    #[arg(short, long)]
    threads: bool,
    /// Where the memory of each VM is, by state, and what it was promised
    #[arg(short, long, conflicts_with = "threads")]
    memory: bool,
    /// As JSON, for programs
    #[arg(long)]
    json: bool,
}

/// One VM.
struct Row {
    name: String,
    pid: Option<u32>,
    state: VmState,
    /// As far as the VM has come to say it.
    info: Option<VmInfo>,
    stats: Option<VmStats>,
}

/// Lists VMs, and removes the sockets that dead ones left.
pub fn ps(arguments: &PsArguments) -> Result<ExitCode, VmsError> {
    let rows: Vec<Row> = rows()?.into_iter().filter(|row| arguments.all || row.is_there()).collect();
    let text = match (arguments.json, arguments.threads) {
        (true, _) => to_json(&rows),
        (false, _) if arguments.memory => memory(&rows) + &totals(&rows),
        (false, true) => threads(&rows) + &totals(&rows),
        (false, false) => table(&rows) + &totals(&rows),
    };
    Ok(crate::print(&text))
}

fn rows() -> Result<Vec<Row>, VmsError> {
    let (alive, dead): (Vec<_>, Vec<_>) = Vms::open()?.all().into_iter().partition(VmDirectory::is_alive);
    // All at once: one that hangs does not hold the others up.
    let sockets: Vec<PathBuf> = alive.iter().map(VmDirectory::api_socket).collect();
    let answers = ask_all::<VmStats>(&sockets, "/stats", PATIENCE)?;
    let mut rows: Vec<Row> =
        alive.iter().zip(answers).map(|(vm, answer)| Row::of_live(vm, answer.ok())).collect();
    for vm in &dead {
        // Somebody who starts a VM of this name cleans up too.
        let _ = vm.sweep();
        rows.push(Row::of_dead(vm));
    }
    rows.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(rows)
}

impl Row {
    fn of_live(vm: &VmDirectory, stats: Option<VmStats>) -> Self {
        let info = vm_home::state_of_silent(vm);
        let silent = info.as_ref().map_or(VmState::Starting, |info| info.state);
        let state = stats.as_ref().map_or(silent, |stats| stats.state);
        let info = info.map(|info| VmInfo { state, ..info });
        Self { name: vm.name().to_owned(), pid: vm.pid(), state, info, stats }
    }

    fn of_dead(vm: &VmDirectory) -> Self {
        let info = vm.info();
        let state = info.as_ref().map_or(VmState::Killed, |info| info.state);
        Self { name: vm.name().to_owned(), pid: vm.pid(), state, info, stats: None }
    }

    fn is_there(&self) -> bool {
        !matches!(self.state, VmState::Ended | VmState::Killed)
    }

    fn vcpus(&self) -> u64 {
        self.info.as_ref().map_or(0, |i| i.description.vcpus.into())
    }

    fn memory(&self) -> u64 {
        self.info.as_ref().map_or(0, |i| i.description.memory_bytes)
    }

    /// What the VM started from, for people.
    fn source(&self) -> String {
        let Some(description) = self.info.as_ref().map(|i| &i.description) else { return String::new() };
        let kernel = || description.kernel.rsplit('/').next().unwrap_or_default().to_owned();
        description.image.clone().unwrap_or_else(kernel)
    }
}

fn to_json(rows: &[Row]) -> String {
    let one = |row: &Row| {
        let mut value = row.info.as_ref().map_or_else(|| json!({}), |info| json!(info));
        value["name"] = json!(row.name);
        value["pid"] = json!(row.pid);
        value["state"] = json!(row.state);
        value["stats"] = json!(row.stats);
        value
    };
    format!("{:#}\n", serde_json::Value::from(rows.iter().map(one).collect::<Vec<_>>()))
}

fn width(rows: &[Row]) -> usize {
    rows.iter().map(|row| row.name.len()).max().unwrap_or(0).max("NAME".len())
}

/// A duration with its two largest units.
fn duration(seconds: f64) -> String {
    let s = seconds.max(0.0) as u64;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {} s", s / 60, s % 60),
        3600..86_400 => format!("{} h {} min", s / 3600, s / 60 % 60),
        _ => format!("{} d {} h", s / 86_400, s / 3600 % 24),
    }
}

fn table(rows: &[Row]) -> String {
    let width = width(rows);
    let mut text = format!(
        "{:width$}  {:12}  {:>8}  {:>12}  {:6}  {:>5}  {:>10}  {:>10}  {:>10}  FROM\n",
        "NAME", "STATE", "PID", "UP", "ENGINE", "VCPUS", "CPU TIME", "MEMORY", "RESIDENT"
    );
    for row in rows {
        let of_info = |f: fn(&VmInfo) -> String| row.info.as_ref().map_or_else(|| "-".to_owned(), f);
        let of_stats = |f: fn(&VmStats) -> String| row.stats.as_ref().map_or_else(|| "-".to_owned(), f);
        let ending = row.info.as_ref().and_then(|i| i.ending.as_ref());
        let state = match ending {
            Some(ending) => format!("ended ({})", ending.exit_code),
            None => row.state.to_string(),
        };
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{:width$}  {state:12}  {:>8}  {:>12}  {:6}  {:>5}  {:>10}  {:>10}  {:>10}  {}",
            row.name,
            row.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
            of_stats(|s| duration(s.uptime_seconds)),
            of_info(|i| i.description.engine.clone()),
            of_info(|i| i.description.vcpus.to_string()),
            of_stats(|s| format!("{:.2} s", s.cpu_seconds)),
            of_info(|i| size::show(i.description.memory_bytes)),
            of_stats(|s| size::show(s.memory.resident_bytes)),
            row.source()
        );
    }
    text
}

/// Guest memory by state: the sum is the size.
fn memory(rows: &[Row]) -> String {
    let width = width(rows);
    let titles =
        ["SIZE", "RESIDENT", "SHARED", "STORED", "GIVEN BACK", "UNTOUCHED", "OVERHEAD", "RESERVE", "LIMIT"];
    let line = |name: &str, state: &str, priority: &str, cells: [String; 9]| {
        let cells: String = cells.iter().map(|cell| format!("  {cell:>10}")).collect();
        format!("{name:width$}  {state:12}  {priority:>8}{cells}\n")
    };
    let mut text = line("NAME", "STATE", "PRIORITY", titles.map(str::to_owned));
    for row in rows {
        let m = row.stats.as_ref().map(|s| &s.memory);
        let known = |bytes: Option<u64>| bytes.map_or_else(|| "-".to_owned(), size::show);
        let guest = m.and_then(|m| m.guest.as_ref());
        let cells = [
            known(row.info.as_ref().map(|i| i.description.memory_bytes)),
            known(guest.map(|g| g.resident_bytes)),
            known(guest.map(|g| g.shared_bytes)),
            known(guest.map(|g| g.stored_bytes)),
            known(guest.map(|g| g.released_bytes)),
            known(guest.map(|g| g.untouched_bytes)),
            known(m.map(|m| m.overhead_bytes)),
            known(m.map(|m| m.reserve_bytes)),
            known(m.and_then(|m| m.limit_bytes)),
        ];
        let priority = m.map_or_else(|| "-".to_owned(), |m| m.priority.to_string());
        text += &line(&row.name, &row.state.to_string(), &priority, cells);
    }
    text
}

fn threads(rows: &[Row]) -> String {
    let width = (width(rows) + "/vcpu63".len()).max("NAME".len());
    let mut text = format!(
        "{:width$}  {:>8}  {:>8}  {:12}  {:>8}  {:>12}  {:>14}\n",
        "NAME", "PID", "TID", "STATE", "HOST CPU", "CPU TIME", "RUN-QUEUE WAIT"
    );
    for row in rows {
        let pid = row.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string());
        let cpu = row.stats.as_ref().map_or_else(|| "-".to_owned(), |s| format!("{:.3} s", s.cpu_seconds));
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{:width$}  {pid:>8}  {pid:>8}  {:12}  {:>8}  {cpu:>12}  {:>14}",
            row.name, row.state, "-", "-"
        );
        for vcpu in row.stats.iter().flat_map(|stats| &stats.vcpus) {
            let t = &vcpu.thread;
            let _ = writeln!(
                text,
                "{:width$}  {pid:>8}  {:>8}  {:12}  {:>8}  {:>12}  {:>14}",
                format!("{}/vcpu{}", row.name, vcpu.id),
                t.tid,
                in_words(&t.state),
                t.host_cpu,
                format!("{:.3} s", t.cpu_seconds),
                format!("{:.3} s", t.run_queue_wait_seconds)
            );
        }
    }
    text
}

/// The scheduler's letter for a thread's state (proc(5)).
fn in_words(state: &str) -> String {
    let word = match state {
        "R" => "runnable",
        "S" => "sleeps",
        "D" => "waits for I/O",
        "T" | "t" => "stopped",
        other => other,
    };
    word.to_owned()
}

/// The line about overcommit.
fn totals(rows: &[Row]) -> String {
    let live: Vec<&Row> = rows.iter().filter(|row| row.is_there()).collect();
    let vcpus: u64 = live.iter().map(|row| row.vcpus()).sum();
    let promised: u64 = live.iter().map(|row| row.memory()).sum();
    let resident: u64 =
        live.iter().filter_map(|row| row.stats.as_ref()).map(|s| s.memory.resident_bytes).sum();
    let cpus = Cpu::read(Path::new("/")).online;
    let memory = Memory::read(Path::new("/")).total.unwrap_or(0);
    let ratio = |a: u64, b: u64| if b == 0 { 0.0 } else { a as f64 / b as f64 };
    let s = if live.len() == 1 { "" } else { "s" };
    format!(
        "{} VM{s}; vCPUs : host CPUs = {vcpus} : {cpus} ({:.2}); memory promised : host memory = {} : {} ({:.2}), {} resident\n",
        live.len(),
        ratio(vcpus, cpus),
        size::show(promised),
        size::show(memory),
        ratio(promised, memory),
        size::show(resident)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_two_units() {
        let shown = [0.4, 61.0, 3_720.0, 90_000.0].map(duration);
        assert_eq!(shown, ["0 s", "1 min 1 s", "1 h 2 min", "1 d 1 h"]);
    }
}

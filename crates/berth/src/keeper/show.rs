//! `berth keeper status`.

use std::fmt::Write;

use berth_keeper::{State, Vm, show};

use super::record::{Status, name, time_of_day};

/// Decisions that are shown to people.
const SHOWN: usize = 20;

pub fn json(status: &Status) -> String {
    format!("{:#}\n", serde_json::json!(status))
}

pub fn table(status: &Status) -> String {
    let host = &status.seen.host;
    let vms = &status.seen.vms;
    let used: u64 = vms.iter().map(Vm::cost).sum();
    let promised: u64 = vms.iter().map(|vm| vm.size).sum();
    let mut text = format!(
        "keeper  process {}, for {:.0} s{}\n",
        status.pid,
        status.at - status.started_at,
        if status.dry_run { ", does nothing (--dry-run)" } else { "" }
    );
    // Writing to a string cannot fail.
    let _ = writeln!(
        text,
        "budget  VMs cost {} of {}; they were promised {}, {:.2} times as much",
        show(used),
        show(host.budget),
        show(promised),
        promised as f64 / host.budget.max(1) as f64
    );
    let available = host.available.map_or_else(|| "?".to_owned(), show);
    let pressure = host.pressure.map_or_else(|| "?".to_owned(), |p| format!("{p:.1} %"));
    let _ = writeln!(
        text,
        "host    {available} available of {}, tasks wait for memory {pressure} of the time",
        show(host.total)
    );
    let width = vms.iter().map(|vm| vm.name.len()).max().unwrap_or(0).max(4);
    let _ = writeln!(
        text,
        "\n{:width$}  {:7}  {:>8}  {:>10}  {:>10}  {:>10}  {:>10}  {:>10}  {:>7}  {:>5}",
        "NAME", "STATE", "PRIORITY", "SIZE", "RESERVE", "RESIDENT", "STORED", "OVERHEAD", "BACK/S", "CPUS"
    );
    for vm in vms {
        let state = match vm.state {
            State::Running => "running",
            State::Frozen => "frozen",
            State::Other => "other",
        };
        let _ = writeln!(
            text,
            "{:width$}  {state:7}  {:>8}  {:>10}  {:>10}  {:>10}  {:>10}  {:>10}  {:>7.0}  {:>5.2}",
            vm.name,
            vm.priority,
            show(vm.size),
            show(vm.reserve),
            show(vm.resident),
            show(vm.stored),
            show(vm.overhead),
            vm.refaults,
            vm.cpus
        );
    }
    if !status.decisions.is_empty() {
        text.push_str("\nDecisions, the last first:\n");
    }
    for decision in status.decisions.iter().rev().take(SHOWN) {
        let result = decision.result.as_ref().map_or(String::new(), |result| format!(" => {result}"));
        let _ = writeln!(
            text,
            "{} {}: {}: {}{result}",
            time_of_day(decision.at),
            name(&decision.vm),
            decision.step,
            decision.reason
        );
    }
    text
}

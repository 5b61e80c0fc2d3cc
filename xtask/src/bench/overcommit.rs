//! More vCPUs than host CPUs: how much all vCPUs of a guest do together when there are more and more of them, under Berth
//! and under QEMU's TCG, in turn; and how the CPU time of two VMs is divided.
//!
//! ```text
//!   round ─► 2 vCPUs: QEMU, Berth ─► 4 vCPUs: Berth, QEMU ─► … ─► next round
//!               └─ a guest: each piece of work once, with a thread for each vCPU (guest/bench, `all-…`)
//!   shares ─► two VMs without an end, weights 100 and 300 ─► CPU times;  one with a limit ─► CPU time
//! ```
//! Throughput is the same amount of work by the elapsed time. Both sides are kept on the same host CPUs. The CPU time for
//! the same work is shown too: it tells what waiting costs, and depends less on what else the host does.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use super::guest::Files;
use super::process::{Interrupt, Process, Times};
use super::sides::{Emulator, EmulatorArguments};
use super::statistics::Spread;

/// What is done: name, what for, how much of it under Berth, and under QEMU.
const WORK: [(&str, &str, u32, u32); 5] = [
    ("all-compute", "(a) independent compute", 10_000, 4_000),
    ("all-pipes", "(b) pipes", 1_000, 50),
    ("all-mmap", "(b) mmap and munmap in threads", 1_000, 200),
    ("all-mutex", "(b) a mutex (futex)", 30_000, 10_000),
    ("all-spin", "(c) a user spinlock", 20_000, 10_000),
];
/// How long shares are measured.
const SHARES: Duration = Duration::from_secs(10);
/// How long a guest works before they are.
const WARM_UP: Duration = Duration::from_secs(2);

/// Arguments of `bench overcommit`.
#[derive(Args)]
pub struct OvercommitArguments {
    /// How often everything is measured
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// vCPUs of the guests; the first is what the others are compared with
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [2, 4, 8, 16, 32])]
    cpus: Vec<u32>,
    /// Only this work: names such as all-compute, or `shares`
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,
    /// Host CPUs that the guests have
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [0, 1])]
    host_cpus: Vec<usize>,
    #[command(flatten)]
    emulators: EmulatorArguments,
}

/// By work, side and vCPUs: elapsed and CPU time for each count.
type Results = BTreeMap<(usize, usize, u32), Vec<Times>>;

/// `bench overcommit`: prints what it measured, also when it ends early.
///
/// # Errors
/// A text when something could not be built, or a guest fails.
pub fn run(arguments: &OvercommitArguments) -> Result<(), String> {
    let known = |name: &String| name == "shares" || WORK.iter().any(|(n, ..)| n == name);
    if let Some(unknown) = arguments.only.iter().find(|name| !known(name)) {
        let names = WORK.map(|(name, ..)| name).join(", ");
        return Err(format!("{unknown:?} is no work: {names} and shares are"));
    }
    let berth = arguments.emulators.berth()?;
    let qemu = arguments.emulators.qemu();
    let version = qemu.as_ref().map(ToString::to_string).unwrap_or_default();
    let versions = format!("Berth: {berth}; {version}");
    let mut sides = vec![("Berth", berth)];
    sides.extend(qemu.map(|qemu| ("QEMU TCG", qemu)));
    let files = Files::make(false)?;
    let interrupt = Interrupt::listen()?;
    // Guests inherit it.
    let mut set = CpuSet::new();
    for &cpu in &arguments.host_cpus {
        set.set(cpu).map_err(|e| format!("host CPU {cpu}: {e}"))?;
    }
    sched_setaffinity(Pid::from_raw(0), &set)
        .map_err(|e| format!("host CPUs {:?}: {e}", arguments.host_cpus))?;

    println!("- {versions}");
    println!(
        "- host CPUs: {:?}; rounds: {}; load before: {}",
        arguments.host_cpus,
        arguments.rounds,
        super::load()
    );
    let mut results = Results::new();
    let measured = rounds(arguments, &sides, &files, &interrupt, &mut results);
    println!("- load after: {}\n", super::load());
    let names: Vec<_> = sides.iter().map(|(name, _)| *name).collect();
    print_table(&results, &names, &arguments.cpus);
    measured?;
    if wanted(arguments, "shares") {
        shares(&sides[0].1, &files, &interrupt, arguments.host_cpus.len())?;
    }
    Ok(())
}

fn wanted(arguments: &OvercommitArguments, name: &str) -> bool {
    arguments.only.is_empty() || arguments.only.iter().any(|only| only == name)
}

fn rounds(
    arguments: &OvercommitArguments,
    sides: &[(&str, Emulator)],
    files: &Files,
    interrupt: &Interrupt,
    results: &mut Results,
) -> Result<(), String> {
    let work: Vec<usize> = (0..WORK.len()).filter(|&i| wanted(arguments, WORK[i].0)).collect();
    if work.is_empty() {
        return Ok(());
    }
    for round in 0..arguments.rounds {
        for (i, &cpus) in arguments.cpus.iter().enumerate() {
            // Who begins changes each time.
            let mut order: Vec<usize> = (0..sides.len()).collect();
            if (round as usize + i) % 2 == 1 {
                order.reverse();
            }
            for side in order {
                let (name, emulator) = &sides[side];
                eprintln!("round {} of {}: {name}, {cpus} vCPUs", round + 1, arguments.rounds);
                let done = guest_times(emulator, files, interrupt, cpus, &work)
                    .map_err(|e| format!("{name}, {cpus} vCPUs: {e}"))?;
                for (work, times) in done {
                    eprintln!("  {:12} {:.3} s, CPU time {:.3} s", WORK[work].0, times.wall, times.cpu);
                    results.entry((work, side, cpus)).or_default().push(times);
                }
            }
        }
    }
    Ok(())
}

/// How much of a piece of work a side does.
fn count(emulator: &Emulator, work: usize) -> u32 {
    let (_, _, berth, qemu) = WORK[work];
    match emulator {
        Emulator::Berth { .. } => berth,
        Emulator::Qemu { .. } => qemu,
    }
}

/// Boots a guest that does all `work`; the times for as much as Berth does.
fn guest_times(
    emulator: &Emulator,
    files: &Files,
    interrupt: &Interrupt,
    cpus: u32,
    work: &[usize],
) -> Result<Vec<(usize, Times)>, String> {
    let orders: Vec<_> = work.iter().map(|&i| format!("{}={}", WORK[i].0, count(emulator, i))).collect();
    let mut process = Process::start(&mut emulator.program(files, cpus, &orders.join(" ")), interrupt)?;
    let mut begun: Option<Times> = None;
    let mut done = Vec::new();
    while let Some(line) = process.line()? {
        let mut words = line.text.strip_prefix("bench ").unwrap_or_default().split(' ');
        match (words.next(), words.next()) {
            (Some("begin"), Some(_)) => begun = Some(line.times),
            (Some("end"), Some(name)) => {
                let index = work.iter().find(|&&i| WORK[i].0 == name);
                if let (Some(&index), Some(since)) = (index, begun.take()) {
                    let (_, _, berth, _) = WORK[index];
                    let more = f64::from(berth) / f64::from(count(emulator, index));
                    let wall = (line.times.wall - since.wall) * more;
                    done.push((index, Times { wall, cpu: (line.times.cpu - since.cpu) * more }));
                }
            }
            (Some("failed" | "skipped"), _) => return Err(line.text),
            _ => {}
        }
    }
    process.end()?;
    if done.len() == work.len() { Ok(done) } else { Err("the guest ended before its work".to_owned()) }
}

fn median(results: &Results, key: (usize, usize, u32), of: fn(&Times) -> f64) -> Option<f64> {
    let values: Vec<f64> = results.get(&key)?.iter().map(of).collect();
    Spread::of(&values).map(|spread| spread.median)
}

fn print_table(results: &Results, sides: &[&str], cpus: &[u32]) {
    let Some(&base) = cpus.first() else { return };
    let heads: Vec<_> = cpus.iter().map(|n| format!("{n} vCPUs")).collect();
    println!("| work | | {} |", heads.join(" | "));
    println!("|---|---|{}", "---|".repeat(cpus.len()));
    for (work, (_, what, ..)) in WORK.iter().enumerate() {
        for (side, name) in sides.iter().enumerate() {
            type Part = fn(&Times) -> f64;
            for (part, of) in [("throughput", (|t| t.wall) as Part), ("CPU time", |t| t.cpu)] {
                let Some(first) = median(results, (work, side, base), of) else { continue };
                let cells = cpus.iter().map(|&n| match median(results, (work, side, n), of) {
                    None => String::new(),
                    Some(time) if n == base => format!("{time:.2} s"),
                    Some(time) if part == "throughput" => format!("{:.0} %", first / time * 100.0),
                    Some(time) => format!("{:.0} %", time / first * 100.0),
                });
                println!("| {what} | {name}, {part} | {} |", cells.collect::<Vec<_>>().join(" | "));
            }
        }
    }
    println!(
        "\nMedians. In percent of the first column, whose times are elapsed time and CPU time for the same work.\n"
    );
}

/// Two VMs with weights, then one with a limit, all under full load.
fn shares(berth: &Emulator, files: &Files, interrupt: &Interrupt, cpus: usize) -> Result<(), String> {
    let vm = |cpus: usize, options: &str| -> Result<Process, String> {
        // Without an end.
        let orders = "all-compute=4000000000";
        let mut command = berth.program_with(files, &format!("count={cpus},{options}"), orders);
        let mut process = Process::start(&mut command, interrupt)?;
        while let Some(line) = process.line()? {
            if line.text.starts_with("bench begin") {
                return Ok(process);
            }
        }
        Err("the guest ended before its work".to_owned())
    };
    let seconds = SHARES.as_secs_f64();
    println!("| under full load for {seconds} s | wanted | got |\n|---|---|---|");
    // One CPU has an exact order. Of several the host's scheduler moves threads about, and shares with it.
    for (count, pin, what) in [
        (1, ",pin=0", "1 vCPU each, on one host CPU"),
        (cpus, "", "a vCPU for each host CPU"),
        (cpus * 4, "", "four"),
    ] {
        let light = vm(count, &format!("weight=100{pin}"))?;
        let heavy = vm(count, &format!("weight=300{pin}"))?;
        let used = cpu_times(&[&light, &heavy], interrupt)?;
        let [light, heavy] = used[..] else { continue };
        let ratio = heavy / light;
        println!("| weights 100 and 300, {what} | 1 : 3 | {light:.2} s : {heavy:.2} s = 1 : {ratio:.2} |");
    }
    let limited = vm(cpus, "limit=0.5")?;
    let used = cpu_times(&[&limited], interrupt)?;
    println!("| limit 0.5, a vCPU for each host CPU | {:.2} s | {:.2} s |", seconds * 0.5, used[0]);
    Ok(())
}

/// The CPU time that each of them uses within [`SHARES`].
fn cpu_times(processes: &[&Process], interrupt: &Interrupt) -> Result<Vec<f64>, String> {
    let wait = |time: Duration| {
        let begun = Instant::now();
        while begun.elapsed() < time {
            if interrupt.requested() {
                return Err("interrupted".to_owned());
            }
            thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    };
    wait(WARM_UP)?;
    let before = processes.iter().map(|p| p.cpu()).collect::<Result<Vec<_>, _>>()?;
    wait(SHARES)?;
    processes.iter().zip(before).map(|(p, before)| Ok(p.cpu()? - before)).collect()
}

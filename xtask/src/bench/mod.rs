//! How fast guests are: the same work on the host itself, under QEMU's translator and under Berth.
//!
//! ```text
//!   rounds ─► native ─► QEMU ─► Berth ─► native ─► …       (`sides`: the commands)
//!                │                          works: what is done, in groups with targets
//!                ▼
//!             process ─► measure ─► report ─► render
//!    lines with times    values     medians   Markdown, JSON
//! ```
//!
//! The three alternate because the load of a host changes; medians are compared. Kernel, initramfs and programs
//! are the same bytes everywhere. Only the host's clock is used. What was measured is printed even if the user
//! interrupts, or something fails on the way.

mod debian;
mod devices;
mod guest;
mod measure;
mod overcommit;
mod process;
mod render;
mod report;
mod sides;
mod start;
mod statistics;
mod works;

use std::fs;
use std::path::PathBuf;

use clap::{Args, Subcommand};

use guest::Files;
use measure::Outcome;
use process::Interrupt;
use report::{Bound, Report, Row, Unit};
use sides::{Emulator, EmulatorArguments, Side, SideName};
use works::{Group, Selection, Work};

/// `--quick` does so much less of all work.
const QUICK: u32 = 4;
/// An idle guest is to be no larger, in MB.
const IDLE_MEGABYTES: f64 = 80.0;

/// Arguments of `bench`.
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct BenchArguments {
    #[command(subcommand)]
    alone: Option<Alone>,
    /// One round with a quarter of the work, without the idle guest: under 3 minutes
    #[arg(long, conflicts_with = "rounds")]
    quick: bool,
    /// How often everything is measured
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Only this work: names as in the report, also `boot`, `login`, `idle` and `scaling`
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,
    /// Who does it
    #[arg(long, value_name = "SIDE", value_delimiter = ',', default_values = ["native", "tcg", "berth"])]
    sides: Vec<SideName>,
    /// Print JSON instead of Markdown
    #[arg(long)]
    json: bool,
    /// Also put the report into this document, between the marks that it has for that
    #[arg(long, value_name = "FILE")]
    update: Option<PathBuf>,
    #[command(flatten)]
    emulators: EmulatorArguments,
}

/// Something that is measured on its own.
#[derive(Subcommand)]
enum Alone {
    /// How long a VM takes to its first instruction, and its memory then
    Start(start::StartArguments),
    /// How fast disks and networks are, beside QEMU's
    Devices(devices::DevicesArguments),
    /// What guests do with more vCPUs than there are host CPUs, beside QEMU's
    Overcommit(overcommit::OvercommitArguments),
}

/// `bench`: prints what it measured.
///
/// # Errors
/// A text when something could not be built, or a guest failed. What was measured until then is printed.
pub fn run(arguments: &BenchArguments) -> Result<(), String> {
    match &arguments.alone {
        Some(Alone::Start(arguments)) => return start::run(arguments),
        Some(Alone::Devices(arguments)) => return devices::run(arguments),
        Some(Alone::Overcommit(arguments)) => return overcommit::run(arguments),
        None => {}
    }
    let selection = Selection::new(&arguments.only)?;
    if let Some(path) = &arguments.update {
        // Before hours of work rather than after them.
        updated(path, "")?;
    }
    let sides = sides(arguments)?;
    let files = Files::make(selection.needs_debian())?;
    let rounds = if arguments.quick { 1 } else { arguments.rounds };
    let mut bench = Bench {
        selection,
        quick: arguments.quick,
        files,
        interrupt: Interrupt::listen()?,
        report: Report::new(about(&sides, rounds)),
    };
    bench.report.about.push(("guest kernel", bench.files.kernel_release.clone()));
    if let Err(reason) = &bench.files.debian
        && bench.selection.needs_debian()
    {
        bench.report.about.push(("no Debian", reason.clone()));
    }
    bench.report.about.push(("load before", load()));
    let complete = bench.rounds(rounds, &sides);
    bench.report.about.push(("load after", load()));
    if !complete {
        bench.report.about.push(("incomplete", "interrupted".to_owned()));
    }
    let report = &bench.report;
    println!("{}", if arguments.json { render::json(report) } else { render::markdown(report) });

    if !complete {
        return Err("interrupted: the report has what was measured until then".to_owned());
    }
    if !report.failures.is_empty() {
        return Err(format!("failed:\n  {}", report.failures.join("\n  ")));
    }
    match &arguments.update {
        Some(path) => fs::write(path, updated(path, &render::markdown(report))?)
            .map_err(|e| format!("{}: {e}", path.display())),
        None => Ok(()),
    }
}

fn updated(path: &PathBuf, report: &str) -> Result<String, String> {
    let document = fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    render::replace_in(&document, report).map_err(|reason| format!("{}: {reason}", path.display()))
}

/// The sides that were asked for and are there, in the order of reports.
///
/// # Errors
/// A text when Berth is to be built and cannot.
fn sides(arguments: &BenchArguments) -> Result<Vec<Side>, String> {
    let mut sides = Vec::new();
    if arguments.sides.contains(&SideName::Native) {
        sides.push(Side::Native);
    }
    if arguments.sides.contains(&SideName::Tcg) {
        sides.extend(arguments.emulators.qemu().map(Side::Guest));
    }
    if arguments.sides.contains(&SideName::Berth) {
        sides.push(Side::Guest(arguments.emulators.berth()?));
    }
    Ok(sides)
}

/// A run of the bench.
struct Bench {
    selection: Selection,
    quick: bool,
    files: Files,
    interrupt: Interrupt,
    report: Report,
}

impl Bench {
    /// Measures everything so often; false if the user has interrupted it.
    fn rounds(&mut self, rounds: u32, sides: &[Side]) -> bool {
        for round in 1..=rounds {
            for side in sides {
                eprintln!("== round {round} of {rounds}: {}, load {}", side.name(), load());
                for step in
                    [Self::boot, Self::login, Self::one_cpu, Self::two_cpus, Self::scaling, Self::idle]
                {
                    let result = step(self, side);
                    if self.interrupt.requested() {
                        return false;
                    }
                    if let Err(reason) = result {
                        fail(&mut self.report, side, &reason);
                    }
                }
            }
        }
        true
    }

    /// Boots a guest that does nothing.
    fn boot(&mut self, side: &Side) -> Result<(), String> {
        let Side::Guest(emulator) = side else { return Ok(()) };
        if !self.selection.has(works::BOOT) {
            return Ok(());
        }
        let (ready, end) = measure::boot(emulator, &self.files, &self.interrupt)?;
        let values = [
            ("boot to first user program, CPU time", true, ready.cpu),
            ("boot to first user program, elapsed", false, ready.wall),
            ("boot and power off, CPU time", false, end.cpu),
            ("boot and power off, elapsed", false, end.wall),
        ];
        for (name, counts, value) in values {
            let row =
                Row { group: Group::Boot, name: name.to_owned(), unit: Unit::Seconds, counts, bound: None };
            add(&mut self.report, row, side, value);
        }
        Ok(())
    }

    /// Boots Debian from its disk to a login.
    fn login(&mut self, side: &Side) -> Result<(), String> {
        let (Side::Guest(emulator), Ok(debian)) = (side, &self.files.debian) else { return Ok(()) };
        if self.quick || !self.selection.has(works::LOGIN) {
            return Ok(());
        }
        let times = measure::login(emulator, debian, &self.interrupt)?;
        for (name, value) in
            [("Debian to its login, CPU time", times.cpu), ("Debian to its login, elapsed", times.wall)]
        {
            let (group, name) = (Group::Boot, name.to_owned());
            let row = Row { group, name, unit: Unit::Seconds, counts: false, bound: None };
            add(&mut self.report, row, side, value);
        }
        Ok(())
    }

    fn one_cpu(&mut self, side: &Side) -> Result<(), String> {
        self.work(side, 1, &self.selection.work(1), Row::of).map(|_| ())
    }

    fn two_cpus(&mut self, side: &Side) -> Result<(), String> {
        self.work(side, 2, &self.selection.work(2), Row::of).map(|_| ())
    }

    /// One thread and two independent threads in guests with more vCPUs than threads, or as many.
    fn scaling(&mut self, side: &Side) -> Result<(), String> {
        for cpus in works::SCALING_CPUS {
            let named = |name: &str| format!("{name}, {cpus} vCPUs");
            let row = |work: &Work| Row { name: named(work.name), counts: false, ..Row::of(work) };
            let times = self.work(side, cpus, &self.selection.scaling(), row)?;
            let [one, two] = works::SCALING_WORK.map(|name| times.iter().find(|(n, _)| *n == name));
            if let (Some((_, one)), Some((_, two))) = (one, two) {
                let row = Row {
                    group: Group::Scaling,
                    name: named("two threads, as fast as so many"),
                    unit: Unit::Times,
                    counts: false,
                    bound: Some(Bound::AtLeast(works::SCALING_TARGET)),
                };
                // Two threads do twice the work of one.
                add(&mut self.report, row, side, 2.0 * one / two);
            }
        }
        Ok(())
    }

    /// Leaves a guest alone.
    fn idle(&mut self, side: &Side) -> Result<(), String> {
        let Side::Guest(emulator) = side else { return Ok(()) };
        if self.quick || !self.selection.has(works::IDLE) {
            return Ok(());
        }
        let [megabytes, percent] = measure::idle(emulator, &self.files, &self.interrupt)?;
        let values = [
            ("resident memory", Unit::Megabytes, megabytes, Some(Bound::AtMost(IDLE_MEGABYTES))),
            ("CPU time", Unit::Percent, percent, None),
        ];
        for (name, unit, value, bound) in values {
            let row = Row { group: Group::Idle, name: name.to_owned(), unit, counts: false, bound };
            add(&mut self.report, row, side, value);
        }
        Ok(())
    }

    /// Has `work` done and put into the rows that `row` makes of it; what took how long.
    fn work(
        &mut self,
        side: &Side,
        cpus: u32,
        work: &[Work],
        row: impl Fn(&Work) -> Row,
    ) -> Result<Vec<(&'static str, f64)>, String> {
        let less = |w: &Work| Work { count: w.count.div_ceil(if self.quick { QUICK } else { 1 }), ..*w };
        let work: Vec<_> = work.iter().map(less).collect();
        let mut times = Vec::new();
        let Self { files, interrupt, report, .. } = self;
        measure::work(side, cpus, &work, files, interrupt, &mut |work, outcome| match outcome {
            Outcome::Took(seconds) => {
                times.push((work.name, seconds));
                add(report, row(work), side, seconds);
            }
            Outcome::Skipped(reason) => report.skip(side.name(), work, &reason),
            Outcome::Again(reason) => {
                eprintln!("{:6} {}, {cpus} CPUs, is tried again: {reason}", side.name(), work.name);
                report.again.push(format!("{}, {cpus} CPUs: {}: {reason}", work.name, side.name()));
            }
            Outcome::Failed(reason) => fail(report, side, &format!("{}, {cpus} CPUs: {reason}", work.name)),
        })?;
        Ok(times)
    }
}

/// Keeps a value and shows it to whoever waits.
fn add(report: &mut Report, row: Row, side: &Side, value: f64) {
    eprintln!("{:6} {:46} {value:.3}", side.name(), row.name);
    report.add(row, side.name(), value);
}

fn fail(report: &mut Report, side: &Side, reason: &str) {
    eprintln!("{:6} failed: {reason}", side.name());
    report.failures.push(format!("{}: {reason}", side.name()));
}

/// What is measured where.
fn about(sides: &[Side], rounds: u32) -> Vec<(&'static str, String)> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpus = cpuinfo.lines().filter(|l| l.starts_with("processor")).count();
    let cpu = cpuinfo.lines().find_map(|l| l.strip_prefix("model name")?.split_once(": "));
    let cpu = cpu.map_or("unknown CPU", |(_, name)| name);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let given: Vec<_> = std::env::args().skip(1).collect();
    let mut about = vec![
        ("date", time::OffsetDateTime::now_utc().date().to_string()),
        ("command", format!("`cargo xtask {}`", given.join(" "))),
        ("rounds", rounds.to_string()),
        ("host CPU", format!("{cpu}, {cpus} online")),
        ("host kernel", kernel.trim().to_owned()),
    ];
    for side in sides {
        match side {
            Side::Native => {}
            Side::Guest(emulator @ Emulator::Qemu { .. }) => about.push(("QEMU", emulator.to_string())),
            Side::Guest(emulator @ Emulator::Berth { .. }) => about.push(("Berth", emulator.to_string())),
        }
    }
    about
}

/// The host's load averages over 1, 5 and 15 minutes.
fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().take(3).collect::<Vec<_>>().join(" ")
}

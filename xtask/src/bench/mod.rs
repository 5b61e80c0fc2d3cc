//! How fast guests are: the same work on the host itself, under QEMU's translator and under Berth.
//!
//! ```text
//!   rounds ─► native ─► QEMU ─► Berth ─► native ─► …   each: one process, its lines with their times (`process`)
//!                                  └─► `measure`: seconds, rates, memory ─► `report`: medians, ratios, JSON
//! ```
//!
//! The three alternate because the load of a host changes; medians are compared. Kernel, initramfs and programs
//! are the same bytes everywhere. Only the host's clock is used.

mod guest;
mod measure;
mod process;
mod report;
mod start;

use std::path::PathBuf;

use clap::{Args, Subcommand};

use guest::Files;
use measure::{IDLE_WORK, Plan, Side};
use report::Report;

/// Arguments of `bench`.
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct BenchArguments {
    #[command(subcommand)]
    only: Option<Only>,
    /// One round, and less CoreMark
    #[arg(long)]
    quick: bool,
    /// How often everything is measured
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Print JSON instead of tables
    #[arg(long)]
    json: bool,
    /// Without the memory and idle CPU time of a waiting guest
    #[arg(long)]
    no_idle: bool,
    /// A Berth that is built already, instead of this workspace's
    #[arg(long, value_name = "FILE")]
    berth: Option<PathBuf>,
    /// QEMU's system emulator; left out if it is not there
    #[arg(long, value_name = "PROGRAM", default_value = "qemu-system-x86_64")]
    qemu: PathBuf,
}

/// Something that is measured on its own.
#[derive(Subcommand)]
enum Only {
    /// How long a VM takes to its first instruction, and its memory then
    Start(start::StartArguments),
}

/// `bench`: prints what it measured.
///
/// # Errors
/// A text when something could not be built, or a guest failed.
pub fn run(arguments: &BenchArguments) -> Result<(), String> {
    if let Some(Only::Start(arguments)) = &arguments.only {
        return start::run(arguments);
    }
    let files = Files::make(arguments.berth.clone())?;
    let plan = Plan { coremark_iterations: if arguments.quick { 5_000 } else { 30_000 } };
    let mut sides = vec![Side::Native];
    match process::version(&arguments.qemu) {
        Some(version) => sides.push(Side::Qemu { program: arguments.qemu.clone(), version }),
        None => {
            eprintln!("{} is not installed: there will be no comparison with it", arguments.qemu.display())
        }
    }
    sides.push(Side::Berth);

    let rounds = if arguments.quick { 1 } else { arguments.rounds };
    let mut report = Report::new(&sides, rounds, &files);
    for round in 1..=rounds {
        for side in &sides {
            eprintln!("round {round} of {rounds}: {side}, load {}", report::load());
            for (work, value) in measure::work(side, &plan, &files)? {
                report.add(work, side, value);
            }
            if !arguments.no_idle && *side != Side::Native {
                for (work, value) in IDLE_WORK.iter().zip(measure::idle(side, &files)?) {
                    report.add(work, side, value);
                }
            }
        }
    }
    report.finish();
    let text = if arguments.json { report.json()? } else { report.tables() };
    println!("{text}");
    Ok(())
}

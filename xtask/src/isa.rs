//! The machine-code tests from the command line.

use std::time::Duration;

use berth_tests_isa::case::CodeMode;
use berth_tests_isa::forms::Catalogue;
use berth_tests_isa::fuzz::{FuzzOptions, fuzz as run_fuzz};
use berth_tests_isa::report::{CaseId, Factory, check};
use berth_tests_isa::runner::{Runner, describe};
use clap::Args;

/// Arguments of `fuzz-isa`.
#[derive(Args)]
pub struct FuzzArguments {
    /// How long.
    #[arg(long, default_value_t = 1.0)]
    minutes: f64,
    /// Seed of the random choices [default: another one each time].
    #[arg(long)]
    seed: Option<u64>,
    /// Number of threads.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Stop after this many differences.
    #[arg(long, default_value_t = 20)]
    failures: usize,
}

/// Arguments of `isa-case`.
#[derive(Args)]
pub struct CaseArguments {
    /// The instruction form, for example Add_rm32_r32.
    #[arg(long, required_unless_present = "sequence", conflicts_with = "sequence")]
    form: Option<String>,
    /// A sequence of instructions.
    #[arg(long)]
    sequence: bool,
    /// The form with its memory operand.
    #[arg(long)]
    memory: bool,
    /// 32-bit code in compatibility mode.
    #[arg(long)]
    bits32: bool,
    /// Seed of the random choices.
    #[arg(long)]
    seed: u64,
    /// How many times, on the same engine.
    #[arg(long, default_value_t = 1)]
    repeat: u64,
}

/// `fuzz-isa`.
///
/// # Errors
/// A text when there were differences, or nothing could be compared.
pub fn fuzz(arguments: &FuzzArguments) -> Result<(), String> {
    let seconds = arguments.minutes * 60.0;
    let duration = Duration::try_from_secs_f64(seconds).map_err(|e| format!("--minutes: {e}"))?;
    let options = FuzzOptions {
        duration,
        seed: arguments.seed.unwrap_or_else(|| fastrand::u64(..)),
        jobs: arguments.jobs,
        most_failures: arguments.failures.max(1),
    };
    println!("seed {}", options.seed);
    let report = run_fuzz(&options, &|line| println!("{line}")).map_err(|e| e.to_string())?;
    println!(
        "seed {}: {} cases, {} to the end, {} undecided, {} different",
        options.seed,
        report.cases,
        report.completed,
        report.undecided,
        report.failures.len()
    );
    if report.failures.is_empty() { Ok(()) } else { Err(format!("{} cases differ", report.failures.len())) }
}

/// `isa-case`.
///
/// # Errors
/// A text when there is a difference, or no such case.
pub fn case(arguments: &CaseArguments) -> Result<(), String> {
    let form = match &arguments.form {
        None => None,
        Some(name) => {
            let code =
                Catalogue::by_name(name).ok_or_else(|| format!("there is no instruction form {name:?}"))?;
            Some((code, arguments.memory))
        }
    };
    let mode = if arguments.bits32 { CodeMode::Bits32 } else { CodeMode::Bits64 };
    let id = CaseId { form, mode, seed: arguments.seed };
    let case = Factory::default().make(&id).ok_or("the random choices give no case")?;
    println!("{}", describe(&case));
    let mut runner = Runner::new().map_err(|e| e.to_string())?;
    let mut verdict = check(&mut runner, &id, &case)?;
    for _ in 1..arguments.repeat {
        verdict = check(&mut runner, &id, &case)?;
    }
    println!("{verdict:?}");
    Ok(())
}

/// `isa-excluded`.
pub fn excluded() {
    let catalogue = Catalogue::default();
    for (mode, name) in [(CodeMode::Bits64, "64-bit"), (CodeMode::Bits32, "32-bit")] {
        println!("{name}: {} forms are compared", catalogue.compared(mode).len());
        for (reason, code) in catalogue.excluded(mode) {
            println!("  {reason:?}: {code:?}");
        }
    }
}

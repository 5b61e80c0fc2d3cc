//! Chores of the workspace: `cargo xtask --help`.

mod bench;
mod cargo;
mod fuzz;
mod isa;
mod prepush;
mod soak;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Chores of the workspace")]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// All tests.
    Test(test::TestArguments),
    /// How fast guests are, beside the host itself and QEMU's translator.
    Bench(Box<bench::BenchArguments>),
    /// What CI checks: formatting, lints, tests.
    Prepush,
    /// The fuzz targets of kernel loaders and virtio devices, for a short time each.
    Fuzz(fuzz::FuzzArguments),
    /// What takes hours and is done by hand.
    Soak(soak::SoakArguments),
    /// Random machine code on the soft engine, compared with the CPU itself.
    FuzzIsa(isa::FuzzArguments),
    /// One case of the machine-code tests, as a failure names it.
    IsaCase(isa::CaseArguments),
    /// Which instruction forms are not compared with the CPU, and why.
    IsaExcluded,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().chore {
        Chore::Test(arguments) => test::run(&arguments),
        Chore::Bench(arguments) => bench::run(&arguments),
        Chore::Prepush => prepush::run(),
        Chore::Fuzz(arguments) => fuzz::run(&arguments),
        Chore::Soak(arguments) => soak::run(&arguments),
        Chore::FuzzIsa(arguments) => isa::fuzz(&arguments),
        Chore::IsaCase(arguments) => isa::case(&arguments),
        Chore::IsaExcluded => {
            isa::excluded();
            Ok(())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            eprintln!("xtask: {text}");
            ExitCode::FAILURE
        }
    }
}

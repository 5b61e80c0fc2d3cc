//! The `berth` command.
//!
//! Exit codes: 0 for success, and for a guest that powered off or was ended by its user; 1 when something
//! failed; 2 for a command line that makes no sense; the guest's own code with `--debug-exit`.

mod cli;
mod console;
mod escape;
mod host_report;
mod log;
mod run;
mod shutdown;
mod size;
mod terminal;

use std::io::Write;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use cli::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
    log::start();
    match cli.command {
        Command::Run(arguments) => run::run(&arguments).unwrap_or_else(|e| {
            log::message(&format!("error: {e}"));
            ExitCode::FAILURE
        }),
        Command::Host { json } => print(&host_report::report(json)),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "berth", &mut script);
            print(&String::from_utf8_lossy(&script))
        }
    }
}

/// Prints to standard output; a reader that went away (such as `head`) is no error.
fn print(text: &str) -> ExitCode {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            log::message(&format!("error: cannot write to standard output: {e}"));
            ExitCode::FAILURE
        }
        _ => ExitCode::SUCCESS,
    }
}

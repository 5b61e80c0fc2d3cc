//! The `berth` command.
//!
//! Exit codes: 0 for success, and for a guest that powered off or was ended by its user; 1 when something
//! failed; 2 for a command line that makes no sense; 3 for a VM that is refused because it does not fit; the guest's own code with `--debug-exit`.

mod admission;
mod boot;
mod cli;
mod completions;
mod console;
mod cpu;
mod detach;
mod disk;
mod escape;
mod exec;
mod host_config;
mod host_report;
mod image;
mod keeper;
mod log;
mod options;
mod rehearse;
mod residence;
mod run;
mod shutdown;
mod terminal;
mod top;
mod vm_file;
mod vm_home;
mod vms;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command};

fn main() -> ExitCode {
    completions::answer_shell();
    let cli = Cli::parse();
    log::start();
    match cli.command {
        Command::Run(arguments) => run::run(&arguments).unwrap_or_else(|e| {
            log::message(&format!("error: {e}"));
            e.exit_code()
        }),
        Command::Disk { command } => disk::run(&command).unwrap_or_else(|e| {
            log::message(&format!("error: {e}"));
            ExitCode::FAILURE
        }),
        Command::Exec(arguments) => exec::exec(*arguments),
        Command::Host { json } => print(&host_report::report(json)),
        Command::Image(command) => match image::image(command) {
            Ok(text) => print(&text),
            Err(e) => failure(&e),
        },
        Command::Vms(command) => vms::run(&command).unwrap_or_else(|e| failure(&e)),
        Command::Keeper(arguments) => keeper::keeper(&arguments).unwrap_or_else(|e| failure(&e)),
        Command::Rehearse(arguments) => rehearse::rehearse(&arguments).unwrap_or_else(|e| failure(&e)),
        Command::Top(arguments) => top::top(&arguments),
        Command::Completions { shell } => print(&completions::script(&shell)),
    }
}

fn failure(error: &dyn std::error::Error) -> ExitCode {
    log::message(&format!("error: {error}"));
    ExitCode::FAILURE
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

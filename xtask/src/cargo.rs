//! Cargo, started from a chore.

use std::process::Command;

/// The cargo that started this program.
pub fn command() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// Runs `command` and says which one it is.
///
/// # Errors
/// A text that names the step when it could not be started or did not succeed.
pub fn run(step: &str, command: &mut Command) -> Result<(), String> {
    let arguments: Vec<_> = command.get_args().map(|a| a.to_string_lossy()).collect();
    eprintln!("== {step}: cargo {}", arguments.join(" "));
    let status = command.status().map_err(|e| format!("{step}: cargo could not be started: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("{step} failed ({status})")) }
}

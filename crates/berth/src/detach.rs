//! `berth run --detach`: a VM in the background.
//!
//! ```text
//!   berth run -d … ──starts──► berth run --background …      the same arguments
//!        │  waits for a line            │ its errors and progress go to the same terminal
//!        ◄── NAME, by standard output ──┤ the machine runs: leaves the session; standard streams lead away
//!   prints NAME, ends 0                 ▼ goes on as the VM
//! ```
//! If the VM cannot be started its process ends instead of printing, and so does the first, with the same exit code.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use berth_api::VmDirectory;

/// Starts the VM's process, and waits until the machine runs.
///
/// # Errors
/// What the host says when there can be no such process.
pub fn start() -> io::Result<ExitCode> {
    let mut arguments = std::env::args_os().skip(1);
    let mut command = Command::new(std::env::current_exe()?);
    // `run`, and then what was given to it.
    command.args(arguments.next()).arg("--background").args(arguments);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let mut name = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout).read_line(&mut name)?;
    }
    if name.ends_with('\n') {
        return Ok(crate::print(&name));
    }
    // A signal has no exit code.
    let code = child.wait()?.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

/// Tells who started this process that the VM `name` runs, and leaves its session and its terminal. What is said from now
/// on goes to the log in the VM's directory.
///
/// # Errors
/// What the host says; and when who started it is gone.
pub fn leave_terminal(name: &str, directory: Option<&VmDirectory>) -> io::Result<()> {
    let log = directory.map_or_else(|| File::create("/dev/null"), |d| File::create(d.log()))?;
    let null = File::options().read(true).write(true).open(Path::new("/dev/null"))?;
    // Fails for the leader of a process group, which no shell made this one.
    let _ = rustix::process::setsid();
    println!("{name}");
    io::stdout().flush()?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&log)?;
    Ok(())
}

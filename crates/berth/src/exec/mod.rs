//! `berth exec`: runs a command in a guest, through the agent there.
//!
//! ```text
//!   VM's vsock socket ◄── connect: waits until the guest's agent answers
//!          │
//!          ▼          ┌─ input thread ◄── standard input       as much as the guest gave credit for
//!       session ──────┼─ output threads ──► standard output, standard error      credit as they are written
//!                     └─ signal thread: signals, the terminal's size
//! ```

mod connect;
mod output;
mod session;

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use berth_agent_protocol::{Exec, FailureKind, WindowSize};
use berth_image::Name;
use clap::Args;
use clap_complete::engine::ArgValueCandidates;

use crate::log;
use crate::terminal;
use crate::vms::live_names;

/// Exit code for a failure of Berth's own, which the command's cannot be told from otherwise.
const FAILURE: u8 = 125;
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;
/// Size of a terminal that tells none.
const USUAL_SIZE: WindowSize = WindowSize { columns: 80, rows: 24 };

/// Arguments of `berth exec`.
#[derive(Debug, Args)]
#[command(long_about = "\
Runs a command in a VM's guest, as root unless --user says otherwise, and ends as it does.

The guest needs Berth's agent: the default guest has it, and images that `berth image build` makes. A guest that still \
boots is waited for.")]
#[command(after_help = "\
Signals SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1 and SIGUSR2 are passed on to the command; after the third SIGINT or \
SIGTERM `berth exec` ends without it. A command whose `berth exec` is gone gets SIGHUP.

Exit code: the command's; 128 and the signal's number if a signal ended it; 125 when Berth failed, 126 when the \
command cannot be run, 127 when there is no such command, 2 for bad arguments.")]
pub struct ExecArguments {
    /// Name of the VM
    #[arg(value_name = "NAME", add = ArgValueCandidates::new(live_names))]
    pub name: Name,
    /// Pass standard input on to the command
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Who runs it: USER or USER:GROUP, names or numbers in the guest [default: root]
    #[arg(short, long)]
    pub user: Option<String>,
    /// Working directory in the guest [default: the user's home]
    #[arg(short, long, value_name = "DIRECTORY")]
    pub workdir: Option<OsString>,
    /// Set a variable; without a value, to the one that it has here. Several possible
    #[arg(short, long, value_name = "NAME[=VALUE]", value_parser = parse_variable)]
    pub env: Vec<Variable>,
    /// How long a guest that boots is waited for, in seconds; 0 tries once
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub timeout: u32,
    /// Socket of a vsock device, instead of that of the VM's directory
    #[arg(long, value_name = "PATH")]
    pub vsock: Option<PathBuf>,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// A variable for the command: name and value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable(Vec<u8>, Vec<u8>);

fn parse_variable(text: &str) -> Result<Variable, String> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, value.as_bytes().to_vec()),
        None => (text, std::env::var_os(text).ok_or("it is not set here: NAME=VALUE sets it")?.into_vec()),
    };
    if name.is_empty() { Err("it has no name".to_owned()) } else { Ok(Variable(name.into(), value)) }
}

/// Why the command did not run to its end. One line for people.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// No way to the agent.
    #[error(transparent)]
    Connect(#[from] connect::ConnectError),
    /// The guest says no.
    #[error("{text}")]
    Refused {
        /// What kind of no.
        kind: FailureKind,
        /// Why.
        text: String,
    },
    /// The command line is longer than the agent takes.
    #[error("the command and its variables are too long")]
    TooLong,
    /// The guest is gone.
    #[error("the connection to the guest broke: the VM ended or was reset, or its agent did")]
    Broken,
    /// The agent is not one.
    #[error("the guest's agent breaks the protocol: {0}")]
    Protocol(String),
    /// The host.
    #[error("cannot set up {what}: {source}")]
    Host {
        /// What.
        what: &'static str,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
}

impl ExecError {
    fn host(what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Host { what, source }
    }

    /// The exit code of the command.
    fn exit_code(&self) -> u8 {
        match self {
            Self::Refused { kind: FailureKind::NotFound, .. } => NOT_FOUND,
            Self::Refused { kind: FailureKind::NotExecutable, .. } => NOT_EXECUTABLE,
            _ => FAILURE,
        }
    }
}

/// Runs the command and says how it ended.
pub fn exec(arguments: ExecArguments) -> ExitCode {
    match run(arguments) {
        Ok(code) => ExitCode::from(code),
        Err(e) => {
            log::message(&format!("error: {e}"));
            ExitCode::from(e.exit_code())
        }
    }
}

fn run(arguments: ExecArguments) -> Result<u8, ExecError> {
    let target = connect::Target::new(&arguments.name, arguments.vsock.as_deref())?;
    let timeout = Duration::from_secs(arguments.timeout.into());
    let link = target.connect(timeout)?;
    let keyboard = arguments.tty && arguments.interactive && terminal::is_terminal();
    session::run(link, &request(arguments), keyboard)
}

fn request(arguments: ExecArguments) -> Exec {
    let mut env: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    if let Some(term) = std::env::var_os("TERM").filter(|_| arguments.tty) {
        env.push((b"TERM".to_vec(), term.into_vec()));
    }
    env.extend(arguments.env.into_iter().map(|Variable(name, value)| (name, value)));
    Exec {
        argv: arguments.command.into_iter().map(OsString::into_vec).collect(),
        env,
        workdir: arguments.workdir.map(OsString::into_vec),
        user: arguments.user,
        tty: arguments.tty.then(|| window().unwrap_or(USUAL_SIZE)),
        stdin: arguments.interactive,
        output_credit: output::CREDIT,
    }
}

/// The size of the user's terminal.
fn window() -> Option<WindowSize> {
    terminal::size().map(|(columns, rows)| WindowSize { columns, rows })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        exec: ExecArguments,
    }

    fn parse(words: &[&str]) -> Result<ExecArguments, String> {
        let line = Line::try_parse_from(["exec"].iter().chain(words));
        line.map(|l| l.exec).map_err(|e| e.to_string())
    }

    #[test]
    fn options_end_where_the_command_begins() {
        for words in [
            &["-it", "web", "--", "ls", "-l", "--", "-t"][..],
            &["web", "-i", "-t", "ls", "-l", "--", "-t"],
            &["web", "-it", "--", "ls", "-l", "--", "-t"],
        ] {
            let a = parse(words).unwrap();
            assert!(a.name.as_str() == "web" && a.interactive && a.tty, "{words:?}");
            assert_eq!(a.command, ["ls", "-l", "--", "-t"], "{words:?}");
        }
        assert!(parse(&["web"]).unwrap_err().contains("<COMMAND>"));
    }

    #[test]
    fn variables_have_a_value_or_take_the_one_from_here() {
        let a = parse(&["web", "-e", "A=b=c", "-e", "E=", "-e", "PATH", "--", "env"]).unwrap();
        let path = std::env::var_os("PATH").unwrap().into_vec();
        let of = |name: &str, value: &[u8]| Variable(name.into(), value.to_vec());
        assert_eq!(a.env, [of("A", b"b=c"), of("E", b""), of("PATH", &path)]);
        assert!(parse(&["web", "-e", "=x", "--", "env"]).is_err());
        assert!(parse(&["web", "-e", "NO_SUCH_VARIABLE", "--", "env"]).is_err());
    }

    #[test]
    fn failures_have_the_exit_codes_of_shells() {
        let refused = |kind| ExecError::Refused { kind, text: String::new() }.exit_code();
        assert_eq!(refused(FailureKind::NotFound), 127);
        assert_eq!(refused(FailureKind::NotExecutable), 126);
        assert_eq!(refused(FailureKind::Busy), 125);
        assert_eq!(ExecError::Broken.exit_code(), 125);
    }
}

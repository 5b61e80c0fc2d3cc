//! Starting a command: who runs it, where, with which streams.

use std::ffi::{CString, OsStr};
use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use berth_agent_protocol::{Exec, FailureKind};
use nix::sys::signal::SigSet;
use nix::unistd::{Gid, Uid, chdir, fchown, setgid, setgroups, setsid, setuid};

use crate::connection::set_nonblocking;
use crate::terminal;
use crate::users::{User, UserError};

/// Where programs are looked for, unless the host says it.
const ROOT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const USER_PATH: &str = "/usr/local/bin:/usr/bin:/bin";

/// A process that was started.
pub struct Process {
    /// The process: the leader of a session and of a process group.
    pub child: Child,
    /// Readable when the process has ended.
    pub exit: OwnedFd,
}

/// Our ends of a command's streams; they do not block.
pub struct Ends {
    /// Its input; none if it was not asked for.
    pub stdin: Option<OwnedFd>,
    /// Its output, or all that its terminal shows.
    pub stdout: Option<OwnedFd>,
    /// Its errors, without a terminal.
    pub stderr: Option<OwnedFd>,
}

/// Why a command does not run.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// No arguments at all.
    #[error("no program is named")]
    Empty,
    /// A variable that has no name, or a name that cannot be one.
    #[error("the variable {0:?} has no usable name")]
    Variable(String),
    /// The user.
    #[error(transparent)]
    User(#[from] UserError),
    /// The working directory.
    #[error("the guest has no directory {0}")]
    Directory(String),
    /// The program.
    #[error("cannot run {program}: {source}")]
    Program {
        /// What was to run.
        program: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Something else.
    #[error("the guest refuses {what}: {source}")]
    System {
        /// What.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl CommandError {
    /// What kind of failure it is to the host.
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Empty | Self::Variable(_) | Self::User(_) | Self::Directory(_) => FailureKind::Invalid,
            Self::Program { source, .. } => match source.kind() {
                ErrorKind::NotFound | ErrorKind::NotADirectory => FailureKind::NotFound,
                ErrorKind::PermissionDenied | ErrorKind::IsADirectory | ErrorKind::ExecutableFileBusy => {
                    FailureKind::NotExecutable
                }
                ErrorKind::InvalidInput => FailureKind::Invalid,
                _ if source.raw_os_error() == Some(libc::ENOEXEC) => FailureKind::NotExecutable,
                _ => FailureKind::System,
            },
            Self::System { .. } => FailureKind::System,
        }
    }

    fn system(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::System { what, source }
    }
}

/// Starts a command.
///
/// # Errors
/// [`CommandError`].
pub fn start(exec: &Exec) -> Result<(Process, Ends), CommandError> {
    let (program, arguments) = exec.argv.split_first().ok_or(CommandError::Empty)?;
    let user = match &exec.user {
        Some(text) => User::find(text)?,
        None => User::find(&Uid::effective().to_string())?,
    };
    let mut command = Command::new(OsStr::from_bytes(program));
    command.args(arguments.iter().map(|a| OsStr::from_bytes(a)));
    set_environment(&mut command, exec, &user)?;
    let directory = directory(exec, &user)?;
    let ends = connect(exec, &mut command, &user).map_err(CommandError::system("streams"))?;
    let (has_terminal, switch) = (exec.tty.is_some(), exec.user.is_some());
    let groups: Vec<Gid> = user.groups.iter().map(|&g| Gid::from_raw(g)).collect();
    let become_it = move || {
        // Whoever started the agent may have blocked signals, as an init does that reads them from a descriptor.
        SigSet::empty().thread_set_mask()?;
        setsid()?;
        if has_terminal {
            terminal::control_by_stdin()?;
        }
        if switch {
            // In this order: afterwards nothing more can be given up.
            setgroups(&groups)?;
            setgid(Gid::from_raw(user.gid))?;
            setuid(Uid::from_raw(user.uid))?;
        }
        Ok(chdir(directory.as_c_str())?)
    };
    // SAFETY: this process has one thread, so that nothing holds a lock in the child; it only makes system calls.
    // SIGPIPE is reset by the standard library.
    unsafe { command.pre_exec(become_it) };
    let said = || String::from_utf8_lossy(program).into_owned();
    let child = command.spawn().map_err(|source| CommandError::Program { program: said(), source })?;
    let exit = exit_of(&child).map_err(CommandError::system("to watch a process"))?;
    Ok((Process { child, exit }, ends))
}

/// The user's usual variables, then the host's.
fn set_environment(command: &mut Command, exec: &Exec, user: &User) -> Result<(), CommandError> {
    let path = if user.uid == 0 { ROOT_PATH } else { USER_PATH };
    let usual =
        [("HOME", &*user.home), ("USER", &user.name), ("LOGNAME", &user.name), ("SHELL", &user.shell)];
    command.env_clear().env("PATH", path).envs(usual);
    for (name, value) in &exec.env {
        if name.is_empty() || name.iter().any(|b| b"=\0".contains(b)) {
            return Err(CommandError::Variable(String::from_utf8_lossy(name).into_owned()));
        }
        command.env(OsStr::from_bytes(name), OsStr::from_bytes(value));
    }
    Ok(())
}

/// The working directory. A home that does not exist is nobody's fault.
fn directory(exec: &Exec, user: &User) -> Result<CString, CommandError> {
    let exists = |path: &[u8]| fs::metadata(OsStr::from_bytes(path)).is_ok_and(|m| m.is_dir());
    let path = match &exec.workdir {
        Some(path) if exists(path) => path,
        Some(path) => return Err(CommandError::Directory(String::from_utf8_lossy(path).into_owned())),
        None if exists(user.home.as_bytes()) => user.home.as_bytes(),
        None => b"/",
    };
    CString::new(path).map_err(|_| CommandError::Directory(String::from_utf8_lossy(path).into_owned()))
}

/// Gives the command its streams; returns our ends.
fn connect(exec: &Exec, command: &mut Command, user: &User) -> io::Result<Ends> {
    // Programs open their streams by name too (`/dev/stdout`), so these belong to their user.
    let owner = Some(Uid::from_raw(user.uid));
    let ends = if let Some(size) = exec.tty {
        let (ours, theirs) = terminal::open(size)?;
        fchown(&theirs, owner, None)?;
        command.stdin(theirs.try_clone()?).stdout(theirs.try_clone()?).stderr(theirs);
        Ends { stdin: Some(ours.try_clone()?), stdout: Some(ours), stderr: None }
    } else {
        let (out, their_out) = io::pipe()?;
        let (err, their_err) = io::pipe()?;
        fchown(&their_out, owner, None)?;
        fchown(&their_err, owner, None)?;
        command.stdout(their_out).stderr(their_err).stdin(Stdio::null());
        let mut ends = Ends { stdin: None, stdout: Some(out.into()), stderr: Some(err.into()) };
        if exec.stdin {
            let (their_in, stdin) = io::pipe()?;
            fchown(&their_in, owner, None)?;
            command.stdin(their_in);
            ends.stdin = Some(stdin.into());
        }
        ends
    };
    for fd in [&ends.stdin, &ends.stdout, &ends.stderr].into_iter().flatten() {
        set_nonblocking(fd)?;
    }
    Ok(ends)
}

/// A descriptor that becomes readable when the process ends (pidfd_open(2)).
fn exit_of(child: &Child) -> io::Result<OwnedFd> {
    // SAFETY: it takes numbers; the process is our child and not waited for, so the number is its own.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, child.id(), 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's. The kernel sets close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}

//! The messages.

use serde::{Deserialize, Serialize};

use crate::Stream;

/// What the host says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromHost {
    /// Are you there? [`FromGuest::Pong`].
    Ping,
    /// What guest is this? [`FromGuest::Info`].
    Info,
    /// Run a program: [`FromGuest::Started`], or [`FromGuest::Failed`].
    Exec(Exec),
    /// The host takes so many more bytes of the command's output.
    Credit(Stream, u32),
    /// There is no more input: the command reads the end of the file. On a terminal, what was typed last is followed by
    /// the terminal's end-of-file character.
    CloseStdin,
    /// The host takes no more of this output: who writes it gets SIGPIPE.
    CloseOutput(Stream),
    /// A signal for the command's process group, by its number on Linux.
    Signal(u8),
    /// The user's terminal has another size.
    WindowSize(WindowSize),
}

/// What the guest says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromGuest {
    /// The answer to [`FromHost::Ping`].
    Pong,
    /// The answer to [`FromHost::Info`].
    Info(GuestInfo),
    /// The command runs.
    Started {
        /// Its process number in the guest.
        pid: u32,
        /// So many bytes of input may come at first.
        stdin_credit: u32,
    },
    /// The guest takes so many more bytes of input.
    Credit(u32),
    /// The command reads no more input.
    StdinClosed,
    /// The command ended, and all of its output was sent.
    Exited(Exit),
    /// What was asked for is not possible. After [`FailureKind::Protocol`] the guest closes the connection.
    Failed {
        /// What kind of failure it is.
        kind: FailureKind,
        /// What went wrong, for people.
        text: String,
    },
}

/// A command to run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// The program and its arguments. A program without a slash is looked for in the command's `PATH`.
    pub argv: Vec<Vec<u8>>,
    /// Variables besides the user's usual ones (`HOME`, `PATH`, …), or instead of them.
    pub env: Vec<(Vec<u8>, Vec<u8>)>,
    /// Working directory; the user's home without it.
    pub workdir: Option<Vec<u8>>,
    /// `USER` or `USER:GROUP`, names or numbers of the guest; root without it.
    pub user: Option<String>,
    /// A terminal of this size for all three streams; everything that is printed is [`Stream::Stdout`] then.
    pub tty: Option<WindowSize>,
    /// Whether there will be input. Without it the command reads from `/dev/null`.
    pub stdin: bool,
    /// The host takes so many bytes of each output at first.
    pub output_credit: u32,
}

/// Size of a terminal in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Columns.
    pub columns: u16,
    /// Rows.
    pub rows: u16,
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// With this exit status.
    Code(u8),
    /// By this signal.
    Signal(u8),
}

impl Exit {
    /// The status as a shell shows it: a signal counts as 128 and its number.
    pub fn status(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => signal.saturating_add(128),
        }
    }
}

/// Kinds of failures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    /// There is no such program.
    NotFound,
    /// The program is there and cannot be run.
    NotExecutable,
    /// Something else that was asked for does not exist, such as a user.
    Invalid,
    /// The guest has no room for more.
    Busy,
    /// The host broke the protocol.
    Protocol,
    /// The guest's kernel refused something.
    System,
}

/// What guest this is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestInfo {
    /// The kernel's release, such as `6.1.0-42-cloud-amd64`.
    pub kernel: String,
    /// The host name.
    pub hostname: String,
    /// Time since the guest's kernel started, in milliseconds.
    pub uptime_ms: u64,
    /// What the operating system calls itself (`PRETTY_NAME` of os-release(5)); empty if it says nothing.
    pub os: String,
    /// Version of the agent.
    pub agent: String,
}

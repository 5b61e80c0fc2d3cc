//! A session: one connection, and the command that runs for it.
//!
//! ```text
//!   step: receive ─► frames ─► command's input ─► command's output ─► flush ─┐
//!                       ▲                                                    │ as long as something moves
//!                       └────────────────────────────────────────────────────┘
//! ```
//! Nothing here blocks. What a step cannot do now, the descriptors that [`Session::wants`] names will tell.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use berth_agent_protocol::{
    CHUNK, Exec, Exit, FailureKind, Frame, FromGuest, FromHost, MAX_CREDIT, Stream, VERSION, WindowSize,
    agree,
};
use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, read, write};

use crate::command::{self, Ends, Process};
use crate::connection::{Connection, Over, retry};
use crate::{info, terminal};

/// Bytes of input that a command may leave unread.
const STDIN_CREDIT: u32 = 64 << 10;
/// Input is asked for in portions of at least this, if the command reads all that came.
const GRANT: u32 = STDIN_CREDIT / 4;
/// Most bytes that are read of an output after the command ended: as much as a pipe can hold. What others write who
/// have it still open is not the command's.
const AFTER_EXIT: usize = 1 << 20;
/// Rounds of one step before other sessions have their turn.
const ROUNDS: usize = 8;
/// What a terminal takes for the end of its input at the beginning of a line (Ctrl-D).
const END_OF_INPUT: u8 = 4;

/// One connection with its command.
pub struct Session {
    connection: Connection,
    greeted: bool,
    command: Option<Running>,
    /// The last step ended before everything was done.
    eager: bool,
}

impl Session {
    /// For a new connection.
    pub fn new(socket: OwnedFd) -> Self {
        Self { connection: Connection::new(socket), greeted: false, command: None, eager: false }
    }

    /// Refuses a connection that is one too many; this session is not to be kept.
    pub fn refuse(mut self) {
        self.connection.greet(VERSION);
        let text = "the guest's agent has as many connections as it can".to_owned();
        self.connection.send(&FromGuest::Failed { kind: FailureKind::Busy, text });
        // A few bytes into an empty socket; else the host notices the end.
        let _ = self.connection.flush();
    }

    /// What to wait for, by descriptor.
    pub fn wants(&self) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        let mut own = PollFlags::empty();
        own.set(PollFlags::POLLIN, self.connection.has_room());
        own.set(PollFlags::POLLOUT, self.connection.has_outgoing());
        let has_room = self.connection.has_room();
        let of_command = self.command.iter().flat_map(move |c| c.wants(has_room));
        std::iter::once((self.connection.as_fd(), own)).chain(of_command)
    }

    /// Whether there is more to do at once, after the others.
    pub fn is_eager(&self) -> bool {
        self.eager
    }

    /// Goes on as far as possible.
    ///
    /// # Errors
    /// [`Over`]: the connection has ended, and the session with it.
    pub fn step(&mut self, buffer: &mut [u8]) -> Result<(), Over> {
        self.eager = false;
        // Before anything comes, so that frames that wait for room are taken first.
        if self.connection.has_room() {
            self.frames()?;
        }
        if self.connection.has_room() {
            self.connection.receive(buffer)?;
        }
        for _ in 0..ROUNDS {
            let mut progress = self.frames()?;
            if let Some(command) = &mut self.command {
                progress |= command.give_input(&mut self.connection);
                progress |= command.take_output(&mut self.connection, buffer);
                if let Some(exit) = command.is_over() {
                    self.command = None;
                    self.connection.send(&FromGuest::Exited(exit));
                }
            }
            progress |= self.connection.flush()?;
            if !progress {
                return Ok(());
            }
        }
        self.eager = true;
        Ok(())
    }

    /// Takes frames as long as there is room for answers; returns whether there was one.
    fn frames(&mut self) -> Result<bool, Over> {
        let mut progress = false;
        while self.connection.has_room() {
            let Some(frame) = self.connection.next_frame()? else { break };
            progress = true;
            match frame {
                Frame::Hello(_) if self.greeted => return Err(Over::Rule("a second greeting")),
                Frame::Hello(version) => {
                    self.connection.greet(VERSION);
                    agree(version).ok_or(Over::Rule("no version in common"))?;
                    self.greeted = true;
                }
                _ if !self.greeted => return Err(Over::Rule("no greeting")),
                Frame::Message(m) => self.message(m)?,
                Frame::Data(Stream::Stdin, bytes) => {
                    if let Some(command) = &mut self.command {
                        command.input(&bytes)?;
                    }
                }
                Frame::Data(..) => return Err(Over::Rule("output from the host")),
            }
        }
        Ok(progress)
    }

    fn message(&mut self, m: FromHost) -> Result<(), Over> {
        let command = self.command.as_mut();
        match m {
            FromHost::Ping => self.connection.send(&FromGuest::Pong),
            FromHost::Info => self.connection.send(&FromGuest::Info(info::info())),
            FromHost::Exec(_) if command.is_some() => return Err(Over::Rule("a second command")),
            FromHost::Exec(exec) => self.start(&exec),
            // The others may cross the message that the command ended.
            FromHost::Credit(stream, bytes) => {
                if let Some(output) = command.and_then(|c| c.output(stream)) {
                    output.credit = output.credit.saturating_add(bytes).min(MAX_CREDIT);
                }
            }
            FromHost::CloseStdin => command.into_iter().for_each(Running::end_input),
            FromHost::CloseOutput(stream) => {
                if let Some(output) = command.and_then(|c| c.output(stream)) {
                    output.fd = None;
                }
            }
            FromHost::Signal(number) => {
                let signal = Signal::try_from(i32::from(number));
                command.into_iter().zip(signal).for_each(|(c, signal)| c.signal(signal));
            }
            FromHost::WindowSize(size) => command.into_iter().for_each(|c| c.resize(size)),
        }
        Ok(())
    }

    fn start(&mut self, exec: &Exec) {
        match command::start(exec) {
            Ok((process, ends)) => {
                let pid = process.child.id();
                self.command = Some(Running::new(process, ends, exec));
                self.connection.send(&FromGuest::Started { pid, stdin_credit: STDIN_CREDIT });
            }
            Err(e) => self.connection.send(&FromGuest::Failed { kind: e.kind(), text: e.to_string() }),
        }
    }

    /// The connection is over: tells the host why, if it broke a rule, and the command. Returns a process that somebody
    /// must wait for.
    pub fn end(mut self, why: &Over) -> Option<Process> {
        if let Some(command) = &self.command {
            command.signal(Signal::SIGHUP);
        }
        if !matches!(why, Over::Gone) {
            let text = why.to_string();
            self.connection.send(&FromGuest::Failed { kind: FailureKind::Protocol, text });
            // What the socket takes now: nobody waits for a host that breaks rules.
            let _ = self.connection.flush();
        }
        self.command.filter(|c| c.exit.is_none()).map(|c| c.process)
    }
}

/// A command that runs, or has ended while there is output of it.
struct Running {
    process: Process,
    stdin: Option<OwnedFd>,
    exit: Option<Exit>,
    terminal: bool,
    /// Input that waits for the command.
    input: VecDeque<u8>,
    input_ended: bool,
    /// Bytes that the host may send, and bytes that were taken of what it sent since it was told.
    input_credit: u32,
    input_taken: u32,
    outputs: [Output; 2],
}

/// One output of a command.
struct Output {
    stream: Stream,
    /// `None` at its end.
    fd: Option<OwnedFd>,
    /// Bytes that the host takes.
    credit: u32,
    /// Bytes that are still read.
    limit: usize,
}

impl Running {
    fn new(process: Process, ends: Ends, exec: &Exec) -> Self {
        let output =
            |stream, fd| Output { stream, fd, credit: exec.output_credit.min(MAX_CREDIT), limit: usize::MAX };
        let outputs = [output(Stream::Stdout, ends.stdout), output(Stream::Stderr, ends.stderr)];
        Self {
            process,
            stdin: ends.stdin,
            exit: None,
            terminal: exec.tty.is_some(),
            input: VecDeque::new(),
            input_ended: false,
            input_credit: STDIN_CREDIT,
            input_taken: 0,
            outputs,
        }
    }

    fn wants(&self, has_room: bool) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        let exit = self.exit.is_none().then(|| (self.process.exit.as_fd(), PollFlags::POLLIN));
        let stdin = self.stdin.as_ref().filter(|_| !self.input.is_empty());
        let outputs = self.outputs.iter().filter(move |o| has_room && o.credit > 0);
        exit.into_iter()
            .chain(stdin.map(|fd| (fd.as_fd(), PollFlags::POLLOUT)))
            .chain(outputs.filter_map(|o| Some((o.fd.as_ref()?.as_fd(), PollFlags::POLLIN))))
    }

    fn output(&mut self, stream: Stream) -> Option<&mut Output> {
        self.outputs.iter_mut().find(|o| o.stream == stream)
    }

    /// Takes input from the host.
    fn input(&mut self, bytes: &[u8]) -> Result<(), Over> {
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        self.input_credit =
            self.input_credit.checked_sub(len).ok_or(Over::Rule("more input than was asked for"))?;
        if self.input_ended {
            return Err(Over::Rule("input after its end"));
        }
        if self.stdin.is_some() {
            self.input.extend(bytes);
        }
        Ok(())
    }

    fn end_input(&mut self) {
        if !self.input_ended && self.terminal {
            self.input.push_back(END_OF_INPUT);
        }
        self.input_ended = true;
    }

    /// Gives the command what it takes of its input; returns whether it took something.
    fn give_input(&mut self, connection: &mut Connection) -> bool {
        let mut progress = false;
        while let Some(fd) = &self.stdin {
            if self.input.is_empty() {
                self.input = VecDeque::new();
                if self.input_ended && !self.terminal {
                    self.stdin = None;
                }
                break;
            }
            match retry(|| write(fd, self.input.as_slices().0)) {
                Ok(n) => {
                    self.input.drain(..n);
                    self.input_taken += n as u32;
                    progress = true;
                }
                Err(Errno::EAGAIN) => break,
                Err(_) => {
                    self.stdin = None;
                    self.input = VecDeque::new();
                    connection.send(&FromGuest::StdinClosed);
                }
            }
        }
        if self.input_taken >= GRANT {
            connection.send(&FromGuest::Credit(self.input_taken));
            self.input_credit += self.input_taken;
            self.input_taken = 0;
        }
        progress
    }

    /// Sends what the command prints; returns whether there was something, or an end.
    fn take_output(&mut self, connection: &mut Connection, buffer: &mut [u8]) -> bool {
        let mut progress = self.look_for_exit();
        let has_ended = self.exit.is_some();
        for output in &mut self.outputs {
            let Some(fd) = &output.fd else { continue };
            let most = CHUNK.min(output.credit as usize).min(output.limit).min(buffer.len());
            if output.limit == 0 {
                output.fd = None;
                progress = true;
                continue;
            }
            if most == 0 || !connection.has_room() {
                continue;
            }
            match retry(|| read(fd, &mut buffer[..most])) {
                Ok(n) if n > 0 => {
                    connection.send_data(output.stream, &buffer[..n]);
                    output.credit -= n as u32;
                    output.limit -= n;
                    progress = true;
                }
                Err(Errno::EAGAIN) if !has_ended => {}
                // Its end; or nothing is left of an ended command. A terminal that nobody has open any more is an error.
                _ => {
                    output.fd = None;
                    progress = true;
                }
            }
        }
        progress
    }

    fn look_for_exit(&mut self) -> bool {
        if self.exit.is_some() {
            return false;
        }
        // That somebody else waited for the child cannot be; then it is gone all the same.
        self.exit = match self.process.child.try_wait() {
            Ok(None) => return false,
            Ok(Some(status)) => Some(exit_of(status)),
            Err(_) => Some(Exit::Code(u8::MAX)),
        };
        for output in &mut self.outputs {
            output.limit = AFTER_EXIT;
        }
        true
    }

    /// How it ended, when all of its output is on its way.
    fn is_over(&self) -> Option<Exit> {
        self.exit.filter(|_| self.outputs.iter().all(|o| o.fd.is_none()))
    }

    fn signal(&self, signal: Signal) {
        // Once it has been waited for, the number may be another's.
        if self.exit.is_none() {
            // It may just have ended.
            let _ = killpg(Pid::from_raw(self.process.child.id() as i32), signal);
        }
    }

    fn resize(&self, size: WindowSize) {
        if let Some(fd) = self.stdin.as_ref().filter(|_| self.terminal) {
            // Fails when nobody has the terminal open any more.
            let _ = terminal::set_size(fd, size);
        }
    }
}

fn exit_of(status: ExitStatus) -> Exit {
    match (status.code(), status.signal()) {
        (Some(code), _) => Exit::Code(code as u8),
        (None, signal) => Exit::Signal(signal.unwrap_or_default() as u8),
    }
}

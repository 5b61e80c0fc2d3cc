//! The way to a guest's agent: through the Unix socket of the VM's vsock device, as soon as the guest is that far.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use berth_agent_protocol::{Decoder, Frame, FrameError, FromGuest, PORT, VERSION, agree, hello};
use berth_api::types::VmState;
use berth_guest_image::progress::Progress;
use berth_image::Name;

use crate::vms::{LiveVm, VmsError};

/// Pause before it is tried again whether an agent listens.
const TRY_AGAIN: Duration = Duration::from_millis(100);
/// How long nothing is said about waiting, and how often it is looked whether the VM still can answer.
const SILENCE: Duration = Duration::from_secs(1);
/// Shortest time that an agent gets to answer at all.
const LEAST: Duration = Duration::from_millis(500);
/// Longest answer of the vsock device: `OK` and a port.
const MAX_ANSWER: usize = 32;

/// Why there is no way to the agent. One line for people.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The VM.
    #[error(transparent)]
    Vm(#[from] VmsError),
    /// The VM cannot have an agent.
    #[error("VM {name} has no vsock device, through which its agent would be reached")]
    NoSocket {
        /// The VM.
        name: String,
    },
    /// The VM stands still.
    #[error("VM {name} is paused: `berth resume {name}` lets it go on")]
    Paused {
        /// The VM.
        name: String,
    },
    /// The VM has ended meanwhile.
    #[error("VM {name} ended while its agent was waited for")]
    Ended {
        /// The VM.
        name: String,
    },
    /// The VM's socket.
    #[error("cannot connect to the vsock socket of VM {name} at {}: {source}", socket.display())]
    Socket {
        /// The VM.
        name: String,
        /// Where.
        socket: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The guest gives no sign.
    #[error(
        "the guest of VM {name} did not answer within {seconds} s: it still boots (wait longer with --timeout), hangs, \
         or has no vsock driver"
    )]
    Silent {
        /// The VM.
        name: String,
        /// How long it had.
        seconds: u64,
    },
    /// Nobody listens.
    #[error(
        "no agent listens in the guest of VM {name} (vsock port {PORT}), after {seconds} s: it still boots (wait longer \
         with --timeout), or has none: the default guest and images of `berth image build` have one"
    )]
    NoAgent {
        /// The VM.
        name: String,
        /// How long it had.
        seconds: u64,
    },
    /// Something else listens.
    #[error("what answers in the guest of VM {name} at vsock port {PORT} is no agent of Berth: {reason}")]
    Stranger {
        /// The VM.
        name: String,
        /// Why not.
        reason: String,
    },
}

/// A greeted agent.
pub struct Link {
    /// The connection.
    pub stream: UnixStream,
    /// What of its frames has come.
    pub decoder: Decoder,
}

/// Where an attempt ended.
enum Attempt {
    Done(Link),
    /// Nobody listens, or the guest was reset.
    Refused,
    /// Time is over, and nothing came.
    Silent,
}

/// A VM whose agent is wanted.
pub struct Target {
    name: String,
    at: At,
}

enum At {
    /// Only its socket is known.
    Socket(PathBuf),
    Vm(Box<LiveVm>),
}

impl Target {
    /// The VM `name`; its vsock socket is where it says, or at `socket`.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn new(name: &Name, socket: Option<&Path>) -> Result<Self, ConnectError> {
        let name_text = name.as_str().to_owned();
        let at = match socket {
            Some(socket) => At::Socket(socket.to_owned()),
            None => At::Vm(Box::new(LiveVm::find(name)?)),
        };
        let target = Self { name: name_text, at };
        // Known at once, unless the VM has only begun.
        target.socket()?;
        Ok(target)
    }

    /// Where to connect; `None` while the VM has not said it. To be asked anew for each attempt.
    fn socket(&self) -> Result<Option<PathBuf>, ConnectError> {
        let vm = match &self.at {
            At::Socket(socket) => return Ok(Some(socket.clone())),
            At::Vm(vm) => vm,
        };
        let Some(description) = vm.directory().description() else { return Ok(None) };
        match description.vsock {
            Some(vsock) => Ok(Some(vsock.path)),
            None => Err(ConnectError::NoSocket { name: self.name.clone() }),
        }
    }

    /// Whether it is worth while to wait for the VM.
    fn look_at_vm(&self) -> Result<(), ConnectError> {
        let At::Vm(vm) = &self.at else { return Ok(()) };
        let name = || self.name.clone();
        if !vm.directory().is_alive() {
            return Err(ConnectError::Ended { name: name() });
        }
        match vm.client().vm() {
            Ok(info) if info.state == VmState::Paused => Err(ConnectError::Paused { name: name() }),
            // Its sockets would wake it too, once all of its memory is away.
            Ok(info) if info.state == VmState::Frozen => {
                vm.ask(|client| client.thaw()).map_err(ConnectError::Vm)
            }
            // One that does not answer may have only begun.
            _ => Ok(()),
        }
    }

    /// Connects and greets; waits for a guest that is not that far. Says after a second that it waits.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn connect(&self, timeout: Duration) -> Result<Link, ConnectError> {
        let mut wait = Wait::new(self, timeout.max(LEAST));
        loop {
            let is_last = wait.is_over() || timeout.is_zero();
            match self.attempt(&mut wait)? {
                Attempt::Done(link) => return Ok(link),
                Attempt::Silent => {
                    let seconds = timeout.as_secs();
                    return Err(ConnectError::Silent { name: self.name.clone(), seconds });
                }
                Attempt::Refused if is_last => {
                    let seconds = timeout.as_secs();
                    return Err(ConnectError::NoAgent { name: self.name.clone(), seconds });
                }
                Attempt::Refused => wait.pause()?,
            }
        }
    }

    fn attempt(&self, wait: &mut Wait<'_>) -> Result<Attempt, ConnectError> {
        let Some(socket) = self.socket()? else { return Ok(Attempt::Refused) };
        let mut stream = match UnixStream::connect(&socket) {
            Ok(stream) => stream,
            // A VM that lives makes its socket soon.
            Err(e) if e.kind() == ErrorKind::NotFound && matches!(self.at, At::Vm(_)) => {
                return Ok(Attempt::Refused);
            }
            Err(source) => {
                let name = self.name.clone();
                return Err(ConnectError::Socket { name, socket, source });
            }
        };
        if stream.write_all(format!("CONNECT {PORT}\n").as_bytes()).is_err() {
            return Ok(Attempt::Refused);
        }
        let mut answer = Vec::new();
        while answer.last() != Some(&b'\n') {
            let mut byte = [0];
            match wait.read(&stream, &mut byte)? {
                None => return Ok(Attempt::Silent),
                Some(0) => return Ok(Attempt::Refused),
                Some(_) if answer.len() < MAX_ANSWER => answer.push(byte[0]),
                Some(_) => return Err(self.stranger("it does not speak as Berth's vsock device")),
            }
        }
        if !answer.starts_with(b"OK ") {
            return Err(self.stranger("it does not speak as Berth's vsock device"));
        }
        self.greet(stream, wait)
    }

    fn greet(&self, mut stream: UnixStream, wait: &mut Wait<'_>) -> Result<Attempt, ConnectError> {
        let mut decoder = Decoder::default();
        if stream.write_all(&hello(VERSION)).is_err() {
            return Ok(Attempt::Refused);
        }
        loop {
            let frame: Option<Frame<FromGuest>> =
                decoder.next_frame().map_err(|e: FrameError| self.stranger(&e.to_string()))?;
            match frame {
                Some(Frame::Hello(theirs)) if agree(theirs).is_some() => {
                    stream.set_read_timeout(None).map_err(|e| self.stranger(&e.to_string()))?;
                    return Ok(Attempt::Done(Link { stream, decoder }));
                }
                Some(_) => return Err(self.stranger("it does not greet")),
                None => {}
            }
            let mut buffer = [0; 256];
            match wait.read(&stream, &mut buffer)? {
                None => return Ok(Attempt::Silent),
                Some(0) => return Ok(Attempt::Refused),
                Some(n) => decoder.feed(buffer.get(..n).unwrap_or_default()),
            }
        }
    }

    fn stranger(&self, reason: &str) -> ConnectError {
        ConnectError::Stranger { name: self.name.clone(), reason: reason.to_owned() }
    }
}

/// Waiting, which shows after a second.
struct Wait<'a> {
    target: &'a Target,
    deadline: Instant,
    /// When it is looked again at the VM.
    look: Instant,
    progress: Option<Progress>,
}

impl<'a> Wait<'a> {
    fn new(target: &'a Target, timeout: Duration) -> Self {
        let now = Instant::now();
        Self { target, deadline: now + timeout, look: now + SILENCE, progress: None }
    }

    fn is_over(&self) -> bool {
        Instant::now() >= self.deadline
    }

    fn pause(&mut self) -> Result<(), ConnectError> {
        thread::sleep(TRY_AGAIN.min(self.deadline.saturating_duration_since(Instant::now())));
        self.look_at_the_clock()
    }

    fn look_at_the_clock(&mut self) -> Result<(), ConnectError> {
        if Instant::now() < self.look {
            return Ok(());
        }
        self.look = Instant::now() + SILENCE;
        self.target.look_at_vm()?;
        if self.progress.is_none() {
            let progress = Progress::default();
            progress.step("waiting for the guest's agent");
            self.progress = Some(progress);
        }
        Ok(())
    }

    /// Reads; `None` when time is over. 0 is the end of the stream, however it came.
    fn read(&mut self, mut stream: &UnixStream, buffer: &mut [u8]) -> Result<Option<usize>, ConnectError> {
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let read = stream.set_read_timeout(Some(left.min(SILENCE))).and_then(|()| stream.read(buffer));
            match read {
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    self.look_at_the_clock()?;
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                // However it ended.
                Err(_) => return Ok(Some(0)),
                Ok(n) => return Ok(Some(n)),
            }
        }
    }
}

//! The way to a guest's agent: through the Unix socket of the VM's vsock device, as soon as the guest is that far.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use berth_agent_protocol::{Decoder, Frame, FrameError, FromGuest, PORT, VERSION, agree, hello};
use berth_guest_image::progress::Progress;

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
    /// It is not known where the VM's socket is.
    #[error("name the socket of VM {name}'s vsock device with --vsock: the path that it was started with")]
    NoSocket {
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
    socket: PathBuf,
}

impl Target {
    /// The VM `name`; its vsock socket is where it says.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn new(name: &str, socket: Option<&Path>) -> Result<Self, ConnectError> {
        let socket = socket.map(Path::to_owned);
        let socket = socket.ok_or_else(|| ConnectError::NoSocket { name: name.to_owned() })?;
        Ok(Self { name: name.to_owned(), socket })
    }

    /// Connects and greets; waits for a guest that is not that far. Says after a second that it waits.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn connect(&self, timeout: Duration) -> Result<Link, ConnectError> {
        let mut wait = Wait::new(timeout.max(LEAST));
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
                Attempt::Refused => {
                    wait.pause();
                }
            }
        }
    }

    fn attempt(&self, wait: &mut Wait) -> Result<Attempt, ConnectError> {
        let broken =
            |source| ConnectError::Socket { name: self.name.clone(), socket: self.socket.clone(), source };
        let mut stream = UnixStream::connect(&self.socket).map_err(broken)?;
        if stream.write_all(format!("CONNECT {PORT}\n").as_bytes()).is_err() {
            return Ok(Attempt::Refused);
        }
        let mut answer = Vec::new();
        while answer.last() != Some(&b'\n') {
            let mut byte = [0];
            match wait.read(&stream, &mut byte).map_err(broken)? {
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

    fn greet(&self, mut stream: UnixStream, wait: &mut Wait) -> Result<Attempt, ConnectError> {
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
            match wait.read(&stream, &mut buffer).map_err(|e| self.stranger(&e.to_string()))? {
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
struct Wait {
    deadline: Instant,
    /// When it is to be said.
    speak: Instant,
    progress: Option<Progress>,
}

impl Wait {
    fn new(timeout: Duration) -> Self {
        let now = Instant::now();
        Self { deadline: now + timeout, speak: now + SILENCE, progress: None }
    }

    fn is_over(&self) -> bool {
        Instant::now() >= self.deadline
    }

    fn pause(&mut self) {
        thread::sleep(TRY_AGAIN.min(self.deadline.saturating_duration_since(Instant::now())));
        self.look_at_the_clock();
    }

    fn look_at_the_clock(&mut self) {
        if self.progress.is_none() && Instant::now() >= self.speak {
            let progress = Progress::default();
            progress.step("waiting for the guest's agent");
            self.progress = Some(progress);
        }
    }

    /// Reads; `None` when time is over. 0 is the end of the stream, however it came.
    fn read(&mut self, mut stream: &UnixStream, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            stream.set_read_timeout(Some(left.min(SILENCE)))?;
            match stream.read(buffer) {
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    self.look_at_the_clock();
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::ConnectionReset => return Ok(Some(0)),
                Err(e) => return Err(e),
                Ok(n) => return Ok(Some(n)),
            }
        }
    }
}

//! A connection to the load in a guest: through the Unix socket of the VM's vsock device.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use berth_agent_protocol::load::{ASK, Count, MAX_LINE, PORT};

/// How long an attempt to connect waits for an answer. A guest whose driver was just starting may have lost the request.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// How long a guest has for an answer, however crowded the host is.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// Why there is no answer. One line for people.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The connection.
    #[error("{0}")]
    Connection(#[from] io::Error),
    /// It takes too long.
    #[error("no answer within {} s", ANSWER_LIMIT.as_secs())]
    TimedOut,
    /// What came is no answer.
    #[error("its answer makes no sense")]
    Answer,
}

/// The way to one load.
#[derive(Debug)]
pub struct Probe {
    stream: UnixStream,
    last: Count,
}

impl Probe {
    /// Connects through the VM's `socket` and asks once. `None`: not yet.
    pub fn connect(socket: &Path) -> Option<Self> {
        let mut stream = UnixStream::connect(socket).ok()?;
        stream.set_read_timeout(Some(CONNECT_LIMIT)).ok()?;
        stream.write_all(format!("CONNECT {PORT}\n").as_bytes()).ok()?;
        if !line(&stream).ok()?.starts_with("OK ") {
            return None;
        }
        stream.set_read_timeout(Some(ANSWER_LIMIT)).ok()?;
        let mut probe = Self { stream, last: Count::default() };
        probe.ask().ok()?;
        Some(probe)
    }

    /// What it answered last.
    pub fn last(&self) -> Count {
        self.last
    }

    /// Asks; how long the answer took.
    ///
    /// # Errors
    /// [`ProbeError`].
    pub fn ask(&mut self) -> Result<(Count, Duration), ProbeError> {
        let begun = Instant::now();
        self.stream.write_all(&[ASK])?;
        let answer = line(&self.stream)?;
        let took = begun.elapsed();
        self.last = Count::from_line(&answer).ok_or(ProbeError::Answer)?;
        Ok((self.last, took))
    }
}

/// Reads a line. Nothing comes behind it that was not asked for.
fn line(mut stream: &UnixStream) -> Result<String, ProbeError> {
    let mut line = Vec::new();
    let mut buffer = [0; MAX_LINE];
    while line.last() != Some(&b'\n') {
        match stream.read(&mut buffer) {
            Ok(0) => return Err(io::Error::from(ErrorKind::UnexpectedEof).into()),
            Ok(n) => line.extend(buffer.iter().take(n)),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                return Err(ProbeError::TimedOut);
            }
            Err(e) => return Err(e.into()),
        }
        if line.len() > MAX_LINE {
            return Err(ProbeError::Answer);
        }
    }
    String::from_utf8(line).map_err(|_| ProbeError::Answer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixListener;

    /// Serves one connection: each line or question has the next of these answers.
    fn answers(socket: &Path, answers: &'static [&'static str]) {
        let listener = UnixListener::bind(socket).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut input = BufReader::new(stream.try_clone().unwrap());
            let mut connect = String::new();
            input.read_line(&mut connect).unwrap();
            assert_eq!(connect, "CONNECT 1025\n");
            for (i, answer) in answers.iter().enumerate() {
                let mut byte = [0];
                if i > 0 && input.read_exact(&mut byte).is_err() {
                    return;
                }
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
    }

    #[test]
    fn counts_are_asked_for_and_nonsense_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("vsock");
        assert!(Probe::connect(&socket).is_none(), "nobody listens");
        answers(&socket, &["OK 1073741824\n", "5 6 0 1\n", "7 8 1 1\n", "what?\n"]);
        let mut probe = Probe::connect(&socket).unwrap();
        assert_eq!(probe.last(), Count { nanos: 5, units: 6, errors: 0, ready: true });
        assert_eq!(probe.ask().unwrap().0, Count { nanos: 7, units: 8, errors: 1, ready: true });
        assert!(matches!(probe.ask(), Err(ProbeError::Answer)));
        assert!(matches!(probe.ask(), Err(ProbeError::Connection(_))));
    }

    #[test]
    fn a_line_without_end_is_no_answer() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("vsock");
        const LONG: &str = "1111111111111111111111111111111111111111111111111111111111111111111111111111111111111111111\
                            11111111111111111111111111111111";
        answers(&socket, &["OK 1\n", "1 1 0 1\n", LONG]);
        let mut probe = Probe::connect(&socket).unwrap();
        assert!(matches!(probe.ask(), Err(ProbeError::Answer)));
    }
}

//! A guest that is spoken to: what a person would read and type on the console of `berth run`.

use std::io::{self, Read, Write};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::GuestError;

/// A running guest with its console. Dropping it ends it.
pub struct Console {
    process: Child,
    input: ChildStdin,
    output: Receiver<Vec<u8>>,
    seen: String,
    /// Where in `seen` the next text is looked for.
    position: usize,
    deadline: Instant,
}

impl Console {
    /// Starts `command`, which has `limit` to end.
    ///
    /// # Errors
    /// [`GuestError::Process`].
    pub fn start(command: &mut Command, limit: Duration) -> Result<Self, GuestError> {
        let mut process =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn()?;
        let missing = || io::Error::other("the process has no pipe");
        let input = process.stdin.take().ok_or_else(missing)?;
        let mut stream = process.stdout.take().ok_or_else(missing)?;
        let (sender, output) = channel();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n) = stream.read(&mut buffer) {
                let part = buffer.get(..n).filter(|part| !part.is_empty());
                if part.is_none_or(|part| sender.send(part.to_vec()).is_err()) {
                    break;
                }
            }
        });
        let deadline = Instant::now() + limit;
        Ok(Self { process, input, output, seen: String::new(), position: 0, deadline })
    }

    /// Waits until the console shows `text` after what was waited for before; returns what it showed until then.
    ///
    /// # Errors
    /// [`GuestError::TimeOut`], [`GuestError::Ended`].
    pub fn expect(&mut self, text: &str) -> Result<String, GuestError> {
        loop {
            let new = self.seen.get(self.position..).unwrap_or_default();
            if let Some(at) = new.find(text) {
                let before = new.get(..at).unwrap_or_default().to_owned();
                self.position += at + text.len();
                return Ok(before);
            }
            let left = self.deadline.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(part) => self.seen.push_str(&String::from_utf8_lossy(&part)),
                Err(e) => {
                    let (waiting_for, console) = (format!("print {text:?}"), self.seen.clone());
                    return Err(match e {
                        RecvTimeoutError::Timeout => GuestError::TimeOut { waiting_for, console },
                        RecvTimeoutError::Disconnected => GuestError::Ended { waiting_for, console },
                    });
                }
            }
        }
    }

    /// Types a line.
    ///
    /// # Errors
    /// [`GuestError::Process`].
    pub fn type_line(&mut self, line: &str) -> Result<(), GuestError> {
        Ok(writeln!(self.input, "{line}")?)
    }

    /// Waits for the end of the process.
    ///
    /// # Errors
    /// [`GuestError::TimeOut`]; the process is ended then.
    pub fn wait(mut self) -> Result<ExitStatus, GuestError> {
        // Its output ends with it.
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(part) => self.seen.push_str(&String::from_utf8_lossy(&part)),
                Err(RecvTimeoutError::Disconnected) => return Ok(self.process.wait()?),
                Err(RecvTimeoutError::Timeout) => {
                    let console = self.seen.clone();
                    return Err(GuestError::TimeOut { waiting_for: "end".to_owned(), console });
                }
            }
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

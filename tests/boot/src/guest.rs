//! One guest: a `berth run` process whose console is read line by line.

use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

/// How often it is looked whether the process has ended.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// A running guest. Dropping it ends it.
pub struct Guest {
    process: Child,
    lines: Receiver<String>,
    complaints: Receiver<String>,
    seen: Vec<String>,
    deadline: Instant,
}

/// How a guest ended.
#[derive(Debug)]
pub struct Ended {
    /// The exit status of the process.
    pub status: ExitStatus,
    /// Its console, line by line without line ends.
    pub console: Vec<String>,
    /// What Berth itself said on standard error.
    pub complaints: String,
}

/// Why a guest is not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The process does not start, or cannot be watched.
    #[error("cannot run berth: {0}")]
    Process(#[from] io::Error),
    /// It took too long.
    #[error("the guest did not {waiting_for} in time; its console:\n{console}")]
    TimeOut {
        /// What it was to do.
        waiting_for: String,
        /// All of its console.
        console: String,
    },
    /// It ended instead.
    #[error("the guest ended and did not {waiting_for}; its console:\n{console}")]
    Ended {
        /// What it was to do.
        waiting_for: String,
        /// All of its console.
        console: String,
    },
}

impl Guest {
    /// Starts `berth run` with `arguments`; the default guest with `initrd` runs the shell command `command`. It
    /// has `limit` to end.
    ///
    /// # Errors
    /// [`GuestError::Process`].
    pub fn start(
        berth: &Path,
        initrd: &Path,
        arguments: &[&str],
        command: &str,
        limit: Duration,
    ) -> Result<Self, GuestError> {
        Self::start_by(&mut Command::new(berth), initrd, arguments, command, limit)
    }

    /// [`Self::start`] with a command that starts `berth` with the arguments that are added to it.
    ///
    /// # Errors
    /// [`GuestError::Process`].
    pub fn start_by(
        berth: &mut Command,
        initrd: &Path,
        arguments: &[&str],
        command: &str,
        limit: Duration,
    ) -> Result<Self, GuestError> {
        // The kernel's command line has no way to quote a double quote, and ends at a newline.
        assert!(!command.contains(['"', '\n']), "not possible on a kernel command line: {command}");
        let mut process = berth
            .arg("run")
            .args(arguments)
            .arg("--initrd")
            .arg(initrd)
            .arg("--append")
            .arg(format!("\"berth.run={command}\""))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let lines = lines_of(process.stdout.take());
        let complaints = lines_of(process.stderr.take());
        Ok(Self { process, lines, complaints, seen: Vec::new(), deadline: Instant::now() + limit })
    }

    /// Waits until the console shows a line that contains `text`.
    ///
    /// # Errors
    /// [`GuestError::TimeOut`], [`GuestError::Ended`].
    pub fn wait_for_line(&mut self, text: &str) -> Result<(), GuestError> {
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    let found = line.contains(text);
                    self.seen.push(line);
                    if found {
                        return Ok(());
                    }
                }
                Err(e) => {
                    let (waiting_for, console) = (format!("print {text:?}"), self.seen.join("\n"));
                    return Err(match e {
                        RecvTimeoutError::Timeout => GuestError::TimeOut { waiting_for, console },
                        RecvTimeoutError::Disconnected => GuestError::Ended { waiting_for, console },
                    });
                }
            }
        }
    }

    /// What the console has shown so far, as far as it was waited for.
    pub fn lines(&self) -> &[String] {
        &self.seen
    }

    /// Number of the process.
    pub fn process(&self) -> u32 {
        self.process.id()
    }

    /// What the console shows from now on, as far as it is there already.
    pub fn new_lines(&mut self) -> Vec<String> {
        let lines: Vec<String> = self.lines.try_iter().collect();
        self.seen.extend(lines.iter().cloned());
        lines
    }

    /// All lines that the process still prints; returns when it has ended.
    pub fn last_lines(&mut self) -> Vec<String> {
        let lines: Vec<String> = self.lines.iter().collect();
        self.seen.extend(lines.iter().cloned());
        lines
    }

    /// Sends a signal to the process.
    ///
    /// # Errors
    /// What the host says.
    pub fn signal(&self, signal: libc::c_int) -> Result<(), GuestError> {
        let pid = self.process.id() as libc::pid_t;
        // SAFETY: it takes numbers. The process is our child and not waited for, so the number is its own.
        if unsafe { libc::kill(pid, signal) } != 0 {
            return Err(io::Error::last_os_error().into());
        }
        Ok(())
    }

    /// Waits for the end of the process.
    ///
    /// # Errors
    /// [`GuestError::TimeOut`] after the guest's limit; the process is ended then.
    pub fn wait(mut self) -> Result<Ended, GuestError> {
        let status = loop {
            self.seen.extend(self.lines.try_iter());
            match self.process.try_wait()? {
                Some(status) => break status,
                None if Instant::now() < self.deadline => thread::sleep(LOOK_AGAIN),
                None => {
                    let console = self.seen.join("\n");
                    return Err(GuestError::TimeOut { waiting_for: "end".to_owned(), console });
                }
            }
        };
        // The process is gone: both streams end.
        self.seen.extend(self.lines.iter());
        let complaints = self.complaints.iter().collect::<Vec<_>>().join("\n");
        Ok(Ended { status, console: std::mem::take(&mut self.seen), complaints })
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Lines of a stream as they come, until it ends. What is not UTF-8 is replaced.
fn lines_of(stream: Option<impl Read + Send + 'static>) -> Receiver<String> {
    let (sender, receiver) = channel();
    if let Some(stream) = stream {
        thread::spawn(move || {
            let mut reader = BufReader::new(stream);
            let mut line = Vec::new();
            while matches!(reader.read_until(b'\n', &mut line), Ok(n) if n > 0) {
                let text = String::from_utf8_lossy(&line).trim_end_matches(['\r', '\n']).to_owned();
                if sender.send(text).is_err() {
                    break;
                }
                line.clear();
            }
        });
    }
    receiver
}

impl Ended {
    /// The lines of the console between two lines that begin with `=== first` and `===`.
    pub fn section(&self, first: &str) -> Vec<&str> {
        let head = format!("=== {first}");
        self.console
            .iter()
            .skip_while(|l| **l != head)
            .skip(1)
            .take_while(|l| !l.starts_with("==="))
            .map(String::as_str)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    #[test]
    fn a_section_ends_where_the_next_begins() {
        let console = ["x", "=== a", "1", "2", "=== b", "3"].map(str::to_owned).to_vec();
        let ended = Ended { status: ExitStatus::from_raw(0), console, complaints: String::new() };
        assert_eq!(ended.section("a"), ["1", "2"]);
        assert_eq!(ended.section("b"), ["3"]);
        assert!(ended.section("c").is_empty());
    }
}

//! A process that is watched: its lines with the time at which they came, its CPU time and its memory.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

/// A guest that says nothing for so long hangs.
const SILENCE: Duration = Duration::from_secs(180);
/// So long may a process take to end after it has closed its output.
const ENDING: Duration = Duration::from_secs(30);
/// Unit of the times in `/proc/PID/stat` (proc(5)): USER_HZ is 100 on x86.
const TICKS_PER_SECOND: f64 = 100.0;

/// Wall-clock and CPU time since a process was started, in seconds.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// Wall-clock time.
    pub wall: f64,
    /// CPU time of all its threads, user and system, in steps of 10 ms.
    pub cpu: f64,
}

/// A line of output with the times at which it came.
pub struct Line {
    /// Without white space around it.
    pub text: String,
    /// When.
    pub times: Times,
}

/// A running process. It is killed when this is dropped.
pub struct Process {
    child: Child,
    started: Instant,
    lines: Receiver<(String, Instant)>,
    name: String,
}

impl Process {
    /// Starts `command` with an input that stays open and empty.
    ///
    /// # Errors
    /// A text when it cannot be started.
    pub fn start(command: &mut Command) -> Result<Self, String> {
        let name = command.get_program().to_string_lossy().into_owned();
        let started = Instant::now();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| format!("{name} could not be started: {e}"))?;
        let (sender, lines) = channel();
        if let Some(output) = child.stdout.take() {
            thread::spawn(move || {
                let mut output = BufReader::new(output);
                let mut line = Vec::new();
                // A console may print anything, so it need not be text.
                while output.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
                    let text = String::from_utf8_lossy(&line).trim().to_owned();
                    if sender.send((text, Instant::now())).is_err() {
                        return;
                    }
                    line.clear();
                }
            });
        }
        Ok(Self { child, started, lines, name })
    }

    /// The next line, or none at the end of the output.
    ///
    /// # Errors
    /// A text when none comes for a long time.
    pub fn line(&mut self) -> Result<Option<Line>, String> {
        match self.lines.recv_timeout(SILENCE) {
            Ok((text, at)) => {
                let wall = (at - self.started).as_secs_f64();
                Ok(Some(Line { text, times: Times { wall, cpu: self.cpu()? } }))
            }
            Err(RecvTimeoutError::Disconnected) => Ok(None),
            Err(RecvTimeoutError::Timeout) => {
                Err(format!("{} said nothing for {} s", self.name, SILENCE.as_secs()))
            }
        }
    }

    /// Waits for the end; then the times up to it.
    ///
    /// # Errors
    /// A text when it does not end, or not well.
    pub fn end(mut self) -> Result<Times, String> {
        // A process that has ended keeps its times until it is waited for.
        let closed = Instant::now();
        while self.stat(0)? != "Z" {
            if closed.elapsed() > ENDING {
                return Err(format!("{} does not end", self.name));
            }
            thread::sleep(Duration::from_millis(1));
        }
        let times = Times { wall: self.started.elapsed().as_secs_f64(), cpu: self.cpu()? };
        let status = self.child.wait().map_err(|e| e.to_string())?;
        if status.success() { Ok(times) } else { Err(format!("{} failed ({status})", self.name)) }
    }

    /// CPU time so far, in seconds.
    pub fn cpu(&self) -> Result<f64, String> {
        let field = |index| self.stat(index)?.parse::<f64>().map_err(|e| e.to_string());
        // Fields 14 and 15 of proc(5): user and system time.
        Ok((field(11)? + field(12)?) / TICKS_PER_SECOND)
    }

    /// Resident memory in bytes, file pages included (proc(5), `smaps_rollup`).
    pub fn resident(&self) -> Result<f64, String> {
        let path = format!("/proc/{}/smaps_rollup", self.child.id());
        let text = fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
        let kib =
            text.lines().find_map(|l| l.strip_prefix("Rss:")?.split_whitespace().next()?.parse::<f64>().ok());
        kib.map(|kib| kib * 1024.0).ok_or_else(|| format!("{path} has no Rss"))
    }

    /// A field of `/proc/PID/stat`, counted from 0 behind the program's name.
    fn stat(&self, index: usize) -> Result<String, String> {
        let path = format!("/proc/{}/stat", self.child.id());
        let text = fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
        // The name may hold spaces and parentheses.
        let fields = text.rsplit_once(')').map_or("", |(_, fields)| fields);
        fields.split_whitespace().nth(index).map(str::to_owned).ok_or_else(|| format!("{path} is too short"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The first line that `program --version` prints, or none if there is no such program.
pub fn version(program: &Path) -> Option<String> {
    let output = Command::new(program).arg("--version").stdin(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    output.status.success().then(|| text.lines().next().unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_with_their_times() {
        let script = "echo one; i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; echo two";
        let mut process = Process::start(Command::new("sh").args(["-c", script])).unwrap();
        let one = process.line().unwrap().unwrap();
        let two = process.line().unwrap().unwrap();
        assert_eq!((&*one.text, &*two.text), ("one", "two"));
        assert!(process.line().unwrap().is_none());
        let end = process.end().unwrap();
        assert!(one.times.wall < two.times.wall && two.times.wall < end.wall);
        assert!(end.cpu > 0.0);
    }

    #[test]
    fn a_process_that_fails_is_an_error() {
        let mut process = Process::start(Command::new("sh").args(["-c", "exit 3"])).unwrap();
        assert!(process.line().unwrap().is_none());
        assert!(process.end().unwrap_err().contains("3"));
        assert!(Process::start(&mut Command::new("/absent")).is_err());
    }
}

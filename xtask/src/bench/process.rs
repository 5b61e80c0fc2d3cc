//! A process that is watched: its lines with the time at which they came, its CPU time and its memory.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_getcpuclockid};
use nix::unistd::Pid;

/// A guest that says nothing for so long hangs.
const SILENCE: Duration = Duration::from_secs(90);
/// So long may a process take to end after it has closed its output.
const ENDING: Duration = Duration::from_secs(30);
/// How soon a wait for a line notices an interrupt.
const NOTICE: Duration = Duration::from_millis(200);

/// Wall-clock and CPU time since a process was started, in seconds.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// Wall-clock time.
    pub wall: f64,
    /// CPU time of all its threads, user and system.
    pub cpu: f64,
}

/// A line of output with the times at which it came.
pub struct Line {
    /// Without white space around it.
    pub text: String,
    /// When.
    pub times: Times,
}

/// Whether the user has interrupted this program (SIGINT, SIGTERM). A second time ends it at once.
#[derive(Clone, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Listens for the signals from now on.
    ///
    /// # Errors
    /// A text when the system refuses that.
    pub fn listen() -> Result<Self, String> {
        let interrupt = Self::default();
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            // In this order: the first signal finds the flag unset and goes on to set it.
            signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&interrupt.0))
                .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&interrupt.0)))
                .map_err(|e| format!("no signal handler: {e}"))?;
        }
        Ok(interrupt)
    }

    /// Whether a signal has come.
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// A running process. It is killed when this is dropped.
pub struct Process {
    child: Child,
    started: Instant,
    lines: Receiver<(String, Instant)>,
    name: String,
    cpu_clock: ClockId,
    interrupt: Interrupt,
}

impl Process {
    /// Starts `command` with an input that stays open and empty.
    ///
    /// # Errors
    /// A text when it cannot be started.
    pub fn start(command: &mut Command, interrupt: &Interrupt) -> Result<Self, String> {
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
        let pid = i32::try_from(child.id()).map_err(|e| e.to_string())?;
        let clock = clock_getcpuclockid(Pid::from_raw(pid));
        let cpu_clock = clock.map_err(|e| format!("{name} has no CPU clock: {e}"))?;
        Ok(Self { child, started, lines, name, cpu_clock, interrupt: interrupt.clone() })
    }

    /// The next line, or none at the end of the output.
    ///
    /// # Errors
    /// A text when none comes for a long time, or the user interrupts the wait.
    pub fn line(&mut self) -> Result<Option<Line>, String> {
        let begun = Instant::now();
        loop {
            if self.interrupt.requested() {
                return Err("interrupted".to_owned());
            }
            match self.lines.recv_timeout(NOTICE) {
                Ok((text, at)) => {
                    let wall = (at - self.started).as_secs_f64();
                    return Ok(Some(Line { text, times: Times { wall, cpu: self.cpu()? } }));
                }
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
                Err(RecvTimeoutError::Timeout) if begun.elapsed() < SILENCE => {}
                Err(RecvTimeoutError::Timeout) => {
                    return Err(format!("{} said nothing for {} s", self.name, SILENCE.as_secs()));
                }
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
        while self.state()? != "Z" {
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
    ///
    /// # Errors
    /// A text when the process is no more.
    pub fn cpu(&self) -> Result<f64, String> {
        let time = self.cpu_clock.now().map_err(|e| format!("the CPU clock of {}: {e}", self.name))?;
        Ok(Duration::from(time).as_secs_f64())
    }

    /// Resident memory in bytes, file pages included (proc(5), `smaps_rollup`).
    pub fn resident(&self) -> Result<f64, String> {
        let path = format!("/proc/{}/smaps_rollup", self.child.id());
        let text = fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
        let kib =
            text.lines().find_map(|l| l.strip_prefix("Rss:")?.split_whitespace().next()?.parse::<f64>().ok());
        kib.map(|kib| kib * 1024.0).ok_or_else(|| format!("{path} has no Rss"))
    }

    /// Its state in `/proc/PID/stat` (proc(5)); `Z` when it has ended and was not waited for.
    fn state(&self) -> Result<String, String> {
        let path = format!("/proc/{}/stat", self.child.id());
        let text = fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
        // The name before it may hold spaces and parentheses.
        let fields = text.rsplit_once(')').map_or("", |(_, fields)| fields);
        fields.split_whitespace().next().map(str::to_owned).ok_or_else(|| format!("{path} is too short"))
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
        let mut process =
            Process::start(Command::new("sh").args(["-c", script]), &Interrupt::default()).unwrap();
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
        let mut process =
            Process::start(Command::new("sh").args(["-c", "exit 3"]), &Interrupt::default()).unwrap();
        assert!(process.line().unwrap().is_none());
        assert!(process.end().unwrap_err().contains("3"));
        assert!(Process::start(&mut Command::new("/absent"), &Interrupt::default()).is_err());
    }

    #[test]
    fn an_interrupt_ends_the_wait_for_a_line() {
        let interrupt = Interrupt::default();
        let mut process = Process::start(Command::new("sleep").arg("600"), &interrupt).unwrap();
        interrupt.0.store(true, Ordering::Relaxed);
        assert_eq!(process.line().err().as_deref(), Some("interrupted"));
    }
}

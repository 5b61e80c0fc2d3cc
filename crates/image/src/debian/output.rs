//! What mmdebstrap says: progress while it works, and the reason when it fails.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use berth_guest_image::progress::Progress;

use crate::ImageError;

/// Lines that are kept to explain a failure.
const KEPT: usize = 200;
/// Complaints that are shown.
const SHOWN: usize = 3;

/// Steps of mmdebstrap that take time, by how their announcement begins (after `I: `), and what they are called
/// here.
const STEPS: [(&str, &str); 6] = [
    ("running apt-get update", "fetching package lists"),
    ("downloading packages", "downloading the essential packages"),
    ("extracting archives", "unpacking the essential packages"),
    ("installing essential", "installing the essential packages"),
    ("installing remaining", "downloading and installing the other packages"),
    ("running --customize-hook", "making the disk"),
];

/// Follows the output of one program.
pub struct Output<'a> {
    progress: &'a Progress,
    lines: VecDeque<String>,
    /// Packages that are installed in this step.
    total: u32,
    /// Events of the step so far: each package is unpacked and set up.
    events: u32,
}

impl<'a> Output<'a> {
    pub fn new(progress: &'a Progress) -> Self {
        Self { progress, lines: VecDeque::new(), total: 0, events: 0 }
    }

    /// Runs `command`, which writes all that it says to standard error.
    ///
    /// # Errors
    /// [`ImageError::Program`] with its complaints.
    pub fn run(&mut self, mut command: Command, program: &'static str) -> Result<(), ImageError> {
        let failed = |said: String| ImageError::Program { program, said };
        let mut child = command
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| failed(e.to_string()))?;
        for line in
            child.stderr.take().into_iter().flat_map(|s| BufReader::new(s).split(b'\n')).map_while(Result::ok)
        {
            self.line(&String::from_utf8_lossy(&line));
        }
        let status = child.wait().map_err(|e| failed(e.to_string()))?;
        if status.success() { Ok(()) } else { Err(failed(format!("{} ({status})", self.complaints()))) }
    }

    fn line(&mut self, line: &str) {
        let line = line.trim_end();
        if let Some(announcement) = line.strip_prefix("I: ") {
            if let Some((_, step)) = STEPS.iter().find(|(begin, _)| announcement.starts_with(begin)) {
                self.progress.step(step);
                (self.total, self.events) = (0, 0);
            }
        } else if let Some(total) = newly_installed(line) {
            self.total = total;
        } else if ["Unpacking ", "Setting up "].iter().any(|begin| line.starts_with(begin)) {
            self.events += 1;
            if self.total > 0 {
                self.progress.fraction(f64::from(self.events) / f64::from(2 * self.total));
            }
        }
        if self.lines.len() == KEPT {
            self.lines.pop_front();
        }
        self.lines.push_back(line.to_owned());
    }

    /// The first complaints, or the last lines if none looks like one.
    fn complaints(&self) -> String {
        // `E: setup failed: E: …` says twice what the first said, and `E: mmdebstrap failed` nothing more.
        let is_complaint = |l: &&String| {
            l.starts_with("E: ")
                && !["E: setup failed", "E: mmdebstrap failed"].iter().any(|s| l.starts_with(s))
        };
        let complaints: Vec<&str> = self.lines.iter().filter(is_complaint).map(String::as_str).collect();
        if !complaints.is_empty() {
            return complaints.into_iter().take(SHOWN).collect::<Vec<_>>().join("; ");
        }
        let said: Vec<&str> = self.lines.iter().map(String::as_str).filter(|l| !l.is_empty()).collect();
        let last = said.get(said.len().saturating_sub(SHOWN)..).unwrap_or_default();
        if last.is_empty() { "it did not say why".to_owned() } else { last.join("; ") }
    }
}

/// The number in apt's line `0 upgraded, 97 newly installed, 0 to remove and 0 not upgraded.`.
fn newly_installed(line: &str) -> Option<u32> {
    let (before, _) = line.split_once(" newly installed")?;
    before.rsplit_once(' ')?.1.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaints_of(script: &str) -> String {
        let progress = Progress::default();
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Output::new(&progress).run(command, "sh").unwrap_err().to_string()
    }

    #[test]
    fn apts_summary_says_how_many_packages_come() {
        assert_eq!(
            newly_installed("0 upgraded, 97 newly installed, 0 to remove and 0 not upgraded."),
            Some(97)
        );
        assert_eq!(newly_installed("Setting up dbus (1.14.10-1~deb12u1) ..."), None);
    }

    #[test]
    fn complaints_are_shown_and_other_lines_not() {
        let script = "echo I: fine >&2; echo 'E: Unable to locate package nosuch' >&2; \
            echo 'E: apt-get failed' >&2; echo 'E: setup failed: E: apt-get failed' >&2; \
            echo 'E: mmdebstrap failed to run' >&2; exit 25";
        assert_eq!(
            complaints_of(script),
            "sh failed: E: Unable to locate package nosuch; E: apt-get failed (exit status: 25)"
        );
        assert_eq!(complaints_of("echo a >&2; echo b >&2; exit 1"), "sh failed: a; b (exit status: 1)");
        assert_eq!(complaints_of("exit 1"), "sh failed: it did not say why (exit status: 1)");
    }
}

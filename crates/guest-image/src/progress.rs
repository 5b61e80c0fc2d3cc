//! What the user sees while a guest is made.

use std::io::{IsTerminal, stderr};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// Progress on standard error: a bar on a terminal, else a line for each step.
pub struct Progress {
    bar: Option<ProgressBar>,
}

impl Default for Progress {
    /// Nothing is shown until the first step.
    fn default() -> Self {
        Self { bar: stderr().is_terminal().then(|| ProgressBar::new(1000)) }
    }
}

impl Progress {
    /// A new step begins.
    pub fn step(&self, what: &str) {
        let Some(bar) = &self.bar else {
            eprintln!("berth: {what}");
            return;
        };
        bar.set_style(ProgressStyle::default_spinner());
        bar.set_position(0);
        bar.set_message(what.to_owned());
        bar.enable_steady_tick(Duration::from_millis(100));
    }

    /// How much of the step is done, 0.0 to 1.0. Steps that never say it show a spinner.
    pub fn fraction(&self, done: f64) {
        let Some(bar) = &self.bar else { return };
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} [{bar:30}] {percent}%") {
            bar.set_style(style);
        }
        bar.set_position((done.clamp(0.0, 1.0) * 1000.0) as u64);
    }

    /// All is done: `what` stays on the screen.
    pub fn done(&self, what: &str) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        eprintln!("berth: {what}");
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        // An error message must not be drawn over.
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

//! `berth top`: what all VMs do, live.
//!
//! ```text
//!   VMs' control APIs ─┐                             ┌─► view (ratatui)  ◄── keys: sort, filter, scroll
//!   /proc of the host ─┴─► sample ─┬─► rates ─► rows ┴─► --once: text, --json
//!   /proc of vCPU threads ─► placement                  (the CPU view)
//! ```
//! One thread takes samples, so that a VM that hangs does not hold the screen up. What is shown are differences between
//! two samples, and never a guess: where there is only one, there is a dash.

mod app;
mod cpus;
mod format;
mod once;
mod placement;
mod rates;
mod sample;
mod table;
mod view;

#[cfg(test)]
mod testing;

use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use ratatui::crossterm::event::{self, Event, KeyEventKind};
use signal_hook::consts::{SIGHUP, SIGTERM};

use crate::log;
use app::App;
use placement::Placement;
use rates::Rates;
use sample::Sample;

/// How often the keyboard is looked at, and where vCPU threads are.
const TICK: Duration = Duration::from_millis(100);

/// Arguments of `berth top`.
#[derive(Debug, Args)]
#[command(after_help = "\
Keys: arrows and PgUp/PgDn scroll, < and > choose the column to sort by, r reverses, / filters by name, t shows the \
vCPU threads, c shows which vCPU threads ran on which host CPU, q ends.

CPU: 100 % is one host CPU. STEAL: the time in which vCPUs wanted to run and no host CPU was free for them; 100 % is one \
vCPU that waited all the time.")]
pub struct TopArguments {
    /// Seconds between two looks, 0.2 to 3600
    #[arg(short, long, value_name = "SECONDS", default_value = "1", value_parser = parse_interval)]
    interval: Duration,
    /// Print one table, of what happens within the interval, and end
    #[arg(long)]
    once: bool,
    /// Print once, as JSON for programs
    #[arg(long)]
    json: bool,
}

fn parse_interval(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().ok().filter(|s| (0.2..=3600.0).contains(s));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| "from 0.2 to 3600 are possible".to_owned())
}

/// Why nothing can be shown.
#[derive(Debug, thiserror::Error)]
pub enum TopError {
    /// The VMs.
    #[error(transparent)]
    Runtime(#[from] berth_api::RuntimeError),
    /// Asking them.
    #[error(transparent)]
    Ask(#[from] berth_api::ClientError),
    /// No terminal.
    #[error("standard output is no terminal: --once or --json prints what `berth top` shows")]
    NoTerminal,
    /// The terminal.
    #[error("cannot use the terminal: {0}")]
    Terminal(#[source] io::Error),
}

/// Shows it.
pub fn top(arguments: &TopArguments) -> ExitCode {
    let done = if arguments.once || arguments.json {
        once::print(arguments.interval, arguments.json)
    } else {
        live(arguments.interval)
    };
    done.unwrap_or_else(|e| {
        log::message(&format!("error: {e}"));
        ExitCode::FAILURE
    })
}

fn live(interval: Duration) -> Result<ExitCode, TopError> {
    if !io::stdout().is_terminal() {
        return Err(TopError::NoTerminal);
    }
    // What is wrong from the start is said before the screen is taken.
    let first = Sample::take()?;
    let ended = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, ended.clone()).map_err(TopError::Terminal)?;
    }
    let samples = take_samples(interval).map_err(TopError::Terminal)?;
    let mut terminal = ratatui::try_init().map_err(TopError::Terminal)?;
    let result = show(&mut terminal, first, &samples, &ended);
    ratatui::restore();
    result
}

/// Takes samples on a thread that ends with the process, or when nobody takes them.
fn take_samples(interval: Duration) -> io::Result<Receiver<Result<Sample, TopError>>> {
    let (sender, samples) = channel();
    thread::Builder::new().name("samples".to_owned()).spawn(move || {
        loop {
            thread::sleep(interval);
            if sender.send(Sample::take()).is_err() {
                break;
            }
        }
    })?;
    Ok(samples)
}

fn show(
    terminal: &mut ratatui::DefaultTerminal,
    first: Sample,
    samples: &Receiver<Result<Sample, TopError>>,
    ended: &AtomicBool,
) -> Result<ExitCode, TopError> {
    let mut app = App::new(Rates::of_first(&first));
    let mut last = first;
    let mut placement = Placement::default();
    let mut tick = Instant::now();
    while !ended.load(Ordering::Acquire) {
        for sample in samples.try_iter() {
            let sample = sample?;
            app.update(Rates::between(&last, &sample), placement.take());
            last = sample;
        }
        if app.shows_cpus() {
            placement.look(&last);
        }
        terminal.draw(|frame| view::draw(frame, &mut app)).map_err(TopError::Terminal)?;
        tick += TICK;
        // At least once, and after a pause (a stopped process) not for each tick that was missed.
        tick = tick.max(Instant::now());
        while event::poll(tick.saturating_duration_since(Instant::now())).map_err(TopError::Terminal)? {
            if let Event::Key(key) = event::read().map_err(TopError::Terminal)?
                && key.kind != KeyEventKind::Release
                && app.key(key)
            {
                return Ok(ExitCode::SUCCESS);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_have_bounds() {
        assert_eq!(parse_interval("0.5"), Ok(Duration::from_millis(500)));
        for bad in ["0", "0.1", "-1", "NaN", "inf", "4000", "x"] {
            assert!(parse_interval(bad).is_err(), "{bad}");
        }
    }
}

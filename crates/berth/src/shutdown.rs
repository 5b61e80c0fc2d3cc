//! Ending a VM from outside: signals press the power button, and what does not end by itself is ended.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use berth_machine::MachineControl;
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::{log, terminal};

/// How long a guest has to power off after the button was pressed. The help text of `berth run` names it too.
pub const GRACE: Duration = Duration::from_secs(10);
/// How long until it is looked again whether the guest watches its power button.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// How long a machine has to stop that was told to.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// Why a VM that was stopped from outside was stopped.
#[derive(Clone, Default)]
pub struct Ending {
    /// The guest did not react to the power button in time.
    timed_out: Arc<AtomicBool>,
}

impl Ending {
    /// Whether the guest had to be ended because it did not power off.
    pub fn timed_out(&self) -> bool {
        self.timed_out.load(Ordering::Acquire)
    }
}

/// Reacts to signals from now on, on a thread of its own.
///
/// # Errors
/// What the host says.
pub fn watch_signals(control: MachineControl) -> io::Result<Ending> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGCONT])?;
    let ending = Ending::default();
    let result = ending.clone();
    thread::Builder::new().name("signals".to_owned()).spawn(move || {
        let mut asked = false;
        for signal in signals.forever() {
            if signal == SIGCONT {
                if terminal::is_raw() {
                    terminal::make_raw();
                }
            } else if asked {
                log::message("ended by a second signal");
                exit_now(1);
            } else {
                asked = true;
                power_off_or_end(control.clone(), ending.clone());
            }
        }
    })?;
    Ok(result)
}

/// Presses the power button as soon as the guest watches it, which it does late while it boots. A guest that is
/// not off in time is ended; if it is off, the process's exit ends the thread earlier.
fn power_off_or_end(control: MachineControl, ending: Ending) {
    let wait = move || {
        let end = Instant::now() + GRACE;
        while !control.hears_power_button() && Instant::now() < end {
            thread::sleep(LOOK_AGAIN);
        }
        control.power_button();
        thread::sleep(end.saturating_duration_since(Instant::now()));
        ending.timed_out.store(true, Ordering::Release);
        stop(&control);
    };
    if thread::Builder::new().name("grace".to_owned()).spawn(wait).is_err() {
        log::message("the host refuses a thread: the VM is ended at once");
        exit_now(1);
    }
}

/// Stops the machine; one that does not stop takes the process with it.
pub fn stop(control: &MachineControl) {
    control.stop();
    let watchdog = || {
        thread::sleep(STOP_LIMIT);
        log::message("the machine does not stop: Berth ends without it");
        exit_now(1);
    };
    // Without the thread there is only the hope that the machine stops.
    let _ = thread::Builder::new().name("watchdog".to_owned()).spawn(watchdog);
}

/// Ends the process whatever its threads do.
fn exit_now(code: i32) -> ! {
    terminal::restore();
    std::process::exit(code)
}

//! Ending a VM from outside: signals and the control API press the power button, and what does not end by itself is
//! ended.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use berth_api_server::Owner;
use berth_machine::MachineControl;
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::{log, terminal, vm_home};

/// How long a guest has to power off after a signal. The help text of `berth run` names it too.
pub const GRACE: Duration = Duration::from_secs(10);
/// How long until it is looked again whether the guest watches its power button.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// How long a machine has to stop that was told to.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// Why a VM that was stopped from outside was stopped.
#[derive(Clone, Default)]
pub struct Ending {
    /// Somebody wanted the VM to end.
    asked: Arc<AtomicBool>,
    /// The guest did not react to the power button in time.
    timed_out: Arc<OnceLock<Duration>>,
}

impl Ending {
    /// Whether somebody wanted the VM to end, and not its guest.
    pub fn was_asked_for(&self) -> bool {
        self.asked.load(Ordering::Acquire)
    }

    /// How long the guest had to power off, if it did not and had to be ended.
    pub fn timed_out(&self) -> Option<Duration> {
        self.timed_out.get().copied()
    }
}

/// Ends one VM, in one way or the other.
#[derive(Clone)]
pub struct Shutdown {
    control: MachineControl,
    ending: Ending,
}

impl Shutdown {
    /// Of this VM.
    pub fn new(control: MachineControl) -> Self {
        Self { control, ending: Ending::default() }
    }

    /// How it came to its end.
    pub fn ending(&self) -> &Ending {
        &self.ending
    }

    /// Reacts to signals from now on, on a thread of its own.
    ///
    /// # Errors
    /// What the host says.
    pub fn watch_signals(&self) -> io::Result<()> {
        let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGCONT])?;
        let this = self.clone();
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
                    this.stop(GRACE);
                }
            }
        })?;
        Ok(())
    }

    /// Presses the power button as soon as the guest watches it, which it does late while it boots, and ends the guest
    /// if it is not off in time.
    fn power_off_or_end(&self, timeout: Duration) {
        let end = Instant::now() + timeout;
        // One that stands still cannot power off.
        self.control.resume();
        while !self.control.hears_power_button() && Instant::now() < end {
            thread::sleep(LOOK_AGAIN.min(timeout));
        }
        self.control.power_button();
        thread::sleep(end.saturating_duration_since(Instant::now()));
        // Who waited first says how long it was.
        let _ = self.ending.timed_out.set(timeout);
        stop(&self.control);
    }
}

impl Owner for Shutdown {
    fn stop(&self, timeout: Duration) {
        if timeout.is_zero() {
            return self.kill();
        }
        self.ending.asked.store(true, Ordering::Release);
        let this = self.clone();
        // If the guest is off in time, the process's exit ends the thread earlier.
        let wait = move || this.power_off_or_end(timeout);
        if thread::Builder::new().name("grace".to_owned()).spawn(wait).is_err() {
            log::message("the host refuses a thread: the VM is ended at once");
            exit_now(1);
        }
    }

    fn kill(&self) {
        self.ending.asked.store(true, Ordering::Release);
        stop(&self.control);
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
    vm_home::leave();
    std::process::exit(code)
}

//! The end: processes, file systems, power.

use std::io::Write;
use std::time::{Duration, Instant};

/// How long processes get to end after SIGTERM.
const GRACE: Duration = Duration::from_secs(2);

/// How the guest ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Power off.
    PowerOff,
    /// Reboot.
    Reboot,
}

/// Collects processes that ended: our own and those whose parents did. Tells `ended` of each, with its exit status as a
/// shell has it, or 128 plus the number of the signal.
pub fn reap(mut ended: impl FnMut(libc::pid_t, i32)) {
    loop {
        let mut status = 0;
        // SAFETY: the pointer is to a live integer.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
        if pid <= 0 {
            return;
        }
        ended(pid, exit_status(status));
    }
}

/// The exit status of a process as a shell shows it, from what waitpid(2) says.
pub fn exit_status(status: libc::c_int) -> i32 {
    if libc::WIFSIGNALED(status) { 128 + libc::WTERMSIG(status) } else { libc::WEXITSTATUS(status) }
}

/// Ends all processes, writes everything back and powers off or reboots. Does not return.
pub fn shut_down(action: Action) -> ! {
    // The shell ignores SIGTERM but not SIGHUP; stopped processes must continue to see either.
    for signal in [libc::SIGTERM, libc::SIGHUP, libc::SIGCONT] {
        kill_all(signal);
    }
    if !wait_for_all(GRACE) {
        kill_all(libc::SIGKILL);
        wait_for_all(GRACE);
    }
    let _ = std::io::stdout().flush();
    let how = match action {
        Action::PowerOff => libc::RB_POWER_OFF,
        Action::Reboot => libc::RB_AUTOBOOT,
    };
    // SAFETY: these take numbers. tcdrain waits until the console has sent what was written.
    unsafe {
        libc::tcdrain(1);
        libc::sync();
        libc::reboot(how);
    }
    // Only a machine that cannot be switched off gets here. Process 1 must not end.
    loop {
        // SAFETY: it takes nothing and only waits.
        unsafe { libc::pause() };
    }
}

fn kill_all(signal: libc::c_int) {
    // SAFETY: it takes numbers; -1 is every process but this one.
    unsafe { libc::kill(-1, signal) };
}

/// Whether all processes ended within `limit`.
fn wait_for_all(limit: Duration) -> bool {
    let end = Instant::now() + limit;
    loop {
        // SAFETY: a null pointer says that the status is not wanted.
        match unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) } {
            -1 => return true,
            0 if Instant::now() >= end => return false,
            0 => std::thread::sleep(Duration::from_millis(5)),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_status_is_the_shells() {
        assert_eq!(exit_status(3 << 8), 3);
        assert_eq!(exit_status(libc::SIGKILL), 137);
    }
}

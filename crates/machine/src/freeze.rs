//! Freezing: a machine that stands still and has given its memory away.
//!
//! ```text
//!   Running ──freeze──► Frozen: paused, memory in the cold store, the store in its file
//!      ▲                   │ thaw, resume, or a program of the host wants something of the guest
//!      └───────────────────┘ pages come back when they are touched
//! ```
//! Who wants something shows at the sockets of vsock and user networking, which a thread watches that lives as long as the
//! machine is frozen. A thaw is possible at any time: what is still to be taken away then stays.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::thread;
use std::time::Duration;

use berth_devices::thread_name;
use berth_memory::Evicted;
use tracing::{info, warn};

use crate::control::MachineControl;
use crate::reclaim::ReclaimError;
use crate::status::MachineState;

/// How often the watching thread looks whether the machine is still frozen.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Why a machine is not frozen.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// Only what runs can be frozen.
    #[error("only a running VM can be frozen")]
    NotRunning,
    /// Its memory stays.
    #[error(transparent)]
    Memory(#[from] ReclaimError),
}

/// What freezing did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Frozen {
    /// What went to the cold store.
    pub evicted: Evicted,
    /// What of the store went to its file, in compressed bytes.
    pub to_file: u64,
}

/// See [`MachineControl::freeze`].
pub(crate) fn freeze(control: &MachineControl) -> Result<Frozen, FreezeError> {
    if control.state() != MachineState::Running || !control.stand_frozen() {
        return Err(FreezeError::NotRunning);
    }
    if control.state() != MachineState::Frozen {
        // It was paused meanwhile, or goes on already.
        return Err(FreezeError::NotRunning);
    }
    let watched = watch(control);
    if let Err(e) = watched {
        warn!("the VM is thawed only when it is told to: {e}");
    }
    let frozen = || control.state() == MachineState::Frozen;
    match control.reclaimer.take_all(frozen) {
        Ok(taken) => {
            info!("the VM is frozen: {taken:?}");
            Ok(taken)
        }
        Err(e) => {
            // Standing still is worth nothing by itself.
            control.thaw();
            Err(e.into())
        }
    }
}

/// Thaws the machine when somebody wants something of its guest.
fn watch(control: &MachineControl) -> io::Result<()> {
    let sockets = control.board().virtio().host_sockets()?;
    if sockets.is_empty() {
        return Ok(());
    }
    let control = control.clone();
    let name = thread_name(&control.vm_name, "frozen");
    thread::Builder::new().name(name).spawn(move || {
        while control.state() == MachineState::Frozen {
            match is_wanted(&sockets) {
                Ok(true) => {
                    info!("somebody wants something of the guest");
                    control.request_thaw(|| ());
                    // It is done when the state has changed.
                    thread::sleep(Duration::from_millis(10));
                }
                Ok(false) => {}
                Err(e) => {
                    warn!("the VM is thawed only when it is told to: {e}");
                    return;
                }
            }
        }
    })?;
    Ok(())
}

/// Waits a while for one of `sockets` to have something to read; the end of a connection is nothing.
fn is_wanted(sockets: &[OwnedFd]) -> io::Result<bool> {
    const LAST: i16 = libc::POLLHUP | libc::POLLRDHUP;
    let mut polled: Vec<libc::pollfd> = sockets
        .iter()
        .map(|s| libc::pollfd { fd: s.as_raw_fd(), events: libc::POLLIN | libc::POLLRDHUP, revents: 0 })
        .collect();
    let timeout = i32::try_from(LOOK_AGAIN.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: the array has as many entries as the call is told, and lives as long as the call.
    let ready = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, timeout) };
    if ready < 0 {
        return match io::Error::last_os_error() {
            e if e.kind() == io::ErrorKind::Interrupted => Ok(false),
            e => Err(e),
        };
    }
    if polled.iter().any(|p| p.revents & libc::POLLIN != 0 && p.revents & LAST == 0) {
        return Ok(true);
    }
    if ready > 0 {
        // Ended connections are ready all the time.
        thread::sleep(LOOK_AGAIN);
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn data_is_a_wish_and_an_end_is_none() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let sockets = [OwnedFd::from(ours)];
        assert!(!is_wanted(&sockets).unwrap());
        theirs.write_all(b"x").unwrap();
        assert!(is_wanted(&sockets).unwrap());
        drop(theirs);
        assert!(!is_wanted(&sockets).unwrap());
    }
}

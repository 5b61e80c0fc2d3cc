//! What other programs ask of init through signals, and waiting for it.

use std::io::Error;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::acpi_event::AcpiEvents;
use crate::power::Action;

/// Signals of init, taken as events instead of handlers.
pub struct Signals(OwnedFd);

impl Signals {
    /// Blocks the signals that init cares for and opens a signalfd(2) for them.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn block_and_open() -> std::io::Result<Self> {
        let mut set = MaybeUninit::<libc::sigset_t>::zeroed();
        // SAFETY: sigemptyset initialises the set that the others use; the descriptor that signalfd returns is
        // new and nobody else's.
        unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in [libc::SIGCHLD, libc::SIGTERM, libc::SIGUSR1, libc::SIGUSR2, libc::SIGINT] {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
            libc::sigprocmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
            let fd = libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if fd < 0 {
                return Err(Error::last_os_error());
            }
            Ok(Self(OwnedFd::from_raw_fd(fd)))
        }
    }

    /// Sleeps until there is a signal or an ACPI event.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn wait(&self, acpi: Option<&AcpiEvents>) -> std::io::Result<()> {
        // poll(2) ignores a negative descriptor.
        let acpi_fd = acpi.map_or(-1, |a| a.as_raw_fd());
        let mut fds =
            [self.0.as_raw_fd(), acpi_fd].map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
        // SAFETY: the pointer and the count are those of one live array.
        if unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) } < 0 {
            let e = Error::last_os_error();
            return if e.kind() == std::io::ErrorKind::Interrupted { Ok(()) } else { Err(e) };
        }
        Ok(())
    }

    /// Takes all signals that came and says what they ask for. The signals are those of busybox's init:
    /// `poweroff` sends SIGUSR2, `halt` SIGUSR1 and `reboot` SIGTERM. A halted VM would only be in the way, so
    /// `halt` powers off.
    pub fn requested_action(&self) -> Option<Action> {
        let mut action = None;
        loop {
            let mut info = MaybeUninit::<libc::signalfd_siginfo>::zeroed();
            let size = size_of::<libc::signalfd_siginfo>();
            // SAFETY: the buffer is as large as said; all bytes of it are integers, so any content is a value.
            let (n, info) = unsafe {
                let n = libc::read(self.0.as_raw_fd(), info.as_mut_ptr().cast(), size);
                (n, info.assume_init())
            };
            if n != size as isize {
                return action;
            }
            action = match info.ssi_signo as libc::c_int {
                libc::SIGUSR1 | libc::SIGUSR2 => Some(Action::PowerOff),
                libc::SIGTERM | libc::SIGINT => Some(Action::Reboot),
                _ => action,
            };
        }
    }
}

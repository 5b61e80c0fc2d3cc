//! Pseudo-terminals (pty(7)).

use std::io;
use std::os::fd::OwnedFd;

use berth_agent_protocol::WindowSize;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::pty::{Winsize, openpty};

mod ioctl {
    nix::ioctl_write_ptr_bad!(set_size, libc::TIOCSWINSZ, nix::pty::Winsize);
    nix::ioctl_write_int_bad!(set_controlling, libc::TIOCSCTTY);
}

/// A new terminal: our end and the command's. No command inherits either by accident.
///
/// # Errors
/// What the kernel says.
pub fn open(size: WindowSize) -> io::Result<(OwnedFd, OwnedFd)> {
    let pair = openpty(&winsize(size), None)?;
    for end in [&pair.master, &pair.slave] {
        fcntl(end, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    }
    Ok((pair.master, pair.slave))
}

/// Changes a terminal's size; who uses it gets SIGWINCH.
///
/// # Errors
/// What the kernel says.
pub fn set_size(terminal: &OwnedFd, size: WindowSize) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    // SAFETY: the kernel reads a winsize, which lives through the call.
    unsafe { ioctl::set_size(terminal.as_raw_fd(), &winsize(size)) }?;
    Ok(())
}

/// In a new process: makes its standard input the terminal of its session.
///
/// # Errors
/// What the kernel says.
pub fn control_by_stdin() -> io::Result<()> {
    // SAFETY: it takes numbers.
    unsafe { ioctl::set_controlling(libc::STDIN_FILENO, 0) }?;
    Ok(())
}

fn winsize(size: WindowSize) -> Winsize {
    Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 }
}

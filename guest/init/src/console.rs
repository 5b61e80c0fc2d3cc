//! The terminal that the kernel's console is on, and the program that runs on it.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

/// The console's terminal.
pub struct Console {
    path: String,
}

impl Console {
    /// The last console of the kernel's list, which is the one behind `/dev/console`. Its own device is used
    /// because job control does not work on `/dev/console`.
    pub fn find() -> Self {
        let list = std::fs::read_to_string("/sys/class/tty/console/active").unwrap_or_default();
        let name = list.split_whitespace().next_back().unwrap_or("console");
        Self { path: format!("/dev/{name}") }
    }

    fn open(&self) -> std::io::Result<File> {
        let options = || OpenOptions::new().read(true).write(true).to_owned();
        options().open(&self.path).or_else(|_| options().open("/dev/console"))
    }

    /// Tells programs how large the user's terminal is: (columns, rows). A serial line cannot.
    pub fn set_size(&self, size: Option<(u16, u16)>) {
        let (Some((ws_col, ws_row)), Ok(tty)) = (size, self.open()) else { return };
        let size = libc::winsize { ws_row, ws_col, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: TIOCSWINSZ reads a winsize, which lives through the call. That it may fail does not matter.
        unsafe { libc::ioctl(tty.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    }

    /// Starts `command` through the shell, or without one a login shell, in a session whose terminal
    /// is the console. Returns the number of that session's leader, which ends as the shell does.
    ///
    /// # Errors
    /// What the kernel says when there is no console or no `/bin/sh`.
    pub fn spawn(&self, command: Option<&str>) -> std::io::Result<libc::pid_t> {
        let tty = self.open()?;
        let mut shell = Command::new("/bin/sh");
        match command {
            Some(text) => shell.args(["-c", text]),
            None => shell.arg("-l"),
        };
        shell
            .current_dir("/root")
            .env("HOME", "/root")
            .env("USER", "root")
            .env("PATH", "/sbin:/usr/sbin:/bin:/usr/bin")
            .stdin(Stdio::from(tty.try_clone()?))
            .stdout(Stdio::from(tty.try_clone()?))
            .stderr(Stdio::from(tty));
        // SAFETY: between fork and exec only system calls that are safe there are made; no memory is allocated.
        unsafe { shell.pre_exec(|| own_session().and_then(|()| stay_as_leader())) };
        let child = shell.spawn()?;
        Ok(child.id() as libc::pid_t)
    }
}

/// In the child: a session of its own, standard input as its terminal, all signals as at start.
fn own_session() -> std::io::Result<()> {
    let mut none = std::mem::MaybeUninit::<libc::sigset_t>::zeroed();
    // SAFETY: sigemptyset initialises the set before sigprocmask reads it; the other calls take only numbers.
    unsafe {
        libc::sigemptyset(none.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut());
        if libc::setsid() < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // Fails on something that is no terminal: then the program runs without job control.
        libc::ioctl(0, libc::TIOCSCTTY, 1);
    }
    Ok(())
}

/// Returns in a child, which becomes the shell; this process stays and waits for it. When the leader of a session
/// ends, the kernel hangs its terminal up and drops what was written but not yet sent: the last lines of a
/// command. So somebody other than the shell leads, and ends after everything is sent.
fn stay_as_leader() -> std::io::Result<()> {
    // SAFETY: this process has one thread, and the calls only take numbers.
    unsafe {
        match libc::fork() {
            -1 => Err(std::io::Error::last_os_error()),
            0 => {
                // The foreground is the shell's. Taking it from the background would stop this process.
                libc::setpgid(0, 0);
                libc::signal(libc::SIGTTOU, libc::SIG_IGN);
                libc::tcsetpgrp(0, libc::getpid());
                libc::signal(libc::SIGTTOU, libc::SIG_DFL);
                Ok(())
            }
            shell => lead(shell),
        }
    }
}

fn lead(shell: libc::pid_t) -> ! {
    let mut status = 0;
    // SAFETY: `status` lives through the calls; the others take numbers. The descriptors above standard error are
    // Rust's, whose parent waits until they are closed; nothing uses them in this process any more.
    unsafe {
        libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0);
        // The foreground is the shell's: otherwise the kernel would refuse to wait for the terminal.
        libc::signal(libc::SIGTTOU, libc::SIG_IGN);
        while libc::waitpid(shell, &raw mut status, 0) < 0 && *libc::__errno_location() == libc::EINTR {}
        libc::tcdrain(0);
        libc::_exit(crate::power::exit_status(status))
    }
}

//! Network namespaces of tests: bridges and addresses that nobody else sees. They need root and `ip` (iproute2).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

/// A network namespace. Dropping it deletes it with all that is in it.
pub struct Namespace(String);

impl Namespace {
    /// A new one; `None` if this user may not make one, or there is no `ip`.
    pub fn make() -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("berth-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let made = Command::new("ip").args(["netns", "add", &name]).output();
        made.is_ok_and(|output| output.status.success()).then_some(Self(name))
    }

    /// Its name, for `ip`.
    pub fn name(&self) -> &str {
        &self.0
    }

    /// A command that runs `program` inside; with arguments to be added.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.0]).arg(program);
        command
    }

    /// Runs `ip` inside once for each line of `script`.
    ///
    /// # Errors
    /// The line, and what `ip` said.
    pub fn ip(&self, script: &str) -> Result<(), String> {
        for line in script.lines().map(str::trim).filter(|l| !l.is_empty()) {
            let output = Command::new("ip").args(["-n", &self.0]).args(line.split_whitespace()).output();
            let output = output.map_err(|e| format!("ip: {e}"))?;
            if !output.status.success() {
                return Err(format!("ip {line}: {}", String::from_utf8_lossy(&output.stderr)));
            }
        }
        Ok(())
    }

    /// Does something on a thread that is inside. Sockets that it makes stay inside.
    ///
    /// # Errors
    /// What the host says, or `what` returns.
    pub fn inside<T: Send>(&self, what: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        let namespace = File::open(format!("/run/netns/{}", self.0))?;
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                // SAFETY: it takes numbers, and changes only the thread that calls it.
                if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
                    return Err(io::Error::last_os_error());
                }
                what()
            });
            thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread inside panicked")))
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // Nothing else can be done about one that stays.
        let _ = Command::new("ip").args(["netns", "del", &self.0]).output();
    }
}

//! The load of `berth rehearse`: this program, called by another name.

use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::complain;

/// Whether this process is called to be the load.
pub fn is_called() -> bool {
    std::env::args_os().next().is_some_and(|name| Path::new(&name).ends_with(berth_guest_load::NAME))
}

/// Is the load, until something goes wrong.
pub fn run() {
    let kind = std::env::args().nth(1).unwrap_or_default();
    let result = kind.parse().map_err(io::Error::other).and_then(berth_guest_load::run);
    if let Err(e) = result {
        complain(&format!("the load cannot go on: {e}"));
    }
}

/// Starts the load; returns its process.
///
/// # Errors
/// What the kernel says.
pub fn start(kind: &str) -> io::Result<libc::pid_t> {
    let mut load = Command::new("/proc/self/exe");
    load.arg0(berth_guest_load::NAME).arg(kind).stdin(Stdio::null());
    Ok(load.spawn()?.id() as libc::pid_t)
}

//! The guest's agent: this program, called by another name.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::complain;

/// The kernel makes it when it has vsock.
const DEVICE: &str = "/dev/vsock";
/// An agent that ends sooner will not do better the next time.
const TOO_SOON: Duration = Duration::from_secs(1);

/// Whether this process is called to be the agent.
pub fn is_called() -> bool {
    std::env::args_os().next().is_some_and(|name| Path::new(&name).ends_with(berth_guest_agent::NAME))
}

/// The agent's process.
#[derive(Default)]
pub struct Agent {
    running: Option<(libc::pid_t, Instant)>,
}

impl Agent {
    /// Starts it, in a guest that has vsock. A guest without an agent goes on.
    pub fn start(&mut self) {
        if !Path::new(DEVICE).exists() {
            return;
        }
        let started =
            Command::new("/proc/self/exe").arg0(berth_guest_agent::NAME).stdin(Stdio::null()).spawn();
        match started {
            Ok(process) => self.running = Some((process.id() as libc::pid_t, Instant::now())),
            Err(e) => complain(&format!("cannot start the agent: {e}")),
        }
    }

    /// A process ended: if it was the agent, there is a new one.
    pub fn process_ended(&mut self, pid: libc::pid_t) {
        if let Some((_, started)) = self.running.take_if(|(agent, _)| *agent == pid) {
            if started.elapsed() >= TOO_SOON {
                self.start();
            } else {
                complain("the agent ended as soon as it was started: there is none");
            }
        }
    }
}

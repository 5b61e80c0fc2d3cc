//! The agent of a guest: runs commands that the host asks for over vsock, and says what guest this is.
//!
//! ```text
//!   berth exec ──► Unix socket ──► virtio vsock ──► port 1024 ──► server ──► session ──► command
//!                                                   (listener)  (one poll)  (frames)   (pipes, or a terminal)
//! ```
//!
//! It is in every guest, so it is small: one thread that sleeps in poll(2), no buffers while nobody is connected. A session
//! is one connection and what runs for it; its memory is bounded whatever the host sends and however slowly it reads
//! (`berth_agent_protocol` has the rules). Only the host may connect: a program of the guest that reaches the port gets
//! nothing, because the agent is root.
//!
//! When a connection ends before its command, the command's process group gets SIGHUP, as if a terminal was closed.
//!
//! The default guest has the agent in its init program, which is the same file; `berth image build` puts that file into
//! images as well.

mod command;
mod connection;
mod info;
mod listener;
mod server;
mod session;
mod terminal;
mod users;

use std::io;

pub use listener::Listener;
pub use server::Server;

/// The name that the program is called by to be the agent.
pub const NAME: &str = "berth-agent";

/// Serves the host until something goes wrong.
///
/// # Errors
/// What the kernel says; that of a guest without vsock is `EAFNOSUPPORT`.
pub fn run() -> io::Result<()> {
    // The name that `ps` shows, however it was started. Without it the agent serves as well.
    let _ = std::fs::write("/proc/self/comm", NAME);
    Server::new(Listener::vsock(berth_agent_protocol::PORT)?).serve()
}

//! The server of a VM's control API: HTTP on a Unix socket, on one thread.
//!
//! ```text
//!   api.sock ── accept ── whose process? ── routes ──► MachineControl   pause, reset, devices …
//!                                             │   ├──► Console          what the guest prints, to several readers
//!                                             │   └──► Owner            stop and kill, which end the process too
//!                                             └ errors: a JSON body with a code and a message, always
//! ```
//! Everything runs on the thread `NAME/api`, started after the vCPUs: the server costs one thread that sleeps. So a
//! handler must not block; what takes time is asked of the machine with a callback (see `routes/control.rs`).
//!
//! Only the VM's owner and root may connect: the socket has mode 0600, and who connects is asked of the kernel too,
//! because `--api-socket` may be anywhere (`peer`).
//!
//! How to add a route: see the head of the crate `berth-api`.

mod console;
mod error;
mod peer;
mod routes;
mod server;
mod threads;

pub use console::{Console, ConsoleWriter};
pub use routes::openapi;
pub use server::{Owner, Server, Vm};

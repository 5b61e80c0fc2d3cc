//! The control API of a VM: its types, a client, and where the VMs of this user are found.
//!
//! ```text
//!   VMs (all of this user) ──► VmDirectory: vm.json, lock, api.sock, console.log, log
//!                                   │
//!        Client ── HTTP on api.sock ┘──► the VM's process (crate berth-api-server)
//! ```
//! A VM is one process, and nothing else knows of it: its directory is what other programs find it by
//! ([`runtime`]). Types in [`types`] are what goes over the socket; they are described for programs of other
//! languages by the OpenAPI document (`docs/openapi.json`), which the server's crate makes from the same types.
//!
//! # Adding a route
//! 1. What it takes and gives: a type in [`types`], with a doc comment that names units: it becomes the description.
//! 2. The handler: a function in `berth-api-server/src/routes/`, with `#[utoipa::path]`, named in `routes::router`.
//! 3. A method of [`Client`].
//! 4. `BLESS=1 cargo test -p berth-api-server openapi` writes `docs/openapi.json` anew.

mod client;
mod http;
pub mod runtime;
pub mod types;

pub use client::{Client, ClientError, ConsoleStream, EventStream, ask_all};
pub use runtime::{Claim, RuntimeError, VmDirectory, Vms};

//! How memory is moved between the VMs of a host.
//!
//! ```text
//!   Seen: budget, host, VMs ──► Policy::decide ──► decisions: an action and its reason
//!                                   ▲                     │
//!                                   └── Policy::done ◄────┘ what came of it
//! ```
//! Nothing here asks or does anything: who calls it looks at the host and at the VMs, and carries the decisions out (the
//! command `berth keeper`). So the whole policy can be tested with numbers.
//!
//! What the policy knows besides what it sees is only how well the last actions went, and is worth little after half a
//! minute: a new policy goes on where another one ended.

mod policy;
mod seen;
mod step;
#[cfg(test)]
mod tests;

pub use policy::Policy;
pub use seen::{Balloon, Host, Seen, State, Vm};
pub use step::{Action, Decision, Step, show};

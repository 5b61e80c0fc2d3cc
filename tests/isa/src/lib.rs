//! Machine code on the soft engine, compared with the host's CPU.
//!
//! ```text
//!   forms.rs ─► generate/ ─► Case ─┬─► native/  a child process: the CPU itself ─► Outcome ─┬─► compare.rs
//!              (state, operands)   └─► soft.rs  a guest on the soft engine ───────► Outcome ─┘
//! ```
//!
//! A case is a few instructions with registers, flags, vector state and memory. It ends with an exception: INT3
//! behind its last instruction, or whatever it raises before. Both sides have the same address space
//! ([`layout`]), and everything that programs can see afterwards must be equal, except for flags that the
//! manual leaves undefined ([`flow`]). Cases are named by a form and a seed ([`report::CaseId`]).
//!
//! What is not compared with the host is listed with its reason in [`forms`].

pub mod case;
pub mod compare;
pub mod flow;
pub mod forms;
pub mod fuzz;
pub mod generate;
pub mod guest;
pub mod layout;
pub mod native;
pub mod operands;
pub mod report;
pub mod runner;
pub mod soft;
pub mod state;

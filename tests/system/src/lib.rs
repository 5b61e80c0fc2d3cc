//! The kit for the system cases: small assembled guests on any engine.
//!
//! ```text
//!   Guest::long()  ──code(|a| …)──► guest memory      run(entry) ──► End: why, CPU state, pushed frame
//!        │  page tables, GDT, IDT, TSS                   ▲  │
//!        └── ports: log, interrupts, scratch ────────────┘  └── every vector ends the run, unless a case sets
//!                                                               a gate of its own
//! ```
//!
//! A case assembles a few instructions, runs them and looks at what came out. No case names an engine: all of
//! them go through [`engine::create`], and [`run`] runs each on every engine. What an engine cannot run on some host
//! is in [`limits`], by name and with the reason.

#![allow(clippy::missing_panics_doc, reason = "a kit for tests: it panics when the case is wrong")]

pub mod apic;
pub mod asm;
pub mod bus;
pub mod end;
pub mod engine;
pub mod guest;
pub mod layout;
pub mod limits;
pub mod mode;
pub mod paging;
pub mod run;

/// What nearly every case uses.
pub mod prelude {
    pub use crate::asm;
    pub use crate::asm::Kit;
    pub use crate::cases;
    pub use crate::end::{End, Frame, Why};
    pub use crate::guest::{Gate, Guest, Options};
    pub use crate::layout::*;
    pub use crate::mode::Mode;
    pub use crate::paging::flag;
    pub use berth_cpu::bits::{cr0, cr4, efer, gpr, pf_error, rflags, vector};
    pub use berth_cpu::{CpuState, MpState, Segment, msr};
    pub use iced_x86::code_asm::*;
}

//! Host code: where it lives, how it is entered and left, and how its registers are used.
//!
//! ```text
//!   translate/ ──emits──► cache.rs (blocks, links, eviction) ──in──► memory.rs (W^X: two mappings)
//!   run.rs ──enter──► stubs.rs ──► block ──► block … ──► exit stub ──► run.rs
//!                                   └─► helper stub ──► Rust ──► back, or out
//!   signal.rs: SIGSEGV, SIGFPE and SIGILL inside blocks become exits
//! ```

pub(crate) mod asm;
pub(crate) mod block;
pub(crate) mod cache;
pub mod calls;
pub(crate) mod memory;
mod perf_map;
pub(crate) mod regs;
pub(crate) mod signal;
pub(crate) mod stubs;

/// What happens after a helper has executed an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// The next instruction follows.
    Next,
    /// The next instruction follows, but translated code must be left first: something that translation, the
    /// TLB or interrupt delivery depends on may have changed.
    Leave,
    /// The helper has set RIP.
    Jump,
    /// HLT: wait for an interrupt, then go on after it.
    Halt,
    /// The next instruction follows, but another vCPU should have this one's host CPU for a moment.
    GiveWay,
}

/// Why translated code was left ([`crate::state::State::exit_reason`]).
pub(crate) mod reason {
    /// RIP is set: find the block for it.
    pub const LOOKUP: u64 = 0;
    /// A link stub was called; `exit_value` is its return address, which tells which jump it was.
    pub const LINK: u64 = 1;
    /// A helper has set `Cpu::pending_flow`.
    pub const FLOW: u64 = 2;
    /// A helper has set `Cpu::pending_fault`.
    pub const FAULT: u64 = 3;
    /// A host signal: `exit_value` is the host PC, `scratch[2]` signal and trap number, `scratch[3]` the host's flags.
    pub const SIGNAL: u64 = 4;
    /// The instruction at RIP must be executed while no other vCPU runs.
    pub const ALONE: u64 = 5;
    /// A dead block was entered; `exit_value` is an address in it.
    pub const TOMB: u64 = 6;
}

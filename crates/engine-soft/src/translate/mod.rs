//! From guest instructions to host code.
//!
//! ```text
//!   fetch.rs ─bytes─► decode ─instructions─► class.rs ─class of each─► emit.rs ─► Draft ─► code::cache
//!                                                                       ├ copy.rs     ordinary instructions
//!                                                                       ├ in_place.rs  … on registers in the state block
//!                                                                       ├ access.rs   memory operands
//!                                                                       ├ control.rs  jumps and exits
//!                                                                       ├ stack.rs    push, pop, call, ret
//!                                                                       ├ string.rs   REP MOVS and STOS
//!                                                                       ├ system.rs   PUSHF, STI, segment reads
//!                                                                       └ flags.rs    where the flags are (liveness.rs: or need not be)
//! ```
//!
//! A block is a run of instructions in one guest page, with conditional forward jumps out of it, that ends with any other
//! jump, with an instruction after which
//! translated code must be left, or at the end of the page. One instruction that crosses into the next page is a
//! block of its own.
//!
//! Why it is right: every instruction's template checks first and commits last, in the order of the guest's
//! code, so at each place where an exception can arise the guest's registers are in their homes
//! ([`crate::code::regs`]), and its flags are where the side table says. The same instruction executes on the
//! same kind of CPU, on an operand that has passed the same checks.

mod access;
mod class;
mod control;
mod copy;
mod emit;
mod fetch;
mod flags;
mod in_place;
mod liveness;
mod stack;
mod string;
mod system;

pub(crate) use emit::next_rip;
pub(crate) use fetch::BlockError;

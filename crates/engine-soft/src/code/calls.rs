//! The call stack of translated code.
//!
//! A guest call becomes a host call, and a guest return a host return, so that the host's CPU predicts where it
//! leads. What the host pushes says nothing about what the guest's return address will be: the return leads to
//! a *continuation* behind the call, which compares. It goes on only if the guest returns to behind that very call
//! and the jump key is what it was at the call; then the mapping through which the calling block was entered still
//! holds. Everything else is found as for any indirect jump, and the stack is emptied, because its entries belong to
//! frames that the guest has left.
//!
//! The stack is a part of the state block and outlives exits to the run loop; it is emptied when the code cache is.
//! An entry is the jump key at the call, and below it the address of the continuation. At the bottom is the address
//! of a stub that looks the target up. So a return always has something to return to.

use crate::cpu::Cpu;

/// Words of the stack: two for each entry.
const WORDS: usize = 4096;
/// Words that are kept free for the stubs' own pushes.
const RESERVE: usize = 32;

/// The call stack and its bounds, as addresses.
#[repr(C, align(64))]
pub struct CallStack {
    /// The stack pointer while translated code does not run.
    pub pointer: u64,
    /// The stack pointer of the empty stack.
    pub bottom: u64,
    /// With its stack pointer at or below this a call empties the stack first.
    pub limit: u64,
    words: [u64; WORDS],
}

impl Cpu {
    /// Empties the call stack of translated code, and gives it its bounds.
    pub(crate) fn empty_call_stack(&mut self) {
        let empty_return = self.vm.cache.stubs.empty_return;
        let stack = &mut self.s.calls;
        let last = WORDS - 2;
        stack.words[last] = empty_return;
        stack.bottom = &raw const stack.words[last] as u64;
        stack.limit = &raw const stack.words[RESERVE] as u64;
        stack.pointer = stack.bottom;
    }
}

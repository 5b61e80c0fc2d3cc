//! The register map of translated code.
//!
//! | guest | host |
//! |---|---|
//! | rax rcx rdx rbx rbp rsi rdi r8 r9 r10 r12 r14 | the same |
//! | rsp | r13 |
//! | r11 r13 r15 | the state block |
//! | arithmetic flags | the host's flags, or the state block (the translator knows which) |
//! | x87, MMX, XMM, YMM, MXCSR | the same |
//!
//! Host r15 and r11 are scratch, rsp is the host's stack, GS:0 is the state block.
//!
//! The registers in the state block are those that compilers use least: r8 to r10 hold the variables of leaf functions
//! and inner loops, where a loop counter in memory costs a store and a load that waits for it in every turn.

/// Number of a host general-purpose register.
pub(crate) type HostReg = u8;

pub(crate) const RAX: HostReg = 0;
pub(crate) const RCX: HostReg = 1;
pub(crate) const RDX: HostReg = 2;
pub(crate) const RBX: HostReg = 3;
pub(crate) const RSP: HostReg = 4;
pub(crate) const RBP: HostReg = 5;
pub(crate) const RSI: HostReg = 6;
pub(crate) const RDI: HostReg = 7;
pub(crate) const R8: HostReg = 8;
pub(crate) const R9: HostReg = 9;
pub(crate) const R10: HostReg = 10;
/// Holds the guest's rsp.
pub(crate) const GUEST_RSP: HostReg = 13;
/// First scratch register: addresses.
pub(crate) const ADDR: HostReg = 15;
/// Second scratch register: values.
pub(crate) const R11: HostReg = 11;
pub(crate) const R12: HostReg = 12;
pub(crate) const R14: HostReg = 14;

/// Where a guest register lives while translated code runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Home {
    Host(HostReg),
    /// In the state block, at this index of `gpr`.
    State(usize),
}

/// Home of the guest register with encoding number `n` (0 to 15).
pub(crate) fn home(n: usize) -> Home {
    match n {
        4 => Home::Host(GUEST_RSP),
        11 | 13 | 15 => Home::State(n),
        n => Home::Host(n as HostReg),
    }
}

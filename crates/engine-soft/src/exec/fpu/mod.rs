//! Saving and restoring x87, SSE and AVX state.
//!
//! ```text
//!   x87.rs          the guest's x87 registers, which stay in the host's
//!   environment.rs  FNSTENV, FLDENV, FNSAVE, FRSTOR
//!   legacy.rs       FXSAVE, FXRSTOR
//!   xsave.rs        XSAVE, XSAVEOPT, XSAVEC, XRSTOR
//! ```
//!
//! FIP, FDP, FOP and their selectors are always saved as zero: the host's registers hold addresses of translated
//! code, which no guest may see.

mod environment;
mod legacy;
pub(super) mod x87;
mod xsave;

use berth_cpu::bits::{cr0, vector, xcr0};

pub use environment::{load_environment, store_environment};
pub use legacy::{fxrstor, fxsave};
pub use xsave::{xrstor, xsave};

use crate::cpu::Cpu;
use crate::fault::{Fault, Guest};
use crate::state::State;
use x87::X87;

/// MXCSR after reset (SDM volume 1, 10.2.3).
const MXCSR_RESET: u32 = 0x1f80;

/// #NM if x87 instructions are trapped (SDM volume 3, table 2-2).
pub(super) fn require_x87(state: &State) -> Guest<()> {
    require_clear(state, cr0::EM | cr0::TS)
}

/// #NM if any of `bits` is set in CR0.
fn require_clear(state: &State, bits: u64) -> Guest<()> {
    if state.cr0 & bits != 0 { Err(Fault::plain(vector::NM)) } else { Ok(()) }
}

/// XINUSE: the state components that are not in their initial configuration (SDM volume 1, 13.6).
pub(super) fn in_use(cpu: &Cpu) -> u64 {
    components_in_use(&cpu.s, &X87::host())
}

fn components_in_use(state: &State, x87: &X87) -> u64 {
    let any =
        |range: std::ops::Range<usize>| state.ymm.iter().any(|r| r[range.clone()].iter().any(|&b| b != 0));
    let mut bits = 0;
    for (bit, used) in [(xcr0::X87, !x87.is_initial()), (xcr0::SSE, any(0..16)), (xcr0::AVX, any(16..32))] {
        bits |= if used { bit } else { 0 };
    }
    bits
}

/// How many vector registers the current mode reaches.
fn vector_registers(state: &State) -> usize {
    if state.is_64bit() { 16 } else { 8 }
}

#[cfg(test)]
mod tests;

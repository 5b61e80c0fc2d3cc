//! Random cases. The same form and seed always give the same case.

mod sequence;
mod single;

use iced_x86::{Code, Decoder, Instruction};

pub use sequence::{Pool, sequence};
pub use single::single;

use crate::case::{CodeMode, Item};
use crate::forms::Catalogue;

/// Linux's interrupt for system calls of 32-bit programs, which works in 64-bit code too.
const LINUX_SYSTEM_CALL: u8 = 0x80;

/// Whether `item` is decoded as the same form again, and which instruction that is.
fn round_trip(
    item: &Item,
    code: Code,
    ip: u64,
    mode: CodeMode,
    catalogue: &Catalogue,
) -> Option<Instruction> {
    let bytes = crate::case::assemble(std::slice::from_ref(item), ip, mode).ok()?.bytes;
    let mut decoder = Decoder::with_ip(mode.bitness(), &bytes, ip, catalogue.decoder_options());
    let insn = decoder.decode();
    // The host's kernel would make a system call of it.
    let system_call = insn.code() == Code::Int_imm8 && insn.immediate8() == LINUX_SYSTEM_CALL;
    (!system_call && insn.code() == code && insn.len() == bytes.len() && bytes.len() <= 15).then_some(insn)
}

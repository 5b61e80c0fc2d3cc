//! Random cases. The same form and seed always give the same case.

mod sequence;
mod single;

use iced_x86::{Code, Decoder, Instruction};

pub use sequence::{Pool, sequence};
pub use single::single;

use crate::case::{CodeMode, Item};
use crate::forms::Catalogue;

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
    (insn.code() == code && insn.len() == bytes.len() && bytes.len() <= 15).then_some(insn)
}

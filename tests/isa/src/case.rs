//! A case: what is executed, and the state that it starts from and ends in.

use berth_cpu::XsaveArea;
use iced_x86::{Encoder, Instruction};

use crate::layout;

/// Size of code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodeMode {
    /// 64-bit mode.
    Bits64,
    /// Compatibility mode with 32-bit code.
    Bits32,
}

impl CodeMode {
    /// 64 or 32.
    pub fn bitness(self) -> u32 {
        match self {
            Self::Bits64 => 64,
            Self::Bits32 => 32,
        }
    }
    /// Number of general-purpose and of vector registers.
    pub fn registers(self) -> usize {
        match self {
            Self::Bits64 => 16,
            Self::Bits32 => 8,
        }
    }
}

/// One instruction of a case.
#[derive(Clone, Copy, Debug)]
pub struct Item {
    /// The instruction. Its IP and branch target are set by [`assemble`].
    pub insn: Instruction,
    /// A prefix byte that means nothing to the instruction, put before it.
    pub prefix: Option<u8>,
    /// For branches: where to.
    pub target: Option<Target>,
}

/// Where a branch leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// To the start of the item with this index; the number of items is the end.
    Item(usize),
    /// To an address. INT3 is there.
    Address(u64),
}

/// Bytes of a case's code and where each item starts in it.
#[derive(Clone, Debug, Default)]
pub struct Code {
    /// Machine code.
    pub bytes: Vec<u8>,
    /// The address of each item, and of the end.
    pub starts: Vec<u64>,
}

/// Encodes `items` at address `start`.
///
/// # Errors
/// A text when an item has no encoding, or a branch does not reach its target.
pub fn assemble(items: &[Item], start: u64, mode: CodeMode) -> Result<Code, String> {
    // Lengths do not depend on targets: the form fixes the size of the displacement.
    let mut starts = vec![start];
    let mut code = Code::default();
    for round in 0..2 {
        let mut encoder = Encoder::new(mode.bitness());
        let mut bytes = Vec::new();
        let mut ends = vec![start];
        for item in items {
            let mut ip = start + bytes.len() as u64;
            if let Some(prefix) = item.prefix {
                bytes.push(prefix);
                ip += 1;
            }
            let mut insn = item.insn;
            if let Some(target) = item.target {
                let address = match target {
                    _ if round == 0 => ip,
                    Target::Item(i) => starts.get(i).copied().unwrap_or(start),
                    Target::Address(address) => address,
                };
                insn.set_near_branch64(address);
                if mode == CodeMode::Bits32 {
                    insn.set_near_branch32(address as u32);
                }
            }
            encoder.encode(&insn, ip).map_err(|e| format!("{insn:?}: {e}"))?;
            bytes.extend(encoder.take_buffer());
            ends.push(start + bytes.len() as u64);
        }
        starts = ends;
        code.bytes = bytes;
    }
    code.starts = starts;
    Ok(code)
}

/// What is executed and from which state.
#[derive(Clone, Debug)]
pub struct Case {
    /// Size of code.
    pub mode: CodeMode,
    /// The instructions.
    pub items: Vec<Item>,
    /// The same as machine code.
    pub code: Code,
    /// General-purpose registers.
    pub gpr: [u64; 16],
    /// RFLAGS.
    pub rflags: u64,
    /// x87, SSE and AVX state.
    pub fpu: XsaveArea,
    /// Memory that differs from [`layout::Image::pristine`], besides the code.
    pub patches: Vec<(u64, Vec<u8>)>,
}

impl Case {
    /// The address of the first instruction.
    pub fn start(&self) -> u64 {
        self.code.starts.first().copied().unwrap_or(layout::CODE)
    }

    /// The same case with other instructions.
    ///
    /// # Errors
    /// As [`assemble`].
    pub fn with_items(&self, items: Vec<Item>) -> Result<Self, String> {
        let code = assemble(&items, self.start(), self.mode)?;
        Ok(Self { items, code, ..self.clone() })
    }
}

/// How a case ended: always with an exception, in the ordinary case INT3's.
#[derive(Clone, PartialEq)]
pub struct Outcome {
    /// Exception vector.
    pub vector: u8,
    /// Error code, 0 where the exception has none.
    pub error: u32,
    /// Faulting address, for #PF.
    pub cr2: u64,
    /// Address that the exception handler would return to.
    pub rip: u64,
    /// General-purpose registers.
    pub gpr: [u64; 16],
    /// RFLAGS.
    pub rflags: u64,
    /// Base of FS.
    pub fs_base: u64,
    /// Base of GS.
    pub gs_base: u64,
    /// x87, SSE and AVX state.
    pub fpu: XsaveArea,
    /// All areas.
    pub image: layout::Image,
}

/// A case has no outcome.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoOutcome {
    /// It did not end within so many milliseconds.
    #[error("did not end within {0} ms")]
    Timeout(u64),
    /// The engine gave up.
    #[error("the engine stopped: {0}")]
    Engine(String),
    /// The native process went away.
    #[error("the native process ended: {0}")]
    Child(String),
}

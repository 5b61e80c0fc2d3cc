//! Where the guest's arithmetic flags are while a block is assembled.
//!
//! The flags stay in the host's flags as long as nothing destroys them. TLB checks and helpers do; before
//! them the flags are saved to the state block, if the host's are newer. So at every instruction that can fault
//! the flags are in a known place, and state is precise. Flags that nothing reads may be in neither place for a while;
//! then it is known how to compute them again (`liveness.rs`).

use iced_x86::{Instruction, Mnemonic, OpKind, Register, RflagsBits};

use super::liveness::Recover;
use crate::code::asm::Asm;
use crate::code::block::FlagsPlace;

/// The current place. If neither is true, `recover` is known.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flags {
    host: bool,
    memory: bool,
    /// How to compute them again, while that is possible and nothing reads them.
    recover: Option<Recover>,
}

const ARITHMETIC: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// What an instruction does with the arithmetic flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Nothing.
    None,
    /// Sets all of them, whatever they were.
    Produce,
    /// Reads some.
    Consume,
    /// Sets some, or reads and sets.
    Merge,
}

impl Effect {
    pub(crate) fn of(insn: &Instruction) -> Self {
        let modified = insn.rflags_modified() & ARITHMETIC;
        let read = insn.rflags_read() & ARITHMETIC;
        match (modified, read) {
            (0, 0) => Effect::None,
            (0, _) => Effect::Consume,
            (ARITHMETIC, 0) if !may_leave_flags(insn) => Effect::Produce,
            _ => Effect::Merge,
        }
    }

    /// Whether the flags must be in the host's before the instruction.
    pub(crate) fn needs_host(self) -> bool {
        matches!(self, Effect::Consume | Effect::Merge)
    }
}

/// Shifts by a count of zero leave the flags alone; BSF and BSR leave those alone that the manual calls undefined.
fn may_leave_flags(insn: &Instruction) -> bool {
    use Mnemonic::*;
    if matches!(insn.mnemonic(), Bsf | Bsr) {
        return true;
    }
    if !matches!(insn.mnemonic(), Shl | Sal | Shr | Sar | Shld | Shrd | Rol | Ror | Rcl | Rcr) {
        return false;
    }
    let last = insn.op_count() - 1;
    match insn.op_kind(last) {
        OpKind::Immediate8 => {
            let mask =
                if insn.op0_register().is_gpr64() || insn.memory_size().size() == 8 { 0x3f } else { 0x1f };
            insn.immediate8() & mask == 0
        }
        OpKind::Register => insn.op_register(last) == Register::CL,
        _ => true,
    }
}

#[expect(clippy::wrong_self_convention, reason = "the flags go to memory or to the host")]
impl Flags {
    pub(crate) const HOST: Self = Self { host: true, memory: false, recover: None };
    pub(crate) const MEMORY: Self = Self { host: false, memory: true, recover: None };

    /// Makes sure that the state block has the flags. Clobbers r11 if it has to save them.
    pub(crate) fn to_memory(&mut self, asm: &mut Asm) {
        if !self.memory {
            self.to_host(asm);
            asm.save_flags();
            self.memory = true;
        }
    }

    /// Something destroyed the host's flags; the state block has them.
    pub(crate) fn host_lost(&mut self) {
        debug_assert!(self.memory || self.recover.is_some());
        self.host = false;
    }

    /// Nothing but exceptions reads the flags that were just set, and this computes them again.
    pub(crate) fn set_recover(&mut self, recover: Recover) {
        self.recover = Some(recover);
    }

    /// How to compute the flags again instead of saving them.
    pub(crate) fn recover(self) -> Option<Recover> {
        if self.memory { None } else { self.recover }
    }

    /// Makes sure that the host's flags are the guest's. Clobbers r11.
    pub(crate) fn to_host(&mut self, asm: &mut Asm) {
        if !self.host {
            match self.recover() {
                Some(recover) => recover.emit(asm),
                None => asm.restore_flags(),
            }
            self.host = true;
        }
    }

    /// Records that the host's flags were just restored by code emitted elsewhere.
    pub(crate) fn host_restored(&mut self) {
        self.host = true;
    }

    /// After an instruction with this effect, executed natively.
    pub(crate) fn after(&mut self, effect: Effect) {
        if matches!(effect, Effect::Produce | Effect::Merge) {
            *self = Self::HOST;
        }
    }

    pub(crate) fn in_memory(self) -> bool {
        self.memory
    }

    pub(crate) fn place(self) -> FlagsPlace {
        match (self.host, self.memory) {
            (true, true) => FlagsPlace::Both,
            (true, false) => FlagsPlace::Host,
            _ => FlagsPlace::Memory,
        }
    }
}

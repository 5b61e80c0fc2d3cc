//! Assembling guest code.

use iced_x86::IcedError;
use iced_x86::code_asm::{CodeAssembler, ax, dx, eax};

use crate::layout::{DONE_VECTOR, port};

/// Assembles a list of instructions: methods of `CodeAssembler` and of [`Kit`], separated by
/// semicolons; prefixes come first, as in `rep().movsb()`.
#[macro_export]
macro_rules! asm {
    ($a:expr; $($($op:ident($($arg:expr),* $(,)?)).+);* $(;)?) => {{
        $( $a$(.$op($($arg),*))+.expect(concat!("cannot assemble ", stringify!($($op)+))); )*
    }};
}

/// What cases assemble besides single instructions.
#[allow(clippy::missing_errors_doc, reason = "as CodeAssembler's methods: the instruction does not exist")]
pub trait Kit {
    /// Ends the run, at privilege level 0 or where IOPL or the bitmap allow it.
    fn done(&mut self) -> Result<(), IcedError>;
    /// Ends the run from any privilege level, through the gate of [`DONE_VECTOR`].
    fn user_done(&mut self) -> Result<(), IcedError>;
    /// Appends EAX to the log.
    fn log(&mut self) -> Result<(), IcedError>;
    /// Appends a constant to the log; EAX is lost.
    fn log_value(&mut self, value: u32) -> Result<(), IcedError>;
    /// Writes EDX:EAX as `value` to `msr`; EAX, ECX and EDX are lost.
    fn write_msr(&mut self, msr: u32, value: u64) -> Result<(), IcedError>;
    /// Ends the interrupt in service at an x2APIC (IA32_X2APIC_EOI); no register is lost.
    fn eoi(&mut self) -> Result<(), IcedError>;
    /// An instruction as bytes.
    fn bytes(&mut self, bytes: &[u8]) -> Result<(), IcedError>;
    /// `count` one-byte NOPs.
    fn nops(&mut self, count: usize) -> Result<(), IcedError>;
}

impl Kit for CodeAssembler {
    fn done(&mut self) -> Result<(), IcedError> {
        self.out(u32::from(port::DONE), iced_x86::code_asm::al)?;
        self.hlt()?;
        // Were it to go on, it would not do harm.
        self.db(&[0xeb, 0xfd])
    }

    fn user_done(&mut self) -> Result<(), IcedError> {
        self.int(u32::from(DONE_VECTOR))
    }

    fn log(&mut self) -> Result<(), IcedError> {
        self.out(u32::from(port::LOG), eax)
    }

    fn log_value(&mut self, value: u32) -> Result<(), IcedError> {
        self.mov(eax, value)?;
        self.log()
    }

    fn write_msr(&mut self, msr: u32, value: u64) -> Result<(), IcedError> {
        self.mov(iced_x86::code_asm::ecx, msr)?;
        self.mov(eax, value as u32)?;
        self.mov(iced_x86::code_asm::edx, (value >> 32) as u32)?;
        self.wrmsr()
    }

    fn eoi(&mut self) -> Result<(), IcedError> {
        use iced_x86::code_asm::{ecx, edx, rax, rcx, rdx};
        self.push(rax)?;
        self.push(rcx)?;
        self.push(rdx)?;
        self.mov(ecx, 0x80b)?;
        self.xor(eax, eax)?;
        self.xor(edx, edx)?;
        self.wrmsr()?;
        self.pop(rdx)?;
        self.pop(rcx)?;
        self.pop(rax)
    }

    fn bytes(&mut self, bytes: &[u8]) -> Result<(), IcedError> {
        self.db(bytes)
    }

    fn nops(&mut self, count: usize) -> Result<(), IcedError> {
        for _ in 0..count {
            self.nop()?;
        }
        Ok(())
    }
}

/// Posts interrupt `vector` to vCPU 0 through the kit's port; AX and DX are lost.
///
/// # Errors
/// None that a case can cause.
pub fn post_interrupt(a: &mut CodeAssembler, vector: u8) -> Result<(), IcedError> {
    a.mov(dx, u32::from(port::INTERRUPT))?;
    a.mov(ax, u32::from(vector))?;
    a.out(dx, iced_x86::code_asm::al)
}

//! Which template translates an instruction.

use iced_x86::{Code, FlowControl, Instruction, Mnemonic as M, OpKind, Register};

use super::flags::Effect;
use crate::fault::Fault;
use crate::mode::Mode;

/// How an instruction is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// Executed natively, with operands replaced.
    Copy,
    /// Nothing to do.
    Nop,
    /// PAUSE.
    Pause,
    /// Address arithmetic.
    Lea,
    /// BT, BTS, BTR or BTC with a register index into memory.
    BitString,
    /// PUSH of a 64-bit value.
    Push,
    /// POP into a 64-bit register.
    Pop,
    Leave,
    /// Direct near jump.
    Jump,
    /// Jcc.
    JumpIf,
    /// LOOP, LOOPcc, JrCXZ.
    JumpCounter,
    /// Direct near call.
    Call,
    /// Near call or jump through a register or memory.
    CallIndirect,
    JumpIndirect,
    /// Near return.
    Return,
    /// CLI at CPL 0.
    Cli,
    /// CLD or STD.
    Direction(bool),
    /// PUSHFQ.
    PushFlags,
    /// MOV of a segment selector into a register.
    ReadSegment,
    /// STI at CPL 0, followed by exactly one more instruction.
    Sti,
    /// SWAPGS at CPL 0.
    SwapGs,
    /// RDTSC or RDTSCP where it is allowed.
    ReadTsc,
    /// STAC (true) or CLAC at CPL 0, where it may change what the kernel may access; the block ends.
    SetAc(bool),
    /// MOVS or STOS in 64-bit mode.
    String,
    /// The CPU model or the mode does not have it.
    Unavailable(Fault),
    /// A helper executes it; the block goes on.
    Helper,
    /// A helper executes it; the block ends.
    HelperEnd,
}

impl Class {
    /// Whether the block ends with this instruction; it may go on after [`Class::JumpIf`].
    pub(crate) fn ends_block(self) -> bool {
        matches!(
            self,
            Class::Jump
                | Class::JumpIf
                | Class::JumpCounter
                | Class::Call
                | Class::CallIndirect
                | Class::JumpIndirect
                | Class::Return
                | Class::HelperEnd
                | Class::SetAc(_)
                | Class::Unavailable(_)
        )
    }
}

/// What an instruction first wants of the flags; decides how a block begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FirstWish {
    /// It does not care.
    None,
    /// In memory, because it destroys the host's.
    Memory,
    /// In the host.
    Host,
    /// It overwrites them.
    Overwrites,
}

pub(crate) fn first_wish(insn: &Instruction, class: Class) -> FirstWish {
    match class {
        Class::Nop
        | Class::Lea
        | Class::Jump
        | Class::Cli
        | Class::Direction(_)
        | Class::ReadSegment
        | Class::SwapGs
        | Class::Sti => FirstWish::None,
        Class::JumpIf => FirstWish::Host,
        Class::Copy if has_memory(insn) => FirstWish::Memory,
        Class::Copy => match Effect::of(insn) {
            Effect::None => FirstWish::None,
            Effect::Produce => FirstWish::Overwrites,
            Effect::Consume | Effect::Merge => FirstWish::Host,
        },
        _ => FirstWish::Memory,
    }
}

/// Whether an operand is in memory.
pub(crate) fn has_memory(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory)
}

fn has_segment_register(insn: &Instruction) -> bool {
    (0..insn.op_count())
        .any(|i| insn.op_kind(i) == OpKind::Register && insn.op_register(i).is_segment_register())
}

/// Classifies an instruction that the CPU model has and that does not fault because of the mode.
pub(crate) fn classify(insn: &Instruction, mode: Mode) -> Class {
    let bits64 = mode.is_64bit();
    match insn.flow_control() {
        FlowControl::Next => {}
        // With limits the jump itself faults when its target is beyond.
        FlowControl::UnconditionalBranch if insn.is_jmp_short_or_near() && !mode.has(Mode::SEGMENTED) => {
            return Class::Jump;
        }
        FlowControl::ConditionalBranch if insn.is_jcc_short_or_near() => return Class::JumpIf,
        FlowControl::ConditionalBranch if insn.is_loop() || insn.is_loopcc() || insn.is_jcx_short() => {
            return Class::JumpCounter;
        }
        FlowControl::Call if bits64 && insn.code() == Code::Call_rel32_64 => return Class::Call,
        FlowControl::IndirectCall if bits64 && insn.code() == Code::Call_rm64 => return Class::CallIndirect,
        FlowControl::IndirectBranch if bits64 && insn.code() == Code::Jmp_rm64 => return Class::JumpIndirect,
        FlowControl::Return if bits64 && matches!(insn.code(), Code::Retnq | Code::Retnq_imm16) => {
            return Class::Return;
        }
        _ => return Class::HelperEnd,
    }
    if crate::exec::features::is_reserved_nop(insn) {
        return Class::Nop;
    }
    match insn.mnemonic() {
        M::Nop
        | M::Endbr64
        | M::Endbr32
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchw
        | M::Prefetch
        | M::Prefetchwt1
        | M::Reservednop => Class::Nop,
        M::Pause => Class::Pause,
        M::Lea => Class::Lea,
        M::Bt | M::Bts | M::Btr | M::Btc
            if insn.op0_kind() == OpKind::Memory && insn.op1_kind() == OpKind::Register =>
        {
            Class::BitString
        }
        M::Push if bits64 => match insn.code() {
            Code::Push_r64 | Code::Push_rm64 | Code::Pushq_imm8 | Code::Pushq_imm32 => Class::Push,
            _ => Class::Helper,
        },
        M::Pop if bits64 => match insn.code() {
            Code::Pop_r64 => Class::Pop,
            Code::Pop_rm64 if insn.op0_kind() == OpKind::Register => Class::Pop,
            // POP SS shadows, POP FS and GS do not; all are rare.
            _ => Class::HelperEnd,
        },
        M::Leave if bits64 && insn.code() == Code::Leaveq => Class::Leave,
        M::Push | M::Pop | M::Leave | M::Enter | M::Pusha | M::Pushad | M::Popa | M::Popad => {
            if insn.op_count() > 0 && has_segment_register(insn) { Class::HelperEnd } else { Class::Helper }
        }
        M::Mov if insn.op0_register().is_segment_register() => Class::HelperEnd,
        M::Mov if has_segment_register(insn) && insn.op0_kind() == OpKind::Register => Class::ReadSegment,
        M::Mov if has_segment_register(insn) => Class::Helper,
        M::Mov if moves_system_register(insn) => Class::HelperEnd,
        M::Cli if mode.cpl() == 0 => Class::Cli,
        M::Sti if mode.cpl() == 0 && super::fetch::chained(mode) => Class::Sti,
        M::Swapgs if bits64 && mode.cpl() == 0 => Class::SwapGs,
        M::Rdtsc | M::Rdtscp if !mode.has(Mode::NO_TSC) => Class::ReadTsc,
        M::Stac if mode.cpl() == 0 && super::fetch::chained(mode) && !mode.has(Mode::USER_OK) => {
            Class::SetAc(true)
        }
        M::Clac if mode.cpl() == 0 && super::fetch::chained(mode) && mode.has(Mode::USER_OK) => {
            Class::SetAc(false)
        }
        // User pages are forbidden only while AC is clear.
        M::Clac if mode.cpl() == 0 && !mode.has(Mode::USER_OK) => Class::Nop,
        M::Pushfq if bits64 => Class::PushFlags,
        M::Movsb | M::Movsw | M::Movsd | M::Movsq | M::Stosb | M::Stosw | M::Stosd | M::Stosq
            if bits64 && super::string::is_inline(insn, mode) =>
        {
            Class::String
        }
        M::Cld => Class::Direction(false),
        M::Std => Class::Direction(true),
        _ if ends_with_helper(insn.mnemonic()) => Class::HelperEnd,
        _ if needs_helper(insn, mode) => Class::Helper,
        _ => Class::Copy,
    }
}

fn moves_system_register(insn: &Instruction) -> bool {
    let system = |r: Register| r.is_cr() || r.is_dr() || r.is_tr();
    system(insn.op0_register()) || system(insn.op1_register())
}

/// Instructions after which mode, TLB or interrupt window may be different.
fn ends_with_helper(mnemonic: M) -> bool {
    matches!(
        mnemonic,
        M::Lgdt
            | M::Lidt
            | M::Lldt
            | M::Ltr
            | M::Lmsw
            | M::Clts
            | M::Invlpg
            | M::Invpcid
            | M::Wrmsr
            | M::Xsetbv
            | M::Stac
            | M::Clac
            | M::Sti
            | M::Popf
            | M::Popfd
            | M::Popfq
            | M::Hlt
            | M::Vmcall
            | M::Vmmcall
            | M::Lds
            | M::Les
            | M::Lfs
            | M::Lgs
            | M::Lss
            | M::INVALID
    )
}

/// Instructions that a helper executes without ending the block.
fn needs_helper(insn: &Instruction, mode: Mode) -> bool {
    if insn.is_string_instruction() || insn.is_vsib() || insn.is_privileged() {
        return true;
    }
    if mode.code_size() != crate::mode::CodeSize::Bits64
        && mode.has(Mode::SEGMENTED)
        && insn.mnemonic() == M::Xlatb
    {
        return true;
    }
    matches!(
        insn.mnemonic(),
        M::Cpuid
            | M::Rdtsc
            | M::Rdtscp
            | M::Rdpid
            | M::Rdpmc
            | M::Rdmsr
            | M::In
            | M::Out
            | M::Insb
            | M::Insw
            | M::Insd
            | M::Outsb
            | M::Outsw
            | M::Outsd
            | M::Cli
            | M::Pushf
            | M::Pushfd
            | M::Pushfq
            | M::Swapgs
            | M::Rdfsbase
            | M::Rdgsbase
            | M::Wrfsbase
            | M::Wrgsbase
            | M::Xgetbv
            | M::Invd
            | M::Wbinvd
            | M::Wbnoinvd
            | M::Monitor
            | M::Mwait
            | M::Monitorx
            | M::Mwaitx
            | M::Sgdt
            | M::Sidt
            | M::Sldt
            | M::Str
            | M::Smsw
            | M::Lar
            | M::Lsl
            | M::Verr
            | M::Verw
            | M::Arpl
            | M::Aaa
            | M::Aas
            | M::Aam
            | M::Aad
            | M::Daa
            | M::Das
            | M::Salc
            | M::Bound
            | M::Xlatb
            | M::Fxsave
            | M::Fxsave64
            | M::Fxrstor
            | M::Fxrstor64
            | M::Xsave
            | M::Xsave64
            | M::Xsaveopt
            | M::Xsaveopt64
            | M::Xsavec
            | M::Xsavec64
            | M::Xsaves
            | M::Xsaves64
            | M::Xrstor
            | M::Xrstor64
            | M::Xrstors
            | M::Xrstors64
            | M::Fnstenv
            | M::Fstenv
            | M::Fldenv
            | M::Fnsave
            | M::Fsave
            | M::Frstor
            | M::Maskmovq
            | M::Maskmovdqu
            | M::Vmaskmovdqu
            | M::Vmaskmovps
            | M::Vmaskmovpd
            | M::Vpmaskmovd
            | M::Vpmaskmovq
            | M::Clzero
            | M::Getsec
            | M::Rsm
            | M::Ud0
            | M::Ud1
            | M::Ud2
    )
}

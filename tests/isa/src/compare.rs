//! What must be equal in two outcomes, and what differs.

use berth_cpu::bits::{gpr, pf_error, vector};
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic as M, OpKind, Register};

use crate::case::{Case, CodeMode, Outcome};
use crate::flow::undefined_at;
use crate::layout::{self, image_address};

const GPR_NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];
/// The page below the canonical boundary, which Linux gives nobody (TASK_SIZE_MAX).
const LAST_USER_PAGE: u64 = 0x7fff_ffff_f000;
/// Flags that a case can change: CF PF AF ZF SF TF DF OF NT AC ID.
const RFLAGS_COMPARED: u64 = 0x0024_4dd5;

/// One difference: native, then soft.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// What differs.
    pub what: String,
    /// Its value natively.
    pub native: String,
    /// Its value on the soft engine.
    pub soft: String,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:<12} native {}  soft {}", self.what, self.native, self.soft)
    }
}

/// What a faulting instruction may leave behind depends on the implementation.
#[derive(Clone, Copy, Debug, Default)]
struct Tolerance {
    /// Which access is reported, and memory that was written before.
    any_access: bool,
    /// Which of two operands is reported.
    any_operand: bool,
    /// Everything: a fault for bytes that the mask leaves out.
    all: bool,
}

/// The instruction that raised the exception; jumps may lead into the middle of an item.
fn instruction_at(case: &Case, rip: u64) -> Option<Instruction> {
    let offset = usize::try_from(rip.checked_sub(case.start())?).ok()?;
    let bytes = case.code.bytes.get(offset..)?;
    let insn = Decoder::with_ip(case.mode.bitness(), bytes, rip, DecoderOptions::NONE).decode();
    (!insn.is_invalid()).then_some(insn)
}

fn tolerance(case: &Case, native: &Outcome) -> Tolerance {
    let any_access = Tolerance { any_access: true, ..Tolerance::default() };
    let Some(insn) = instruction_at(case, native.rip) else { return Tolerance::default() };
    match insn.mnemonic() {
        M::Fldenv
        | M::Fnstenv
        | M::Frstor
        | M::Fnsave
        | M::Fxsave
        | M::Fxrstor
        | M::Fxsave64
        | M::Fxrstor64 => any_access,
        M::Pusha | M::Pushad | M::Popa | M::Popad => any_access,
        // The frame is pushed before the new stack pointer is tried.
        M::Enter => any_access,
        // The return address may have been pushed before the target is found bad.
        M::Call if native.vector == vector::GP => any_access,
        M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq => Tolerance { any_operand: true, ..Tolerance::default() },
        M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => Tolerance { all: true, ..Tolerance::default() },
        _ => Tolerance::default(),
    }
}

/// An access across the end of a 4 GiB segment may or may not violate its limit (SDM volume 3, 5.3); without a
/// violation its alignment is checked, then it meets a page that is not present, or the next access of an ENTER does.
fn beyond_4_gib(case: &Case, native: &Outcome, soft: &Outcome) -> bool {
    let near = |address: u64| !(0x1000..0xffff_f000).contains(&address);
    let enters = instruction_at(case, native.rip).is_some_and(|insn| insn.mnemonic() == M::Enter);
    let at_the_edge = near(soft.cr2) || enters && near(soft.gpr[gpr::RSP] & 0xffff_ffff);
    case.mode == CodeMode::Bits32
        && matches!(native.vector, vector::GP | vector::SS)
        && (soft.vector == vector::PF && at_the_edge || soft.vector == vector::AC)
        && soft.rip == native.rip
}

/// An offset that only its segment's base makes canonical: Zen 5 has been seen to find the offset itself not canonical
/// (#GP), where the linear address is what counts (SDM volume 1, 3.3.7.1).
fn canonical_by_its_base(case: &Case, native: &Outcome, soft: &Outcome) -> bool {
    let canonical = |address: u64| ((address as i64) << 16 >> 16) as u64 == address;
    let base = instruction_at(case, native.rip).and_then(|insn| match insn.memory_segment() {
        Register::FS => Some(native.fs_base),
        Register::GS => Some(native.gs_base),
        _ => None,
    });
    case.mode == CodeMode::Bits64
        && native.vector == vector::GP
        && soft.vector == vector::PF
        && soft.rip == native.rip
        && base.is_some_and(|base| !canonical(soft.cr2.wrapping_sub(base)))
}

/// What no case has on purpose, because it depends on the descriptors of the host's kernel, or for INT1 on a hypervisor
/// that intercepts #DB; but a return to a changed address can lead to it in the middle of another instruction.
fn astray_at_another_world(case: &Case, native: &Outcome, soft: &Outcome) -> bool {
    let another_world = |rip: u64| {
        !case.code.starts.contains(&rip)
            && instruction_at(case, rip).is_some_and(|insn| {
                let loads_segment = insn.op_count() > 0 && insn.op0_kind() == OpKind::Register && {
                    let register = insn.op0_register();
                    register.is_segment_register() && insn.mnemonic() != M::Push
                };
                matches!(
                    insn.mnemonic(),
                    M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss | M::Int1 | M::Int | M::Into
                ) || matches!(insn.mnemonic(), M::Retf | M::Iret | M::Iretd | M::Iretq)
                    || insn.is_jmp_far()
                    || insn.is_jmp_far_indirect()
                    || insn.is_call_far()
                    || insn.is_call_far_indirect()
                    || loads_segment
            })
    };
    another_world(native.rip) || another_world(soft.rip)
}

/// Everything that differs between the native and the soft outcome of `case`.
pub fn differences(case: &Case, native: &Outcome, soft: &Outcome) -> Vec<Difference> {
    let mut list = Vec::new();
    let tolerance = tolerance(case, native);
    let access = |v| matches!(v, vector::PF | vector::GP | vector::SS);
    let operand = |v| access(v) || v == vector::AC;
    let both = operand(native.vector) && operand(soft.vector) && native.rip == soft.rip;
    if tolerance.any_operand && both || tolerance.all && access(native.vector) {
        return list;
    }
    if beyond_4_gib(case, native, soft)
        || canonical_by_its_base(case, native, soft)
        || astray_at_another_world(case, native, soft)
    {
        return list;
    }
    let mut number = |what: &str, native: u64, soft: u64| {
        if native != soft {
            list.push(Difference {
                what: what.to_owned(),
                native: format!("{native:#x}"),
                soft: format!("{soft:#x}"),
            });
        }
    };
    number("vector", native.vector.into(), soft.vector.into());
    number("rip", native.rip, soft.rip);
    if native.vector == soft.vector {
        let mut ignored = 0;
        if native.vector == vector::PF {
            let ignored_bits = match tolerance {
                Tolerance { any_access: true, .. } => u64::MAX,
                _ => 0,
            };
            number("cr2", native.cr2 & !ignored_bits, soft.cr2 & !ignored_bits);
            // Linux claims that everything above the user's last page is present.
            ignored = u32::from(native.cr2 >= LAST_USER_PAGE);
            if tolerance.any_access {
                ignored |= pf_error::WRITE | pf_error::PRESENT;
            }
        }
        number("error", (native.error & !ignored).into(), (soft.error & !ignored).into());
    }
    let registers = case.mode.registers();
    let mask = if case.mode == CodeMode::Bits64 { u64::MAX } else { 0xffff_ffff };
    for (i, name) in GPR_NAMES.iter().enumerate().take(registers) {
        number(name, native.gpr[i] & mask, soft.gpr[i] & mask);
    }
    let flags = RFLAGS_COMPARED & !undefined_at(case, native.rip);
    number("rflags", native.rflags & flags, soft.rflags & flags);
    number("fs_base", native.fs_base, soft.fs_base);
    number("gs_base", native.gs_base, soft.gs_base);
    let (n, s) = (&native.fpu.0, &soft.fpu.0);
    let word = |bytes: &[u8; berth_cpu::XSAVE_AREA_SIZE], at: usize| {
        u64::from(bytes[at]) | u64::from(bytes[at + 1]) << 8
    };
    number("fcw", word(n, 0), word(s, 0));
    number("fsw", word(n, 2), word(s, 2));
    number("ftw", n[4].into(), s[4].into());
    number("mxcsr", word(n, 24), word(s, 24));
    for i in 0..8 {
        bytes(&mut list, format!("st{i}"), &n[32 + i * 16..][..10], &s[32 + i * 16..][..10]);
    }
    for i in 0..registers {
        bytes(&mut list, format!("xmm{i}"), &n[160 + i * 16..][..16], &s[160 + i * 16..][..16]);
        bytes(&mut list, format!("ymm{i} high"), &n[576 + i * 16..][..16], &s[576 + i * 16..][..16]);
    }
    let code = layout::CODE_LEN as usize;
    if !tolerance.any_access && native.image.0[code..] != soft.image.0[code..] {
        memory(&mut list, &native.image.0, &soft.image.0, code);
    }
    list
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().rev().map(|b| format!("{b:02x}")).collect()
}

fn bytes(list: &mut Vec<Difference>, what: String, native: &[u8], soft: &[u8]) {
    if native != soft {
        list.push(Difference { what, native: hex(native), soft: hex(soft) });
    }
}

/// Reports differing memory in units of eight bytes, a few of them.
fn memory(list: &mut Vec<Difference>, native: &[u8], soft: &[u8], from: usize) {
    let units = (from..native.len()).step_by(8);
    for at in units.filter(|&at| native[at..at + 8] != soft[at..at + 8]).take(8) {
        bytes(list, format!("[{:#x}]", image_address(at)), &native[at..at + 8], &soft[at..at + 8]);
    }
}

//! Cases of one instruction.

use berth_cpu::bits::gpr;
use fastrand::Rng;
use iced_x86::{Code, FlowControl, Instruction, Mnemonic as M, OpCodeOperandKind as O, OpKind, Register};

use super::round_trip;
use crate::case::{Case, CodeMode, Item, Target, assemble};
use crate::forms::Catalogue;
use crate::layout::{CODE, CODE_LEN, FS_BASE, GS_BASE};
use crate::operands::Operands;
use crate::state::{Needs, Risk, Setup};

const ATTEMPTS: usize = 60;

pub(super) fn needs(code: Code) -> Needs {
    let kinds = code.op_code().op_kinds();
    Needs {
        strings: kinds.iter().any(|k| matches!(k, O::seg_rSI | O::es_rDI | O::seg_rDI)),
        division: matches!(code.mnemonic(), M::Div | M::Idiv),
        frame: matches!(code.mnemonic(), M::Leave | M::Enter),
    }
}

/// A case of one instruction of the form `code`; `memory`: with a memory operand, if the form has the choice.
/// `None` if random choices did not give an instruction that is encoded as this form.
pub fn single(code: Code, memory: bool, seed: u64, mode: CodeMode, catalogue: &Catalogue) -> Option<Case> {
    let mut rng = Rng::with_seed(seed);
    for _ in 0..ATTEMPTS {
        let mut setup = Setup::random(&mut rng, mode, Risk::Usual, needs(code));
        let start =
            if rng.u8(..20) == 0 { CODE + 4096 - rng.u64(1..15) } else { CODE + 0x100 + rng.u64(..0xc00) };
        let mut operands =
            Operands { rng: &mut rng, setup: &setup, keep: &[], risk: Risk::Usual, memory, near: start };
        let Some(insn) = operands.choose(code) else { continue };
        // A repeat prefix makes LOOPE and LOOPNE each other on some CPUs.
        let any = !insn.is_loopcc();
        let prefix = (rng.u8(..16) == 0 && any).then(|| redundant_prefix(&mut rng));
        let target = branch_target(&mut rng, &insn, start);
        let item = Item { insn, prefix, target };
        let Some(decoded) = round_trip(&item, code, start, mode, catalogue) else { continue };
        let mut patches = Vec::new();
        prepare(&mut rng, &decoded, &mut setup, &mut patches);
        let items = vec![Item { insn: decoded, ..item }];
        let Ok(assembled) = assemble(&items, start, mode) else { continue };
        return Some(Case {
            mode,
            items,
            code: assembled,
            gpr: setup.gpr,
            rflags: setup.rflags,
            fpu: setup.fpu,
            patches,
        });
    }
    None
}

fn redundant_prefix(rng: &mut Rng) -> u8 {
    const PREFIXES: [u8; 9] = [0x66, 0xf2, 0xf3, 0x26, 0x2e, 0x36, 0x3e, 0x40, 0x48];
    PREFIXES[rng.usize(..PREFIXES.len())]
}

fn branch_target(rng: &mut Rng, insn: &Instruction, start: u64) -> Option<Target> {
    let near = (0..insn.op_count()).any(|i| {
        matches!(insn.op_kind(i), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64)
    });
    if !near {
        return None;
    }
    let first = insn.code().op_code().op_kinds().first().copied();
    let short = matches!(first, Some(O::br16_1 | O::br32_1 | O::br64_1));
    let mut target =
        if short { start.wrapping_add_signed(rng.i64(-100..100)) } else { CODE + rng.u64(..CODE_LEN) };
    if (start..start + 16).contains(&target) {
        target += 16;
    }
    Some(Target::Address(target))
}

/// The value of a register in `setup`, for address arithmetic.
fn value_of(setup: &Setup, register: Register) -> Option<u64> {
    match register {
        Register::FS => return Some(FS_BASE),
        Register::GS => return Some(GS_BASE),
        r if r.is_segment_register() => return Some(0),
        _ => {}
    }
    let value = setup.gpr.get(register.full_register().number()).copied()?;
    Some(match register.size() {
        2 => value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    })
}

/// The address of the memory operand.
pub(super) fn operand_address(insn: &Instruction, setup: &Setup) -> Option<u64> {
    let i = (0..insn.op_count()).find(|&i| insn.op_kind(i) == OpKind::Memory)?;
    insn.virtual_address(i, 0, |register, _, _| value_of(setup, register))
}

/// Makes the interesting outcome of some instructions likely.
fn prepare(rng: &mut Rng, insn: &Instruction, setup: &mut Setup, patches: &mut Vec<(u64, Vec<u8>)>) {
    let code_address = if rng.u8(..12) == 0 { rng.u64(..) } else { CODE + rng.u64(0x10..CODE_LEN - 0x10) };
    let register = |i: u32| {
        let r = insn.op_register(i);
        (insn.op_kind(i) == OpKind::Register && r.is_gpr()).then(|| r.full_register().number())
    };
    match insn.flow_control() {
        FlowControl::Return => patches.push((setup.gpr[gpr::RSP], code_address.to_le_bytes().to_vec())),
        FlowControl::IndirectBranch | FlowControl::IndirectCall => {
            if let Some(r) = register(0)
                && r != gpr::RSP
            {
                setup.gpr[r] = code_address;
            } else if let Some(address) = operand_address(insn, setup) {
                patches.push((address, code_address.to_le_bytes().to_vec()));
            }
        }
        _ => {}
    }
    let often = rng.u8(..8) < 5;
    match insn.mnemonic() {
        M::Cmpxchg | M::Cmpxchg8b | M::Cmpxchg16b if often => {
            let (low, high) = (setup.gpr[gpr::RAX], setup.gpr[gpr::RDX]);
            if let Some(r) = register(0) {
                setup.gpr[r] = low;
            } else if let Some(address) = operand_address(insn, setup) {
                let mut bytes = low.to_le_bytes().to_vec();
                bytes.truncate(if insn.mnemonic() == M::Cmpxchg8b { 4 } else { 8 });
                bytes.extend(high.to_le_bytes());
                patches.push((address, bytes));
            }
        }
        M::Bt | M::Bts | M::Btr | M::Btc if often && insn.op0_kind() == OpKind::Memory => {
            if let Some(r) = register(1)
                && setup.pointers.iter().all(|p| p.register != r)
                && r != gpr::RSP
            {
                setup.gpr[r] = rng.i64(-3000..3000) as u64
                    & if setup.gpr[r] >> 32 == 0 { 0xffff_ffff } else { u64::MAX };
            }
        }
        M::Bound if often => {
            if let (Some(r), Some(address)) = (register(0), operand_address(insn, setup)) {
                let value = setup.gpr[r] as u32;
                let around = [value.wrapping_sub(rng.u32(..3)), value.wrapping_add(rng.u32(..3))];
                patches.push((address, around.iter().flat_map(|v| v.to_le_bytes()).collect()));
            }
        }
        _ => {}
    }
    if insn.is_vsib() {
        let (index, mask) = (insn.memory_index().number(), insn.op_register(2).number());
        for half in [160, 576] {
            for (i, byte) in setup.fpu.0[half + index * 16..][..16].iter_mut().enumerate() {
                // Small positive elements of four or eight bytes.
                *byte = if i % 8 == 0 || i == 4 && insn.is_vsib32() { rng.u8(..32) } else { 0 };
            }
            for byte in &mut setup.fpu.0[half + mask * 16..][..16] {
                *byte = rng.u8(..);
            }
        }
    }
}

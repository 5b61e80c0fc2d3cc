//! Which flags are undefined where: a small data-flow analysis over a case's items.
//!
//! An undefined flag may have any value, so it is not compared, and generated code does not read it.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic as M, OpKind, RflagsBits};

use crate::case::{Case, Item, Target};

/// The six arithmetic flags as the decoder numbers them, with their bit of RFLAGS.
const FLAGS: [(u32, u64); 6] = [
    (RflagsBits::CF, 1 << 0),
    (RflagsBits::PF, 1 << 2),
    (RflagsBits::AF, 1 << 4),
    (RflagsBits::ZF, 1 << 6),
    (RflagsBits::SF, 1 << 7),
    (RflagsBits::OF, 1 << 11),
];

fn to_rflags(bits: u32) -> u64 {
    FLAGS.iter().filter(|(b, _)| bits & b != 0).fold(0, |all, (_, flag)| all | flag)
}

/// Whether the instruction may leave all flags alone, depending on data.
fn may_leave(insn: &Instruction) -> bool {
    let shift = matches!(
        insn.mnemonic(),
        M::Shl | M::Sal | M::Shr | M::Sar | M::Shld | M::Shrd | M::Rol | M::Ror | M::Rcl | M::Rcr
    );
    let by_register = shift && insn.op_kind(insn.op_count() - 1) == OpKind::Register;
    by_register || insn.has_rep_prefix() || insn.has_repne_prefix()
}

/// Flags that the instruction leaves undefined.
fn undefined_by(insn: &Instruction) -> u32 {
    let wraps = matches!(insn.mnemonic(), M::Rcl | M::Rcr) && insn.op_kind(1) == OpKind::Immediate8;
    if wraps && insn.immediate8() & 0x1f > 1 {
        // The decoder takes a whole turn through the carry for no rotation; OF is undefined all the same.
        return insn.rflags_undefined() | RflagsBits::OF;
    }
    insn.rflags_undefined()
}

fn after(insn: &Instruction, undefined: u32) -> u32 {
    let defined = insn.rflags_written() | insn.rflags_cleared() | insn.rflags_set();
    let kept = if may_leave(insn) { undefined } else { undefined & !defined };
    kept | undefined_by(insn)
}

/// With `astray`, a return may lead to any item.
fn successors(items: &[Item], i: usize, astray: bool) -> Vec<usize> {
    let target = match items[i].target {
        Some(Target::Item(t)) => Some(t),
        _ => None,
    };
    match items[i].insn.flow_control() {
        FlowControl::UnconditionalBranch | FlowControl::Call => target.into_iter().collect(),
        FlowControl::ConditionalBranch => target.into_iter().chain([i + 1]).collect(),
        FlowControl::Return if astray => (0..items.len()).collect(),
        FlowControl::Return => (0..items.len())
            .filter(|&c| items[c].insn.flow_control() == FlowControl::Call)
            .map(|c| c + 1)
            .collect(),
        _ => vec![i + 1],
    }
}

/// For each item and the end: the flags (as the decoder numbers them) that may be undefined before it.
fn undefined_before(items: &[Item]) -> Vec<u32> {
    let mut before = vec![0; items.len() + 1];
    let astray = may_return_astray(items);
    loop {
        let mut changed = false;
        for (i, item) in items.iter().enumerate() {
            let out = after(&item.insn, before[i]);
            for s in successors(items, i, astray) {
                if let Some(state) = before.get_mut(s)
                    && *state | out != *state
                {
                    *state |= out;
                    changed = true;
                }
            }
        }
        if !changed {
            return before;
        }
    }
}

/// The first item that reads a flag that may be undefined.
pub fn reads_undefined(items: &[Item]) -> Option<usize> {
    let before = undefined_before(items);
    items.iter().zip(before).position(|(item, undefined)| item.insn.rflags_read() & undefined != 0)
}

/// Whether a store may change a return address, so that a return leads to any item, or into the middle of one.
fn may_return_astray(items: &[Item]) -> bool {
    let returns = items.iter().any(|item| item.insn.flow_control() == FlowControl::Return);
    let stores = |insn: &Instruction| insn.op_count() > 0 && insn.op0_kind() == OpKind::Memory;
    returns && items.iter().any(|item| stores(&item.insn))
}

/// Flags that the instructions leave undefined which begin in the middle of an item.
fn undefined_between(case: &Case) -> u32 {
    let bytes = &case.code.bytes;
    (0..bytes.len())
        .map(|offset| (offset, case.start() + offset as u64))
        .filter(|(_, rip)| !case.code.starts.contains(rip))
        .map(|(offset, rip)| {
            Decoder::with_ip(case.mode.bitness(), &bytes[offset..], rip, DecoderOptions::NONE).decode()
        })
        .filter(|insn| !insn.is_invalid())
        .fold(0, |all, insn| all | undefined_by(&insn))
}

/// Bits of RFLAGS that may be undefined when `case` ends at `rip`.
pub fn undefined_at(case: &Case, rip: u64) -> u64 {
    let before = undefined_before(&case.items);
    // INT3 after the last item, or a fault at an item. Elsewhere: anything that any item leaves.
    let at = case.code.starts.iter().position(|&s| s == rip);
    let ended = case.code.starts.last().is_some_and(|&end| rip == end + 1);
    let astray = if may_return_astray(&case.items) { to_rflags(undefined_between(case)) } else { 0 };
    astray
        | match (at, before.last()) {
            (Some(i), _) if i < case.items.len() => to_rflags(before[i]),
            (_, Some(last)) if ended => to_rflags(*last),
            _ => to_rflags(case.items.iter().fold(0, |all, item| all | undefined_by(&item.insn))),
        }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Code, Register};

    fn item(insn: Instruction) -> Item {
        Item { insn, prefix: None, target: None }
    }

    #[test]
    fn flags_become_undefined_and_defined_again() {
        let r32 = |code| Instruction::with2(code, Register::EAX, Register::EBX).unwrap();
        let (and, add) = (r32(Code::And_rm32_r32), r32(Code::Add_rm32_r32));
        let lahf = Instruction::with(Code::Lahf);
        assert_eq!(reads_undefined(&[item(and), item(lahf)]), Some(1)); // AF
        assert_eq!(reads_undefined(&[item(and), item(add), item(lahf)]), None);
        let shl = Instruction::with2(Code::Shl_rm32_CL, Register::EAX, Register::CL).unwrap();
        assert_eq!(reads_undefined(&[item(and), item(shl), item(lahf)]), Some(2));
    }

    #[test]
    fn undefined_flags_flow_through_jumps() {
        let and = Instruction::with2(Code::And_rm32_r32, Register::EAX, Register::EBX).unwrap();
        let add = Instruction::with2(Code::Add_rm32_r32, Register::EAX, Register::EBX).unwrap();
        let jump = Item {
            insn: Instruction::with_branch(Code::Je_rel8_64, 0).unwrap(),
            prefix: None,
            target: Some(Target::Item(3)),
        };
        let lahf = Instruction::with(Code::Lahf);
        assert_eq!(reads_undefined(&[item(and), jump, item(add), item(lahf)]), Some(3));
    }

    #[test]
    fn a_return_whose_address_may_have_changed_leads_anywhere() {
        let mul = Instruction::with1(Code::Mul_rm32, Register::EBX).unwrap();
        let call = Item {
            insn: Instruction::with_branch(Code::Call_rel32_64, 0).unwrap(),
            prefix: None,
            target: Some(Target::Item(3)),
        };
        let memory = iced_x86::MemoryOperand::with_base(Register::RSP);
        let store = Instruction::with1(Code::Seto_rm8, memory).unwrap();
        let nop = Instruction::with(Code::Nopd);
        let (lahf, ret) = (Instruction::with(Code::Lahf), Instruction::with(Code::Retnq));
        let code = |store| [item(lahf), item(mul), call, item(store), item(ret)];
        assert_eq!(reads_undefined(&code(store)), Some(0));
        assert_eq!(reads_undefined(&code(nop)), None);
    }
}

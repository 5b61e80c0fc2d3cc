//! A readable account of a vCPU that cannot go on: registers, control bits and the code at RIP.

use std::fmt::Write;

use berth_cpu::bits::{cr0, efer, gpr, rflags};
use berth_cpu::{CpuState, Segment};
use berth_explain::{Paging, translate};
use berth_memory::{GuestMemory, GuestVirtAddr};

/// Bytes of code that are shown.
const CODE_LEN: u64 = 16;

const GPR_NAMES: [&str; 16] = [
    "RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8 ", "R9 ", "R10", "R11", "R12", "R13", "R14",
    "R15",
];
/// The order in which people expect them.
const GPR_ORDER: [usize; 16] = [
    gpr::RAX,
    gpr::RBX,
    gpr::RCX,
    gpr::RDX,
    gpr::RSI,
    gpr::RDI,
    gpr::RBP,
    gpr::RSP,
    8,
    9,
    10,
    11,
    12,
    13,
    14,
    15,
];
const FLAGS: [(u64, &str); 16] = [
    (rflags::ID, "ID"),
    (rflags::VIP, "VIP"),
    (rflags::VIF, "VIF"),
    (rflags::AC, "AC"),
    (rflags::VM, "VM"),
    (rflags::RF, "RF"),
    (rflags::NT, "NT"),
    (rflags::OF, "OF"),
    (rflags::DF, "DF"),
    (rflags::IF, "IF"),
    (rflags::TF, "TF"),
    (rflags::SF, "SF"),
    (rflags::ZF, "ZF"),
    (rflags::AF, "AF"),
    (rflags::PF, "PF"),
    (rflags::CF, "CF"),
];

/// The state as some lines of text, the last without a line end.
pub fn account(state: &CpuState, memory: &GuestMemory) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = write_account(&mut text, state, memory);
    text
}

fn write_account(text: &mut String, s: &CpuState, memory: &GuestMemory) -> std::fmt::Result {
    let flags: Vec<&str> =
        FLAGS.iter().filter(|(bit, _)| s.rflags & bit != 0).map(|(_, name)| *name).collect();
    writeln!(text, "  RIP {:016x}  RFLAGS {:08x} [{}]  {}", s.rip, s.rflags, flags.join(" "), mode(s))?;
    for row in GPR_ORDER.chunks(4) {
        let row: Vec<String> = row.iter().map(|&r| format!("{} {:016x}", GPR_NAMES[r], s.gpr[r])).collect();
        writeln!(text, "  {}", row.join("  "))?;
    }
    let segments = [
        ("CS", s.cs),
        ("SS", s.ss),
        ("DS", s.ds),
        ("ES", s.es),
        ("FS", s.fs),
        ("GS", s.gs),
        ("TR", s.tr),
        ("LDT", s.ldtr),
    ];
    for row in segments.chunks(2) {
        let row: Vec<String> = row.iter().map(|(name, segment)| describe_segment(name, segment)).collect();
        writeln!(text, "  {}", row.join("    "))?;
    }
    writeln!(
        text,
        "  GDT {:016x} limit {:04x}    IDT {:016x} limit {:04x}",
        s.gdtr.base, s.gdtr.limit, s.idtr.base, s.idtr.limit
    )?;
    writeln!(
        text,
        "  CR0 {:08x}  CR2 {:016x}  CR3 {:016x}  CR4 {:08x}  EFER {:04x}",
        s.cr0, s.cr2, s.cr3, s.cr4, s.efer
    )?;
    write!(text, "  code at RIP: {}", code(s, memory))
}

fn describe_segment(name: &str, s: &Segment) -> String {
    format!("{name:<3} {:04x} base {:016x} limit {:08x} attr {:04x}", s.selector, s.base, s.limit, s.attr)
}

/// The operating mode (SDM volume 3, 2.2) and the privilege level.
fn mode(s: &CpuState) -> String {
    let mode = if s.cr0 & cr0::PE == 0 {
        return "real mode".to_owned();
    } else if s.rflags & rflags::VM != 0 {
        "virtual-8086 mode"
    } else if s.efer & efer::LMA != 0 && s.cs.attr & Segment::L != 0 {
        "64-bit mode"
    } else if s.efer & efer::LMA != 0 {
        "compatibility mode"
    } else if s.cs.attr & Segment::DB != 0 {
        "32-bit protected mode"
    } else {
        "16-bit protected mode"
    };
    format!("{mode}, CPL {}", s.ss.dpl())
}

/// The bytes at RIP, as far as they can be read.
fn code(s: &CpuState, memory: &GuestMemory) -> String {
    let linear = if s.efer & efer::LMA != 0 && s.cs.attr & Segment::L != 0 {
        s.rip
    } else {
        s.cs.base.wrapping_add(s.rip) & 0xffff_ffff
    };
    // Most bits that a physical address can have: what is reserved does not matter here.
    let paging = Paging::of(s, 52);
    let byte = |offset| {
        let at = translate(memory, &paging, GuestVirtAddr(linear.wrapping_add(offset)))?;
        let mut byte = [0];
        memory.read(at, &mut byte).ok()?;
        Some(format!("{:02x}", byte[0]))
    };
    let bytes: Vec<String> = (0..CODE_LEN).map_while(byte).collect();
    if bytes.is_empty() { "not mapped to RAM".to_owned() } else { bytes.join(" ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_memory::GuestPhysAddr;

    #[test]
    fn the_account_has_registers_mode_and_code() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        memory.write(GuestPhysAddr(0x7c00), &[0x0f, 0x0b, 0xf4]).unwrap();
        let mut state = CpuState::after_sipi(7);
        state.rip = 0xc00;
        state.gpr[gpr::RBX] = 0xbeef;
        state.rflags |= rflags::CF | rflags::ZF;
        let text = account(&state, &memory);
        for part in ["RIP 0000000000000c00", "[ZF CF]", "real mode", "RBX 000000000000beef", "0f 0b f4 00"] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
    }

    #[test]
    fn unreadable_code_is_said_so() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        assert!(account(&CpuState::reset(), &memory).contains("not mapped to RAM"));
    }
}

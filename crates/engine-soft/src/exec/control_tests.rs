use super::*;
use crate::exec::tests_support::*;

const GP: Fault = Fault::gp(0);
const UD: Fault = Fault::ud();

/// MOV to control register `n` from RAX.
fn set_cr(m: &mut Machine, n: u8, value: u64) -> Guest<Flow> {
    m.cpu.s.gpr[gpr::RAX] = value;
    if n < 8 { m.run(&[0x0f, 0x22, 0xc0 | n << 3]) } else { m.run(&[0x44, 0x0f, 0x22, 0xc0 | (n & 7) << 3]) }
}

/// MOV to debug register `n` from RAX.
fn set_dr(m: &mut Machine, n: u8, value: u64) -> Guest<Flow> {
    m.cpu.s.gpr[gpr::RAX] = value;
    m.run(&[0x0f, 0x23, 0xc0 | n << 3])
}

#[test]
fn impossible_values_of_cr0_are_refused() {
    let mut m = Machine::long(0);
    let on = m.cpu.s.cr0;
    assert_eq!(set_cr(&mut m, 0, on | 1 << 32), Err(GP));
    assert_eq!(set_cr(&mut m, 0, on & !cr0::PE), Err(GP), "PG without PE");
    assert_eq!(set_cr(&mut m, 0, on | cr0::NW), Err(GP), "NW without CD");
    assert_eq!(set_cr(&mut m, 0, on & !cr0::PG), Err(GP), "64-bit code needs paging");
    assert_eq!(m.cpu.s.cr0, on);
    assert_eq!(set_cr(&mut m, 0, on | cr0::TS), Ok(Flow::Leave));
    assert!(m.cpu.s.mode.has(crate::mode::Mode::TASK_SWITCHED));
    m.run(&[0x0f, 0x06]).unwrap(); // clts
    assert_eq!(m.cpu.s.cr0, on);
}

#[test]
fn long_mode_begins_with_paging() {
    let mut m = Machine::protected(0);
    m.cpu.s.efer = efer::LME;
    let on = m.cpu.s.cr0 | cr0::PG;
    assert_eq!(set_cr(&mut m, 0, on), Err(GP), "without PAE");
    m.cpu.s.cr4 = cr4::PAE;
    set_cr(&mut m, 0, on).unwrap();
    assert!(m.cpu.s.is_long() && !m.cpu.s.is_64bit());
    assert_eq!(set_cr(&mut m, 4, 0), Err(GP), "PAE stays while long mode is on");
    set_cr(&mut m, 0, on & !cr0::PG).unwrap();
    assert!(!m.cpu.s.is_long());
}

#[test]
fn pae_paging_checks_the_four_pointers() {
    let mut m = Machine::protected(0);
    m.cpu.s.cr4 = cr4::PAE;
    m.cpu.s.cr3 = 0x2_0000;
    m.write(0x2_0008, 8, 0x3000 | 0x2 | PRESENT);
    let on = m.cpu.s.cr0 | cr0::PG;
    assert_eq!(set_cr(&mut m, 0, on), Err(GP), "bit 1 is reserved");
    m.write(0x2_0008, 8, 0x3000 | PRESENT);
    assert_eq!(set_cr(&mut m, 0, on), Ok(Flow::Leave));
}

#[test]
fn cr4_takes_what_cpuid_announces() {
    let mut m = Machine::long(0);
    let on = m.cpu.s.cr4;
    for reserved in [cr4::VME, cr4::PVI, 1 << 12, 1 << 13, 1 << 22, 1 << 23, 1 << 40] {
        assert_eq!(set_cr(&mut m, 4, on | reserved), Err(GP), "{reserved:#x}");
    }
    set_cr(&mut m, 4, on | cr4::SMEP | cr4::SMAP | cr4::UMIP | cr4::OSXSAVE | cr4::FSGSBASE).unwrap();
    m.cpu.s.cr3 |= 5;
    assert_eq!(set_cr(&mut m, 4, on | cr4::PCIDE), Err(GP), "CR3 has low bits");
}

#[test]
fn cr3_keeps_translations_only_with_pcids() {
    let mut m = Machine::long(0);
    let table = m.cpu.s.cr3;
    assert_eq!(set_cr(&mut m, 3, table | CR3_NO_FLUSH), Err(GP));
    assert_eq!(set_cr(&mut m, 3, table | 1 << 50), Err(GP), "beyond the physical address width");
    let cr4 = m.cpu.s.cr4;
    set_cr(&mut m, 4, cr4 | cr4::PCIDE).unwrap();
    set_cr(&mut m, 3, table | CR3_NO_FLUSH | 7).unwrap();
    assert_eq!(m.cpu.s.cr3, table | 7);
}

#[test]
fn control_registers_belong_to_the_kernel() {
    let mut m = Machine::long(3);
    assert_eq!(set_cr(&mut m, 0, 0), Err(GP));
    assert_eq!(m.run(&[0x0f, 0x20, 0xd8]), Err(GP)); // mov rax, cr3
    assert_eq!(m.run(&[0x0f, 0x06]), Err(GP)); // clts
    assert_eq!(set_dr(&mut m, 0, 0), Err(GP));
    let mut m = Machine::long(0);
    assert_eq!(set_cr(&mut m, 8, 16), Err(GP));
}

#[test]
fn lmsw_sets_but_never_clears_pe() {
    let mut m = Machine::long(0);
    let before = m.cpu.s.cr0;
    m.cpu.s.gpr[gpr::RAX] = 0xffff_fff0 | cr0::TS;
    m.run(&[0x0f, 0x01, 0xf0]).unwrap();
    assert_eq!(m.cpu.s.cr0, before | cr0::TS);
}

#[test]
fn smsw_is_hidden_by_umip() {
    let mut m = Machine::long(3);
    m.run(&[0x48, 0x0f, 0x01, 0xe0]).unwrap(); // smsw rax
    assert_eq!(m.cpu.s.gpr[gpr::RAX], m.cpu.s.cr0);
    m.cpu.s.cr4 |= cr4::UMIP;
    assert_eq!(m.run(&[0x48, 0x0f, 0x01, 0xe0]), Err(GP));
}

#[test]
fn debug_registers_have_fixed_bits_and_aliases() {
    let mut m = Machine::long(0);
    set_dr(&mut m, 6, 0).unwrap();
    set_dr(&mut m, 5, 0xffff_ffff & !DR7_GD).unwrap();
    assert_eq!((m.cpu.s.dr[6], m.cpu.s.dr[7]), (0xffff_0ff0, 0xffff_07ff));
    assert!(m.cpu.s.mode.has(crate::mode::Mode::WATCHED));
    assert_eq!(set_dr(&mut m, 7, 1 << 32), Err(GP));
    m.cpu.s.cr4 |= cr4::DE;
    assert_eq!(set_dr(&mut m, 4, 0), Err(UD));
}

#[test]
fn general_detect_protects_the_debug_registers_once() {
    let mut m = Machine::long(0);
    set_dr(&mut m, 7, DR7_GD).unwrap();
    assert_eq!(m.run(&[0x0f, 0x21, 0xc0]), Err(Fault::plain(vector::DB)));
    assert_eq!(m.cpu.s.dr[6] & DR6_BD, DR6_BD);
    assert_eq!(m.run(&[0x0f, 0x21, 0xc0]), Ok(Flow::Next));
}

#[test]
fn xcr0_takes_only_consistent_components() {
    let mut m = Machine::long(0);
    let set = |m: &mut Machine, index: u64, value: u64| {
        (m.cpu.s.gpr[gpr::RCX], m.cpu.s.gpr[gpr::RAX], m.cpu.s.gpr[gpr::RDX]) = (index, value, 0);
        m.run(&[0x0f, 0x01, 0xd1])
    };
    assert_eq!(set(&mut m, 0, 3), Err(UD), "CR4.OSXSAVE is clear");
    m.cpu.s.cr4 |= cr4::OSXSAVE;
    for bad in [0, 2, 5, 0x80, 0x1f] {
        assert_eq!(set(&mut m, 0, bad), Err(GP), "{bad:#x}");
    }
    assert_eq!(set(&mut m, 1, 3), Err(GP));
    set(&mut m, 0, 3).unwrap();
    m.cpu.s.gpr[gpr::RCX] = 0;
    m.run(&[0x0f, 0x01, 0xd0]).unwrap(); // xgetbv
    assert_eq!(m.cpu.s.gpr[gpr::RAX], 3);
}

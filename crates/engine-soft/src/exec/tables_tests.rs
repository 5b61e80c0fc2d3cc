use berth_cpu::bits::gpr;

use super::*;
use crate::exec::tests_support::*;

fn inspect(m: &mut Machine, opcode: u8, selector: u16) -> Option<u64> {
    m.cpu.s.gpr[gpr::RCX] = u64::from(selector);
    // lar/lsl eax, ecx
    assert!(m.run(&[0x0f, opcode, 0xc1]).is_ok());
    (m.cpu.s.rflags() & rflags::ZF != 0).then(|| m.cpu.s.gpr[gpr::RAX])
}

#[test]
fn lar_and_lsl_show_what_the_program_may_see() {
    let mut m = Machine::long(3);
    assert_eq!(inspect(&mut m, 3, USER_DATA), Some(0xffff_ffff));
    assert_eq!(inspect(&mut m, 2, USER_DATA), Some(0x00cf_f300));
    assert_eq!(inspect(&mut m, 2, KERNEL_DATA), None);
    assert_eq!(inspect(&mut m, 2, CONFORMING_CODE32), Some(0x00cf_9f00));
    assert_eq!(inspect(&mut m, 3, 0), None);
    assert_eq!(inspect(&mut m, 3, 0x1000), None);
    let mut m = Machine::long(0);
    assert_eq!(inspect(&mut m, 3, TSS_SELECTOR), Some(0x67));
}

#[test]
fn verr_and_verw() {
    let mut m = Machine::long(3);
    let mut verify = |modrm: u8, selector: u16| {
        m.cpu.s.gpr[gpr::RCX] = u64::from(selector);
        m.run(&[0x0f, 0x00, modrm]).unwrap();
        m.cpu.s.rflags() & rflags::ZF != 0
    };
    assert!(verify(0xe1, USER_DATA) && verify(0xe9, USER_DATA));
    assert!(verify(0xe1, USER_CODE64) && !verify(0xe9, USER_CODE64));
    assert!(!verify(0xe1, KERNEL_DATA));
}

#[test]
fn ltr_marks_the_tss_busy() {
    let mut m = Machine::long(0);
    m.cpu.s.gpr[gpr::RCX] = u64::from(TSS_SELECTOR);
    assert!(m.run(&[0x0f, 0x00, 0xd9]).is_ok());
    assert_eq!((m.cpu.s.tr.base, m.cpu.s.tr.limit, m.cpu.s.tr.attr), (TSS, 0x67, 0x8b));
    assert_eq!(m.read(GDT + u64::from(TSS_SELECTOR) + 5, 1), 0x8b);
    // Busy now.
    assert_eq!(m.run(&[0x0f, 0x00, 0xd9]), Err(Fault::gp(u32::from(TSS_SELECTOR))));
}

#[test]
fn descriptor_table_registers_round_trip() {
    let mut m = Machine::long(0);
    m.write(0x5000, 2, 0x1f);
    m.write(0x5002, 8, 0xffff_8000_0000_2000);
    // lidt [0x5000]; sidt [0x5010]
    assert!(m.run(&[0x0f, 0x01, 0x1c, 0x25, 0, 0x50, 0, 0]).is_ok());
    assert_eq!(m.cpu.s.idtr, TableRegister { base: 0xffff_8000_0000_2000, limit: 0x1f });
    assert!(m.run(&[0x0f, 0x01, 0x0c, 0x25, 0x10, 0x50, 0, 0]).is_ok());
    assert_eq!((m.read(0x5010, 2), m.read(0x5012, 8)), (0x1f, 0xffff_8000_0000_2000));
    m.write(0x5002, 8, 0x1000_0000_0000_0000);
    assert_eq!(m.run(&[0x0f, 0x01, 0x1c, 0x25, 0, 0x50, 0, 0]), Err(Fault::gp(0)));
}

#[test]
fn user_programs_see_no_tables_under_umip() {
    let mut m = Machine::long(3);
    assert!(m.run(&[0x0f, 0x00, 0xc9]).is_ok());
    assert_eq!(m.cpu.s.gpr[gpr::RCX], u64::from(TSS_SELECTOR));
    m.cpu.s.cr4 |= cr4::UMIP;
    assert_eq!(m.run(&[0x0f, 0x00, 0xc9]), Err(Fault::gp(0)));
    assert_eq!(m.run(&[0x0f, 0x01, 0x0c, 0x25, 0x10, 0x50, 0, 0]), Err(Fault::gp(0)));
}

#[test]
fn arpl_raises_the_requested_level() {
    let mut m = Machine::protected(3);
    m.cpu.s.gpr[gpr::RAX] = 0x1234_0010;
    m.cpu.s.gpr[gpr::RCX] = 3;
    assert!(m.run(&[0x63, 0xc8]).is_ok());
    assert_eq!((m.cpu.s.gpr[gpr::RAX], m.cpu.s.rflags() & rflags::ZF), (0x1234_0013, rflags::ZF));
    assert!(m.run(&[0x63, 0xc8]).is_ok());
    assert_eq!(m.cpu.s.rflags() & rflags::ZF, 0);
}

use super::*;
use crate::exec::tests_support::*;

#[test]
fn popf_changes_what_the_privilege_level_allows() {
    let all = !(rflags::VM | rflags::TF);
    let changed = |mut m: Machine, iopl: u64| {
        m.cpu.s.set_rflags(iopl << 12);
        let sp = m.cpu.s.gpr[gpr::RSP];
        m.write(sp, 8, all);
        assert!(m.run(&[0x9d]).is_ok());
        m.cpu.s.rflags() & (rflags::IF | rflags::IOPL | rflags::RF | rflags::VIF | rflags::AC)
    };
    assert_eq!(changed(Machine::long(0), 0), rflags::IF | rflags::IOPL | rflags::AC);
    assert_eq!(changed(Machine::long(3), 0), rflags::AC);
    assert_eq!(changed(Machine::long(3), 3), rflags::IF | rflags::IOPL | rflags::AC);
}

#[test]
fn pushf_hides_rf() {
    let mut m = Machine::long(3);
    m.cpu.s.set_rflags(0x202 | rflags::RF);
    assert!(m.run(&[0x9c]).is_ok());
    assert_eq!(m.stack(8, 1), [0x202]);
}

#[test]
fn pop_to_memory_uses_the_new_stack_pointer_and_faults_cleanly() {
    let mut m = Machine::long(3);
    m.write(USER_STACK, 8, 0x1122);
    // pop qword [rsp + 8]
    assert!(m.run(&[0x8f, 0x44, 0x24, 8]).is_ok());
    assert_eq!(m.read(USER_STACK + 16, 8), 0x1122);
    m.unmap(0x2_0000);
    m.cpu.s.gpr[gpr::RAX] = 0x2_0000;
    assert_eq!(m.run(&[0x8f, 0x00]), Err(Fault::page(0x2_0000, 6)));
    assert_eq!(m.cpu.s.gpr[gpr::RSP], USER_STACK + 8);
}

#[test]
fn pusha_and_popa() {
    let mut m = Machine::protected(3);
    for n in 0..8 {
        if n != gpr::RSP {
            m.cpu.s.gpr[n] = 0x1000 + n as u64;
        }
    }
    assert!(m.run(&[0x60]).is_ok());
    assert_eq!(m.stack(4, 8), [0x1007, 0x1006, 0x1005, USER_STACK, 0x1003, 0x1002, 0x1001, 0x1000]);
    m.cpu.s.gpr[gpr::RAX] = 0;
    m.cpu.s.gpr[gpr::RDI] = 0;
    assert!(m.run(&[0x61]).is_ok());
    let s = &m.cpu.s;
    assert_eq!((s.gpr[gpr::RAX], s.gpr[gpr::RDI], s.gpr[gpr::RSP]), (0x1000, 0x1007, USER_STACK));
}

#[test]
fn nothing_of_a_frame_is_pushed_onto_a_missing_page() {
    let mut m = Machine::long(3);
    m.unmap(0x2_0000);
    m.cpu.s.gpr[gpr::RSP] = 0x2_1010;
    m.cpu.s.gpr[gpr::RBP] = 0x2_1100;
    // enter 0, 4: five values, the last ones below the page.
    assert_eq!(m.run(&[0xc8, 0, 0, 4]), Err(Fault::page(0x2_0fe8, 6)));
    assert_eq!((m.read(0x2_1000, 8), m.read(0x2_1008, 8)), (0, 0));
    assert_eq!(m.cpu.s.gpr[gpr::RSP], 0x2_1010);
}

#[test]
fn enter_copies_frame_pointers_and_leave_undoes_it() {
    let mut m = Machine::long(3);
    m.cpu.s.gpr[gpr::RBP] = 0x2_0000;
    m.write(0x2_0000 - 8, 8, 0xaaaa);
    // enter 0x20, 2
    assert!(m.run(&[0xc8, 0x20, 0, 2]).is_ok());
    assert_eq!(m.cpu.s.gpr[gpr::RSP], USER_STACK - 24 - 0x20);
    assert_eq!(m.cpu.s.gpr[gpr::RBP], USER_STACK - 8);
    assert_eq!(m.read(USER_STACK - 8, 8), 0x2_0000);
    assert_eq!(m.read(USER_STACK - 16, 8), 0xaaaa);
    assert_eq!(m.read(USER_STACK - 24, 8), USER_STACK - 8);
    assert!(m.run(&[0xc9]).is_ok());
    assert_eq!((m.cpu.s.gpr[gpr::RSP], m.cpu.s.gpr[gpr::RBP]), (USER_STACK, 0x2_0000));
}

#[test]
fn immediates_are_sign_extended() {
    let mut m = Machine::protected(3);
    assert!(m.run(&[0x6a, 0xff]).is_ok());
    assert!(m.run(&[0x66, 0x68, 0x34, 0x12]).is_ok());
    assert_eq!((m.stack(2, 1), m.read(USER_STACK - 4, 4)), (vec![0x1234], 0xffff_ffff));
}

#[test]
fn interrupts_wait_one_instruction_after_sti() {
    let mut m = Machine::long(0);
    m.cpu.s.set_rflags(2);
    assert_eq!(m.run(&[0xfb]), Ok(Flow::Leave));
    assert!(m.cpu.s.interrupt_shadow);
    m.cpu.s.interrupt_shadow = false;
    assert_eq!(m.run(&[0xfb]), Ok(Flow::Next));
    assert!(!m.cpu.s.interrupt_shadow);
    let mut m = Machine::long(3);
    assert_eq!(m.run(&[0xfa]), Err(Fault::gp(0)));
}

use super::*;
use crate::exec::tests_support::*;

const USER_SS: u64 = USER_DATA as u64;

#[test]
fn page_fault_in_user_code_switches_to_the_kernel_stack() {
    let mut m = Machine::long(3);
    m.gate64(14, 0, 0);
    deliver(&mut m.cpu, Event::Fault(Fault::page(0x1234_5678, 6))).unwrap();
    let s = &m.cpu.s;
    assert_eq!((s.cr2, s.rip, s.cpl(), s.interrupt_flag), (0x1234_5678, HANDLER, 0, 0));
    assert_eq!(s.seg(Seg::Cs).selector, KERNEL_CODE64);
    assert_eq!(s.seg(Seg::Ss).selector, 0);
    assert_eq!(s.gpr[gpr::RSP], KERNEL_STACK - 48);
    let user_cs = u64::from(USER_CODE64);
    assert_eq!(m.stack(8, 6), [6, CODE, user_cs, 0x1_0202, USER_STACK, USER_SS]);
}

#[test]
fn interrupt_in_kernel_code_stays_on_its_stack_and_aligns_it() {
    let mut m = Machine::long(0);
    m.gate64(0x30, 0, 0);
    m.cpu.s.gpr[gpr::RSP] = 0xa_ff3;
    deliver(&mut m.cpu, Event::External(0x30)).unwrap();
    assert_eq!(m.cpu.s.gpr[gpr::RSP], 0xaff0 - 40);
    assert_eq!(m.stack(8, 5), [CODE, 8, 0x202, 0xaff3, 0x10]);
    assert_eq!(m.cpu.s.seg(Seg::Ss).selector, KERNEL_DATA);
}

#[test]
fn nmi_uses_its_interrupt_stack_and_blocks_further_ones() {
    let mut m = Machine::long(0);
    m.gate64(2, 1, 0);
    deliver(&mut m.cpu, Event::Nmi).unwrap();
    assert_eq!(m.cpu.s.gpr[gpr::RSP], (IST1 & !0xf) - 40);
    assert!(m.cpu.s.nmi_blocked);
}

#[test]
fn software_interrupt_returns_behind_itself() {
    let mut m = Machine::long(3);
    m.gate64(0x80, 0, 3);
    assert_eq!(m.run(&[0xcd, 0x80]), Ok(Flow::Jump));
    assert_eq!(m.cpu.s.rip, HANDLER);
    assert_eq!(m.stack(8, 3), [CODE + 2, u64::from(USER_CODE64), 0x202]);
}

#[test]
fn software_interrupt_through_a_kernel_gate_is_a_protection_fault() {
    let mut m = Machine::long(3);
    m.gate64(0x80, 0, 0);
    m.gate64(13, 0, 0);
    assert_eq!(m.run(&[0xcd, 0x80]), Ok(Flow::Jump));
    // Index, IDT bit, no EXT: the program asked for it. It returns to the instruction itself, with RF.
    assert_eq!(m.stack(8, 4), [0x80 * 8 + 2, CODE, u64::from(USER_CODE64), 0x1_0202]);
}

#[test]
fn page_fault_that_cannot_be_delivered_becomes_a_double_fault() {
    let mut m = Machine::long(3);
    m.gate64(14, 0, 0);
    m.gate64(8, 1, 0);
    m.unmap(KERNEL_STACK);
    deliver(&mut m.cpu, Event::Fault(Fault::page(0x5000, 4))).unwrap();
    assert_eq!(m.cpu.s.gpr[gpr::RSP], (IST1 & !0xf) - 48);
    assert_eq!(m.stack(8, 2), [0, CODE]);
    // The second page fault's address: the top of the stack that is missing.
    assert_eq!(m.cpu.s.cr2, KERNEL_STACK - 8);
}

#[test]
fn protection_fault_then_page_fault_is_served_as_a_page_fault() {
    let mut m = Machine::long(3);
    m.gate64(13, 0, 0);
    m.gate64(14, 1, 0);
    m.unmap(KERNEL_STACK);
    deliver(&mut m.cpu, Event::Fault(Fault::gp(0))).unwrap();
    assert_eq!(m.cpu.s.cr2, KERNEL_STACK - 8);
    assert_eq!(m.stack(8, 2), [2, CODE]);
}

#[test]
fn triple_fault_tells_its_story() {
    let mut m = Machine::long(0);
    let before = (m.cpu.s.rip, m.cpu.s.gpr, m.cpu.s.rflags());
    let triple = deliver(&mut m.cpu, Event::Fault(Fault::page(0x42, 2))).unwrap_err();
    let expected = "at 0008:6000: exception 14 (error code 0x2, address 0x42), and during its delivery \
                    exception 13 (error code 0x73): double fault, and during its delivery exception 13 \
                    (error code 0x43)";
    assert_eq!(triple.detail, expected);
    assert_eq!((m.cpu.s.rip, m.cpu.s.gpr, m.cpu.s.rflags()), before);
}

#[test]
fn protected_mode_takes_stack_and_gate_size_from_tss_and_idt() {
    let mut m = Machine::protected(3);
    m.gate32(13, 14, 0);
    deliver(&mut m.cpu, Event::Fault(Fault::gp(0x18))).unwrap();
    let user_cs = u64::from(USER_CODE32);
    assert_eq!(m.stack(4, 6), [0x18, CODE, user_cs, 0x1_0202, USER_STACK, USER_SS]);
    assert_eq!(m.cpu.s.seg(Seg::Ss).selector, KERNEL_DATA);
    assert_eq!(m.cpu.s.gpr[gpr::RSP], KERNEL_STACK - 24);
    assert_eq!(m.cpu.s.interrupt_flag, 0);
}

#[test]
fn trap_gate_leaves_the_interrupt_flag() {
    let mut m = Machine::protected(0);
    m.gate32(3, 15, 0);
    assert_eq!(m.run(&[0xcc]), Ok(Flow::Jump));
    assert_eq!(m.stack(4, 3), [CODE + 1, u64::from(KERNEL_CODE32), 0x202]);
    assert_eq!(m.cpu.s.interrupt_flag, 1);
}

#[test]
fn virtual_8086_mode_saves_and_clears_its_segments() {
    let mut m = Machine::protected(3);
    for (n, seg) in Seg::ALL.into_iter().enumerate() {
        *m.cpu.s.seg_mut(seg) = segments::v86_segment(0x100 + n as u16);
    }
    m.cpu.s.set_rflags(0x202 | rflags::VM);
    m.cpu.s.rip = 0x77;
    m.cpu.s.gpr[gpr::RSP] = 0x1000;
    m.cpu.mode_changed();
    m.gate32(13, 14, 0);
    deliver(&mut m.cpu, Event::Fault(Fault::gp(0))).unwrap();
    let flags = 0x202 | rflags::VM | rflags::RF;
    assert_eq!(m.stack(4, 10), [0, 0x77, 0x101, flags, 0x1000, 0x102, 0x100, 0x103, 0x104, 0x105]);
    assert!(!m.cpu.s.is_v86());
    assert!([Seg::Ds, Seg::Es, Seg::Fs, Seg::Gs].iter().all(|&s| m.cpu.s.seg(s).selector == 0));
    assert_eq!(m.cpu.s.cpl(), 0);

    // And back: IRETD drops the error code first.
    m.cpu.s.gpr[gpr::RSP] += 4;
    assert_eq!(m.run(&[0xcf]), Ok(Flow::Jump));
    assert!(m.cpu.s.is_v86());
    assert_eq!((m.cpu.s.rip, m.cpu.s.gpr[gpr::RSP]), (0x77, 0x1000));
    assert_eq!(Seg::ALL.map(|s| m.cpu.s.seg(s).selector), [0x100, 0x101, 0x102, 0x103, 0x104, 0x105]);
}

#[test]
fn real_mode_goes_through_the_vector_table() {
    let mut m = Machine::real();
    m.write(IDT + 0x21 * 4, 4, 0x0700_1234);
    assert_eq!(m.run(&[0xcd, 0x21]), Ok(Flow::Jump));
    assert_eq!((m.cpu.s.seg(Seg::Cs).base, m.cpu.s.rip), (0x7000, 0x1234));
    assert_eq!(m.stack(2, 3), [CODE + 2, 0, 0x202]);
    assert_eq!(m.run(&[0xcf]), Ok(Flow::Jump));
    assert_eq!((m.cpu.s.seg(Seg::Cs).base, m.cpu.s.rip, m.cpu.s.interrupt_flag), (0, CODE + 2, 1));
}

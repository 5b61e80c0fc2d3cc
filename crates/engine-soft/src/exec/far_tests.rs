use berth_cpu::bits::{gpr, rflags};

use super::*;
use crate::exec::tests_support::*;

fn push(m: &mut Machine, size: u64, values: &[u64]) {
    for value in values {
        m.cpu.s.gpr[gpr::RSP] -= size;
        let at = m.cpu.s.gpr[gpr::RSP];
        m.write(at, size as usize, *value);
    }
}

#[test]
fn far_jump_from_64bit_to_compatibility_code_and_back() {
    let mut m = Machine::long(0);
    m.write(0x5000, 8, 0x1234 | u64::from(KERNEL_CODE32) << 32);
    // jmp far dword [0x5000]
    assert_eq!(m.run(&[0xff, 0x2c, 0x25, 0, 0x50, 0, 0]), Ok(Flow::Jump));
    assert!(!m.cpu.s.is_64bit());
    assert_eq!((m.cpu.s.rip, m.cpu.s.mode.bitness()), (0x1234, 32));
    // jmp 8:0x4321
    assert_eq!(m.run(&[0xea, 0x21, 0x43, 0, 0, 8, 0]), Ok(Flow::Jump));
    assert!(m.cpu.s.is_64bit());
    assert_eq!(m.cpu.s.rip, 0x4321);
}

#[test]
fn far_call_and_return() {
    let mut m = Machine::protected(0);
    let start = m.cpu.s.gpr[gpr::RSP];
    // call 0x48:0x4000, conforming
    assert_eq!(m.run(&[0x9a, 0, 0x40, 0, 0, 0x48, 0]), Ok(Flow::Jump));
    assert_eq!(m.cpu.s.seg(Seg::Cs).selector, CONFORMING_CODE32);
    assert_eq!(m.stack(4, 2), [CODE + 7, u64::from(KERNEL_CODE32)]);
    // retf 8
    assert_eq!(m.run(&[0xca, 8, 0]), Ok(Flow::Jump));
    assert_eq!((m.cpu.s.rip, m.cpu.s.gpr[gpr::RSP]), (CODE + 7, start + 8));
}

#[test]
fn far_jump_to_data_null_or_outside_the_table() {
    let mut m = Machine::protected(0);
    assert_eq!(m.run(&[0xea, 0, 0x40, 0, 0, 0x10, 0]), Err(Fault::gp(0x10)));
    assert_eq!(m.run(&[0xea, 0, 0x40, 0, 0, 0, 0]), Err(Fault::gp(0)));
    assert_eq!(m.run(&[0xea, 0, 0x40, 0, 0, 0x80, 0]), Err(Fault::gp(0x80)));
    assert_eq!(m.run(&[0xea, 0, 0x40, 0, 0, 0x18, 0]), Err(Fault::gp(0x18)));
    assert_eq!(m.cpu.s.rip, CODE);
}

#[test]
fn call_gate_copies_parameters_to_the_inner_stack() {
    let mut m = Machine::protected(3);
    let gate = 0x7000 | u64::from(KERNEL_CODE32) << 16 | 2 << 32 | 0xec << 40;
    m.write(GDT + u64::from(CALL_GATE), 8, gate);
    push(&mut m, 4, &[0xaaaa, 0xbbbb]);
    // call 0x53:0
    assert_eq!(m.run(&[0x9a, 0, 0, 0, 0, 0x53, 0]), Ok(Flow::Jump));
    assert_eq!((m.cpu.s.rip, m.cpu.s.cpl()), (0x7000, 0));
    let frame = [CODE + 7, u64::from(USER_CODE32), 0xbbbb, 0xaaaa, USER_STACK - 8, u64::from(USER_DATA)];
    assert_eq!(m.stack(4, 6), frame);
    // The kernel loads its own data segment; retf 8 must not leave it to the program.
    m.cpu.s.gpr[gpr::RAX] = u64::from(KERNEL_DATA);
    assert_eq!(m.run(&[0x8e, 0xd8]), Ok(Flow::Next));
    assert_eq!(m.run(&[0xca, 8, 0]), Ok(Flow::Jump));
    assert_eq!((m.cpu.s.rip, m.cpu.s.cpl(), m.cpu.s.gpr[gpr::RSP]), (CODE + 7, 3, USER_STACK));
    assert!(m.cpu.s.seg(Seg::Ds).is_unusable());
    assert_eq!(m.cpu.s.seg(Seg::Es).selector, USER_DATA);
}

#[test]
fn iretq_to_user_code() {
    let mut m = Machine::long(0);
    m.cpu.s.nmi_blocked = true;
    let flags = 0x202 | rflags::IOPL | rflags::CF;
    push(&mut m, 8, &[u64::from(USER_DATA), USER_STACK, flags, u64::from(USER_CODE64), 0x40_0000]);
    assert_eq!(m.run(&[0x48, 0xcf]), Ok(Flow::Jump));
    assert_eq!((m.cpu.s.rip, m.cpu.s.cpl(), m.cpu.s.gpr[gpr::RSP]), (0x40_0000, 3, USER_STACK));
    assert_eq!(m.cpu.s.rflags(), flags);
    assert!(!m.cpu.s.nmi_blocked);
}

#[test]
fn iretq_faults_leave_everything_as_it_was() {
    let mut m = Machine::long(0);
    let good = [u64::from(USER_DATA), USER_STACK, 0x202, u64::from(USER_CODE64), 0x1000];
    let cases = [
        (4, 0x8000_0000_0000, Fault::gp(0)),
        (3, 0, Fault::gp(0)),
        (3, u64::from(USER_DATA), Fault::gp(0x20)),
        (0, 0, Fault::gp(0)),
        (0, u64::from(KERNEL_DATA), Fault::gp(0x10)),
    ];
    for (index, value, fault) in cases {
        let mut frame = good;
        frame[index] = value;
        m.cpu.s.gpr[gpr::RSP] = KERNEL_STACK;
        push(&mut m, 8, &frame);
        assert_eq!(m.run(&[0x48, 0xcf]), Err(fault), "{index} {value:#x}");
        assert_eq!((m.cpu.s.rip, m.cpu.s.cpl(), m.cpu.s.gpr[gpr::RSP]), (CODE, 0, KERNEL_STACK - 40));
    }
}

#[test]
fn iretd_from_user_code_cannot_raise_iopl_or_clear_if() {
    let mut m = Machine::protected(3);
    push(&mut m, 4, &[rflags::IOPL | rflags::ZF, u64::from(USER_CODE32), 0x1111]);
    assert_eq!(m.run(&[0xcf]), Ok(Flow::Jump));
    assert_eq!((m.cpu.s.rip, m.cpu.s.rflags()), (0x1111, 0x202 | rflags::ZF));
}

#[test]
fn syscall_and_sysret() {
    let mut m = Machine::long(3);
    m.cpu.msrs.star = 0x001b_0008 << 32;
    m.cpu.msrs.lstar = 0xffff_8000_0000_1000;
    m.cpu.msrs.fmask = rflags::IF | rflags::TF;
    assert_eq!(m.run(&[0x0f, 0x05]), Ok(Flow::Jump));
    assert_eq!((m.cpu.s.rip, m.cpu.s.cpl()), (0xffff_8000_0000_1000, 0));
    assert_eq!((m.cpu.s.gpr[gpr::RCX], m.cpu.s.gpr[gpr::R11]), (CODE + 2, 0x202));
    assert_eq!((m.cpu.s.interrupt_flag, m.cpu.s.seg(Seg::Ss).selector), (0, 0x10));
    assert_eq!(m.run(&[0x48, 0x0f, 0x07]), Ok(Flow::Jump));
    assert_eq!((m.cpu.s.rip, m.cpu.s.cpl(), m.cpu.s.rflags()), (CODE + 2, 3, 0x202));
    assert_eq!((m.cpu.s.seg(Seg::Cs).selector, m.cpu.s.seg(Seg::Ss).selector), (USER_CODE64, USER_DATA));
    assert!(m.cpu.s.is_64bit());
}

#[test]
fn near_transfers_in_16bit_code_keep_to_64_kib() {
    let mut m = Machine::real();
    m.cpu.s.rip = 0xfff0;
    // call +0x20 wraps.
    assert_eq!(m.run(&[0xe8, 0x20, 0]), Ok(Flow::Jump));
    assert_eq!((m.cpu.s.rip, m.stack(2, 1)), (0x13, vec![0xfff3]));
    assert_eq!(m.run(&[0xc3]), Ok(Flow::Jump));
    assert_eq!(m.cpu.s.rip, 0xfff3);
    m.cpu.s.gpr[gpr::RAX] = 0x1_0000;
    // jmp eax is outside the segment.
    assert_eq!(m.run(&[0x66, 0xff, 0xe0]), Err(Fault::gp(0)));
}

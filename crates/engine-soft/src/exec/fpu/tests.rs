//! The instructions on images in guest memory.

use berth_cpu::bits::{cr4, gpr};

use super::x87::X87;
use super::*;
use crate::exec::tests_support::*;

const AREA: u64 = 0x5000;
const XSAVE: &[u8] = &[0x0f, 0xae, 0x23];
const XSAVEOPT: &[u8] = &[0x0f, 0xae, 0x33];
const XSAVEC: &[u8] = &[0x0f, 0xc7, 0x23];
const XRSTOR: &[u8] = &[0x0f, 0xae, 0x2b];
const FXSAVE: &[u8] = &[0x0f, 0xae, 0x03];
const FXRSTOR: &[u8] = &[0x0f, 0xae, 0x0b];
const GP: Fault = Fault::gp(0);

/// Gives the test thread its x87 registers back at the end.
struct KeepX87(X87);

impl Drop for KeepX87 {
    fn drop(&mut self) {
        self.0.load();
    }
}

fn machine() -> (Machine, KeepX87) {
    let keep = KeepX87(X87::host());
    let mut m = Machine::long(0);
    m.cpu.s.cr4 |= cr4::OSXSAVE | cr4::OSFXSR;
    m.cpu.s.xcr0 = m.cpu.vm.cpuid.xcr0_supported();
    m.cpu.s.mxcsr = MXCSR_RESET;
    m.cpu.s.gpr[gpr::RAX] = 7;
    m.cpu.s.gpr[gpr::RDX] = 0;
    m.cpu.s.gpr[gpr::RBX] = AREA;
    m.cpu.mode_changed();
    X87::default().load();
    (m, keep)
}

fn one() -> X87 {
    let mut x87 = X87 { fsw: 7 << 11, ftw: 0x80, ..X87::default() };
    x87.st[0] = [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f];
    x87
}

#[test]
fn everything_comes_back_in_both_forms() {
    for save in [XSAVE, XSAVEC, XSAVEOPT] {
        let (mut m, _keep) = machine();
        one().load();
        m.cpu.s.ymm[15] = std::array::from_fn(|i| i as u8 + 1);
        m.cpu.s.mxcsr = 0x1fa0;
        let ymm = m.cpu.s.ymm;
        m.run(save).unwrap();
        X87::default().load();
        m.cpu.s.ymm = [[0xee; 32]; 16];
        m.cpu.s.mxcsr = MXCSR_RESET;
        m.run(XRSTOR).unwrap();
        assert_eq!((X87::host(), m.cpu.s.mxcsr), (one(), 0x1fa0), "{save:x?}");
        assert!(m.cpu.s.ymm == ymm, "{save:x?}");
    }
}

#[test]
fn components_in_their_initial_state_are_left_out() {
    let (mut m, _keep) = machine();
    m.write(AREA, 2, 0xaaaa);
    m.write(AREA + 160, 8, 0xbbbb);
    m.write(AREA + 512, 8, 0xf8);
    m.run(XSAVEOPT).unwrap();
    assert_eq!(m.read(AREA + 512, 8), 0xf8, "bits outside the request stay");
    assert_eq!((m.read(AREA, 2), m.read(AREA + 160, 8)), (0xaaaa, 0xbbbb));
    m.run(XSAVE).unwrap();
    assert_eq!((m.read(AREA, 2), m.read(AREA + 160, 8), m.read(AREA + 512, 8)), (0x37f, 0, 0xf8));
    m.run(XSAVEC).unwrap();
    assert_eq!((m.read(AREA + 512, 8), m.read(AREA + 520, 8)), (0, 1 << 63 | m.cpu.s.xcr0));
    m.cpu.s.mxcsr = 0x1f81;
    m.run(XSAVEC).unwrap();
    assert_eq!(m.read(AREA + 512, 8), 2, "MXCSR counts as SSE");
}

#[test]
fn absent_components_are_initialized() {
    let (mut m, _keep) = machine();
    one().load();
    m.cpu.s.ymm = [[0xee; 32]; 16];
    m.write(AREA + 24, 4, 0x1fc0);
    m.run(XRSTOR).unwrap();
    assert!(X87::host().is_initial());
    assert!(m.cpu.s.ymm == [[0; 32]; 16]);
    assert_eq!(m.cpu.s.mxcsr, 0x1fc0, "the standard form loads MXCSR all the same");
    m.write(AREA + 520, 8, 1 << 63 | 3);
    m.run(XRSTOR).unwrap();
    assert_eq!(m.cpu.s.mxcsr, MXCSR_RESET, "the compacted form initializes it");
}

#[test]
fn only_requested_components_are_touched() {
    let (mut m, _keep) = machine();
    m.cpu.s.ymm = [[0xee; 32]; 16];
    m.cpu.s.gpr[gpr::RAX] = 1;
    m.write(AREA + 24, 4, 0xffff_ffff);
    m.run(XRSTOR).unwrap();
    assert!(m.cpu.s.ymm == [[0xee; 32]; 16]);
    m.run(XSAVE).unwrap();
    assert_eq!(m.read(AREA + 160, 8), 0);
    assert_eq!(m.read(AREA + 24, 4), 0xffff_ffff, "MXCSR was not asked for");
}

#[test]
fn bad_operands_are_refused() {
    let (mut m, _keep) = machine();
    m.write(AREA + 24, 4, 1 << 30);
    assert_eq!(m.run(XRSTOR), Err(GP), "reserved bit in MXCSR");
    assert_eq!(m.run(FXRSTOR), Err(GP));
    m.cpu.s.gpr[gpr::RBX] = AREA + 8;
    assert_eq!(m.run(XSAVE), Err(GP), "alignment");
    assert_eq!(m.run(FXSAVE), Err(GP));
    m.cpu.s.gpr[gpr::RBX] = AREA + 16;
    assert_eq!(m.run(XSAVE), Err(GP));
    m.run(FXSAVE).unwrap();
    m.cpu.s.cr0 |= cr0::TS;
    assert_eq!(m.run(XSAVE), Err(Fault::plain(vector::NM)));
    m.cpu.s.cr4 &= !cr4::OSXSAVE;
    assert_eq!(m.run(XSAVE), Err(Fault::ud()));
}

#[test]
fn a_fault_in_the_second_page_leaves_everything() {
    let (mut m, _keep) = machine();
    one().load();
    m.cpu.s.gpr[gpr::RBX] = 0x4e00;
    m.unmap(0x5000);
    for save in [XSAVE, XSAVEC, XSAVEOPT] {
        assert!(matches!(m.run(save), Err(Fault { vector: vector::PF, address: 0x5000, .. })));
        assert_eq!(m.read(0x4e00, 8), 0);
    }
}

#[test]
fn fxsave_leaves_the_end_of_the_area() {
    let (mut m, _keep) = machine();
    one().load();
    m.cpu.s.ymm[0][..4].fill(9);
    for at in [416, 464, 504] {
        m.write(AREA + at, 8, 0x55);
    }
    m.run(FXSAVE).unwrap();
    assert_eq!([416, 464, 504].map(|at| m.read(AREA + at, 8)), [0x55; 3]);
    assert_eq!((m.read(AREA, 8), m.read(AREA + 8, 8), m.read(AREA + 16, 8)), (0x80_3800_037f, 0, 0));
    X87::default().load();
    m.cpu.s.ymm[0] = [1; 32];
    m.run(FXRSTOR).unwrap();
    assert_eq!(X87::host(), one());
    assert_eq!(m.cpu.s.ymm[0][..5], [9, 9, 9, 9, 0]);
    assert_eq!(m.cpu.s.ymm[0][16..], [1; 16], "the upper half is not its business");
}

#[test]
fn code_of_32_bits_sees_8_vector_registers() {
    let (_, _keep) = machine();
    let mut m = Machine::protected(0);
    m.cpu.s.cr4 |= cr4::OSXSAVE;
    m.cpu.s.xcr0 = 3;
    m.cpu.s.gpr[gpr::RAX] = 3;
    m.cpu.s.gpr[gpr::RBX] = AREA;
    m.cpu.s.ymm = [[7; 32]; 16];
    m.write(AREA + 24, 4, 0x1f80);
    m.run(XRSTOR).unwrap();
    assert_eq!((m.cpu.s.ymm[7][0], m.cpu.s.ymm[8][0]), (0, 7));
    m.run(XSAVE).unwrap();
    assert_eq!(m.read(AREA + 512, 8), 2);
    assert_eq!(m.read(AREA + 160 + 8 * 16, 8), 0, "not written");
}

#[test]
fn fnsave_initializes_and_frstor_brings_back() {
    let (mut m, _keep) = machine();
    one().load();
    m.run(&[0xdd, 0x33]).unwrap(); // fnsave [rbx]
    assert_eq!(X87::host().fcw, 0x37f);
    assert_eq!(X87::host().ftw, 0);
    assert_eq!(m.read(AREA + 8, 4), 0xffff_3fff);
    m.run(&[0xdd, 0x23]).unwrap(); // frstor [rbx]
    assert_eq!(X87::host(), one());
    m.run(&[0xd9, 0x33]).unwrap(); // fnstenv [rbx]
    m.write(AREA, 2, 0x027f);
    m.run(&[0xd9, 0x23]).unwrap(); // fldenv [rbx]
    assert_eq!(X87::host(), X87 { fcw: 0x27f, ..one() });
}

#[test]
fn a_waiting_exception_stops_waiting_instructions() {
    let (mut m, _keep) = machine();
    X87 { fcw: 0x37e, fsw: 0x8081, ..X87::default() }.load();
    assert_eq!(m.run(&[0xdd, 0x23]), Err(Fault::plain(vector::MF))); // frstor
    m.run(&[0xd9, 0x33]).unwrap(); // fnstenv does not wait, and masks it
    assert!(!X87::host().exception_waits());
}

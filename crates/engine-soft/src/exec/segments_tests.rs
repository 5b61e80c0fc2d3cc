use berth_cpu::bits::gpr;

use super::*;
use crate::exec::tests_support::*;

fn load(m: &mut Machine, modrm: u8, selector: u16) -> Guest<Flow> {
    m.cpu.s.gpr[gpr::RAX] = u64::from(selector);
    m.run(&[0x8e, modrm])
}

const DS: u8 = 0xd8;
const ES: u8 = 0xc0;
const FS: u8 = 0xe0;
const SS: u8 = 0xd0;

#[test]
fn data_segments_check_type_and_privilege() {
    let mut m = Machine::protected(3);
    assert!(load(&mut m, DS, USER_DATA).is_ok());
    assert_eq!(load(&mut m, DS, KERNEL_DATA | 3), Err(Fault::gp(0x10)));
    assert_eq!(load(&mut m, DS, TSS_SELECTOR), Err(Fault::gp(0x30)));
    assert_eq!(load(&mut m, DS, 0xfff3), Err(Fault::gp(0xfff0)));
    // Conforming readable code is open to everyone, a null selector too.
    assert!(load(&mut m, ES, CONFORMING_CODE32).is_ok());
    assert!(load(&mut m, FS, 3).is_ok());
    assert_eq!(m.cpu.s.seg(Seg::Ds).selector, USER_DATA);
    assert!(m.cpu.s.seg(Seg::Fs).is_unusable());
}

#[test]
fn load_sets_the_accessed_bit() {
    let mut m = Machine::protected(0);
    let at = GDT + u64::from(SMALL_STACK16) + 5;
    m.write(at, 1, 0x92);
    assert!(load(&mut m, ES, SMALL_STACK16).is_ok());
    assert_eq!(m.read(at, 1), 0x93);
    let es = m.cpu.s.seg(Seg::Es);
    assert_eq!((es.base, es.limit, es.attr), (0x9000, 0xff, 0x93));
}

#[test]
fn absent_segments_raise_np_or_ss() {
    let mut m = Machine::protected(0);
    m.write(GDT + u64::from(SMALL_STACK16) + 5, 1, 0x12);
    let error = u32::from(SMALL_STACK16);
    assert_eq!(load(&mut m, DS, SMALL_STACK16), Err(Fault::with_error(vector::NP, error)));
    assert_eq!(load(&mut m, SS, SMALL_STACK16), Err(Fault::with_error(vector::SS, error)));
}

#[test]
fn stack_segment_casts_a_shadow() {
    let mut m = Machine::protected(0);
    assert_eq!(load(&mut m, SS, 0), Err(Fault::gp(0)));
    assert_eq!(load(&mut m, SS, USER_DATA), Err(Fault::gp(0x20)));
    assert!(!m.cpu.s.interrupt_shadow);
    assert_eq!(load(&mut m, SS, SMALL_STACK16), Ok(Flow::Leave));
    assert!(m.cpu.s.interrupt_shadow && m.cpu.s.shadow_blocks_debug);
}

#[test]
fn null_stack_segment_is_for_64bit_mode_below_level_3() {
    let mut m = Machine::long(0);
    assert_eq!(load(&mut m, SS, 0), Ok(Flow::Leave));
    assert_eq!(m.cpu.s.cpl(), 0);
    let mut m = Machine::long(3);
    assert_eq!(load(&mut m, SS, 3), Err(Fault::gp(0)));
    assert_eq!(m.cpu.s.cpl(), 3);
}

#[test]
fn stack_limit_and_width_of_a_16bit_stack() {
    let mut m = Machine::protected(0);
    assert!(load(&mut m, SS, SMALL_STACK16).is_ok());
    m.cpu.s.gpr[gpr::RSP] = 0x7777_0002;
    // push eax: the second dword would wrap to the end of 64 KiB, past the limit.
    assert_eq!(m.run(&[0x50]), Err(Fault::with_error(vector::SS, 0)));
    m.cpu.s.gpr[gpr::RSP] = 0x7777_0080;
    assert_eq!(m.run(&[0x50]), Ok(Flow::Next));
    assert_eq!(m.cpu.s.gpr[gpr::RSP], 0x7777_007c);
    assert_eq!(m.read(0x907c, 4), u64::from(SMALL_STACK16));
}

#[test]
fn far_pointer_loads() {
    let mut m = Machine::protected(0);
    m.write(0x5000, 8, 0x0060_1234_5678);
    // lfs ebx, [0x5000]
    assert!(m.run(&[0x0f, 0xb4, 0x1d, 0, 0x50, 0, 0]).is_ok());
    assert_eq!((m.cpu.s.gpr[gpr::RBX], m.cpu.s.seg(Seg::Fs).base), (0x1234_5678, 0x9000));
    m.write(0x5004, 2, 0xf000);
    assert_eq!(m.run(&[0x0f, 0xb4, 0x1d, 0, 0x50, 0, 0]), Err(Fault::gp(0xf000)));
}

#[test]
fn real_mode_keeps_limits() {
    let mut m = Machine::real();
    m.cpu.s.seg_mut(Seg::Ds).limit = u32::MAX;
    assert!(load(&mut m, DS, 0x1234).is_ok());
    let ds = m.cpu.s.seg(Seg::Ds);
    assert_eq!((ds.base, ds.limit), (0x1_2340, u32::MAX));
}

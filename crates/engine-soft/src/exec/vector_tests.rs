use super::*;
use crate::exec::tests_support::*;
use berth_cpu::bits::{cr0, cr4};

const DATA: u64 = 0x5000;

fn machine() -> Machine {
    let mut m = Machine::long(3);
    m.cpu.s.cr4 |= cr4::OSXSAVE | cr4::OSFXSR;
    m.cpu.s.xcr0 = 7;
    m.cpu.s.gpr[gpr::RBX] = DATA;
    m.cpu.s.gpr[gpr::RDI] = DATA;
    for i in 0..1024 {
        m.write(DATA + i * 4, 4, i);
    }
    m.cpu.mode_changed();
    m
}

fn dwords(values: [i32; 8]) -> [u8; YMM_SIZE] {
    let mut bytes = [0; YMM_SIZE];
    for (slot, value) in bytes.chunks_exact_mut(4).zip(values) {
        slot.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

#[test]
fn a_gather_loads_what_the_mask_selects() {
    let mut m = machine();
    m.cpu.s.ymm[0] = [0xee; 32];
    m.cpu.s.ymm[1] = dwords([5, 4, 3, 2, 1, 0, 100, 7]);
    m.cpu.s.ymm[2] = dwords([-1, 0, -1, 0, 1, -1, -1, 0]);
    m.run(&[0xc4, 0xe2, 0x6d, 0x90, 0x04, 0x8b]).unwrap(); // vpgatherdd ymm0, [rbx + ymm1*4], ymm2
    let old = i32::from_le_bytes([0xee; 4]);
    assert_eq!(m.cpu.s.ymm[0], dwords([5, old, 3, old, old, 0, 100, old]));
    assert_eq!(m.cpu.s.ymm[2], [0; 32]);
}

#[test]
fn short_gathers_clear_the_rest() {
    let mut m = machine();
    m.cpu.s.ymm[0] = [0xee; 32];
    m.cpu.s.ymm[1] = [0; 32];
    m.cpu.s.ymm[1][8] = 3;
    m.cpu.s.ymm[2] = [0xff; 32];
    m.run(&[0xc4, 0xe2, 0x69, 0x91, 0x04, 0x8b]).unwrap(); // vpgatherqd xmm0, [rbx + xmm1*4], xmm2
    assert_eq!(m.cpu.s.ymm[0], dwords([0, 3, 0, 0, 0, 0, 0, 0]));
    assert_eq!(m.cpu.s.ymm[2], [0; 32]);
}

#[test]
fn a_faulting_gather_keeps_what_is_done() {
    let mut m = machine();
    m.unmap(0x6000);
    m.cpu.s.ymm[0] = [0; 32];
    m.cpu.s.ymm[1] = dwords([1, 2, 1024, 3, 0, 0, 0, 0]);
    m.cpu.s.ymm[2] = [0xff; 32];
    let fault = m.run(&[0xc4, 0xe2, 0x6d, 0x90, 0x04, 0x8b]).unwrap_err();
    assert_eq!((fault.vector, fault.address), (vector::PF, 0x6000));
    assert_eq!(m.cpu.s.ymm[0], dwords([1, 2, 0, 0, 0, 0, 0, 0]));
    assert_eq!(m.cpu.s.ymm[2], dwords([0, 0, -1, -1, -1, -1, -1, -1]));
}

#[test]
fn a_single_step_of_a_gather_comes_before_the_fault_of_a_later_element() {
    let mut m = machine();
    m.unmap(0x6000);
    m.cpu.s.rflags_rest |= rflags::TF;
    m.cpu.s.ymm[1] = dwords([1, 1024, 0, 0, 0, 0, 0, 0]);
    m.cpu.s.ymm[2] = [0xff; 32];
    let code = [0xc4, 0xe2, 0x6d, 0x90, 0x04, 0x8b];
    assert_eq!(m.run(&code), Err(Fault::plain(vector::DB)));
    assert_eq!(m.cpu.s.ymm[2], dwords([0, -1, -1, -1, -1, -1, -1, -1]));
    assert_ne!(m.cpu.s.rflags_rest & rflags::RF, 0);
    // Restarted, it gathers nothing before the fault.
    assert_eq!(m.run(&code).unwrap_err().vector, vector::PF);
}

#[test]
fn gathers_need_avx_and_no_task_switch() {
    let mut m = machine();
    m.cpu.s.cr0 |= cr0::TS;
    m.cpu.mode_changed();
    assert_eq!(m.run(&[0xc4, 0xe2, 0x6d, 0x90, 0x04, 0x8b]), Err(Fault::plain(vector::NM)));
    m.cpu.s.xcr0 = 3;
    m.cpu.mode_changed();
    assert_eq!(m.run(&[0xc4, 0xe2, 0x6d, 0x90, 0x04, 0x8b]), Err(Fault::ud()));
}

#[test]
fn masked_moves_do_not_touch_what_is_masked() {
    let mut m = machine();
    m.unmap(0x6000);
    m.cpu.s.gpr[gpr::RBX] = 0x5ff0;
    m.cpu.s.ymm[1] = dwords([-1, 0, -1, -1, 0, 0, 0, 0]);
    m.run(&[0xc4, 0xe2, 0x75, 0x8c, 0x03]).unwrap(); // vpmaskmovd ymm0, ymm1, [rbx]
    assert_eq!(m.cpu.s.ymm[0], dwords([1020, 0, 1022, 1023, 0, 0, 0, 0]));
    m.cpu.s.ymm[0] = dwords([7; 8]);
    m.run(&[0xc4, 0xe2, 0x75, 0x8e, 0x03]).unwrap(); // vpmaskmovd [rbx], ymm1, ymm0
    assert_eq!([0, 4, 8, 12].map(|at| m.read(0x5ff0 + at, 4)), [7, 1021, 7, 7]);
    m.cpu.s.ymm[0] = dwords([9; 8]);
    m.cpu.s.ymm[1] = dwords([-1; 8]);
    assert!(m.run(&[0xc4, 0xe2, 0x75, 0x8e, 0x03]).is_err());
    assert_eq!(m.read(0x5ff0, 4), 7, "all or nothing");
}

/// As a CPU does it: the address size cuts the address of the access, not those of its elements.
#[test]
fn a_masked_move_with_a_32_bit_address_goes_on_beyond_4_gib() {
    let mut m = machine();
    m.cpu.s.gpr[gpr::RBX] = 0xffff_fff8;
    m.cpu.s.ymm[1] = dwords([0, 0, 0, 0, 0, 0, -1, 0]);
    let fault = m.run(&[0x67, 0xc4, 0xe2, 0x75, 0x8c, 0x03]).unwrap_err(); // vpmaskmovd ymm0, ymm1, [ebx]
    assert_eq!((fault.vector, fault.address), (vector::PF, 0x1_0000_0010));
}

#[test]
fn maskmovdqu_stores_selected_bytes() {
    let mut m = machine();
    m.cpu.s.ymm[0] = [0x11; 32];
    m.cpu.s.ymm[1] = std::array::from_fn(|i| if i % 2 == 0 { 0x80 } else { 0x7f });
    m.run(&[0x66, 0x0f, 0xf7, 0xc1]).unwrap();
    assert_eq!(m.read(DATA + 8, 8), 0x0011_0011_0011_0011);
}

#[test]
fn maskmovq_reads_the_mmx_registers() {
    let keep = X87::host();
    let mut m = machine();
    let mut x87 = X87 { fsw: 7 << 11, ..X87::default() };
    x87.st[1][..8].fill(0x22); // MM0
    x87.st[2][..2].fill(0x80); // MM1
    x87.load();
    m.write(DATA, 8, 0);
    m.run(&[0x0f, 0xf7, 0xc1]).unwrap();
    let after = X87::host();
    keep.load();
    assert_eq!(m.read(DATA, 8), 0x2222);
    assert_eq!((after.top(), after.ftw), (0, 0xff));
}

#[test]
fn elements_are_little_endian_and_selected_by_their_top_bit() {
    let mut register = [0; YMM_SIZE];
    set_element(&mut register, 4, 3, 0x8000_0001);
    assert_eq!(register[12..16], [1, 0, 0, 0x80]);
    assert_eq!(element(&register, 4, 3), 0x8000_0001);
    assert!(is_selected(&register, 4, 3) && is_selected(&register, 8, 1));
    assert!(!is_selected(&register, 4, 2));
}

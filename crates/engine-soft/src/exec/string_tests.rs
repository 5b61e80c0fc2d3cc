use super::*;
use crate::exec::tests_support::*;
use berth_memory::GuestPhysAddr;

fn fill(m: &mut Machine, at: u64, bytes: &[u8]) {
    m.cpu.vm.memory.write(GuestPhysAddr(at), bytes).unwrap();
}

fn bytes(m: &Machine, at: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    m.cpu.vm.memory.read(GuestPhysAddr(at), &mut data).unwrap();
    data
}

fn set(m: &mut Machine, rsi: u64, rdi: u64, rcx: u64) {
    m.cpu.s.gpr[gpr::RSI] = rsi;
    m.cpu.s.gpr[gpr::RDI] = rdi;
    m.cpu.s.gpr[gpr::RCX] = rcx;
}

fn indices(m: &Machine) -> (u64, u64, u64) {
    (m.cpu.s.gpr[gpr::RSI], m.cpu.s.gpr[gpr::RDI], m.cpu.s.gpr[gpr::RCX])
}

#[test]
fn overlapping_copy_repeats_the_pattern() {
    let mut m = Machine::long(3);
    fill(&mut m, 0x2_0000, b"abc");
    set(&mut m, 0x2_0000, 0x2_0003, 9);
    assert_eq!(m.run(&[0xf3, 0xa4]), Ok(Flow::Next));
    assert_eq!(bytes(&m, 0x2_0000, 12), b"abcabcabcabc");
    assert_eq!(indices(&m), (0x2_0009, 0x2_000c, 0));
}

#[test]
fn backward_copy_across_pages() {
    let mut m = Machine::long(3);
    let data: Vec<u8> = (0..=255).cycle().take(0x3000).collect();
    fill(&mut m, 0x2_0ffd, &data);
    m.cpu.s.direction = 1;
    let count = 0x3000 / 8;
    set(&mut m, 0x2_0ffd + 0x2ff8, 0x3_0801 + 0x2ff8, count);
    assert_eq!(m.run(&[0xf3, 0x48, 0xa5]), Ok(Flow::Next));
    assert_eq!(bytes(&m, 0x3_0801, 0x3000), data);
    assert_eq!(indices(&m), (0x2_0ffd - 8, 0x3_0801 - 8, 0));
}

#[test]
fn fault_in_the_middle_keeps_what_is_done() {
    let mut m = Machine::long(3);
    m.unmap(0x2_2000);
    set(&mut m, 0, 0x2_0ff0, 0x2000);
    m.cpu.s.gpr[gpr::RAX] = 0x5a;
    assert_eq!(m.run(&[0xf3, 0xaa]), Err(Fault::page(0x2_2000, 6)));
    assert_eq!(indices(&m), (0, 0x2_2000, 0x2000 - 0x1010));
    assert_eq!(m.cpu.s.rip, CODE);
    assert_eq!(bytes(&m, 0x2_0fef, 2), [0, 0x5a]);
    assert_eq!(bytes(&m, 0x2_1fff, 1), [0x5a]);
}

#[test]
fn element_across_pages_is_all_or_nothing() {
    let mut m = Machine::long(3);
    m.unmap(0x2_1000);
    set(&mut m, 0x3_0000, 0x2_0ffc, 1);
    fill(&mut m, 0x3_0000, &[0xff; 8]);
    assert_eq!(m.run(&[0x48, 0xa5]), Err(Fault::page(0x2_1000, 6)));
    assert_eq!(bytes(&m, 0x2_0ffc, 4), [0; 4]);
    assert_eq!(indices(&m), (0x3_0000, 0x2_0ffc, 1));
}

#[test]
fn indices_wrap_at_the_address_size() {
    let mut m = Machine::real();
    set(&mut m, 0, 0x1234_fffe, 0x5678_0004);
    m.cpu.s.gpr[gpr::RAX] = 0x41;
    // rep stosb with 16-bit addresses
    assert_eq!(m.run(&[0xf3, 0xaa]), Ok(Flow::Next));
    assert_eq!(indices(&m), (0, 0x1234_0002, 0x5678_0000));
    assert_eq!((bytes(&m, 0xfffe, 3), bytes(&m, 0, 3)), (vec![0x41, 0x41, 0], vec![0x41, 0x41, 0]));
}

#[test]
fn word_at_the_end_of_a_real_mode_segment_faults() {
    let mut m = Machine::real();
    set(&mut m, 0, 0xfffd, 3);
    assert_eq!(m.run(&[0xf3, 0xab]), Err(Fault::gp(0)));
    assert_eq!(indices(&m), (0, 0xffff, 2));
}

#[test]
fn comparison_stops_behind_the_difference_with_its_flags() {
    let mut m = Machine::long(3);
    fill(&mut m, 0x2_0ffd, b"same then A");
    fill(&mut m, 0x3_0000, b"same then B");
    set(&mut m, 0x2_0ffd, 0x3_0000, 100);
    // repe cmpsb
    assert_eq!(m.run(&[0xf3, 0xa6]), Ok(Flow::Next));
    assert_eq!(indices(&m), (0x2_0ffd + 11, 0x3_000b, 89));
    assert_eq!(m.cpu.s.flags.to_rflags(), rflags::CF | rflags::SF | rflags::PF | rflags::AF);
}

#[test]
fn scan_finds_the_element() {
    let mut m = Machine::long(3);
    fill(&mut m, 0x2_0ff0, &[1; 0x40]);
    fill(&mut m, 0x2_1008, &[0; 1]);
    set(&mut m, 0, 0x2_0ff0, u64::MAX);
    m.cpu.s.gpr[gpr::RAX] = 0xff00;
    // repne scasb
    assert_eq!(m.run(&[0xf2, 0xae]), Ok(Flow::Next));
    assert_eq!(indices(&m), (0, 0x2_1009, u64::MAX - 0x19));
    assert_eq!(m.cpu.s.flags.to_rflags(), rflags::ZF | rflags::PF);
}

#[test]
fn count_of_zero_does_nothing() {
    let mut m = Machine::long(3);
    m.unmap(0x2_0000);
    set(&mut m, 0x2_0000, 0x2_0000, 0);
    m.cpu.s.flags = SavedFlags::from_rflags(rflags::CF);
    assert_eq!(m.run(&[0xf3, 0xa6]), Ok(Flow::Next));
    assert_eq!(m.cpu.s.flags.to_rflags(), rflags::CF);
}

#[test]
fn single_step_sees_each_iteration() {
    let mut m = Machine::long(3);
    let flags = m.cpu.s.rflags() | rflags::TF;
    m.cpu.s.set_rflags(flags);
    m.cpu.mode_changed();
    set(&mut m, 0, 0x2_0000, 3);
    assert_eq!(m.run(&[0xf3, 0xaa]), Ok(Flow::Jump));
    assert_eq!((m.cpu.s.rip, indices(&m)), (CODE, (0, 0x2_0001, 2)));
    assert_eq!(m.run(&[0xf3, 0xaa]), Ok(Flow::Jump));
    assert_eq!(m.run(&[0xf3, 0xaa]), Ok(Flow::Next));
    assert_eq!(m.cpu.s.rip, CODE + 2);
}

#[test]
fn load_of_a_small_element_keeps_the_rest_of_rax() {
    let mut m = Machine::long(3);
    fill(&mut m, 0x2_0000, &[1, 2, 3, 4]);
    set(&mut m, 0x2_0000, 0, 3);
    m.cpu.s.gpr[gpr::RAX] = 0x1122_3344_5566_7788;
    assert_eq!(m.run(&[0xf3, 0xac]), Ok(Flow::Next));
    assert_eq!((m.cpu.s.gpr[gpr::RAX], indices(&m)), (0x1122_3344_5566_7703, (0x2_0003, 0, 0)));
}

#[test]
fn port_strings() {
    let mut m = Machine::long(0);
    set(&mut m, 0, 0x2_0000, 3);
    // rep insb
    assert_eq!(m.run(&[0xf3, 0x6c]), Ok(Flow::Next));
    assert_eq!((bytes(&m, 0x2_0000, 4), indices(&m)), (vec![0xff, 0xff, 0xff, 0], (0, 0x2_0003, 0)));
    // outsw
    set(&mut m, 0x2_0000, 0, 3);
    assert_eq!(m.run(&[0x66, 0x6f]), Ok(Flow::Next));
    assert_eq!(indices(&m), (0x2_0002, 0, 3));
}

use super::*;
use crate::exec::tests_support::*;

#[test]
fn input_keeps_or_clears_the_rest_of_the_register() {
    let mut m = Machine::long(0);
    m.cpu.s.gpr[gpr::RAX] = 0x1111_2222_3333_4444;
    m.run(&[0xe4, 0x60]).unwrap(); // in al, 0x60
    assert_eq!(m.cpu.s.gpr[gpr::RAX], 0x1111_2222_3333_44ff);
    m.run(&[0xed]).unwrap(); // in eax, dx
    assert_eq!(m.cpu.s.gpr[gpr::RAX], 0xffff_ffff);
}

#[test]
fn the_bitmap_decides_for_user_code() {
    let mut m = Machine::long(3);
    m.write(TSS + MAP_BASE, 2, 0x68);
    assert_eq!(m.run(&[0xee]), Err(Fault::gp(0)), "the TSS ends before the bitmap");
    m.cpu.s.tr.limit = 0x67 + 0x80;
    m.write(TSS + 0x68 + 0x70 / 8, 2, 0b1000);
    for (port, size, allowed) in [
        (0x70, 1, true),
        (0x72, 1, true),
        (0x73, 1, false),
        (0x70, 2, true),
        (0x70, 4, false),
        (0x72, 2, false),
    ] {
        assert_eq!(check(&mut m.cpu, port, size).is_ok(), allowed, "{port:#x} {size}");
    }
    // Both bytes must lie inside the limit.
    assert!(check(&mut m.cpu, 0x3f7, 1).is_ok());
    assert!(check(&mut m.cpu, 0x3f8, 1).is_err());
}

#[test]
fn iopl_opens_all_ports() {
    let mut m = Machine::long(3);
    m.cpu.s.set_rflags(0x3202);
    assert_eq!(m.run(&[0xee]), Ok(Flow::Next));
}

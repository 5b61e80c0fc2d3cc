use berth_cpu::bits::efer;
use berth_cpu::msr as n;

use super::*;
use crate::exec::tests_support::*;

const GP: Fault = Fault::gp(0);

fn wrmsr(m: &mut Machine, number: u32, value: u64) -> Guest<Flow> {
    let gpr = &mut m.cpu.s.gpr;
    (gpr[gpr::RCX], gpr[gpr::RAX], gpr[gpr::RDX]) = (number.into(), value & 0xffff_ffff, value >> 32);
    m.run(&[0x0f, 0x30])
}

fn rdmsr(m: &mut Machine, number: u32) -> Guest<u64> {
    m.cpu.s.gpr[gpr::RCX] = number.into();
    m.run(&[0x0f, 0x32])?;
    Ok(m.cpu.s.gpr[gpr::RDX] << 32 | m.cpu.s.gpr[gpr::RAX])
}

#[test]
fn registers_take_what_they_should() {
    let mut m = Machine::long(0);
    for (number, good, bad) in [
        (n::IA32_LSTAR, 0xffff_8000_0000_1234, 1 << 47),
        (n::IA32_FMASK, 0x4_7700, 1 << 32),
        (n::IA32_PAT, 0x0007_0106_0007_0406, 0x0007_0206_0007_0406),
        (n::IA32_KERNEL_GS_BASE, 0x1000, 0x8000_0000_0000_0000),
        (n::IA32_GS_BASE, 0xffff_ffff_8000_0000, 0x0000_9000_0000_0000),
        (n::IA32_TSC_AUX, 3, 1 << 32),
        (n::IA32_SPEC_CTRL, 1, 4),
        (0x200, 0x8000_0006, 0x8000_0002),
    ] {
        assert_eq!(wrmsr(&mut m, number, bad), Err(GP), "{number:#x}");
        wrmsr(&mut m, number, good).unwrap();
        assert_eq!(rdmsr(&mut m, number), Ok(good), "{number:#x}");
    }
    assert_eq!(m.cpu.s.seg(Seg::Gs).base, 0xffff_ffff_8000_0000);
}

#[test]
fn unknown_and_constant_registers_fault() {
    let mut m = Machine::long(0);
    assert_eq!(rdmsr(&mut m, 0x1234_5678), Err(GP));
    assert_eq!(wrmsr(&mut m, 0x1234_5678, 0), Err(GP));
    assert_eq!(wrmsr(&mut m, n::IA32_MTRRCAP, 0), Err(GP));
    assert_eq!(rdmsr(&mut m, n::IA32_PRED_CMD), Err(GP));
    assert_eq!(rdmsr(&mut Machine::long(3), n::IA32_PAT), Err(GP));
}

#[test]
fn efer_is_checked() {
    let mut m = Machine::long(0);
    let on = m.cpu.s.efer;
    assert_eq!(wrmsr(&mut m, n::IA32_EFER, on & !efer::LME), Err(GP), "paging is on");
    assert_eq!(wrmsr(&mut m, n::IA32_EFER, on | 1 << 12), Err(GP), "no SVM");
    wrmsr(&mut m, n::IA32_EFER, on & !efer::NXE & !efer::LMA).unwrap();
    assert_eq!(m.cpu.s.efer, on & !efer::NXE, "LMA cannot be written");
}

#[test]
fn writing_the_tsc_moves_it_and_its_adjustment() {
    let mut m = Machine::long(0);
    wrmsr(&mut m, n::IA32_TSC, 1 << 60).unwrap();
    assert_eq!(rdmsr(&mut m, n::IA32_TSC).unwrap() >> 60, 1);
    let adjust = rdmsr(&mut m, n::IA32_TSC_ADJUST).unwrap();
    assert_eq!(adjust, m.cpu.msrs.tsc_offset);
    wrmsr(&mut m, n::IA32_TSC_ADJUST, 0).unwrap();
    assert_eq!(m.cpu.msrs.tsc_offset, 0);
}

#[test]
fn saved_registers_can_be_restored() {
    let mut m = Machine::long(0);
    wrmsr(&mut m, n::IA32_LSTAR, 0x1234).unwrap();
    wrmsr(&mut m, n::KVM_STEAL_TIME, 0x8001).unwrap();
    let saved = super::super::msr::save(&mut m.cpu);
    assert!(saved.contains(&(n::IA32_LSTAR, 0x1234)) && saved.contains(&(n::KVM_STEAL_TIME, 0x8001)));
    let mut other = Machine::long(0);
    super::super::msr::restore(&mut other.cpu, &saved).unwrap();
    assert_eq!(rdmsr(&mut other, n::IA32_LSTAR), Ok(0x1234));
    // What this CPU does not have may be missing, unless guests depend on it.
    let not_canonical = 1 << 62;
    assert_eq!(super::super::msr::restore(&mut other.cpu, &[(0x1234_5678, 1)]), Ok(()));
    assert_eq!(
        super::super::msr::restore(&mut other.cpu, &[(n::IA32_LSTAR, not_canonical)]),
        Err(n::IA32_LSTAR)
    );
}

#[test]
fn rdtscp_counts_up_and_names_the_cpu() {
    let mut m = Machine::long(3);
    m.cpu.msrs.tsc_aux = 7;
    let mut read = || {
        m.run(&[0x0f, 0x01, 0xf9]).unwrap();
        m.cpu.s.gpr[gpr::RDX] << 32 | m.cpu.s.gpr[gpr::RAX]
    };
    let (first, second) = (read(), read());
    assert!(second > first);
    assert_eq!(m.cpu.s.gpr[gpr::RCX], 7);
    m.cpu.s.cr4 |= cr4::TSD;
    assert_eq!(m.run(&[0x0f, 0x31]), Err(GP));
}

#[test]
fn cpuid_shows_the_state_of_this_vcpu() {
    let mut m = Machine::long(3);
    m.cpu.s.cr4 |= cr4::OSXSAVE;
    m.cpu.s.gpr[gpr::RAX] = 1;
    m.run(&[0x0f, 0xa2]).unwrap();
    assert_eq!(m.cpu.s.gpr[gpr::RCX] >> 27 & 1, 1);
    assert_eq!(m.cpu.s.gpr[gpr::RBX] >> 24, 0);
}

#[test]
fn invpcid_checks_type_and_descriptor() {
    let mut m = Machine::long(0);
    let invpcid = |m: &mut Machine, kind: u64, low: u64, lin: u64| {
        m.write(0x5000, 8, low);
        m.write(0x5008, 8, lin);
        (m.cpu.s.gpr[gpr::RAX], m.cpu.s.gpr[gpr::RBX]) = (kind, 0x5000);
        m.run(&[0x66, 0x0f, 0x38, 0x82, 0x03])
    };
    for (kind, low, lin) in [(4, 0, 0), (2, 0x1000, 0), (0, 1, 0), (1, 1, 0), (0, 0, 1 << 47)] {
        assert_eq!(invpcid(&mut m, kind, low, lin), Err(GP), "{kind} {low:#x} {lin:#x}");
    }
    for kind in 0..4 {
        assert_eq!(invpcid(&mut m, kind, 0, 0x1000), Ok(Flow::Leave));
    }
}

#[test]
fn segment_bases_and_swapgs() {
    let mut m = Machine::long(0);
    m.cpu.s.gpr[gpr::RAX] = 0x1111;
    assert_eq!(m.run(&[0xf3, 0x48, 0x0f, 0xae, 0xd8]), Err(Fault::ud()), "CR4.FSGSBASE is clear");
    m.cpu.s.cr4 |= cr4::FSGSBASE;
    m.run(&[0xf3, 0x48, 0x0f, 0xae, 0xd8]).unwrap(); // wrgsbase rax
    m.cpu.msrs.kernel_gs_base = 0x2222;
    m.run(&[0x0f, 0x01, 0xf8]).unwrap(); // swapgs
    m.run(&[0xf3, 0x48, 0x0f, 0xae, 0xc9]).unwrap(); // rdgsbase rcx
    assert_eq!((m.cpu.s.gpr[gpr::RCX], m.cpu.msrs.kernel_gs_base), (0x2222, 0x1111));
    m.cpu.s.gpr[gpr::RAX] = 1 << 47;
    assert_eq!(m.run(&[0xf3, 0x48, 0x0f, 0xae, 0xd0]), Err(GP)); // wrfsbase rax
}

#[test]
fn only_the_kernel_halts_and_opens_user_memory() {
    let mut m = Machine::long(0);
    assert_eq!(m.run(&[0xf4]), Ok(Flow::Halt));
    m.run(&[0x0f, 0x01, 0xcb]).unwrap(); // stac
    assert_ne!(m.cpu.s.rflags() & rflags::AC, 0);
    m.run(&[0x0f, 0x01, 0xca]).unwrap(); // clac
    assert_eq!(m.cpu.s.rflags() & rflags::AC, 0);
    let mut m = Machine::long(3);
    assert_eq!(m.run(&[0xf4]), Err(GP));
    assert_eq!(m.run(&[0x0f, 0x01, 0xcb]), Err(Fault::ud()));
    assert_eq!(m.run(&[0x0f, 0x09]), Err(GP)); // wbinvd
}

//! From one mode to another and back (SDM volume 3, 9.8 and 9.9).

use berth_tests_system::prelude::*;

/// Writes the GDT of the kit into a guest that starts in real mode, and four-level tables for the first 2 MiB.
/// Returns their root.
fn prepare(g: &mut Guest) -> u64 {
    for selector in [selector::CODE64, selector::DATA, selector::CODE32, selector::CODE16, selector::DATA16] {
        g.descriptor(selector, berth_tests_system::mode::descriptor_of(selector));
    }
    // The pseudo-descriptor for LGDT.
    g.set(DATA, 2, GDT_ENTRIES * 8 - 1);
    g.set(DATA + 2, 4, GDT);
    let root = ARENA;
    g.set(root, 8, (root + 0x1000) | flag::USER);
    g.set(root + 0x1000, 8, (root + 0x2000) | flag::USER);
    g.set(root + 0x2000, 8, flag::KERNEL | flag::PS);
    root
}

/// The first byte of code after this is 32-bit code at `next`.
fn to_protected(a: &mut CodeAssembler, next: u64) {
    asm!(a; lgdt(fword_ptr(DATA)); mov(eax, cr0); or(al, 1); mov(cr0, eax); jmp_far(selector::CODE32, next as u32));
}

fn real_to_protected_to_long_and_all_the_way_back() {
    let mut g = Guest::mode(Mode::Real);
    let root = prepare(&mut g);
    // Written from the last stage to the first, because each one needs the address of the next.
    let real_again =
        g.code_of(16, |a| asm!(a; xor(ax, ax); mov(ds, ax); mov(ss, ax); mov(eax, 6); log(); done()));
    let leave_protected = g.code_of(16, |a| {
        asm!(a; mov(eax, 5); log(); mov(eax, cr0); and(al, 0xfe); mov(cr0, eax); jmp_far(0, real_again as u32));
    });
    let leave_long = g.code_of(32, |a| {
        asm!(a; log_value(4); mov(eax, cr0); btr(eax, 31); mov(cr0, eax));
        asm!(a; mov(ecx, msr::IA32_EFER); rdmsr(); btr(eax, 8); wrmsr());
        asm!(a; mov(ax, u32::from(selector::DATA16)); mov(ds, ax); mov(ss, ax); jmp_far(selector::CODE16, leave_protected as u32));
    });
    g.set(DATA + 16, 4, leave_long);
    g.set(DATA + 20, 2, u64::from(selector::CODE32));
    let long = g.code_of(64, |a| {
        asm!(a; log_value(3); mov(rcx, 0x1234_5678_9abc_def0u64); shr(rcx, 32); mov(eax, ecx); log());
        asm!(a; jmp(fword_ptr(DATA + 16)));
    });
    let compatibility = g.code_of(32, |a| asm!(a; log_value(2); jmp_far(selector::CODE64, long as u32)));
    let protected = g.code_of(32, |a| {
        asm!(a; mov(ax, u32::from(selector::DATA)); mov(ds, ax); mov(ss, ax); mov(esp, STACK as u32); log_value(1));
        asm!(a; mov(eax, cr4); bts(eax, 5); mov(cr4, eax); mov(eax, root as u32); mov(cr3, eax));
        asm!(a; mov(ecx, msr::IA32_EFER); rdmsr(); bts(eax, 8); wrmsr(); mov(eax, cr0); bts(eax, 31); mov(cr0, eax));
        asm!(a; jmp_far(selector::CODE32, compatibility as u32));
    });
    let main = g.code_of(16, |a| to_protected(a, protected));
    let end = g.run(main).done();
    assert_eq!(g.log(), [1, 2, 3, 0x1234_5678, 4, 5, 6]);
    assert_eq!(end.state.efer & (efer::LME | efer::LMA), 0);
    assert_eq!(end.state.cr0 & (cr0::PE | cr0::PG), 0);
}

fn real_mode_keeps_limits_that_protected_mode_loaded() {
    // "Unreal" mode: a data segment of 4 GiB is still there after CR0.PE is cleared.
    let mut g = Guest::mode(Mode::Real);
    prepare(&mut g);
    g.set(ARENA + 0x10_0000, 4, 0x1234_5678);
    let main = g.code(|a| {
        asm!(a; lgdt(fword_ptr(DATA)); mov(eax, cr0); or(al, 1); mov(cr0, eax));
        asm!(a; mov(cx, u32::from(selector::DATA)); mov(ds, cx); and(al, 0xfe); mov(cr0, eax));
        asm!(a; mov(ebx, ARENA as u32 + 0x10_0000); mov(eax, dword_ptr(ebx)); log(); done());
    });
    g.run(main).done();
    assert_eq!(g.log(), [0x1234_5678]);
}

fn code_between_setting_pe_and_the_jump_is_still_16_bit() {
    let mut g = Guest::mode(Mode::Real);
    prepare(&mut g);
    let protected = g.code_of(32, |a| asm!(a; log(); done()));
    let main = g.code(|a| {
        asm!(a; lgdt(fword_ptr(DATA)); mov(eax, cr0); or(al, 1); mov(cr0, eax));
        // B8 with a 16-bit immediate here, which 32-bit code would take for 32 bits.
        asm!(a; xor(eax, eax); mov(ax, 0x1234); jmp_far(selector::CODE32, protected as u32));
    });
    g.run(main).done();
    assert_eq!(g.log(), [0x1234]);
}

fn the_same_bytes_in_16_32_and_64_bit_code() {
    // 66 B8 imm; then 40: INC EAX, or a REX prefix.
    let bytes = [0xb8, 0x01, 0x00, 0x90, 0x90, 0x40, 0x90, 0xe6, 0xe0, 0xe7, 0xe0];
    for (mode, expected) in
        [(Mode::Real, 0x0002), (Mode::Protected32, 0x9090_0002), (Mode::Long, 0x9090_0001)]
    {
        let mut g = Guest::mode(mode);
        let main = g.code(|a| asm!(a; bytes(&bytes); done()));
        let end = g.run(main).done();
        assert_eq!(end.rax(), expected, "{mode:?}");
    }
}

fn one_page_of_code_in_two_modes() {
    // The same physical code is executed by 64-bit and by compatibility mode, alternately.
    let mut g = Guest::long();
    // 64-bit: MOV EAX, 1; REX RET? No: 40 is a prefix of RETF. 32-bit: MOV EAX, 1; INC EAX; RETF.
    g.write(ARENA, &[0xb8, 1, 0, 0, 0, 0x40, 0xcb]);
    g.set(DATA, 4, ARENA);
    g.set(DATA + 4, 2, u64::from(selector::CODE32));
    g.set(DATA + 8, 4, ARENA);
    g.set(DATA + 12, 2, u64::from(selector::CODE64));
    let main = g.code(|a| {
        for _ in 0..3 {
            asm!(a; call(fword_ptr(DATA)); log(); call(fword_ptr(DATA + 8)); log());
        }
        asm!(a; done());
    });
    g.run(main).done();
    assert_eq!(g.log(), [2, 1, 2, 1, 2, 1]);
}

fn long_mode_needs_pae() {
    let mut g = Guest::mode(Mode::Protected32);
    let main = g.code(|a| {
        asm!(a; mov(ecx, msr::IA32_EFER); rdmsr(); bts(eax, 8); wrmsr(); mov(eax, cr0); bts(eax, 31); mov(cr0, eax));
    });
    g.run(main).fault(vector::GP, 0);
}

fn paging_cannot_be_switched_off_in_64_bit_code() {
    let mut g = Guest::long();
    let main = g.code(|a| asm!(a; mov(rax, cr0); btr(rax, 31); mov(cr0, rax)));
    g.run(main).fault(vector::GP, 0);
}

fn lme_cannot_change_while_paging_is_on() {
    let mut g = Guest::long();
    let main = g.code(|a| asm!(a; mov(ecx, msr::IA32_EFER); rdmsr(); btr(eax, 8); wrmsr()));
    g.run(main).fault(vector::GP, 0);
}

fn lma_appears_with_paging() {
    let mut g = Guest::mode(Mode::Pae);
    // Four-level tables for the first 2 MiB.
    let root = ARENA;
    g.set(root, 8, (root + 0x1000) | flag::USER);
    g.set(root + 0x1000, 8, (root + 0x2000) | flag::USER);
    g.set(root + 0x2000, 8, flag::KERNEL | flag::PS);
    let main = g.code(|a| {
        asm!(a; mov(eax, cr0); btr(eax, 31); mov(cr0, eax));
        asm!(a; mov(ecx, msr::IA32_EFER); rdmsr(); bts(eax, 8); wrmsr(); rdmsr(); log());
        asm!(a; mov(eax, root as u32); mov(cr3, eax); mov(eax, cr0); bts(eax, 31); mov(cr0, eax));
        asm!(a; mov(ecx, msr::IA32_EFER); rdmsr(); log(); done());
    });
    g.run(main).done();
    let bits: Vec<_> = g.log().iter().map(|v| u64::from(*v) & (efer::LME | efer::LMA)).collect();
    assert_eq!(bits, [efer::LME, efer::LME | efer::LMA]);
}

fn upper_halves_are_gone_after_32_bit_operations_in_compatibility_mode() {
    let mut g = Guest::long();
    g.reg(gpr::RCX, u64::MAX);
    g.reg(gpr::R8, u64::MAX);
    let compatibility = g.code_of(32, |a| asm!(a; inc(ecx); retf()));
    g.set(DATA, 4, compatibility);
    g.set(DATA + 4, 2, u64::from(selector::CODE32));
    let main = g.code(|a| asm!(a; call(fword_ptr(DATA)); done()));
    let end = g.run(main).done();
    assert_eq!((end.reg(gpr::RCX), end.reg(gpr::R8)), (0, u64::MAX));
}

fn lmsw_sets_pe_and_does_not_clear_it() {
    let mut g = Guest::mode(Mode::Real);
    prepare(&mut g);
    let protected = g.code_of(32, |a| {
        asm!(a; mov(ax, u32::from(selector::DATA)); mov(ss, ax); xor(eax, eax); lmsw(ax); smsw(eax); log(); done());
    });
    let main = g.code(|a| {
        asm!(a; lgdt(fword_ptr(DATA)); mov(ax, 1); lmsw(ax); jmp_far(selector::CODE32, protected as u32));
    });
    g.run(main).done();
    assert_eq!(g.log()[0] & 1, 1);
}

fn virtual_8086_mode_and_out_again() {
    let mut g = Guest::mode(Mode::Paged32);
    // The task may use all of the low memory; level 3 needs the user bit.
    for page in 0..16 {
        let at = g.tables.entry(page << 12, 12);
        g.tables.set(at, g.tables.get(at) | flag::U);
    }
    let task = g.code_of(16, |a| asm!(a; mov(ax, ds); shl(ax, 4); add(ax, word_ptr(0)); int3()));
    let handler = g.code(|a| asm!(a; mov(ebx, dword_ptr(esp + 8)); mov(ecx, dword_ptr(esp + 24)); done()));
    g.set_gate(vector::BP, Gate { dpl: 3, ..g.gate_to(handler) });
    // DS is 0xE00: the word at 0xE000.
    g.set(DATA, 2, 7);
    let main = g.code(|a| {
        asm!(a; push(0); push(0); push(0xe00); push(0); push(0); push(0x6ff0); push(0x2_0202); push(0); push(task as i32));
        asm!(a; iretd());
    });
    let end = g.run(main).done();
    assert_eq!(end.rax() & 0xffff, 0xe007);
    assert_ne!(end.reg(gpr::RBX) & rflags::VM, 0, "the frame says that it came from virtual-8086 mode");
    assert_eq!(end.reg(gpr::RCX), 0xe00, "DS is in the frame");
    assert_eq!(end.state.ds.selector, 0, "data segments are null in the handler");
}

berth_tests_system::cases![
    real_to_protected_to_long_and_all_the_way_back,
    real_mode_keeps_limits_that_protected_mode_loaded,
    code_between_setting_pe_and_the_jump_is_still_16_bit,
    the_same_bytes_in_16_32_and_64_bit_code,
    one_page_of_code_in_two_modes,
    long_mode_needs_pae,
    paging_cannot_be_switched_off_in_64_bit_code,
    lme_cannot_change_while_paging_is_on,
    lma_appears_with_paging,
    upper_halves_are_gone_after_32_bit_operations_in_compatibility_mode,
    lmsw_sets_pe_and_does_not_clear_it,
    virtual_8086_mode_and_out_again,
];

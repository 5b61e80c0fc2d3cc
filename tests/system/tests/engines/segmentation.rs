//! Segments: limits, types, null selectors, bases, wrap-around (SDM volume 3, chapter 5).

use berth_tests_system::mode::{descriptor, loaded};
use berth_tests_system::prelude::*;

/// Access rights of a writable data segment, level 0, 32-bit.
const DATA_ATTR: u16 = 0x4093;
/// The same, expand-down.
const DOWN_ATTR: u16 = 0x4097;

/// 32-bit protected mode with `descriptor` loaded in FS.
fn with_fs(raw: u64) -> Guest {
    let mut g = Guest::mode(Mode::Protected32);
    g.descriptor(selector::FREE, raw);
    g.state.fs = loaded(selector::FREE, raw);
    g
}

/// Whether `build` faults with #GP(0) at its first instruction in such a guest.
#[track_caller]
fn is_refused(raw: u64, build: impl FnOnce(&mut CodeAssembler)) -> bool {
    let mut g = with_fs(raw);
    let main = g.code(|a| {
        build(a);
        asm!(a; done());
    });
    let end = g.run(main);
    if end.why == Why::Done {
        return false;
    }
    assert_eq!(end.fault(vector::GP, 0).rip, main);
    true
}

fn limits_count_the_last_byte() {
    let limited = descriptor(DATA, 0xff, DATA_ATTR);
    assert!(!is_refused(limited, |a| asm!(a; mov(al, byte_ptr(0xffu32).fs()))));
    assert!(is_refused(limited, |a| asm!(a; mov(al, byte_ptr(0x100u32).fs()))));
    assert!(!is_refused(limited, |a| asm!(a; mov(eax, dword_ptr(0xfcu32).fs()))));
    assert!(is_refused(limited, |a| asm!(a; mov(eax, dword_ptr(0xfdu32).fs()))));
    assert!(is_refused(limited, |a| asm!(a; mov(dword_ptr(0xffff_ffffu32).fs(), eax))));
    assert!(is_refused(limited, |a| asm!(a; movups(xmm0, xmmword_ptr(0xf1u32).fs()))));
}

fn page_granular_limits() {
    let limited = descriptor(DATA, 0, DATA_ATTR | Segment::G);
    assert!(!is_refused(limited, |a| asm!(a; mov(al, byte_ptr(0xfffu32).fs()))));
    assert!(is_refused(limited, |a| asm!(a; mov(al, byte_ptr(0x1000u32).fs()))));
}

fn expand_down_segments_are_valid_above_their_limit() {
    let down = descriptor(DATA - 0x1000, 0xfff, DOWN_ATTR);
    assert!(is_refused(down, |a| asm!(a; mov(al, byte_ptr(0xfffu32).fs()))));
    assert!(!is_refused(down, |a| asm!(a; mov(al, byte_ptr(0x1000u32).fs()))));
    assert!(is_refused(down, |a| asm!(a; mov(eax, dword_ptr(0xffeu32).fs()))));
    // With D clear the upper bound is 64 KiB.
    let small = descriptor(0, 0xfff, DOWN_ATTR & !Segment::DB);
    assert!(!is_refused(small, |a| asm!(a; mov(al, byte_ptr(0xffffu32).fs()))));
    assert!(is_refused(small, |a| asm!(a; mov(al, byte_ptr(0x1_0000u32).fs()))));
}

fn bases_are_added() {
    let mut g = with_fs(descriptor(DATA - 0x100, 0xffff, DATA_ATTR));
    g.set(DATA, 4, 0x1234);
    let main = g.code(|a| asm!(a; mov(eax, dword_ptr(0x100u32).fs()); done()));
    assert_eq!(g.run(main).done().rax(), 0x1234);
}

fn linear_addresses_wrap_at_4_gib() {
    let mut g = with_fs(descriptor(0xffff_f000, 0xf_ffff, DATA_ATTR | Segment::G));
    g.set(DATA, 4, 0x77);
    let main = g.code(|a| asm!(a; mov(eax, dword_ptr((DATA + 0x1000) as u32).fs()); done()));
    assert_eq!(g.run(main).done().rax(), 0x77);
}

fn types_are_checked() {
    let read_only = descriptor(DATA, 0xff, 0x4091);
    assert!(!is_refused(read_only, |a| asm!(a; mov(eax, dword_ptr(0u32).fs()))));
    assert!(is_refused(read_only, |a| asm!(a; mov(dword_ptr(0u32).fs(), eax))));
    assert!(is_refused(read_only, |a| asm!(a; add(dword_ptr(0u32).fs(), eax))));
    let code = descriptor(DATA, 0xff, 0x409b);
    assert!(!is_refused(code, |a| asm!(a; mov(eax, dword_ptr(0u32).fs()))));
    assert!(is_refused(code, |a| asm!(a; mov(dword_ptr(0u32).fs(), eax))));
}

fn execute_only_code_cannot_be_loaded_into_a_data_segment() {
    let mut g = Guest::mode(Mode::Protected32);
    g.descriptor(selector::FREE, descriptor(0, 0xff, 0x4099));
    g.reg(gpr::RAX, u64::from(selector::FREE));
    let main = g.code(|a| asm!(a; mov(fs, ax)));
    g.run(main).fault(vector::GP, u32::from(selector::FREE));
}

fn a_null_selector_can_be_loaded_but_not_used() {
    let mut g = Guest::mode(Mode::Protected32);
    let (main, [used]) = g.code_with(|a| {
        let mut used = a.create_label();
        asm!(a; xor(eax, eax); mov(es, ax); set_label(&mut used); mov(al, byte_ptr(DATA as u32).es()));
        [used]
    });
    assert_eq!(g.run(main).fault(vector::GP, 0).rip, used);
}

fn stack_limits_raise_ss() {
    let raw = descriptor(0, STACK - 1, DATA_ATTR);
    let mut g = Guest::mode(Mode::Protected32);
    g.descriptor(selector::FREE, raw);
    g.state.ss = loaded(selector::FREE, raw);
    g.reg(gpr::RSP, STACK - 2);
    // The handler's frame fits, the load does not.
    let main = g.code(|a| asm!(a; pop(eax)));
    assert_eq!(g.run(main).fault(vector::SS, 0).rip, main);
}

fn the_accessed_bit_is_set_by_loading() {
    let mut g = Guest::mode(Mode::Protected32);
    g.descriptor(selector::FREE, descriptor(0, 0xff, DATA_ATTR & !1));
    g.reg(gpr::RAX, u64::from(selector::FREE));
    let main = g.code(|a| asm!(a; mov(gs, ax); done()));
    g.run(main).done();
    assert_eq!(g.get(GDT + u64::from(selector::FREE) + 5, 1) & 1, 1);
}

fn code_with_a_base() {
    let mut g = Guest::mode(Mode::Protected32);
    let raw = descriptor(ARENA, 0xfff, 0x409b);
    g.descriptor(selector::FREE, raw);
    // Offsets 0 and 0x100 in the segment: direct jump, call, return and a jump through memory stay inside.
    g.assemble(32, 0, ARENA, |a| {
        let mut function = a.create_label();
        asm!(a; mov(eax, 1); call(function); log(); jmp(0x100u64); set_label(&mut function); inc(eax); ret());
    });
    g.assemble(32, 0x100, ARENA + 0x100, |a| asm!(a; mov(eax, dword_ptr(4u32).cs()); log(); retf()));
    let main = g.code(|a| asm!(a; call_far(selector::FREE, 0); log_value(9); done()));
    g.run(main).done();
    assert_eq!(g.log(), [2, g.get(ARENA + 4, 4) as u32, 9]);
}

fn a_jump_beyond_the_limit_of_code() {
    let mut g = Guest::mode(Mode::Protected32);
    let raw = descriptor(ARENA, 0xff, 0x409b);
    g.descriptor(selector::FREE, raw);
    let end = g.assemble(32, 0, ARENA, |a| asm!(a; jmp(0x100u64)));
    assert!(end < ARENA + 16);
    let main = g.code(|a| asm!(a; jmp_far(selector::FREE, 0)));
    let frame = g.run(main).fault(vector::GP, 0);
    assert_eq!((frame.rip, frame.cs), (0, selector::FREE));
}

fn falling_over_the_limit_of_code() {
    let mut g = Guest::mode(Mode::Protected32);
    g.descriptor(selector::FREE, descriptor(ARENA, 0xff, 0x409b));
    g.write(ARENA + 0xf0, &[0x90; 32]);
    let main = g.code(|a| asm!(a; jmp_far(selector::FREE, 0xf0)));
    assert_eq!(g.run(main).fault(vector::GP, 0).rip, 0x100);
}

fn an_instruction_over_the_limit_of_code() {
    let mut g = Guest::mode(Mode::Protected32);
    g.descriptor(selector::FREE, descriptor(ARENA, 0xff, 0x409b));
    g.write(ARENA + 0xfd, &[0xb8, 0, 0, 0, 0]);
    let main = g.code(|a| asm!(a; jmp_far(selector::FREE, 0xfd)));
    assert_eq!(g.run(main).fault(vector::GP, 0).rip, 0xfd);
}

fn real_mode_segments_are_16_times_the_selector() {
    let mut g = Guest::mode(Mode::Real);
    g.set(0x1_2350, 2, 0xbeef);
    let main = g.code(|a| asm!(a; mov(ax, 0x1234); mov(ds, ax); mov(ax, word_ptr(0x10)); log(); done()));
    g.run(main).done();
    assert_eq!(g.log()[0] & 0xffff, 0xbeef);
}

fn real_mode_reaches_above_1_mib() {
    let mut g = Guest::mode(Mode::Real);
    g.set(0x10_0000, 2, 0xbeef);
    let main = g.code(|a| asm!(a; mov(ax, 0xffff); mov(ds, ax); mov(ax, word_ptr(0x10)); log(); done()));
    g.run(main).done();
    assert_eq!(g.log()[0] & 0xffff, 0xbeef);
}

fn a_word_at_offset_ffff_exceeds_64_kib() {
    let mut g = Guest::mode(Mode::Real);
    g.reg(gpr::RBX, 0xffff);
    let main = g.code(|a| asm!(a; mov(ax, word_ptr(bx))));
    assert_eq!(g.run(main).vector(vector::GP).rip, main);
    let mut g = Guest::mode(Mode::Real);
    g.reg(gpr::RBP, 0xffff);
    let main = g.code(|a| asm!(a; mov(ax, word_ptr(bp))));
    assert_eq!(g.run(main).vector(vector::SS).rip, main);
}

fn sixteen_bit_addresses_wrap() {
    let mut g = Guest::mode(Mode::Real);
    g.reg(gpr::RBX, 0xffff);
    g.reg(gpr::RSI, DATA + 1);
    g.set(DATA, 2, 0x1234);
    let main = g.code(|a| asm!(a; mov(ax, word_ptr(bx + si)); log(); done()));
    g.run(main).done();
    assert_eq!(g.log()[0] & 0xffff, 0x1234);
}

fn sixteen_bit_jumps_wrap() {
    let mut g = Guest::mode(Mode::Real);
    // IP 0xFFFE: JMP SHORT +2 goes to 0x0002 in a segment at 64 KiB.
    g.write(0x1_fffe, &[0xeb, 0x02]);
    g.assemble(16, 2, 0x1_0002, |a| asm!(a; mov(eax, 7); log(); done()));
    let main = g.code(|a| asm!(a; jmp_far(0x1000, 0xfffe)));
    g.run(main).done();
    assert_eq!(g.log(), [7]);
}

fn the_16_bit_stack_wraps() {
    let mut g = Guest::mode(Mode::Real);
    g.state.ss = Segment::real_mode(0x2000);
    g.reg(gpr::RSP, 0);
    g.reg(gpr::RAX, 0x4321);
    let main = g.code(|a| asm!(a; push(ax); done()));
    let end = g.run(main).done();
    assert_eq!((g.get(0x2_fffe, 2), end.reg(gpr::RSP)), (0x4321, 0xfffe));
}

fn only_sp_changes_with_a_16_bit_stack() {
    let raw = descriptor(0, 0xffff, 0x93);
    let mut g = Guest::mode(Mode::Protected32);
    g.descriptor(selector::FREE, raw);
    g.state.ss = loaded(selector::FREE, raw);
    g.reg(gpr::RSP, 0x1234_0000 | STACK);
    g.reg(gpr::RAX, 5);
    let main = g.code(|a| asm!(a; push(eax); done()));
    let end = g.run(main).done();
    assert_eq!((end.reg(gpr::RSP), g.get(STACK - 4, 4)), (0x1234_0000 | (STACK - 4), 5));
}

fn address_size_prefixes_wrap_at_their_size() {
    // 64-bit code with 32-bit addresses wraps at 4 GiB.
    let mut g = Guest::long();
    g.reg(gpr::RBX, 0xffff_fff0);
    g.set(DATA, 4, 0x99);
    let main = g.code(|a| asm!(a; mov(eax, dword_ptr(ebx + (DATA + 16) as u32)); done()));
    assert_eq!(g.run(main).done().rax(), 0x99);
    // 32-bit code with 16-bit addresses wraps at 64 KiB.
    let mut g = Guest::mode(Mode::Protected32);
    g.reg(gpr::RBX, 0xfff0);
    g.reg(gpr::RSI, DATA + 16);
    g.set(DATA, 4, 0x99);
    let main = g.code(|a| asm!(a; mov(eax, dword_ptr(bx + si)); done()));
    assert_eq!(g.run(main).done().rax(), 0x99);
}

fn fs_and_gs_have_64_bit_bases() {
    let mut g = Guest::long();
    let address = 0xffff_8000_0000_0000u64;
    g.map(address, 0x50_0000, flag::KERNEL);
    g.set(0x50_0010, 8, 0x1122_3344_5566_7788);
    g.state.cr4 |= cr4::FSGSBASE;
    let main = g.code(|a| {
        asm!(a; mov(rcx, address); wrgsbase(rcx); mov(rax, qword_ptr(0x10).gs()); rdgsbase(rdx); done());
    });
    let end = g.run(main).done();
    assert_eq!((end.rax(), end.reg(gpr::RDX)), (0x1122_3344_5566_7788, address));
}

fn limits_and_other_bases_do_not_count_in_64_bit_mode() {
    let mut g = Guest::long();
    g.descriptor(selector::FREE, descriptor(0x1000, 0, DATA_ATTR));
    g.set(DATA, 4, 42);
    let main = g.code(|a| {
        asm!(a; mov(eax, u32::from(selector::FREE)); mov(ds, eax); mov(es, eax); mov(eax, dword_ptr(DATA)); done());
    });
    assert_eq!(g.run(main).done().rax(), 42);
}

fn non_canonical_bases_are_refused() {
    let mut g = Guest::long();
    let main = g.code(|a| asm!(a; write_msr(msr::IA32_GS_BASE, 1 << 47)));
    g.run(main).fault(vector::GP, 0);
    let mut g = Guest::long();
    g.state.cr4 |= cr4::FSGSBASE;
    g.reg(gpr::RAX, 1 << 47);
    let main = g.code(|a| asm!(a; wrfsbase(rax)));
    g.run(main).fault(vector::GP, 0);
}

fn swapgs_exchanges_the_bases() {
    let mut g = Guest::long();
    g.state.gs.base = 0x1111;
    g.state.msrs.push((msr::IA32_KERNEL_GS_BASE, 0xffff_8888_0000_0000));
    let main = g.code(|a| asm!(a; swapgs(); mov(ecx, msr::IA32_KERNEL_GS_BASE); rdmsr(); done()));
    let end = g.run(main).done();
    assert_eq!((end.state.gs.base, end.rax()), (0xffff_8888_0000_0000, 0x1111));
}

fn lar_lsl_verr_verw() {
    let mut g = Guest::mode(Mode::Protected32);
    g.descriptor(selector::FREE, descriptor(0, 0x123, 0x4091));
    g.reg(gpr::RBX, u64::from(selector::FREE));
    let main = g.code(|a| {
        asm!(a; lar(eax, ebx); log(); lsl(eax, ebx); log());
        asm!(a; xor(eax, eax); verr(bx); sete(al); log(); verw(bx); sete(al); log());
        asm!(a; mov(ebx, 0x1238); mov(eax, 5); lar(eax, ebx); log(); sete(al); log(); done());
    });
    g.run(main).done();
    assert_eq!(g.log(), [0x0040_9100, 0x123, 1, 0, 5, 0]);
}

berth_tests_system::cases![
    limits_count_the_last_byte,
    page_granular_limits,
    expand_down_segments_are_valid_above_their_limit,
    bases_are_added,
    linear_addresses_wrap_at_4_gib,
    types_are_checked,
    execute_only_code_cannot_be_loaded_into_a_data_segment,
    a_null_selector_can_be_loaded_but_not_used,
    stack_limits_raise_ss,
    the_accessed_bit_is_set_by_loading,
    code_with_a_base,
    a_jump_beyond_the_limit_of_code,
    falling_over_the_limit_of_code,
    an_instruction_over_the_limit_of_code,
    real_mode_segments_are_16_times_the_selector,
    real_mode_reaches_above_1_mib,
    a_word_at_offset_ffff_exceeds_64_kib,
    sixteen_bit_addresses_wrap,
    sixteen_bit_jumps_wrap,
    the_16_bit_stack_wraps,
    only_sp_changes_with_a_16_bit_stack,
    address_size_prefixes_wrap_at_their_size,
    fs_and_gs_have_64_bit_bases,
    limits_and_other_bases_do_not_count_in_64_bit_mode,
    non_canonical_bases_are_refused,
    swapgs_exchanges_the_bases,
    lar_lsl_verr_verw,
];

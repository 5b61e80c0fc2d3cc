//! Changes of privilege: gates, returns, fast system calls, I/O permissions, MSRs (SDM volume 3, chapters 5 and 6;
//! volume 1, 19.5).

use berth_tests_system::engine::is_amd;
use berth_tests_system::mode::{descriptor, loaded};
use berth_tests_system::prelude::*;

const USER_CODE64: u16 = selector::USER_CODE64 | 3;
const USER_CODE32: u16 = selector::USER_CODE32 | 3;
const USER_DATA: u16 = selector::USER_DATA | 3;

/// A call gate of type 12 (32- and 64-bit) or 4 (16-bit).
fn call_gate(g: &mut Guest, code: u16, offset: u64, kind: u64, dpl: u64, parameters: u64) {
    let raw = offset & 0xffff
        | u64::from(code) << 16
        | parameters << 32
        | (0x80 | dpl << 5 | kind) << 40
        | (offset >> 16 & 0xffff) << 48;
    g.descriptor(selector::FREE, raw);
}

fn an_exception_at_level_3_switches_to_the_stack_of_the_tss() {
    let mut g = Guest::long_user();
    let main = g.code(|a| asm!(a; ud2()));
    let end = g.run(main);
    let frame = end.vector(vector::UD);
    assert_eq!((frame.rsp, frame.ss, frame.cs), (Some(STACK), Some(USER_DATA), USER_CODE64));
    assert_eq!(end.reg(gpr::RSP), KERNEL_STACK - 40);
    assert_eq!((end.state.ss.selector, end.state.cs.selector), (0, selector::CODE64));
}

fn the_same_in_32_bit_mode() {
    let mut g = Guest::user(Mode::Paged32);
    let main = g.code(|a| asm!(a; ud2()));
    let end = g.run(main);
    let frame = end.vector(vector::UD);
    assert_eq!((frame.rsp, frame.ss, frame.cs), (Some(STACK), Some(USER_DATA), USER_CODE32));
    assert_eq!(end.reg(gpr::RSP), KERNEL_STACK - 20);
    assert_eq!(end.state.ss.selector, selector::DATA);
}

fn long_mode_aligns_the_stack_of_handlers() {
    let mut g = Guest::long();
    g.reg(gpr::RSP, STACK - 3);
    let main = g.code(|a| asm!(a; ud2()));
    let end = g.run(main);
    assert_eq!(end.vector(vector::UD).rsp, Some(STACK - 3));
    assert_eq!(end.reg(gpr::RSP), STACK - 16 - 40);
}

fn an_ist_stack_is_used_without_a_change_of_level() {
    let mut g = Guest::long();
    g.set_gate(0x21, Gate { ist: 1, ..g.gate_to(STUBS + 0x21 * STUB_SIZE) });
    let main = g.code(|a| asm!(a; int(0x21)));
    let end = g.run(main);
    assert_eq!(end.vector(0x21).rsp, Some(STACK));
    assert_eq!(end.reg(gpr::RSP), IST_STACK - 40);
}

fn compatibility_mode_faults_push_64_bit_frames() {
    let mut g = Guest::long_user();
    let code = g.code_of(32, |a| asm!(a; ud2()));
    g.state.cs = berth_tests_system::mode::segment(USER_CODE32);
    let frame = g.run(code).vector(vector::UD);
    assert_eq!((frame.rip, frame.cs, frame.rsp), (code, USER_CODE32, Some(STACK)));
}

fn iretq_to_level_3_and_back() {
    let mut g = Guest::long_user();
    let user = g.code(|a| asm!(a; mov(ecx, cs); mov(edx, ss); user_done()));
    let handler = g.code(|a| {
        asm!(a; push(i32::from(USER_DATA)); push(STACK as i32 - 64); push(0x202); push(i32::from(USER_CODE64)); push(user as i32); iretq());
    });
    g.set_gate(0x31, Gate { dpl: 3, ..g.gate_to(handler) });
    let main = g.code(|a| asm!(a; int(0x31)));
    let end = g.run(main).done();
    assert_eq!((end.reg(gpr::RCX), end.reg(gpr::RDX)), (u64::from(USER_CODE64), u64::from(USER_DATA)));
}

fn iretd_to_level_3_in_32_bit_mode_clears_inner_segments() {
    let mut g = Guest::user(Mode::Protected32);
    let user = g.code(|a| asm!(a; mov(ecx, fs); mov(edx, gs); user_done()));
    let handler = g.code(|a| {
        asm!(a; mov(eax, u32::from(selector::DATA)); mov(fs, ax));
        asm!(a; push(i32::from(USER_DATA)); push(STACK as i32); push(0x202); push(i32::from(USER_CODE32)); push(user as i32); iretd());
    });
    g.set_gate(0x31, Gate { dpl: 3, ..g.gate_to(handler) });
    let main = g.code(|a| asm!(a; int(0x31)));
    let end = g.run(main).done();
    assert_eq!((end.reg(gpr::RCX), end.reg(gpr::RDX)), (0, u64::from(USER_DATA)));
}

fn iret_to_64_bit_code_at_level_3_checks_the_frame() {
    let refused = |code: u16, stack: u16, rip: u64, error: u32| {
        let mut g = Guest::long();
        let main = g.code(|a| {
            asm!(a; push(i32::from(stack)); push(0x7000); push(2); push(i32::from(code)); mov(rax, rip); push(rax); iretq());
        });
        g.run(main).fault(vector::GP, error);
    };
    refused(USER_CODE64, 0, 0x8000, 0); // a null stack at level 3
    refused(USER_CODE64, selector::DATA, 0x8000, selector::DATA.into());
    refused(selector::DATA, selector::DATA, 0x8000, selector::DATA.into());
    refused(0, USER_DATA, 0x8000, 0);
    refused(USER_CODE64, USER_DATA, 1 << 63, 0);
}

fn iret_with_nt_is_refused_in_long_mode() {
    let mut g = Guest::long();
    g.state.rflags |= rflags::NT;
    let main = g.code(|a| asm!(a; iretq()));
    g.run(main).fault(vector::GP, 0);
}

fn iret_in_real_mode() {
    let mut g = Guest::mode(Mode::Real);
    let handler = g.code(|a| asm!(a; mov(eax, 1); log(); iret()));
    g.handler(0x21, handler);
    let main = g.code(|a| asm!(a; stc(); int(0x21); sbb(eax, eax); log(); done()));
    g.run(main).done();
    assert_eq!(g.log(), [1, u32::MAX]);
}

fn popf_changes_if_and_iopl_only_where_allowed() {
    let mut g = Guest::long_user();
    let main = g.code(|a| asm!(a; push(0x3202); popfq(); pushfq(); pop(rcx); user_done()));
    let end = g.run(main).done();
    assert_eq!(end.reg(gpr::RCX) & (rflags::IF | rflags::IOPL), 0);
    let mut g = Guest::long();
    let main = g.code(|a| asm!(a; push(0x3202); popfq(); pushfq(); pop(rcx); done()));
    let end = g.run(main).done();
    assert_eq!(end.reg(gpr::RCX) & (rflags::IF | rflags::IOPL), rflags::IF | rflags::IOPL);
}

fn a_call_gate_switches_the_stack_and_retf_comes_back() {
    let mut g = Guest::long_user();
    let inner = g.code(|a| asm!(a; mov(ecx, cs); mov(rdx, rsp); bytes(&[0x48, 0xcb])));
    call_gate(&mut g, selector::CODE64, inner, 12, 3, 0);
    g.descriptor(selector::FREE + 8, 0);
    g.set(DATA, 4, 0);
    g.set(DATA + 4, 2, u64::from(selector::FREE | 3));
    let main = g.code(|a| asm!(a; call(fword_ptr(DATA)); mov(ebx, cs); user_done()));
    let end = g.run(main).done();
    assert_eq!(end.reg(gpr::RCX), u64::from(selector::CODE64));
    assert_eq!(end.reg(gpr::RDX), KERNEL_STACK - 32);
    assert_eq!(end.reg(gpr::RBX), u64::from(USER_CODE64));
    assert_eq!(end.stack(8, 3), STACK, "the stack pointer is back");
}

fn a_32_bit_call_gate_copies_parameters() {
    let mut g = Guest::user(Mode::Protected32);
    let inner = g.code(|a| asm!(a; mov(ecx, dword_ptr(esp + 8)); mov(edx, dword_ptr(esp + 12)); retf_1(8)));
    call_gate(&mut g, selector::CODE32, inner, 12, 3, 2);
    let main = g.code(
        |a| asm!(a; push(0x11); push(0x22); call_far(selector::FREE | 3, 0); mov(ebx, esp); user_done()),
    );
    let end = g.run(main).done();
    assert_eq!((end.reg(gpr::RCX), end.reg(gpr::RDX)), (0x22, 0x11));
    assert_eq!(end.reg(gpr::RBX), STACK, "both stacks dropped the parameters");
}

fn a_call_gate_checks_its_dpl() {
    let mut g = Guest::user(Mode::Protected32);
    call_gate(&mut g, selector::CODE32, CODE, 12, 0, 0);
    let main = g.code(|a| asm!(a; call_far(selector::FREE | 3, 0)));
    g.run(main).fault(vector::GP, u32::from(selector::FREE));
}

fn conforming_code_runs_at_the_level_of_its_caller() {
    let mut g = Guest::user(Mode::Protected32);
    g.descriptor(selector::FREE, descriptor(0, 0xf_ffff, 0xc09f));
    let inner = g.code(|a| asm!(a; mov(ecx, cs); retf()));
    let main = g.code(|a| asm!(a; call_far(selector::FREE, inner as u32); user_done()));
    let end = g.run(main).done();
    assert_eq!(end.reg(gpr::RCX), u64::from(selector::FREE | 3));
}

fn inner_code_cannot_be_jumped_to_directly() {
    let mut g = Guest::user(Mode::Protected32);
    let main = g.code(|a| asm!(a; jmp_far(selector::CODE32, CODE as u32)));
    g.run(main).fault(vector::GP, u32::from(selector::CODE32));
}

fn a_segment_that_is_not_present_in_a_far_jump() {
    let mut g = Guest::mode(Mode::Protected32);
    g.descriptor(selector::FREE, descriptor(0, 0xf_ffff, 0xc01b));
    let main = g.code(|a| asm!(a; jmp_far(selector::FREE, CODE as u32)));
    g.run(main).fault(vector::NP, u32::from(selector::FREE));
}

/// A guest at level 3 with the kernel's entry for SYSCALL.
fn with_syscall(build: impl FnOnce(&mut CodeAssembler)) -> Guest {
    let mut g = Guest::long_user();
    let entry = g.code(build);
    g.state.msrs.push((msr::IA32_LSTAR, entry));
    g.state.msrs.push((
        msr::IA32_STAR,
        u64::from(selector::USER_CODE32 | 3) << 48 | u64::from(selector::CODE64) << 32,
    ));
    g.state.msrs.push((msr::IA32_FMASK, rflags::IF | rflags::DF));
    g
}

fn syscall_and_sysret() {
    let mut g = with_syscall(|a| {
        asm!(a; mov(ebx, cs); mov(edx, ss); pushfq(); pop(rsi); sysretq());
    });
    g.state.rflags |= rflags::IF | rflags::DF | rflags::CF;
    let main = g.code(|a| asm!(a; syscall(); mov(r8d, cs); mov(r9d, ss); pushfq(); pop(r10); user_done()));
    let end = g.run(main).done();
    assert_eq!((end.reg(gpr::RBX), end.reg(gpr::RDX)), (selector::CODE64.into(), selector::DATA.into()));
    assert_eq!(end.reg(gpr::RSI) & (rflags::IF | rflags::DF | rflags::CF), rflags::CF);
    assert_eq!((end.reg(gpr::R8), end.reg(gpr::R9)), (USER_CODE64.into(), USER_DATA.into()));
    assert_eq!(end.reg(gpr::R10), end.reg(gpr::R11), "the flags are back");
    assert_eq!(end.reg(gpr::RCX), main + 2);
}

fn sysretl_goes_to_compatibility_mode() {
    let mut g = with_syscall(|a| asm!(a; mov(ecx, dword_ptr(DATA)); sysret()));
    let compatibility =
        g.code_of(32, |a| asm!(a; mov(ebx, cs); xor(eax, eax); dec(eax); inc(eax); user_done()));
    g.set(DATA, 4, compatibility);
    let main = g.code(|a| asm!(a; syscall()));
    let end = g.run(main).done();
    assert_eq!(end.reg(gpr::RBX), u64::from(USER_CODE32));
}

fn syscall_needs_sce() {
    let mut g = with_syscall(|a| asm!(a; nop()));
    g.state.efer &= !efer::SCE;
    let main = g.code(|a| asm!(a; syscall()));
    assert_eq!(g.run(main).vector(vector::UD).rip, main);
}

fn sysret_needs_level_0() {
    let mut g = with_syscall(|a| asm!(a; nop()));
    let main = g.code(|a| asm!(a; sysretq()));
    g.run(main).fault(vector::GP, 0);
}

fn sysret_to_a_non_canonical_address() {
    let mut g = with_syscall(|a| asm!(a; mov(rcx, 1u64 << 47); sysretq()));
    let main = g.code(|a| asm!(a; syscall()));
    let frame = g.run(main).fault(vector::GP, 0);
    // Intel faults before, AMD after the privilege is given up.
    assert_eq!(frame.cs & 3, if is_amd() { 3 } else { 0 });
}

fn sysenter_and_sysexit_in_32_bit_mode() {
    let mut g = Guest::user(Mode::Protected32);
    let entry = g.code(|a| asm!(a; mov(ebx, cs); mov(esi, esp); sysexit()));
    g.state.msrs.push((msr::IA32_SYSENTER_CS, selector::CODE64.into()));
    g.state.msrs.push((msr::IA32_SYSENTER_ESP, KERNEL_STACK));
    g.state.msrs.push((msr::IA32_SYSENTER_EIP, entry));
    let back = g.code(|a| asm!(a; mov(edi, cs); user_done()));
    let main = g.code(|a| asm!(a; mov(ecx, esp); mov(edx, back as u32); sysenter()));
    let end = g.run(main).done();
    assert_eq!((end.reg(gpr::RBX), end.reg(gpr::RSI)), (selector::CODE64.into(), KERNEL_STACK));
    assert_eq!(end.reg(gpr::RDI), u64::from(USER_CODE32));
}

fn the_io_bitmap_opens_single_ports() {
    let mut g = Guest::long_user();
    // Ports 0xd0 to 0xff are open, and 0x100 is not: a dword at 0xfe touches it.
    let main = g.code(|a| asm!(a; mov(edx, 0xfc); in_(eax, dx); mov(edx, 0xff); in_(al, dx); mov(edx, 0xfe); nop(); in_(eax, dx)));
    let end = g.run(main);
    end.fault(vector::GP, 0);
    assert_eq!(end.reg(gpr::RDX), 0xfe);
}

fn iopl_3_opens_all_ports_and_cli() {
    let mut g = Guest::long_user();
    g.state.rflags |= rflags::IOPL;
    let main = g.code(|a| asm!(a; mov(edx, 0x1234); in_(al, dx); cli(); sti(); cli(); user_done()));
    g.run(main).done();
}

fn ports_beyond_the_bitmap_are_closed() {
    let mut g = Guest::long_user();
    g.state.tr.limit = 0x67 + 0x20;
    let main = g.code(|a| asm!(a; mov(edx, 0x1000); in_(al, dx)));
    g.run(main).fault(vector::GP, 0);
}

fn ins_and_outs_check_the_port_first() {
    let mut g = Guest::long_user();
    g.reg(gpr::RDX, 0x80);
    g.reg(gpr::RCX, 1);
    let main = g.code(|a| asm!(a; rep().outsb()));
    let end = g.run(main);
    end.fault(vector::GP, 0);
    assert_eq!(end.reg(gpr::RCX), 1);
}

fn unknown_msrs_fault() {
    let read = |number: u32| {
        let mut g = Guest::long();
        let main = g.code(|a| asm!(a; mov(ecx, number); rdmsr(); done()));
        g.run(main)
    };
    read(0x1234_5678).fault(vector::GP, 0);
    read(msr::IA32_PAT).done();
}

fn msrs_check_their_values() {
    let write = |number: u32, value: u64| {
        let mut g = Guest::long();
        let main = g.code(|a| asm!(a; write_msr(number, value); done()));
        g.run(main)
    };
    write(msr::IA32_LSTAR, 1 << 47).fault(vector::GP, 0);
    write(msr::IA32_LSTAR, 0xffff_8000_0000_0000).done();
    write(msr::IA32_EFER, 1 << 20).fault(vector::GP, 0);
    write(msr::IA32_PAT, 2).fault(vector::GP, 0);
}

fn ltr_marks_the_tss_busy_and_refuses_a_busy_one() {
    let mut g = Guest::long();
    g.system_descriptor(selector::FREE, TSS, 0x67, 0x89);
    g.reg(gpr::RAX, u64::from(selector::FREE));
    let (main, [second]) = g.code_with(|a| {
        let mut second = a.create_label();
        asm!(a; ltr(ax); set_label(&mut second); ltr(ax));
        [second]
    });
    let end = g.run(main);
    assert_eq!(end.fault(vector::GP, u32::from(selector::FREE)).rip, second);
    assert_eq!(g.get(GDT + u64::from(selector::FREE) + 5, 1), 0x8b);
}

fn segments_of_the_ldt() {
    let mut g = Guest::mode(Mode::Protected32);
    g.system_descriptor(selector::LDT, LDT, 0x7f, 0x82);
    g.descriptor(0x0c, descriptor(DATA, 0xff, 0x4093));
    g.set(DATA, 4, 0x5a);
    let main = g.code(|a| {
        asm!(a; mov(eax, u32::from(selector::LDT)); lldt(ax); mov(eax, 0x0c); mov(fs, ax); mov(eax, dword_ptr(0u32).fs()); done());
    });
    let end = g.run(main).done();
    assert_eq!(end.rax(), 0x5a);
    assert_eq!(end.state.fs, loaded(0x0c, descriptor(DATA, 0xff, 0x4093)));
}

fn cpl_1_is_privileged_for_pages_but_not_for_instructions() {
    let mut g = Guest::mode(Mode::Paged32);
    let (code, data) = (descriptor(0, 0xf_ffff, 0xc0bb), descriptor(0, 0xf_ffff, 0xc0b3));
    g.descriptor(selector::FREE, code);
    g.descriptor(selector::FREE + 8, data);
    g.state.cs = loaded(selector::FREE | 1, code);
    g.state.ss = loaded((selector::FREE + 8) | 1, data);
    let (main, [refused]) = g.code_with(|a| {
        let mut refused = a.create_label();
        asm!(a; mov(eax, dword_ptr(DATA as u32)); set_label(&mut refused); hlt());
        [refused]
    });
    let frame = g.run(main).fault(vector::GP, 0);
    assert_eq!((frame.rip, frame.cs), (refused, selector::FREE | 1));
}

fn sixteen_bit_gates_push_words() {
    let mut g = Guest::mode(Mode::Protected32);
    let (main, [refused]) = g.code_with(|a| {
        let mut refused = a.create_label();
        asm!(a; mov(eax, 0x1238); set_label(&mut refused); mov(es, ax));
        [refused]
    });
    assert!(main < 0x1_0000);
    g.set_gate(vector::GP, Gate { kind: 6, ..g.gate_to(STUBS + 13 * STUB_SIZE) });
    let end = g.run(main);
    assert_eq!(end.why, Why::Vector(vector::GP));
    assert_eq!(end.reg(gpr::RSP), STACK - 8);
    assert_eq!([0, 1, 2].map(|n| end.stack(2, n)), [0x1238, refused, selector::CODE32.into()]);
}

fn sixteen_bit_code_faults_into_32_bit_handlers() {
    let mut g = Guest::mode(Mode::Protected16);
    let gate = Gate { kind: 14, selector: selector::CODE32, ..g.gate_to(STUBS + 6 * STUB_SIZE) };
    g.set_gate(vector::UD, gate);
    let main = g.code(|a| asm!(a; ud2()));
    let end = g.run(main);
    let frame = end.vector(vector::UD);
    assert_eq!((frame.rip, frame.cs), (main, selector::CODE16));
    assert_eq!(end.reg(gpr::RSP), STACK - 12);
}

berth_tests_system::cases![
    an_exception_at_level_3_switches_to_the_stack_of_the_tss,
    the_same_in_32_bit_mode,
    long_mode_aligns_the_stack_of_handlers,
    an_ist_stack_is_used_without_a_change_of_level,
    compatibility_mode_faults_push_64_bit_frames,
    iretq_to_level_3_and_back,
    iretd_to_level_3_in_32_bit_mode_clears_inner_segments,
    iret_to_64_bit_code_at_level_3_checks_the_frame,
    iret_with_nt_is_refused_in_long_mode,
    iret_in_real_mode,
    popf_changes_if_and_iopl_only_where_allowed,
    a_call_gate_switches_the_stack_and_retf_comes_back,
    a_32_bit_call_gate_copies_parameters,
    a_call_gate_checks_its_dpl,
    conforming_code_runs_at_the_level_of_its_caller,
    inner_code_cannot_be_jumped_to_directly,
    a_segment_that_is_not_present_in_a_far_jump,
    syscall_and_sysret,
    sysretl_goes_to_compatibility_mode,
    syscall_needs_sce,
    sysret_needs_level_0,
    sysret_to_a_non_canonical_address,
    sysenter_and_sysexit_in_32_bit_mode,
    the_io_bitmap_opens_single_ports,
    iopl_3_opens_all_ports_and_cli,
    ports_beyond_the_bitmap_are_closed,
    ins_and_outs_check_the_port_first,
    unknown_msrs_fault,
    msrs_check_their_values,
    ltr_marks_the_tss_busy_and_refuses_a_busy_one,
    segments_of_the_ldt,
    cpl_1_is_privileged_for_pages_but_not_for_instructions,
    sixteen_bit_gates_push_words,
    sixteen_bit_code_faults_into_32_bit_handlers,
];

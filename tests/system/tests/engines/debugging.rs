//! Single-step and breakpoints (SDM volume 3, chapter 18).

use berth_tests_system::prelude::*;

/// DR6.BS.
const SINGLE_STEP: u64 = 1 << 14;

/// A handler of #DB that logs the return address relative to `base` and the low bits of DR6, and returns.
fn log_steps(g: &mut Guest, base: u64) {
    let handler = g.code(|a| {
        asm!(a; push(rax); mov(rax, qword_ptr(rsp + 8)); sub(rax, base as i32); log(); pop(rax); iretq());
    });
    g.handler(vector::DB, handler);
}

fn a_single_step_traps_after_each_instruction() {
    let mut g = Guest::long();
    let (main, [one, two, three]) = g.code_with(|a| {
        let (mut one, mut two, mut three) = (a.create_label(), a.create_label(), a.create_label());
        asm!(a; push(0x102); popfq(); nop(); set_label(&mut one); mov(eax, 5); set_label(&mut two); push(2); set_label(&mut three); popfq(); done());
        [one, two, three]
    });
    log_steps(&mut g, main);
    g.run(main).done();
    // POPF that clears TF is stepped too: TF was set when it began.
    let expected = [one - main, two - main, three - main, three - main + 1].map(|v| v as u32);
    assert_eq!(g.log(), expected);
}

fn a_single_step_sets_dr6_and_clears_tf_in_the_handler() {
    let mut g = Guest::long();
    g.state.rflags |= rflags::TF;
    let main = g.code(|a| asm!(a; nop(); nop()));
    let end = g.run(main);
    let frame = end.vector(vector::DB);
    assert_eq!(frame.rip, main + 1);
    assert_ne!(end.state.dr[6] & SINGLE_STEP, 0);
    assert_ne!(frame.flags & rflags::TF, 0);
    assert_eq!(end.state.rflags & rflags::TF, 0);
}

fn a_jump_is_one_step() {
    let mut g = Guest::long();
    g.state.rflags |= rflags::TF;
    let (main, [target]) = g.code_with(|a| {
        let mut target = a.create_label();
        asm!(a; jmp(target); ud2(); set_label(&mut target); nop());
        [target]
    });
    assert_eq!(g.run(main).vector(vector::DB).rip, target);
}

fn each_iteration_of_a_string_is_a_step() {
    let mut g = Guest::long();
    g.state.rflags |= rflags::TF;
    let main = g.code(|a| asm!(a; rep().stosb(); done()));
    g.reg(gpr::RCX, 3);
    g.reg(gpr::RDI, DATA);
    log_steps(&mut g, main);
    let handler_end = g.run(main);
    assert_eq!(g.log()[..3], [0, 0, 2], "{}", handler_end.account());
    assert_eq!(g.get(DATA, 4), 0);
}

fn mov_ss_delays_a_single_step() {
    let mut g = Guest::long();
    g.state.rflags |= rflags::TF;
    g.reg(gpr::RCX, u64::from(selector::DATA));
    let main = g.code(|a| asm!(a; mov(ss, ecx); nop(); nop()));
    assert_eq!(g.run(main).vector(vector::DB).rip, main + 3);
}

fn a_fault_is_delivered_instead_of_the_step() {
    let mut g = Guest::long();
    g.state.rflags |= rflags::TF;
    let main = g.code(|a| asm!(a; ud2()));
    let end = g.run(main);
    let frame = end.vector(vector::UD);
    assert_eq!(frame.rip, main);
    assert_eq!(end.state.dr[6] & SINGLE_STEP, 0);
}

fn int_n_clears_tf_without_a_step() {
    let mut g = Guest::long();
    g.state.rflags |= rflags::TF;
    let main = g.code(|a| asm!(a; int(0x21)));
    let frame = g.run(main).vector(0x21);
    assert_ne!(frame.flags & rflags::TF, 0);
}

/// A level 3 guest whose SYSCALL goes to `kernel` and clears `mask`.
fn with_syscall(kernel: impl FnOnce(&mut CodeAssembler), mask: u64) -> Guest {
    let mut g = Guest::long_user();
    let kernel = g.code(kernel);
    g.state.msrs.push((msr::IA32_LSTAR, kernel));
    g.state.msrs.push((msr::IA32_STAR, 0x0018_0008 << 32));
    g.state.msrs.push((msr::IA32_FMASK, mask));
    g
}

fn syscall_with_tf_masked_is_not_stepped() {
    let mut g = with_syscall(|a| asm!(a; nop(); done()), rflags::TF);
    g.state.rflags |= rflags::TF;
    let main = g.code(|a| asm!(a; syscall()));
    let end = g.run(main).done();
    assert_ne!(end.reg(gpr::R11) & rflags::TF, 0);
}

fn sysret_to_a_stepped_program_steps_at_once() {
    let mut g = with_syscall(|a| asm!(a; sysretq()), rflags::TF);
    g.state.rflags |= rflags::TF;
    let main = g.code(|a| asm!(a; syscall(); nop(); nop()));
    let frame = g.run(main).vector(vector::DB);
    assert_eq!((frame.rip, frame.cs), (main + 2, selector::USER_CODE64 | 3));
}

fn iret_that_sets_tf_steps_after_the_next_instruction() {
    let mut g = Guest::long();
    let (main, [target]) = g.code_with(|a| {
        let mut target = a.create_label();
        asm!(a; mov(rcx, rsp); push(i32::from(selector::DATA)); push(rcx); push(0x102); push(i32::from(selector::CODE64)));
        asm!(a; lea(rcx, ptr(target)); push(rcx); iretq(); set_label(&mut target); nop(); nop());
        [target]
    });
    assert_eq!(g.run(main).vector(vector::DB).rip, target + 1);
}

fn an_instruction_breakpoint_faults_before_the_instruction() {
    let mut g = Guest::long();
    let (main, [here]) = g.code_with(|a| {
        let mut here = a.create_label();
        asm!(a; mov(eax, 1); set_label(&mut here); mov(eax, 2); done());
        [here]
    });
    g.state.dr[1] = here;
    g.state.dr[7] = 1 << 2 | 0x400;
    let end = g.run(main);
    let frame = end.vector(vector::DB);
    assert_eq!((frame.rip, end.rax()), (here, 1));
    assert_eq!(end.state.dr[6] & 0xf, 2);
    assert_eq!(frame.flags & rflags::RF, 0);
}

fn rf_skips_an_instruction_breakpoint_once() {
    let mut g = Guest::long();
    let (main, [here]) = g.code_with(|a| {
        let (mut again, mut here) = (a.create_label(), a.create_label());
        asm!(a; set_label(&mut again); inc(ecx); set_label(&mut here); nop(); cmp(ecx, 3); jne(again); done());
        [here]
    });
    g.state.dr[0] = here;
    g.state.dr[7] = 1 | 0x400;
    // The handler sets RF in the image, so the breakpoint is hit once a round.
    let handler = g.code(|a| asm!(a; inc(ebp); bts(qword_ptr(rsp + 16), 16); iretq()));
    g.handler(vector::DB, handler);
    let end = g.run(main).done();
    assert_eq!((end.reg(gpr::RCX), end.reg(gpr::RBP)), (3, 3));
}

/// A data breakpoint on [`DATA`] with R/W and LEN bits `kind`; runs `build`, then NOP.
#[track_caller]
fn watch(kind: u64, build: impl FnOnce(&mut CodeAssembler)) -> (End, u64) {
    let mut g = Guest::long();
    g.state.dr[0] = DATA;
    g.state.dr[7] = 1 | 0x400 | kind << 16;
    g.reg(gpr::RBX, DATA);
    g.reg(gpr::RDI, DATA - 2);
    let (main, [after]) = g.code_with(|a| {
        let mut after = a.create_label();
        build(a);
        asm!(a; set_label(&mut after); nop(); done());
        [after]
    });
    (g.run(main), after)
}

/// Write, 4 bytes.
const WRITE4: u64 = 0b1101;
/// Read or write, 4 bytes.
const ANY4: u64 = 0b1111;
/// Read or write, 1 byte.
const ANY1: u64 = 0b0011;

#[track_caller]
fn hit((end, after): (End, u64)) {
    assert_eq!(end.vector(vector::DB).rip, after);
    assert_eq!(end.state.dr[6] & 0xf, 1);
}

#[track_caller]
fn not_hit((end, _): (End, u64)) {
    end.done();
}

fn data_breakpoints_trap_after_the_access() {
    hit(watch(WRITE4, |a| asm!(a; mov(dword_ptr(rbx), eax))));
    hit(watch(ANY4, |a| asm!(a; mov(eax, dword_ptr(rbx)))));
    hit(watch(ANY4, |a| asm!(a; mov(byte_ptr(rbx + 3), al))));
    hit(watch(WRITE4, |a| asm!(a; lock().add(dword_ptr(rbx), 1))));
    hit(watch(WRITE4, |a| asm!(a; mov(qword_ptr(rbx - 4), rax))));
    hit(watch(WRITE4, |a| asm!(a; lea(rsp, ptr(rbx + 8)); push(rax))));
    hit(watch(WRITE4, |a| asm!(a; movups(xmmword_ptr(rbx - 8), xmm0))));
}

fn data_breakpoints_do_not_trap_beside_their_range_and_kind() {
    not_hit(watch(WRITE4, |a| asm!(a; mov(eax, dword_ptr(rbx)))));
    not_hit(watch(ANY4, |a| asm!(a; mov(al, byte_ptr(rbx + 4)); mov(al, byte_ptr(rbx - 1)))));
    not_hit(watch(ANY1, |a| asm!(a; mov(al, byte_ptr(rbx + 1)))));
    not_hit(watch(ANY4, |a| asm!(a; lea(eax, ptr(rbx)))));
}

fn a_data_breakpoint_in_a_string_stops_it_there() {
    let (end, after) = watch(WRITE4, |a| asm!(a; mov(ecx, 6); rep().stosb()));
    let frame = end.vector(vector::DB);
    // After the third byte: the instruction is not finished.
    assert_eq!(frame.rip, after - 2);
    assert_eq!((end.reg(gpr::RCX), end.reg(gpr::RDI)), (3, DATA + 1));
}

fn disabled_breakpoints_still_do_not_trap() {
    let mut g = Guest::long();
    g.state.dr[0] = DATA;
    g.state.dr[7] = 0x400 | ANY4 << 16;
    let main = g.code(|a| asm!(a; mov(eax, dword_ptr(DATA)); done()));
    g.run(main).done();
}

fn general_detect_protects_the_debug_registers() {
    let mut g = Guest::long();
    g.state.dr[7] = 0x400 | 1 << 13;
    let main = g.code(|a| asm!(a; mov(rax, dr0)));
    let end = g.run(main);
    assert_eq!(end.vector(vector::DB).rip, main);
    assert_ne!(end.state.dr[6] & 1 << 13, 0, "BD");
    assert_eq!(end.state.dr[7] & 1 << 13, 0, "off for the handler");
}

fn dr4_is_dr6_unless_de() {
    let mut g = Guest::long();
    let main = g.code(|a| asm!(a; bytes(&[0x0f, 0x21, 0xe0]); done()));
    assert_eq!(g.run(main).done().rax(), 0xffff_0ff0);
    let mut g = Guest::long();
    g.state.cr4 |= cr4::DE;
    let main = g.code(|a| asm!(a; bytes(&[0x0f, 0x21, 0xe0])));
    g.run(main).vector(vector::UD);
}

fn breakpoints_are_set_and_read_back_by_the_guest() {
    let mut g = Guest::long();
    let main = g.code(|a| {
        asm!(a; mov(eax, DATA as u32); mov(dr3, rax); mov(eax, 1 << 6 | WRITE4 as u32 & 3 << 28); mov(rcx, dr3));
        asm!(a; mov(eax, 0x1040_0000u32 | 1 << 6); mov(dr7, rax); mov(rdx, dr7); mov(byte_ptr(DATA), 1); nop(); done());
    });
    let end = g.run(main);
    end.vector(vector::DB);
    assert_eq!(end.reg(gpr::RCX), DATA);
    assert_eq!(end.state.dr[6] & 0xf, 8);
}

berth_tests_system::cases![
    a_single_step_traps_after_each_instruction,
    a_single_step_sets_dr6_and_clears_tf_in_the_handler,
    a_jump_is_one_step,
    each_iteration_of_a_string_is_a_step,
    mov_ss_delays_a_single_step,
    a_fault_is_delivered_instead_of_the_step,
    int_n_clears_tf_without_a_step,
    syscall_with_tf_masked_is_not_stepped,
    sysret_to_a_stepped_program_steps_at_once,
    iret_that_sets_tf_steps_after_the_next_instruction,
    an_instruction_breakpoint_faults_before_the_instruction,
    rf_skips_an_instruction_breakpoint_once,
    data_breakpoints_trap_after_the_access,
    data_breakpoints_do_not_trap_beside_their_range_and_kind,
    a_data_breakpoint_in_a_string_stops_it_there,
    disabled_breakpoints_still_do_not_trap,
    general_detect_protects_the_debug_registers,
    dr4_is_dr6_unless_de,
    breakpoints_are_set_and_read_back_by_the_guest,
];

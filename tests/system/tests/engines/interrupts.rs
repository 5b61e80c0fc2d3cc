//! Interrupts, NMIs, shadows and HLT (SDM volume 3, 6.3 to 6.8).

use std::thread;
use std::time::{Duration, Instant};

use berth_engine::ApicEvent;
use berth_tests_system::asm::post_interrupt;
use berth_tests_system::engine::rounds;
use berth_tests_system::prelude::*;

/// A vector without a handler of the case's own: it ends the run.
const VECTOR: u8 = 0x25;

/// Posts [`VECTOR`] to vCPU 0; AX and DX are lost.
fn post(a: &mut CodeAssembler) {
    post_interrupt(a, VECTOR).unwrap();
}

/// Posts `VECTOR` with IF clear, executes `build`, and returns the return address and the label's.
#[track_caller]
fn taken_at<const N: usize>(build: impl FnOnce(&mut CodeAssembler) -> [CodeLabel; N]) -> (u64, [u64; N]) {
    let mut g = Guest::long();
    let (main, labels) = g.code_with(|a| {
        post(a);
        build(a)
    });
    (g.run(main).vector(VECTOR).rip, labels)
}

fn sti_shadows_one_instruction() {
    let (rip, [expected]) = taken_at(|a| {
        let mut after = a.create_label();
        asm!(a; sti(); nop(); set_label(&mut after); nop(); nop(); done());
        [after]
    });
    assert_eq!(rip, expected);
}

fn sti_and_cli_leave_no_window() {
    let mut g = Guest::long();
    let main = g.code(|a| {
        post(a);
        asm!(a; sti(); cli(); nop(); done());
    });
    g.run(main).done();
}

fn a_second_sti_does_not_prolong_the_shadow() {
    let (rip, [expected]) = taken_at(|a| {
        let mut after = a.create_label();
        asm!(a; sti(); sti(); set_label(&mut after); nop(); nop(); done());
        [after]
    });
    assert_eq!(rip, expected);
}

fn mov_ss_shadows_one_instruction() {
    let (rip, [expected]) = taken_at(|a| {
        let mut after = a.create_label();
        asm!(a; mov(ecx, ss); sti(); mov(ss, ecx); nop(); set_label(&mut after); nop(); done());
        [after]
    });
    assert_eq!(rip, expected);
}

fn pop_ss_shadows_one_instruction() {
    let mut g = Guest::mode(Mode::Protected32);
    let (main, [expected]) = g.code_with(|a| {
        let mut after = a.create_label();
        post(a);
        asm!(a; push(ss); sti(); pop(ss); nop(); set_label(&mut after); nop(); done());
        [after]
    });
    assert_eq!(g.run(main).vector(VECTOR).rip, expected);
}

fn popf_has_no_shadow() {
    let (rip, [expected]) = taken_at(|a| {
        let mut after = a.create_label();
        asm!(a; push(0x202); popfq(); set_label(&mut after); nop(); nop(); done());
        [after]
    });
    assert_eq!(rip, expected);
}

fn iret_has_no_shadow() {
    let (rip, [expected]) = taken_at(|a| {
        let mut after = a.create_label();
        asm!(a; mov(rcx, rsp); push(i32::from(selector::DATA)); push(rcx); push(0x202); push(i32::from(selector::CODE64)));
        asm!(a; lea(rcx, ptr(after)); push(rcx); iretq(); set_label(&mut after); nop(); done());
        [after]
    });
    assert_eq!(rip, expected);
}

fn the_handler_of_an_interrupt_gate_is_not_interrupted() {
    let mut g = Guest::long();
    g.state.rflags |= rflags::IF;
    let handler = g.code(|a| {
        asm!(a; pushfq(); pop(rax); log());
        post(a);
        asm!(a; nop(); nop(); done());
    });
    g.handler(0x31, handler);
    let main = g.code(|a| asm!(a; int(0x31)));
    g.run(main).done();
    assert_eq!(u64::from(g.log()[0]) & rflags::IF, 0);
}

fn a_trap_gate_leaves_if_alone() {
    let mut g = Guest::long();
    g.state.rflags |= rflags::IF;
    let handler = g.code(|a| asm!(a; pushfq(); pop(rax); log(); done()));
    g.set_gate(0x31, Gate { kind: 15, ..g.gate_to(handler) });
    let main = g.code(|a| asm!(a; int(0x31)));
    g.run(main).done();
    assert_ne!(u64::from(g.log()[0]) & rflags::IF, 0);
}

fn sti_hlt_wakes_and_returns_after_the_hlt() {
    let (rip, [expected]) = taken_at(|a| {
        let mut after = a.create_label();
        asm!(a; sti(); hlt(); set_label(&mut after); nop(); done());
        [after]
    });
    assert_eq!(rip, expected);
}

fn hlt_waits_for_an_interrupt_from_another_thread() {
    let mut g = Guest::long();
    g.state.rflags |= rflags::IF;
    let (main, [expected]) = g.code_with(|a| {
        let mut after = a.create_label();
        asm!(a; log(); hlt(); set_label(&mut after); done());
        [after]
    });
    let apic = g.apic(0);
    let poster = thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        apic.post(VECTOR);
    });
    let start = Instant::now();
    assert_eq!(g.run(main).vector(VECTOR).rip, expected);
    assert!(start.elapsed() >= Duration::from_millis(40), "HLT did not wait");
    poster.join().unwrap();
}

fn hlt_without_if_wakes_only_for_nmi() {
    let mut g = Guest::long();
    let (main, [expected]) = g.code_with(|a| {
        let mut after = a.create_label();
        post(a);
        asm!(a; hlt(); set_label(&mut after); done());
        [after]
    });
    let apic = g.apic(0);
    let poster = thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        apic.event(ApicEvent::Nmi);
    });
    assert_eq!(g.run(main).vector(vector::NMI).rip, expected);
    poster.join().unwrap();
}

fn cr8_holds_interrupts_back() {
    let mut g = Guest::long();
    g.state.rflags |= rflags::IF;
    let (main, [expected]) = g.code_with(|a| {
        let mut after = a.create_label();
        asm!(a; mov(ecx, u32::from(VECTOR >> 4)); mov(cr8, rcx));
        post(a);
        asm!(a; nop(); nop(); log_value(1); xor(ecx, ecx); mov(cr8, rcx); set_label(&mut after); nop(); done());
        [after]
    });
    assert_eq!(g.run(main).vector(VECTOR).rip, expected);
    assert_eq!(g.log(), [1]);
}

fn the_highest_vector_comes_first() {
    let mut g = Guest::long();
    for vector in [0x21, 0x2f, 0x28] {
        let handler = g.code(|a| asm!(a; log_value(u32::from(vector)); eoi(); iretq()));
        g.handler(vector, handler);
    }
    let main = g.code(|a| {
        for vector in [0x21, 0x2f, 0x28] {
            post_interrupt(a, vector).unwrap();
        }
        asm!(a; sti(); nop(); nop(); nop(); nop(); cli(); done());
    });
    g.run(main).done();
    assert_eq!(g.log(), [0x2f, 0x28, 0x21]);
}

fn an_nmi_ignores_if() {
    let mut g = Guest::long();
    let main = g.code(|a| asm!(a; mov(edx, u32::from(port::NMI)); out(dx, al); nop(); bytes(&[0xeb, 0xfe])));
    g.run(main).vector(vector::NMI);
}

fn nmis_wait_until_iret() {
    let mut g = Guest::long();
    // The handler posts another NMI at its first entry; it must come only after the IRET.
    let handler = g.code(|a| {
        let mut second = a.create_label();
        asm!(a; inc(ebp); log_value(1); cmp(ebp, 2); je(second));
        asm!(a; mov(edx, u32::from(port::NMI)); out(dx, al); nop(); nop(); pause());
        asm!(a; set_label(&mut second); log_value(2); iretq());
    });
    g.handler(vector::NMI, handler);
    let main = g.code(|a| {
        let mut wait = a.create_label();
        asm!(a; mov(edx, u32::from(port::NMI)); out(dx, al); set_label(&mut wait); cmp(ebp, 2); jne(wait); done());
    });
    let end = g.run(main).done();
    assert_eq!(g.log(), [1, 2, 1, 2]);
    assert!(!end.state.nmi_blocked);
}

fn nmi_is_blocked_in_its_handler() {
    let mut g = Guest::long();
    let main = g.code(|a| asm!(a; mov(edx, u32::from(port::NMI)); out(dx, al); nop(); bytes(&[0xeb, 0xfe])));
    let end = g.run(main);
    end.vector(vector::NMI);
    assert!(end.state.nmi_blocked);
}

/// Runs `body`, which never ends by itself, and interrupts it from another thread. Returns how long the interrupt
/// took to be noticed.
#[track_caller]
fn interrupts_endless(mut g: Guest, body: impl FnOnce(&mut CodeAssembler)) -> Duration {
    g.state.rflags |= rflags::IF;
    let main = g.code(body);
    let apic = g.apic(0);
    let poster = thread::spawn(move || {
        thread::sleep(Duration::from_millis(30));
        let start = Instant::now();
        apic.post(VECTOR);
        start
    });
    let end = g.run(main);
    let noticed = Instant::now();
    end.vector(VECTOR);
    noticed.duration_since(poster.join().unwrap())
}

fn an_interrupt_that_waits_for_if_comes_once_it_is_set() {
    let end = {
        let mut g = Guest::long();
        let main = g.code(|a| {
            post(a);
            asm!(a; log_value(1); sti(); bytes(&[0xeb, 0xfe]));
        });
        let end = g.run(main);
        assert_eq!(g.log(), [1]);
        end
    };
    assert_ne!(end.vector(VECTOR).flags & rflags::IF, 0);
}

/// Far more than it ever takes, and far less than the time limit: a loaded host may not run us for a while.
const SOON: Duration = Duration::from_secs(2);

fn a_jump_to_itself_is_interrupted() {
    assert!(interrupts_endless(Guest::long(), |a| asm!(a; bytes(&[0xeb, 0xfe]))) < SOON);
    assert!(interrupts_endless(Guest::mode(Mode::Real), |a| asm!(a; bytes(&[0xeb, 0xfe]))) < SOON);
    assert!(interrupts_endless(Guest::mode(Mode::Paged32), |a| asm!(a; bytes(&[0xeb, 0xfe]))) < SOON);
}

fn an_indirect_jump_to_itself_is_interrupted() {
    let body = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        asm!(a; lea(rax, ptr(again)); set_label(&mut again); jmp(rax));
    };
    assert!(interrupts_endless(Guest::long(), body) < SOON);
}

fn a_loop_instruction_is_interrupted() {
    let body = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        asm!(a; xor(ecx, ecx); dec(rcx); set_label(&mut again); loop_(again); jmp(again));
    };
    assert!(interrupts_endless(Guest::long(), body) < SOON);
}

fn a_chain_of_calls_and_returns_is_interrupted() {
    let body = |a: &mut CodeAssembler| {
        let (mut again, mut function) = (a.create_label(), a.create_label());
        asm!(a; set_label(&mut again); call(function); call(function); jmp(again); set_label(&mut function); ret());
    };
    assert!(interrupts_endless(Guest::long(), body) < SOON);
}

fn a_conditional_loop_over_two_pages_is_interrupted() {
    let mut g = Guest::long();
    g.code_at(ARENA, |a| asm!(a; jmp(ARENA + 0x1000)));
    g.code_at(ARENA + 0x1000, |a| asm!(a; test(rsp, rsp); jnz(ARENA)));
    assert!(interrupts_endless(g, |a| asm!(a; jmp(ARENA))) < SOON);
}

fn a_long_rep_movs_is_interrupted_with_exact_progress() {
    let mut g = Guest::long();
    g.state.rflags |= rflags::IF;
    // Endless: the copy of a megabyte is begun again and again until the interrupt comes.
    let (main, [copy]) = g.code_with(|a| {
        let (mut again, mut copy) = (a.create_label(), a.create_label());
        asm!(a; set_label(&mut again); mov(esi, ARENA as u32); mov(edi, ARENA as u32 + 0x10_0000));
        asm!(a; mov(ecx, 0x10_0000); set_label(&mut copy); rep().movsb(); jmp(again));
        [copy]
    });
    let apic = g.apic(0);
    let poster = thread::spawn(move || {
        thread::sleep(Duration::from_millis(20));
        apic.post(VECTOR);
    });
    let end = g.run(main);
    let frame = end.vector(VECTOR);
    poster.join().unwrap();
    if frame.rip == copy {
        let left = end.reg(gpr::RCX);
        assert!(left <= 0x10_0000);
        assert_eq!(end.reg(gpr::RSI), ARENA + 0x10_0000 - left);
        assert_eq!(end.reg(gpr::RDI), ARENA + 0x20_0000 - left);
    }
}

fn an_interrupted_string_goes_on_where_it_was() {
    let mut g = Guest::long();
    g.state.rflags |= rflags::IF;
    for n in 0..0x2_0000 / 8 {
        g.set(ARENA + n * 8, 8, n ^ 0x5555);
    }
    let handler = g.code(|a| asm!(a; inc(ebp); eoi(); iretq()));
    g.handler(VECTOR, handler);
    let main = g.code(|a| {
        let mut again = a.create_label();
        asm!(a; mov(r12d, rounds(200)); set_label(&mut again));
        asm!(a; mov(esi, ARENA as u32); mov(edi, ARENA as u32 + 0x10_0000); mov(ecx, 0x2_0000); rep().movsb());
        asm!(a; mov(esi, ARENA as u32); mov(edi, ARENA as u32 + 0x10_0000); mov(ecx, 0x2_0000); repe().cmpsb());
        asm!(a; jne(again); dec(r12d); jg(again));
        // Where the posting thread gets no CPU in time, it goes on.
        asm!(a; test(ebp, ebp); jz(again); cli(); done());
    });
    let apic = g.apic(0);
    let over = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stop = std::sync::Arc::clone(&over);
    let poster = thread::spawn(move || {
        while !stop.load(std::sync::atomic::Ordering::SeqCst) {
            apic.post(VECTOR);
            thread::sleep(Duration::from_micros(100));
        }
    });
    let end = g.run(main).done();
    over.store(true, std::sync::atomic::Ordering::SeqCst);
    poster.join().unwrap();
    assert!(end.reg(gpr::RBP) > 0);
    assert_eq!(end.reg(gpr::RCX), 0);
}

fn registers_and_flags_survive_a_storm_of_interrupts() {
    let mut g = Guest::long();
    g.state.rflags |= rflags::IF;
    // The handler destroys flags and vector registers and gives them back.
    let handler = g.code(|a| {
        asm!(a; push(rax); xor(eax, eax); cmp(eax, 1); inc(qword_ptr(DATA)); pop(rax); eoi(); iretq());
    });
    g.handler(VECTOR, handler);
    let main = g.code(|a| {
        let mut again = a.create_label();
        asm!(a; xor(eax, eax); mov(ebx, 1); mov(ecx, rounds(20_000_000)); set_label(&mut again));
        asm!(a; add(rax, rbx); adc(rbx, 0); rol(rax, 7); setc(dl); adc(rax, rcx); loop_(again); cli(); done());
    });
    let run = |g: &mut Guest| {
        let end = g.run(main).done();
        (end.rax(), end.reg(gpr::RBX))
    };
    let undisturbed = run(&mut g);
    let apic = g.apic(0);
    let over = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stop = std::sync::Arc::clone(&over);
    let poster = thread::spawn(move || {
        while !stop.load(std::sync::atomic::Ordering::SeqCst) {
            apic.post(VECTOR);
            thread::sleep(Duration::from_micros(20));
        }
    });
    let disturbed = run(&mut g);
    over.store(true, std::sync::atomic::Ordering::SeqCst);
    poster.join().unwrap();
    assert_eq!(disturbed, undisturbed);
    assert!(g.get(DATA, 8) > 0, "no interrupt came");
}

fn interrupts_in_each_mode_push_frames_of_its_size() {
    for mode in [Mode::Real, Mode::Protected16, Mode::Protected32, Mode::Paged32, Mode::Pae, Mode::Long] {
        let mut g = Guest::mode(mode);
        let (main, [expected]) = g.code_with(|a| {
            let mut after = a.create_label();
            post(a);
            asm!(a; sti(); nop(); set_label(&mut after); nop(); done());
            [after]
        });
        let frame = g.run(main).vector(VECTOR);
        assert_eq!((frame.rip, frame.cs), (expected, g.state.cs.selector), "{mode:?}");
        assert_ne!(frame.flags & rflags::IF, 0, "{mode:?}");
    }
}

berth_tests_system::cases![
    sti_shadows_one_instruction,
    sti_and_cli_leave_no_window,
    a_second_sti_does_not_prolong_the_shadow,
    mov_ss_shadows_one_instruction,
    pop_ss_shadows_one_instruction,
    popf_has_no_shadow,
    iret_has_no_shadow,
    the_handler_of_an_interrupt_gate_is_not_interrupted,
    a_trap_gate_leaves_if_alone,
    sti_hlt_wakes_and_returns_after_the_hlt,
    hlt_waits_for_an_interrupt_from_another_thread,
    hlt_without_if_wakes_only_for_nmi,
    cr8_holds_interrupts_back,
    the_highest_vector_comes_first,
    an_nmi_ignores_if,
    nmis_wait_until_iret,
    nmi_is_blocked_in_its_handler,
    an_interrupt_that_waits_for_if_comes_once_it_is_set,
    a_jump_to_itself_is_interrupted,
    an_indirect_jump_to_itself_is_interrupted,
    a_loop_instruction_is_interrupted,
    a_chain_of_calls_and_returns_is_interrupted,
    a_conditional_loop_over_two_pages_is_interrupted,
    a_long_rep_movs_is_interrupted_with_exact_progress,
    an_interrupted_string_goes_on_where_it_was,
    registers_and_flags_survive_a_storm_of_interrupts,
    interrupts_in_each_mode_push_frames_of_its_size,
];

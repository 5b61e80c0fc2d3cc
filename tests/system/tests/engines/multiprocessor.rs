//! Several vCPUs: start-up, IPIs, atomic operations, memory ordering (SDM volume 3, chapters 8 and 9.4).

use berth_tests_system::engine::rounds;
use berth_tests_system::prelude::*;

/// IA32_X2APIC_ICR.
const ICR: u32 = 0x830;
/// Page of the start-up code.
const TRAMPOLINE: u64 = 0x9_0000;

/// A guest with `n` vCPUs that all execute `build`, with their number in EDI; the last thing that vCPU 0 does is
/// to wait for the others, which count at DATA + 0xf80.
#[track_caller]
fn all(n: u8, build: impl Fn(&mut CodeAssembler)) -> Guest {
    let mut g = Guest::smp(n);
    let main = g.code(|a| {
        let (mut wait, mut first, mut begin) = (a.create_label(), a.create_label(), a.create_label());
        // They begin together.
        asm!(a; lock().inc(dword_ptr(DATA + 0xfc0)); set_label(&mut begin); pause());
        asm!(a; cmp(dword_ptr(DATA + 0xfc0), u32::from(n)); jne(begin));
        build(a);
        asm!(a; lock().inc(dword_ptr(DATA + 0xf80)); test(edi, edi); jz(first); done());
        asm!(a; set_label(&mut first); nop(); set_label(&mut wait); pause());
        asm!(a; cmp(dword_ptr(DATA + 0xf80), u32::from(n)); jne(wait); done());
    });
    for index in 1..n {
        g.start(usize::from(index), main, Guest::stack_of(index.into()));
    }
    for end in g.run_smp(main) {
        end.done();
    }
    g
}

/// A loop of `count` times `body`, in EBP.
fn repeat(a: &mut CodeAssembler, count: u32, body: impl Fn(&mut CodeAssembler)) {
    let mut again = a.create_label();
    asm!(a; mov(ebp, count); set_label(&mut again));
    body(a);
    asm!(a; dec(ebp); jnz(again));
}

fn init_and_startup_ipis_start_a_vcpu_in_real_mode() {
    let mut g = Guest::smp(2);
    g.map(TRAMPOLINE, TRAMPOLINE, flag::KERNEL);
    g.assemble(16, 0, TRAMPOLINE, |a| {
        asm!(a; mov(ax, cs); mov(bx, 0xe00); mov(ds, bx); mov(word_ptr(2), ax); mov(word_ptr(0), 1); cli(); hlt());
    });
    let main = g.code(|a| {
        let mut wait = a.create_label();
        for command in [0x4500, 0x4600 | (TRAMPOLINE as u32 >> 12)] {
            asm!(a; mov(ecx, ICR); mov(eax, command); mov(edx, 1); wrmsr());
        }
        asm!(a; set_label(&mut wait); pause(); cmp(word_ptr(DATA), 1); jne(wait); done());
    });
    let ends = g.run_smp(main);
    assert_eq!(g.get(DATA + 2, 2), TRAMPOLINE >> 4, "CS of the started vCPU");
    assert_eq!(ends[1].state.cs.base, TRAMPOLINE);
    assert_eq!(ends[1].state.mp_state, MpState::Halted);
}

fn a_second_startup_ipi_is_ignored() {
    let mut g = Guest::smp(2);
    g.assemble(16, 0, TRAMPOLINE, |a| {
        let mut stay = a.create_label();
        asm!(a; mov(bx, 0xe00); mov(ds, bx); inc(word_ptr(0)); set_label(&mut stay); pause(); jmp(stay));
    });
    let main = g.code(|a| {
        let (mut wait, mut later) = (a.create_label(), a.create_label());
        let startup = 0x4600 | (TRAMPOLINE as u32 >> 12);
        asm!(a; mov(ecx, ICR); mov(edx, 1); mov(eax, 0x4500); wrmsr(); mov(eax, startup); wrmsr());
        asm!(a; set_label(&mut wait); pause(); cmp(word_ptr(DATA), 0); je(wait); wrmsr());
        asm!(a; mov(ebp, rounds(2_000_000)); set_label(&mut later); dec(ebp); jnz(later); done());
    });
    g.run(main).done();
    assert_eq!(g.get(DATA, 2), 1);
}

fn init_stops_a_running_vcpu() {
    let mut g = Guest::smp(2);
    let other = g.code(|a| {
        let mut again = a.create_label();
        asm!(a; set_label(&mut again); lock().inc(dword_ptr(DATA)); jmp(again));
    });
    g.start(1, other, Guest::stack_of(1));
    let main = g.code(|a| {
        let (mut wait, mut later, mut settle) = (a.create_label(), a.create_label(), a.create_label());
        asm!(a; set_label(&mut wait); pause(); cmp(dword_ptr(DATA), 0); je(wait));
        asm!(a; mov(ecx, ICR); mov(edx, 1); mov(eax, 0x4500); wrmsr(); mov(ebp, rounds(20_000_000)));
        asm!(a; set_label(&mut settle); dec(ebp); jnz(settle); mov(ebx, dword_ptr(DATA)); mov(ebp, rounds(1_000_000)));
        asm!(a; set_label(&mut later); dec(ebp); jnz(later); sub(ebx, dword_ptr(DATA)); done());
    });
    let ends = g.run_smp(main);
    assert_eq!(ends[0].reg(gpr::RBX), 0, "it still counts");
    assert_eq!(ends[1].state.mp_state, MpState::WaitForSipi);
    assert_eq!(ends[1].state.cr0 & (cr0::PE | cr0::PG), 0);
}

fn an_ipi_wakes_a_halted_vcpu() {
    let mut g = Guest::smp(2);
    let handler = g.code(|a| asm!(a; inc(dword_ptr(DATA)); eoi(); iretq()));
    g.handler(0x35, handler);
    let other = g.code(|a| {
        let mut again = a.create_label();
        asm!(a; set_label(&mut again); sti(); hlt(); cli(); cmp(dword_ptr(DATA), 50); jne(again); done());
    });
    g.start(1, other, Guest::stack_of(1));
    let main = g.code(|a| {
        let (mut send, mut wait) = (a.create_label(), a.create_label());
        asm!(a; xor(ebp, ebp); set_label(&mut send); inc(ebp); mov(ecx, ICR); mov(edx, 1); mov(eax, 0x4035); wrmsr());
        asm!(a; set_label(&mut wait); pause(); cmp(dword_ptr(DATA), ebp); jne(wait); cmp(ebp, 50); jne(send); done());
    });
    for end in g.run_smp(main) {
        end.done();
    }
    assert!(g.apic(1).acknowledged().is_none_or(|n| n == 50));
}

fn locked_increments_are_not_lost() {
    for n in [2, 4] {
        let g = all(n, |a| repeat(a, 100_000, |a| asm!(a; lock().inc(qword_ptr(DATA)))));
        assert_eq!(g.get(DATA, 8), u64::from(n) * 100_000);
    }
}

fn locked_operations_of_each_kind() {
    let g = all(2, |a| {
        repeat(a, 50_000, |a| {
            let mut again = a.create_label();
            asm!(a; mov(eax, 1); lock().xadd(dword_ptr(DATA), eax); lock().add(word_ptr(DATA + 16), 1));
            asm!(a; mov(eax, dword_ptr(DATA + 32)); set_label(&mut again); lea(ecx, ptr(rax + 1)));
            asm!(a; lock().cmpxchg(dword_ptr(DATA + 32), ecx); jne(again); lock().dec(byte_ptr(DATA + 48)));
        });
    });
    assert_eq!(g.get(DATA, 4), 100_000);
    assert_eq!(g.get(DATA + 16, 2), 100_000 & 0xffff);
    assert_eq!(g.get(DATA + 32, 4), 100_000);
    assert_eq!(g.get(DATA + 48, 1), 100_000u64.wrapping_neg() & 0xff);
}

fn xchg_is_locked_by_itself() {
    // A spin lock made of XCHG around an increment that is not locked.
    let g = all(3, |a| {
        repeat(a, 20_000, |a| {
            let mut spin = a.create_label();
            asm!(a; nop(); set_label(&mut spin); mov(eax, 1); xchg(dword_ptr(DATA), eax); test(eax, eax); jnz(spin));
            asm!(a; inc(qword_ptr(DATA + 64)); mov(dword_ptr(DATA), 0));
        });
    });
    assert_eq!(g.get(DATA + 64, 8), 60_000);
}

fn cmpxchg16b_is_atomic() {
    // Both halves are incremented together; a torn read or write would let them differ.
    let g = all(2, |a| {
        repeat(a, 30_000, |a| {
            let mut again = a.create_label();
            asm!(a; mov(rax, qword_ptr(DATA)); mov(rdx, qword_ptr(DATA + 8)); set_label(&mut again));
            asm!(a; lea(rbx, ptr(rax + 1)); lea(rcx, ptr(rdx + 3)); lock().cmpxchg16b(xmmword_ptr(DATA)); jne(again));
        });
    });
    assert_eq!((g.get(DATA, 8), g.get(DATA + 8, 8)), (60_000, 180_000));
}

fn locked_increments_across_pages() {
    let g = all(2, |a| repeat(a, 500, |a| asm!(a; lock().inc(qword_ptr(DATA + 0xffd)))));
    assert_eq!(g.get(DATA + 0xffd, 8), 1_000);
}

fn locked_increments_across_pages_and_inside_one() {
    // Half of the vCPUs lock eight bytes across the boundary, the others a byte of them on one page.
    let g = all(2, |a| {
        repeat(a, 500, |a| {
            let (mut other, mut over) = (a.create_label(), a.create_label());
            asm!(a; test(edi, edi); jnz(other); lock().add(qword_ptr(DATA + 0xffd), 0x100); jmp(over));
            asm!(a; set_label(&mut other); lock().inc(byte_ptr(DATA + 0xffd)); set_label(&mut over); nop());
        });
    });
    assert_eq!(g.get(DATA + 0xffd, 8), 500 * 0x100 + (500 & 0xff));
}

fn bit_strings_are_atomic() {
    // Each of 4,096 bits is claimed by exactly one vCPU.
    let g = all(3, |a| {
        let (mut again, mut taken) = (a.create_label(), a.create_label());
        asm!(a; xor(ebp, ebp); xor(r12d, r12d); mov(ebx, DATA as u32); set_label(&mut again));
        asm!(a; lock().bts(dword_ptr(rbx), ebp); jc(taken); inc(r12d); set_label(&mut taken); inc(ebp));
        asm!(a; cmp(ebp, 4096); jne(again); lock().add(dword_ptr(DATA + 0x400), r12d));
    });
    assert_eq!(g.get(DATA + 0x400, 4), 4096);
}

/// Runs two threads in lockstep rounds: `body` gets the number of the vCPU in EDI and must leave its result in
/// EAX. Returns how often both were 0.
#[track_caller]
fn litmus(rounds: u32, body: impl Fn(&mut CodeAssembler)) -> u64 {
    const X: u64 = DATA;
    const RESULTS: u64 = DATA + 0x200;
    const BARRIER: u64 = DATA + 0x300;
    let g = all(2, |a| {
        let (mut round, mut next) = (a.create_label(), a.create_label());
        let barrier = |a: &mut CodeAssembler| {
            let mut wait = a.create_label();
            asm!(a; add(r12d, 2); lock().inc(dword_ptr(BARRIER)); set_label(&mut wait); pause());
            asm!(a; mov(eax, dword_ptr(BARRIER)); sub(eax, r12d); js(wait));
        };
        asm!(a; mov(ebp, rounds); xor(r12d, r12d); set_label(&mut round));
        barrier(a);
        body(a);
        asm!(a; mov(ecx, edi); mov(dword_ptr(rcx * 4 + RESULTS), eax));
        barrier(a);
        asm!(a; test(edi, edi); jnz(next); mov(eax, dword_ptr(RESULTS)); or(eax, dword_ptr(RESULTS + 4)));
        asm!(a; sete(al); movzx(eax, al); add(qword_ptr(DATA + 0x500), rax));
        asm!(a; mov(dword_ptr(X), 0); mov(dword_ptr(X + 64), 0); set_label(&mut next); dec(ebp); jnz(round));
    });
    g.get(DATA + 0x500, 8)
}

/// Stores 1 to one's own variable, executes `between`, loads the other's.
fn store_buffering(a: &mut CodeAssembler, between: impl Fn(&mut CodeAssembler)) {
    asm!(a; mov(ebx, edi); shl(ebx, 6); mov(dword_ptr(rbx + DATA), 1));
    between(a);
    asm!(a; xor(ebx, 64); mov(eax, dword_ptr(rbx + DATA)));
}

fn store_buffering_is_forbidden_with_mfence() {
    assert_eq!(litmus(rounds(20_000), |a| store_buffering(a, |a| asm!(a; mfence()))), 0);
}

fn store_buffering_is_forbidden_with_a_locked_instruction() {
    assert_eq!(
        litmus(rounds(20_000), |a| store_buffering(a, |a| asm!(a; lock().add(dword_ptr(rsp - 64), 0)))),
        0
    );
}

fn messages_pass_in_order() {
    // vCPU 0 writes data, then a number; vCPU 1 that sees the number must see the data.
    let mut g = Guest::smp(2);
    let other = g.code(|a| {
        let (mut again, mut bad) = (a.create_label(), a.create_label());
        asm!(a; set_label(&mut again); mov(ecx, dword_ptr(DATA + 64)); mov(eax, dword_ptr(DATA)));
        asm!(a; cmp(eax, ecx); jb(bad); cmp(ecx, rounds(2_000_000)); jb(again); done(); set_label(&mut bad); ud2());
    });
    g.start(1, other, Guest::stack_of(1));
    let main = g.code(|a| {
        let (mut again, mut wait) = (a.create_label(), a.create_label());
        asm!(a; xor(ebp, ebp); set_label(&mut again); inc(ebp); mov(dword_ptr(DATA), ebp); mov(dword_ptr(DATA + 64), ebp));
        asm!(a; cmp(ebp, rounds(2_000_000)); jne(again); mov(ecx, rounds(10_000_000)); set_label(&mut wait); dec(ecx); jnz(wait); done());
    });
    assert_ne!(g.run_smp(main)[1].why, Why::Vector(vector::UD), "data older than its number was seen");
}

fn a_shootdown_by_ipi_is_seen() {
    // vCPU 1 reads through a mapping; vCPU 0 changes it, sends an IPI whose handler flushes, and waits for it.
    const PAGE: u64 = 0x4000_0000;
    let mut g = Guest::smp(2);
    g.map(PAGE, 0x50_0000, flag::KERNEL);
    // Each frame holds its number.
    for n in 0..=200 {
        g.set(0x50_0000 + n * 0x1000, 4, n);
    }
    let entry = g.tables.entry(PAGE, 12);
    g.map(ARENA, entry & !0xfff, flag::KERNEL);
    let handler = g.code(|a| asm!(a; push(rbx); mov(ebx, PAGE as u32); invlpg(byte_ptr(rbx)); pop(rbx); inc(dword_ptr(DATA)); eoi(); iretq()));
    g.handler(0x35, handler);
    let other = g.code(|a| {
        let (mut again, mut bad) = (a.create_label(), a.create_label());
        // What was read after `n` flushes is frame `n`, or already the next one.
        asm!(a; sti(); set_label(&mut again); mov(ecx, dword_ptr(DATA)); mov(eax, dword_ptr(PAGE)); cmp(ecx, dword_ptr(DATA)); jne(again));
        asm!(a; sub(eax, ecx); cmp(eax, 1); ja(bad); mov(dword_ptr(DATA + 8), 1));
        asm!(a; cmp(dword_ptr(DATA), 200); jb(again); done(); set_label(&mut bad); ud2());
    });
    g.start(1, other, Guest::stack_of(1));
    let main = g.code(|a| {
        let (mut ready, mut round, mut wait) = (a.create_label(), a.create_label(), a.create_label());
        asm!(a; set_label(&mut ready); pause(); cmp(dword_ptr(DATA + 8), 1); jne(ready); xor(ebp, ebp); set_label(&mut round));
        asm!(a; add(qword_ptr(ARENA + (entry & 0xfff)), 0x1000); inc(ebp); mov(ecx, ICR); mov(edx, 1); mov(eax, 0x4035); wrmsr());
        asm!(a; set_label(&mut wait); pause(); cmp(dword_ptr(DATA), ebp); jne(wait); cmp(ebp, 200); jne(round));
        asm!(a; done());
    });
    let ends = g.run_smp(main);
    assert_ne!(ends[1].why, Why::Vector(vector::UD), "{}", ends[1].account());
}

berth_tests_system::cases![
    init_and_startup_ipis_start_a_vcpu_in_real_mode,
    a_second_startup_ipi_is_ignored,
    init_stops_a_running_vcpu,
    an_ipi_wakes_a_halted_vcpu,
    locked_increments_are_not_lost,
    locked_operations_of_each_kind,
    xchg_is_locked_by_itself,
    cmpxchg16b_is_atomic,
    locked_increments_across_pages,
    locked_increments_across_pages_and_inside_one,
    bit_strings_are_atomic,
    store_buffering_is_forbidden_with_mfence,
    store_buffering_is_forbidden_with_a_locked_instruction,
    messages_pass_in_order,
    a_shootdown_by_ipi_is_seen,
];

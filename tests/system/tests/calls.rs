//! Calls and returns whose return addresses are not what they were: engines predict them.

use berth_tests_system::prelude::*;

/// A page for functions.
const PAGE: u64 = ARENA;
/// A page whose mapping changes, and its frames.
const MOVING: u64 = 0x4000_0000;
const FRAME: u64 = 0x50_0000;
const OTHER: u64 = 0x50_1000;

/// Calls a function at [`PAGE`] a hundred times and more, so that everything that can be linked is.
fn call_often(a: &mut CodeAssembler) {
    let mut again = a.create_label();
    asm!(a; mov(ebp, 200); xor(r12d, r12d); set_label(&mut again));
    asm!(a; call(PAGE); add(r12d, eax); dec(ebp); jnz(again));
}

#[test]
fn a_deep_recursion_comes_back() {
    let mut g = Guest::long();
    // Deeper than any prediction goes: 3000 frames of 16 bytes are 48 KiB of stack.
    const DEPTH: u32 = 3000;
    g.code_at(PAGE, |a| {
        let mut end = a.create_label();
        asm!(a; inc(ecx); cmp(ecx, DEPTH); je(end); push(rcx); call(PAGE); pop(rdx); add(rax, rdx));
        asm!(a; set_label(&mut end); ret());
    });
    let main =
        g.code(|a| asm!(a; xor(eax, eax); xor(ecx, ecx); mov(rsp, ARENA + 0x2_0000); call(PAGE); done()));
    let sum = u64::from(DEPTH) * u64::from(DEPTH - 1) / 2;
    assert_eq!(g.run(main).done().rax(), sum);
}

#[test]
fn a_changed_return_address_is_taken() {
    let mut g = Guest::long();
    // The 100th call returns behind the INC.
    g.code_at(PAGE, |a| {
        let mut plain = a.create_label();
        asm!(a; inc(ebx); cmp(ebx, 100); jne(plain); add(qword_ptr(rsp), 2); set_label(&mut plain); ret());
    });
    let main = g.code(|a| {
        let mut again = a.create_label();
        asm!(a; xor(ebx, ebx); xor(r12d, r12d); mov(ebp, 200); set_label(&mut again));
        // FF C1 is INC ECX.
        asm!(a; call(PAGE); bytes(&[0xff, 0xc1]); dec(ebp); jnz(again); done());
    });
    assert_eq!(g.run(main).done().reg(gpr::RCX), 199);
}

#[test]
fn frames_that_are_left_out() {
    let mut g = Guest::long();
    // The inner function drops its own return address and returns to the outer one's caller.
    g.code_at(PAGE, |a| asm!(a; call(PAGE + 0x100); mov(eax, 1000); ret()));
    g.code_at(PAGE + 0x100, |a| asm!(a; add(rsp, 8); mov(eax, 1); ret()));
    let main = g.code(|a| {
        call_often(a);
        asm!(a; done());
    });
    assert_eq!(g.run(main).done().reg(gpr::R12), 200);
}

#[test]
fn returns_without_calls() {
    let mut g = Guest::long();
    g.code_at(PAGE, |a| asm!(a; mov(eax, 1); ret()));
    let main = g.code(|a| {
        let (mut again, mut back) = (a.create_label(), a.create_label());
        asm!(a; mov(ebp, 200); xor(r12d, r12d); set_label(&mut again); lea(rdx, ptr(back)); push(rdx));
        asm!(a; mov(edx, PAGE as u32); push(rdx); ret(); set_label(&mut back));
        asm!(a; add(r12d, eax); dec(ebp); jnz(again); done());
    });
    assert_eq!(g.run(main).done().reg(gpr::R12), 200);
}

#[test]
fn two_stacks_in_turns() {
    let mut g = Guest::long();
    // A coroutine: PAGE switches to the other stack and returns to what is called there.
    g.code_at(PAGE, |a| asm!(a; xchg(rsp, r13); ret()));
    let main = g.code(|a| {
        let (mut other, mut go) = (a.create_label(), a.create_label());
        asm!(a; mov(r13, ARENA + 0x1_0000); lea(rax, ptr(other)); mov(qword_ptr(r13), rax));
        asm!(a; mov(ebp, 200); xor(eax, eax); xor(ecx, ecx); jmp(go));
        asm!(a; set_label(&mut other); call(PAGE); inc(ecx); jmp(other));
        asm!(a; set_label(&mut go); call(PAGE); inc(eax); dec(ebp); jnz(go); done());
    });
    let end = g.run(main).done();
    assert_eq!((end.rax(), end.reg(gpr::RCX)), (200, 199));
}

#[test]
fn code_behind_the_call_is_changed_by_what_is_called() {
    let mut g = Guest::long();
    // The function stores its argument into the immediate behind its return address.
    g.code_at(PAGE, |a| asm!(a; mov(rdx, qword_ptr(rsp)); mov(dword_ptr(rdx + 1), ebp); ret()));
    let main = g.code(|a| {
        let mut again = a.create_label();
        asm!(a; mov(ebp, 200); xor(r12d, r12d); set_label(&mut again));
        asm!(a; call(PAGE); mov(eax, 0); add(r12d, eax); dec(ebp); jnz(again); done());
    });
    assert_eq!(g.run(main).done().reg(gpr::R12), 200 * 201 / 2);
}

#[test]
fn the_caller_is_mapped_elsewhere_while_it_waits() {
    let mut g = Guest::long();
    g.map(MOVING, FRAME, flag::KERNEL);
    let entry = g.tables.entry(MOVING, 12);
    let table = ARENA + 0x1000;
    g.map(table, entry & !0xfff, flag::KERNEL);
    // Both frames call PAGE, wherever they are mapped; what comes after differs.
    for (frame, n) in [(FRAME, 1), (OTHER, 1000)] {
        g.code_at(frame, |a| asm!(a; mov(eax, PAGE as u32); call(rax); mov(eax, n); ret()));
    }
    g.code_at(PAGE, |a| {
        let mut plain = a.create_label();
        asm!(a; cmp(ebp, 1); jne(plain); mov(qword_ptr(rsi), rdi); invlpg(byte_ptr(rbx)));
        asm!(a; set_label(&mut plain); ret());
    });
    g.reg(gpr::RSI, table + (entry & 0xfff));
    g.reg(gpr::RDI, OTHER | flag::KERNEL);
    g.reg(gpr::RBX, MOVING);
    let main = g.code(|a| {
        let mut again = a.create_label();
        asm!(a; mov(ebp, 200); xor(r12d, r12d); set_label(&mut again));
        asm!(a; call(MOVING); add(r12d, eax); dec(ebp); jnz(again); done());
    });
    assert_eq!(g.run(main).done().reg(gpr::R12), 199 + 1000);
}

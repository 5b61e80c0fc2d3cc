//! Code that is written while it is executed: by itself, under another address, by strings, by devices and by
//! other vCPUs (SDM volume 3, 11.6 and 8.1.3).

use berth_memory::GuestPhysAddr;
use berth_tests_system::prelude::*;

/// A page for code that changes.
const PAGE: u64 = ARENA;

/// `MOV EAX, imm32; RET` at `at`; the immediate is at `at + 1`.
fn function(g: &mut Guest, at: u64, n: u32) {
    g.code_at(at, |a| asm!(a; mov(eax, n); ret()));
}

fn the_next_instruction() {
    let mut g = Guest::long();
    // FF C0 is INC EAX; FF C1 is INC ECX.
    let (main, [target]) = g.code_with(|a| {
        let mut target = a.create_label();
        asm!(a; mov(byte_ptr(rbx), 0xc1); set_label(&mut target); bytes(&[0xff, 0xc0]); done());
        [target]
    });
    g.reg(gpr::RBX, target + 1);
    let end = g.run(main).done();
    assert_eq!((end.rax(), end.reg(gpr::RCX)), (0, 1));
}

fn later_in_the_same_block() {
    let mut g = Guest::long();
    let (main, [target]) = g.code_with(|a| {
        let mut target = a.create_label();
        asm!(a; mov(dword_ptr(rbx), 0x1234); mov(ecx, 1); add(ecx, ecx); set_label(&mut target); mov(eax, 1); done());
        [target]
    });
    g.reg(gpr::RBX, target + 1);
    let end = g.run(main).done();
    assert_eq!((end.rax(), end.reg(gpr::RCX)), (0x1234, 2));
}

fn the_storing_instruction_itself() {
    let mut g = Guest::long();
    // The store overwrites its own opcode; the old one is executed to its end, the new one the next time.
    let (main, [store]) = g.code_with(|a| {
        let (mut store, mut again) = (a.create_label(), a.create_label());
        asm!(a; xor(ecx, ecx); set_label(&mut again); inc(ecx); cmp(ecx, 2));
        asm!(a; set_label(&mut store); bytes(&[0x88, 0x03]); jne(again); done());
        [store]
    });
    // MOV [RBX], AL becomes MOV AL, [RBX] (8A 03).
    g.reg(gpr::RBX, store);
    g.reg(gpr::RAX, 0x8a);
    let end = g.run(main).done();
    assert_eq!((end.reg(gpr::RCX), end.rax()), (2, 0x8a));
}

fn a_function_on_another_page_many_times() {
    let mut g = Guest::long();
    function(&mut g, PAGE, 0);
    let main = g.code(|a| {
        let mut again = a.create_label();
        asm!(a; xor(ebp, ebp); xor(r12d, r12d); set_label(&mut again));
        asm!(a; mov(dword_ptr(PAGE + 1), ebp); call(PAGE); add(r12d, eax); inc(ebp); cmp(ebp, 1000); jne(again); done());
    });
    assert_eq!(g.run(main).done().reg(gpr::R12), 999 * 1000 / 2);
}

fn data_beside_code_on_one_page() {
    let mut g = Guest::long();
    function(&mut g, PAGE, 3);
    let main = g.code(|a| {
        let mut again = a.create_label();
        asm!(a; mov(ebp, 1000); xor(r12d, r12d); set_label(&mut again));
        asm!(a; inc(dword_ptr(PAGE + 0x800)); call(PAGE); add(r12d, eax); dec(ebp); jnz(again); done());
    });
    assert_eq!(g.run(main).done().reg(gpr::R12), 3000);
    assert_eq!(g.get(PAGE + 0x800, 4), 1000);
}

fn through_another_address() {
    let mut g = Guest::long();
    function(&mut g, PAGE, 1);
    g.map(0x4000_0000, PAGE, flag::KERNEL);
    g.reg(gpr::RBX, 0x4000_0001);
    let main = g.code(|a| {
        asm!(a; mov(dword_ptr(rbx + 0x100), eax); call(PAGE); log(); mov(dword_ptr(rbx), 2); call(PAGE); log(); done());
    });
    g.run(main).done();
    assert_eq!(g.log(), [1, 2]);
}

fn code_under_two_addresses() {
    let mut g = Guest::long();
    function(&mut g, PAGE, 1);
    g.map(0x4000_0000, PAGE, flag::KERNEL);
    let main = g.code(|a| {
        asm!(a; call(PAGE); log(); call(0x4000_0000u64); log(); mov(dword_ptr(PAGE + 1), 2));
        asm!(a; call(PAGE); log(); call(0x4000_0000u64); log(); done());
    });
    g.run(main).done();
    assert_eq!(g.log(), [1, 1, 2, 2]);
}

fn after_the_page_was_written_many_times_before() {
    // The first stores make a direct mapping for stores; translating the code must take it away.
    let mut g = Guest::long();
    let main = g.code(|a| {
        let mut again = a.create_label();
        asm!(a; mov(ebp, 100); set_label(&mut again));
        asm!(a; mov(word_ptr(PAGE), 0xb8); mov(dword_ptr(PAGE + 1), ebp); mov(byte_ptr(PAGE + 5), 0xc3));
        asm!(a; call(PAGE); log(); dec(ebp); jnz(again); done());
    });
    g.run(main).done();
    assert_eq!(g.log(), (1..=100).rev().collect::<Vec<_>>());
}

fn by_rep_movs_and_rep_stos() {
    let mut g = Guest::long();
    function(&mut g, PAGE, 1);
    function(&mut g, DATA, 2);
    let main = g.code(|a| {
        asm!(a; call(PAGE); log());
        asm!(a; mov(esi, DATA as u32); mov(edi, PAGE as u32); mov(ecx, 6); rep().movsb(); call(PAGE); log());
        asm!(a; mov(eax, 0x0303_0303); mov(edi, PAGE as u32 + 1); mov(ecx, 1); rep().stosd(); call(PAGE); log(); done());
    });
    g.run(main).done();
    assert_eq!(g.log(), [1, 2, 0x0303_0303]);
}

fn rep_movs_over_the_code_that_is_running() {
    let mut g = Guest::long();
    let (main, [target]) = g.code_with(|a| {
        let mut target = a.create_label();
        asm!(a; mov(ecx, 4); rep().movsb(); set_label(&mut target); mov(eax, 1); done());
        [target]
    });
    g.set(DATA, 4, 0x55);
    g.reg(gpr::RSI, DATA);
    g.reg(gpr::RDI, target + 1);
    assert_eq!(g.run(main).done().rax(), 0x55);
}

fn by_push_and_call() {
    let mut g = Guest::long();
    function(&mut g, PAGE, 1);
    let main = g.code(|a| {
        asm!(a; call(PAGE); log(); mov(r8, rsp); mov(rsp, PAGE + 8); mov(rcx, 0xc300_0000_02b8u64); push(rcx));
        asm!(a; mov(rsp, r8); call(PAGE); log(); done());
    });
    g.run(main).done();
    assert_eq!(g.log(), [1, 2]);
}

fn by_locked_and_vector_stores() {
    let mut g = Guest::long();
    function(&mut g, PAGE, 1);
    g.set(DATA, 8, 0xc300_0000_07b8);
    let main = g.code(|a| {
        asm!(a; call(PAGE); log(); lock().add(dword_ptr(PAGE + 1), 1); call(PAGE); log());
        asm!(a; movdqu(xmm0, xmmword_ptr(DATA)); movdqu(xmmword_ptr(PAGE), xmm0); call(PAGE); log());
        asm!(a; mov(eax, 9); xchg(dword_ptr(PAGE + 1), eax); call(PAGE); log());
        asm!(a; mov(eax, 9); mov(ecx, 11); lock().cmpxchg(dword_ptr(PAGE + 1), ecx); call(PAGE); log(); done());
    });
    g.run(main).done();
    assert_eq!(g.log(), [1, 2, 7, 9, 11]);
}

fn a_store_that_crosses_into_a_page_of_code() {
    let mut g = Guest::long();
    function(&mut g, PAGE, 1);
    let main = g.code(|a| {
        asm!(a; call(PAGE); log(); mov(rcx, 0x05b8_0000_0000_0000u64); mov(qword_ptr(PAGE - 6), rcx); call(PAGE); log(); done());
    });
    g.run(main).done();
    assert_eq!(g.log(), [1, 5]);
}

fn the_second_page_of_an_instruction() {
    let mut g = Guest::long();
    function(&mut g, PAGE + 0xffe, 1);
    let main = g.code(|a| {
        asm!(a; call(PAGE + 0xffe); log(); mov(byte_ptr(PAGE + 0x1001), 2); call(PAGE + 0xffe); log(); done());
    });
    g.run(main).done();
    assert_eq!(g.log(), [1, 2 << 16 | 1]);
}

fn the_first_page_of_an_instruction() {
    let mut g = Guest::long();
    function(&mut g, PAGE + 0xffe, 1);
    let main = g.code(|a| {
        asm!(a; call(PAGE + 0xffe); log(); mov(byte_ptr(PAGE + 0xfff), 2); call(PAGE + 0xffe); log(); done());
    });
    g.run(main).done();
    assert_eq!(g.log(), [1, 2]);
}

fn a_jump_whose_target_is_patched() {
    let mut g = Guest::long();
    // A short jump in a loop whose displacement toggles between two targets of one page.
    let main = g.code(|a| {
        let (mut again, mut jump, mut one, mut two) =
            (a.create_label(), a.create_label(), a.create_label(), a.create_label());
        asm!(a; mov(ebp, 10); xor(ecx, ecx); xor(edx, edx); lea(rbx, ptr(jump)); set_label(&mut again));
        asm!(a; nop(); set_label(&mut jump); bytes(&[0xeb, 0x00]));
        asm!(a; inc(ecx); jmp(two); set_label(&mut one); inc(edx); set_label(&mut two));
        asm!(a; xor(byte_ptr(rbx + 1), 4); dec(ebp); jnz(again); done());
    });
    let end = g.run(main).done();
    assert_eq!((end.reg(gpr::RCX), end.reg(gpr::RDX)), (5, 10 - 5));
}

fn by_a_device() {
    let mut g = Guest::long();
    function(&mut g, PAGE, 1);
    let (memory, engine) = (g.memory.clone(), std::sync::Arc::clone(&g.engine));
    g.hook(move |value| {
        memory.write(GuestPhysAddr(PAGE + 1), &value.to_le_bytes()).unwrap();
        engine.memory_written(GuestPhysAddr(PAGE + 1), 4);
    });
    let main = g.code(|a| {
        asm!(a; call(PAGE); log(); mov(eax, 42); out(u32::from(port::HOOK), eax); xor(eax, eax); call(PAGE); log(); done());
    });
    g.run(main).done();
    assert_eq!(g.log(), [1, 42]);
}

fn by_a_device_in_the_block_that_runs() {
    let mut g = Guest::long();
    let (main, [target]) = g.code_with(|a| {
        let mut target = a.create_label();
        asm!(a; mov(eax, 42); out(u32::from(port::HOOK), eax); jmp(target); set_label(&mut target); mov(eax, 1); done());
        [target]
    });
    let (memory, engine) = (g.memory.clone(), std::sync::Arc::clone(&g.engine));
    g.hook(move |value| {
        memory.write(GuestPhysAddr(target + 1), &value.to_le_bytes()).unwrap();
        engine.memory_written(GuestPhysAddr(target + 1), 4);
    });
    assert_eq!(g.run(main).done().rax(), 42);
}

fn an_accessed_bit_in_a_page_of_code() {
    // The page of code is also a page table: a walk writes an accessed bit into what is an instruction.
    let mut g = Guest::long();
    g.map(0x4000_0000, 0x50_0000, flag::KERNEL);
    let table = g.tables.entry(0x4000_0000, 12) & !0xfff;
    g.map(PAGE, table, flag::KERNEL);
    // The entry for 0x4000_1000, on the same page as the code that reads it.
    g.set(table + 8, 8, 0x50_0003);
    g.assemble(64, PAGE + 0x100, table + 0x100, |a| asm!(a; mov(al, byte_ptr(PAGE + 8)); ret()));
    let main = g.code(|a| {
        asm!(a; call(PAGE + 0x100); movzx(eax, al); log(); mov(cl, byte_ptr(0x4000_1000u64)); call(PAGE + 0x100));
        asm!(a; movzx(eax, al); log(); done());
    });
    g.run(main).done();
    assert_eq!(g.log(), [0x03, 0x23]);
}

fn by_another_vcpu() {
    let mut g = Guest::smp(2);
    function(&mut g, PAGE, 1);
    // vCPU 1 executes the function until it returns 2; vCPU 0 patches it after vCPU 1 has begun.
    let other = g.code(|a| {
        let mut again = a.create_label();
        asm!(a; set_label(&mut again); call(PAGE); mov(dword_ptr(DATA), eax); cmp(eax, 2); jne(again); done());
    });
    g.start(1, other, Guest::stack_of(1));
    let main = g.code(|a| {
        let (mut wait, mut until) = (a.create_label(), a.create_label());
        asm!(a; set_label(&mut wait); pause(); cmp(dword_ptr(DATA), 1); jne(wait));
        asm!(a; mov(dword_ptr(PAGE + 1), 2));
        asm!(a; set_label(&mut until); pause(); cmp(dword_ptr(DATA), 2); jne(until); done());
    });
    g.run(main).done();
}

fn by_another_vcpu_with_a_breakpoint_first() {
    // As kernels patch live code: int3 over the first byte, wait, the rest, wait, the first byte.
    let mut g = Guest::smp(2);
    function(&mut g, PAGE, 1);
    // The handler of the breakpoint skips the five bytes and gives 0.
    let handler =
        g.code(|a| asm!(a; add(qword_ptr(rsp), 4); xor(eax, eax); inc(dword_ptr(DATA + 64)); iretq()));
    g.handler(vector::BP, handler);
    let other = g.code(|a| {
        let mut again = a.create_label();
        asm!(a; set_label(&mut again); call(PAGE); mov(dword_ptr(DATA), eax); inc(dword_ptr(DATA + 4)));
        asm!(a; cmp(dword_ptr(DATA + 8), 1); jne(again); mov(dword_ptr(DATA + 12), 1); done());
    });
    g.start(1, other, Guest::stack_of(1));
    let main = g.code(|a| {
        let mut round = a.create_label();
        asm!(a; mov(ebp, 2); set_label(&mut round));
        asm!(a; mov(byte_ptr(PAGE), 0xcc); mov(dword_ptr(PAGE + 1), ebp); mov(byte_ptr(PAGE), 0xb8));
        // Wait until the other one has called it twice more: then it must have seen the new code.
        let mut wait = a.create_label();
        asm!(a; mov(ecx, dword_ptr(DATA + 4)); add(ecx, 2); set_label(&mut wait); pause());
        asm!(a; mov(edx, dword_ptr(DATA + 4)); sub(edx, ecx); js(wait));
        asm!(a; mov(eax, dword_ptr(DATA)); cmp(eax, ebp); jne(wait));
        asm!(a; inc(ebp); cmp(ebp, 200); jne(round));
        let mut last = a.create_label();
        asm!(a; mov(dword_ptr(DATA + 8), 1); set_label(&mut last); cmp(dword_ptr(DATA + 12), 1); jne(last); done());
    });
    for end in g.run_smp(main) {
        end.done();
    }
}

berth_tests_system::cases![
    the_next_instruction,
    later_in_the_same_block,
    the_storing_instruction_itself,
    a_function_on_another_page_many_times,
    data_beside_code_on_one_page,
    through_another_address,
    code_under_two_addresses,
    after_the_page_was_written_many_times_before,
    by_rep_movs_and_rep_stos,
    rep_movs_over_the_code_that_is_running,
    by_push_and_call,
    by_locked_and_vector_stores,
    a_store_that_crosses_into_a_page_of_code,
    the_second_page_of_an_instruction,
    the_first_page_of_an_instruction,
    a_jump_whose_target_is_patched,
    by_a_device,
    by_a_device_in_the_block_that_runs,
    an_accessed_bit_in_a_page_of_code,
    by_another_vcpu,
    by_another_vcpu_with_a_breakpoint_first,
];

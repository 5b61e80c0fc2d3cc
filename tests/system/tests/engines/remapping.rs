//! Changed mappings: what is seen before and after each kind of flush (SDM volume 3, 4.10), for data and for code.

use berth_tests_system::prelude::*;

/// An address that is mapped to [`FRAME`] first and to [`OTHER`] later.
const PAGE: u64 = 0x4000_0000;
const FRAME: u64 = 0x50_0000;
const OTHER: u64 = 0x50_1000;
/// Where the guest sees the entry that maps [`PAGE`].
const ENTRY: u64 = ARENA + 0x1000;

/// A guest with [`PAGE`] mapped, its entry at the address in RSI, the values 1 and 2 in the two frames.
fn guest(flags: u64) -> Guest {
    let mut g = Guest::long();
    g.map(PAGE, FRAME, flags);
    let entry = g.tables.entry(PAGE, 12);
    g.map(ENTRY, entry & !0xfff, flag::KERNEL);
    g.reg(gpr::RSI, ENTRY + (entry & 0xfff));
    g.reg(gpr::RBX, PAGE);
    g.reg(gpr::RDI, OTHER | flags);
    g.set(FRAME, 4, 1);
    g.set(OTHER, 4, 2);
    g
}

/// Reads the page, maps it elsewhere, executes `flush`, and returns what is read then.
#[track_caller]
fn read_after(mut g: Guest, flush: impl FnOnce(&mut CodeAssembler)) -> u64 {
    let main = g.code(|a| {
        asm!(a; mov(eax, dword_ptr(rbx)); mov(qword_ptr(rsi), rdi));
        flush(a);
        asm!(a; mov(eax, dword_ptr(rbx)); done());
    });
    g.run(main).done().rax()
}

fn invlpg_flushes_one_page() {
    assert_eq!(read_after(guest(flag::KERNEL), |a| asm!(a; invlpg(byte_ptr(rbx)))), 2);
}

fn loading_cr3_flushes() {
    assert_eq!(read_after(guest(flag::KERNEL), |a| asm!(a; mov(rcx, cr3); mov(cr3, rcx))), 2);
}

fn invlpg_flushes_global_pages() {
    let mut g = guest(flag::KERNEL | flag::G);
    g.state.cr4 |= cr4::PGE;
    assert_eq!(read_after(g, |a| asm!(a; invlpg(byte_ptr(rbx)))), 2);
}

fn clearing_pge_flushes_global_pages() {
    let mut g = guest(flag::KERNEL | flag::G);
    g.state.cr4 |= cr4::PGE;
    let toggled =
        read_after(g, |a| asm!(a; mov(rcx, cr4); btc(rcx, 7); mov(cr4, rcx); btc(rcx, 7); mov(cr4, rcx)));
    assert_eq!(toggled, 2);
}

fn global_pages_change_with_cr3_when_pge_is_off() {
    let g = guest(flag::KERNEL | flag::G);
    assert_eq!(read_after(g, |a| asm!(a; mov(rcx, cr3); mov(cr3, rcx))), 2);
}

fn toggling_paging_bits_of_cr0_flushes() {
    let toggled = read_after(guest(flag::KERNEL), |a| {
        asm!(a; mov(rcx, cr0); btc(rcx, 16); mov(cr0, rcx); btc(rcx, 16); mov(cr0, rcx));
        // WP alone need not flush; CR3 does in any case.
        asm!(a; mov(rcx, cr3); mov(cr3, rcx));
    });
    assert_eq!(toggled, 2);
}

/// INVPCID of type `kind` for `pcid` and [`PAGE`].
fn invpcid_of(a: &mut CodeAssembler, kind: u32, pcid: u32) {
    asm!(a; mov(dword_ptr(DATA), pcid); mov(dword_ptr(DATA + 4), 0); mov(qword_ptr(DATA + 8), rbx));
    asm!(a; mov(ecx, kind); mov(edx, DATA as u32); invpcid(rcx, xmmword_ptr(rdx)));
}

fn invpcid_of_each_type_flushes() {
    for kind in 0..4 {
        assert_eq!(read_after(guest(flag::KERNEL), |a| invpcid_of(a, kind, 0)), 2, "type {kind}");
    }
}

fn invpcid_type_2_flushes_global_pages() {
    let mut g = guest(flag::KERNEL | flag::G);
    g.state.cr4 |= cr4::PGE;
    assert_eq!(read_after(g, |a| invpcid_of(a, 2, 0)), 2);
}

fn bad_invpcid_operands() {
    let refused = |kind: u32, pcid: u32| {
        let mut g = guest(flag::KERNEL);
        let main = g.code(|a| invpcid_of(a, kind, pcid));
        g.run(main).fault(vector::GP, 0);
    };
    refused(4, 0);
    refused(0, 0x1000);
    refused(1, 1); // a PCID without CR4.PCIDE
}

fn a_pcid_that_is_kept_is_flushed_by_invpcid() {
    let mut g = guest(flag::KERNEL);
    g.state.cr4 |= cr4::PCIDE;
    let root = g.tables.root;
    let keep = 1 << 63;
    let main = g.code(|a| {
        asm!(a; mov(eax, dword_ptr(rbx)));
        // To PCID 1 without a flush, change the mapping, flush PCID 0's entry, and back without a flush.
        asm!(a; mov(rcx, keep | root | 1); mov(cr3, rcx); mov(qword_ptr(rsi), rdi));
        invpcid_of(a, 0, 0);
        asm!(a; mov(rcx, keep | root); mov(cr3, rcx); mov(eax, dword_ptr(rbx)); done());
    });
    assert_eq!(g.run(main).done().rax(), 2);
}

fn each_pcid_has_its_own_translations() {
    let mut g = guest(flag::KERNEL);
    g.state.cr4 |= cr4::PCIDE;
    let mut second = g.more_tables();
    g.map_in(&mut second, PAGE, OTHER, flag::KERNEL);
    let keep = 1 << 63;
    let (one, two) = (keep | g.tables.root, keep | second.root | 1);
    let main = g.code(|a| {
        for root in [two, one, two, one] {
            asm!(a; mov(rcx, root); mov(cr3, rcx); mov(eax, dword_ptr(rbx)); log());
        }
        asm!(a; done());
    });
    g.run(main).done();
    assert_eq!(g.log(), [2, 1, 2, 1]);
}

fn loading_cr3_with_a_pcid_flushes_that_pcid() {
    let mut g = guest(flag::KERNEL);
    g.state.cr4 |= cr4::PCIDE;
    assert_eq!(read_after(g, |a| asm!(a; mov(rcx, cr3); mov(cr3, rcx))), 2);
}

fn pcide_cannot_be_set_with_a_pcid_in_cr3() {
    let mut g = guest(flag::KERNEL);
    g.state.cr3 |= 8;
    let main = g.code(|a| asm!(a; mov(rcx, cr4); bts(rcx, 17); mov(cr4, rcx)));
    g.run(main).fault(vector::GP, 0);
}

fn a_new_mapping_needs_no_flush() {
    let mut g = guest(0);
    g.reg(gpr::RDI, OTHER | flag::KERNEL);
    // The first access faults; its handler maps the page and returns to it.
    let handler = g.code(|a| asm!(a; mov(qword_ptr(rsi), rdi); add(rsp, 8); iretq()));
    g.handler(vector::PF, handler);
    let main = g.code(|a| asm!(a; mov(eax, dword_ptr(rbx)); done()));
    assert_eq!(g.run(main).done().rax(), 2);
}

fn more_rights_need_no_flush_after_the_fault() {
    let mut g = guest(flag::P);
    g.reg(gpr::RDI, FRAME | flag::KERNEL);
    let handler = g.code(|a| asm!(a; mov(qword_ptr(rsi), rdi); add(rsp, 8); iretq()));
    g.handler(vector::PF, handler);
    let main = g.code(|a| asm!(a; mov(eax, dword_ptr(rbx)); inc(dword_ptr(rbx)); done()));
    g.run(main).done();
    assert_eq!(g.get(FRAME, 4), 2);
}

/// Writes `mov eax, n; ret` at `offset` of both frames with different `n`.
fn two_functions(g: &mut Guest, offset: u64) {
    for (frame, n) in [(FRAME, 1), (OTHER, 2)] {
        g.assemble(64, PAGE + offset, frame + offset, |a| asm!(a; mov(eax, n); ret()));
    }
}

/// Calls the code in RBX with `call`, maps the page elsewhere and flushes, and calls again; twice, so that
/// everything has been linked by then.
fn call_remapped(g: &mut Guest, call: impl Fn(&mut CodeAssembler)) -> Vec<u32> {
    let main = g.code(|a| {
        let mut again = a.create_label();
        asm!(a; mov(ebp, 4); set_label(&mut again));
        call(a);
        asm!(a; log(); xchg(qword_ptr(rsi), rdi); invlpg(byte_ptr(rbx)); dec(ebp); jnz(again); done());
    });
    g.run(main).done();
    g.log()
}

fn remapped_code_by_indirect_call() {
    let mut g = guest(flag::KERNEL);
    two_functions(&mut g, 0);
    assert_eq!(call_remapped(&mut g, |a| asm!(a; call(rbx))), [1, 2, 1, 2]);
}

fn remapped_code_by_direct_call() {
    let mut g = guest(flag::KERNEL);
    two_functions(&mut g, 0x40);
    assert_eq!(call_remapped(&mut g, |a| asm!(a; call(PAGE + 0x40))), [1, 2, 1, 2]);
}

fn remapped_code_by_direct_jump_and_back() {
    let mut g = guest(flag::KERNEL);
    for (frame, n) in [(FRAME, 1), (OTHER, 2)] {
        g.assemble(64, PAGE, frame, |a| asm!(a; mov(eax, n); jmp(r8)));
    }
    let log = call_remapped(&mut g, |a| {
        let mut back = a.create_label();
        asm!(a; lea(r8, ptr(back)); jmp(PAGE); set_label(&mut back));
    });
    assert_eq!(log, [1, 2, 1, 2]);
}

fn remapped_code_by_conditional_jump() {
    let mut g = guest(flag::KERNEL);
    for (frame, n) in [(FRAME, 1), (OTHER, 2)] {
        g.assemble(64, PAGE, frame, |a| asm!(a; mov(eax, n); jmp(r8)));
    }
    let log = call_remapped(&mut g, |a| {
        let mut back = a.create_label();
        asm!(a; lea(r8, ptr(back)); test(rsp, rsp); jnz(PAGE); set_label(&mut back));
    });
    assert_eq!(log, [1, 2, 1, 2]);
}

fn remapped_code_by_return() {
    let mut g = guest(flag::KERNEL);
    for (frame, n) in [(FRAME, 1), (OTHER, 2)] {
        g.assemble(64, PAGE, frame, |a| asm!(a; mov(eax, n); jmp(r8)));
    }
    let log = call_remapped(&mut g, |a| {
        let mut back = a.create_label();
        asm!(a; lea(r8, ptr(back)); push(rbx); ret(); set_label(&mut back));
    });
    assert_eq!(log, [1, 2, 1, 2]);
}

fn remapped_code_is_entered_by_falling_off_the_page_before() {
    let mut g = guest(flag::KERNEL);
    two_functions(&mut g, 0);
    // The page before ends with NOPs and continues on the one that changes.
    g.map(PAGE - 0x1000, 0x50_2000, flag::KERNEL);
    g.write(0x50_2ff0, &[0x90; 16]);
    let main = g.code(|a| asm!(a; lea(r9, qword_ptr(rbx - 16)); call(r9); log(); jmp(qword_ptr(DATA))));
    let swap = g.code(|a| {
        asm!(a; xchg(qword_ptr(rsi), rdi); invlpg(byte_ptr(rbx)); dec(ebp); jnz(main); done());
    });
    g.set(DATA, 8, swap);
    g.reg(gpr::RBP, 4);
    g.run(main).done();
    assert_eq!(g.log(), [1, 2, 1, 2]);
}

fn an_instruction_whose_second_half_is_remapped() {
    let mut g = guest(flag::KERNEL);
    g.map(PAGE - 0x1000, 0x50_2000, flag::KERNEL);
    // MOV EAX, imm32 with its immediate on the second page, then RET.
    g.write(0x50_2fff, &[0xb8]);
    g.write(FRAME, &[1, 0, 0, 0, 0xc3]);
    g.write(OTHER, &[2, 0, 0, 0, 0xc3]);
    assert_eq!(call_remapped(&mut g, |a| asm!(a; lea(r9, qword_ptr(rbx - 1)); call(r9))), [1, 2, 1, 2]);
}

fn an_instruction_whose_first_half_is_remapped() {
    let mut g = guest(flag::KERNEL);
    g.map(PAGE + 0x1000, 0x50_2000, flag::KERNEL);
    // MOV EAX or MOV ECX, by the first page; the immediate is on the second.
    g.write(FRAME + 0xfff, &[0xb8]);
    g.write(OTHER + 0xfff, &[0xb9]);
    g.write(0x50_2000, &[7, 0, 0, 0, 0xc3]);
    let log = call_remapped(&mut g, |a| {
        asm!(a; xor(eax, eax); xor(ecx, ecx); lea(r9, qword_ptr(rbx + 0xfff)); call(r9); lea(eax, ptr(rax + rcx * 2)));
    });
    assert_eq!(log, [7, 14, 7, 14]);
}

fn code_at_one_address_in_two_address_spaces() {
    let mut g = guest(flag::KERNEL);
    two_functions(&mut g, 0);
    let mut second = g.more_tables();
    g.map_in(&mut second, PAGE, OTHER, flag::KERNEL);
    let (one, two) = (g.tables.root, second.root);
    let main = g.code(|a| {
        let mut again = a.create_label();
        asm!(a; mov(ebp, 3); set_label(&mut again));
        for root in [one, two] {
            asm!(a; mov(rcx, root); mov(cr3, rcx); call(PAGE); log());
        }
        asm!(a; dec(ebp); jnz(again); done());
    });
    g.run(main).done();
    assert_eq!(g.log(), [1, 2, 1, 2, 1, 2]);
}

fn code_that_becomes_unreadable_faults() {
    let mut g = guest(flag::KERNEL);
    two_functions(&mut g, 0);
    g.reg(gpr::RDI, 0);
    let main = g.code(|a| {
        asm!(a; call(PAGE); call(PAGE); mov(qword_ptr(rsi), rdi); invlpg(byte_ptr(rbx)); call(PAGE));
    });
    assert_eq!(g.run(main).page_fault(PAGE, pf_error::FETCH).rip, PAGE);
}

fn code_that_loses_its_user_bit_faults_at_level_3_only() {
    let mut g = Guest::long_user();
    g.map(PAGE, FRAME, flag::USER);
    g.assemble(64, PAGE, FRAME, |a| asm!(a; mov(eax, 1); ret()));
    let entry = g.tables.entry(PAGE, 12);
    g.map(ENTRY, entry & !0xfff, flag::KERNEL);
    // A system call takes the right away, and calls the code itself.
    let handler = g.code(|a| {
        asm!(a; btr(qword_ptr(ENTRY + (entry & 0xfff)), 2); mov(ebx, PAGE as u32); invlpg(byte_ptr(rbx)));
        asm!(a; call(PAGE); log(); iretq());
    });
    g.set_gate(0x31, Gate { dpl: 3, ..g.gate_to(handler) });
    let main = g.code(|a| asm!(a; call(PAGE); call(PAGE); int(0x31); call(PAGE)));
    let end = g.run(main);
    end.page_fault(PAGE, pf_error::PRESENT | pf_error::USER | pf_error::FETCH);
    assert_eq!(g.log(), [1]);
}

fn a_loop_over_two_pages_that_swap_places() {
    let mut g = guest(flag::KERNEL);
    // Each page adds a different amount and jumps to the other; the entries are exchanged in between.
    g.map(PAGE + 0x1000, OTHER, flag::KERNEL);
    g.reg(gpr::RDI, OTHER | flag::KERNEL);
    let second = g.tables.entry(PAGE + 0x1000, 12);
    g.reg(gpr::R10, ENTRY + (second & 0xfff));
    g.assemble(64, PAGE, FRAME, |a| asm!(a; add(eax, 1); jmp(r8)));
    g.assemble(64, PAGE, OTHER, |a| asm!(a; add(eax, 100); jmp(r8)));
    let main = g.code(|a| {
        let (mut again, mut one, mut two) = (a.create_label(), a.create_label(), a.create_label());
        asm!(a; xor(eax, eax); mov(ebp, 10); set_label(&mut again));
        asm!(a; lea(r8, ptr(one)); jmp(PAGE); set_label(&mut one));
        asm!(a; shl(eax, 1); lea(r8, ptr(two)); jmp(PAGE + 0x1000); set_label(&mut two));
        asm!(a; mov(r11, qword_ptr(rsi)); xchg(qword_ptr(r10), r11); mov(qword_ptr(rsi), r11));
        asm!(a; mov(rcx, cr3); mov(cr3, rcx); dec(ebp); jnz(again); done());
    });
    let mut expected = 0u32;
    for round in 0..10 {
        let (first, then) = if round % 2 == 0 { (1, 100) } else { (100, 1) };
        expected = ((expected.wrapping_add(first)) << 1).wrapping_add(then);
    }
    assert_eq!(g.run(main).done().rax(), u64::from(expected));
}

berth_tests_system::cases![
    invlpg_flushes_one_page,
    loading_cr3_flushes,
    invlpg_flushes_global_pages,
    clearing_pge_flushes_global_pages,
    global_pages_change_with_cr3_when_pge_is_off,
    toggling_paging_bits_of_cr0_flushes,
    invpcid_of_each_type_flushes,
    invpcid_type_2_flushes_global_pages,
    bad_invpcid_operands,
    a_pcid_that_is_kept_is_flushed_by_invpcid,
    each_pcid_has_its_own_translations,
    loading_cr3_with_a_pcid_flushes_that_pcid,
    pcide_cannot_be_set_with_a_pcid_in_cr3,
    a_new_mapping_needs_no_flush,
    more_rights_need_no_flush_after_the_fault,
    remapped_code_by_indirect_call,
    remapped_code_by_direct_call,
    remapped_code_by_direct_jump_and_back,
    remapped_code_by_conditional_jump,
    remapped_code_by_return,
    remapped_code_is_entered_by_falling_off_the_page_before,
    an_instruction_whose_second_half_is_remapped,
    an_instruction_whose_first_half_is_remapped,
    code_at_one_address_in_two_address_spaces,
    code_that_becomes_unreadable_faults,
    code_that_loses_its_user_bit_faults_at_level_3_only,
    a_loop_over_two_pages_that_swap_places,
];

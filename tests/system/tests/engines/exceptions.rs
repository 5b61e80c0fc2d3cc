//! Every exception that instructions raise: vector, error code, and where the handler would return to.

use berth_tests_system::engine::is_amd;
use berth_tests_system::prelude::*;

/// Runs one piece of 64-bit code that must fault at its first instruction; returns what was pushed.
#[track_caller]
fn faults(mut g: Guest, expected: u8, build: impl FnOnce(&mut CodeAssembler)) -> (Frame, End) {
    let main = g.code(build);
    let end = g.run(main);
    let frame = end.vector(expected);
    assert_eq!(frame.rip, main, "a fault points at its instruction: {}", end.account());
    assert_eq!(frame.cs, end_code(&g), "{}", end.account());
    assert_ne!(frame.flags & rflags::RF, 0, "faults push RF: {}", end.account());
    (frame, end)
}

fn end_code(g: &Guest) -> u16 {
    g.state.cs.selector
}

fn de_by_zero() {
    faults(Guest::long(), vector::DE, |a| asm!(a; div(ecx)));
}

fn de_by_quotient_too_large() {
    let mut g = Guest::long();
    g.reg(gpr::RDX, 5);
    g.reg(gpr::RCX, 5);
    let (_, end) = faults(g, vector::DE, |a| asm!(a; div(rcx)));
    assert_eq!((end.reg(gpr::RDX), end.reg(gpr::RCX)), (5, 5));
}

fn de_by_signed_overflow_of_memory_operand() {
    let mut g = Guest::long();
    g.reg(gpr::RAX, 0x8000_0000);
    g.reg(gpr::RDX, 0xffff_ffff);
    g.set(DATA, 4, 0xffff_ffff);
    g.reg(gpr::RBX, DATA);
    faults(g, vector::DE, |a| asm!(a; idiv(dword_ptr(rbx))));
}

fn de_of_aam_by_zero() {
    let mut g = Guest::mode(Mode::Paged32);
    let main = g.code(|a| asm!(a; bytes(&[0xd4, 0x00])));
    assert_eq!(g.run(main).vector(vector::DE).rip, main);
}

fn db_of_int1() {
    let mut g = Guest::long();
    let main = g.code(|a| asm!(a; int1()));
    let end = g.run(main);
    assert_eq!(end.vector(vector::DB).rip, main + 1, "a trap");
    assert_eq!(end.state.dr[6] & (1 << 14), 0, "INT1 is no single step");
}

fn bp_is_a_trap() {
    let mut g = Guest::long();
    let main = g.code(|a| asm!(a; int3()));
    let frame = g.run(main).vector(vector::BP);
    assert_eq!((frame.rip, frame.flags & rflags::RF), (main + 1, 0));
}

fn bp_from_level_3_needs_dpl_3() {
    let mut g = Guest::long_user();
    let main = g.code(|a| asm!(a; int3()));
    assert_eq!(g.run(main).fault(vector::GP, 3 * 8 + 2).rip, main);
}

fn int_n_pushes_the_next_address() {
    let mut g = Guest::long();
    let main = g.code(|a| asm!(a; int(0x21)));
    assert_eq!(g.run(main).vector(0x21).rip, main + 2);
}

fn of_by_into_only_with_overflow() {
    let mut g = Guest::mode(Mode::Protected32);
    let main = g.code(|a| asm!(a; xor(eax, eax); into(); mov(al, 0x7f); add(al, 1); into()));
    assert_eq!(g.run(main).vector(vector::OF).rip, main + 2 + 1 + 2 + 2 + 1);
}

fn br_by_bound() {
    let mut g = Guest::mode(Mode::Protected32);
    g.set(DATA, 4, 10);
    g.set(DATA + 4, 4, 20);
    g.reg(gpr::RAX, 15);
    g.reg(gpr::RCX, 21);
    g.reg(gpr::RBX, DATA);
    let main = g.code(|a| asm!(a; bound(eax, qword_ptr(ebx)); bound(ecx, qword_ptr(ebx))));
    assert_eq!(g.run(main).vector(vector::BR).rip, main + 2);
}

fn ud_by_ud2() {
    faults(Guest::long(), vector::UD, |a| asm!(a; ud2()));
}

fn ud_by_lock_on_an_instruction_without_it() {
    faults(Guest::long(), vector::UD, |a| asm!(a; bytes(&[0xf0, 0x01, 0xc8])));
}

fn ud_by_instructions_that_64_bit_mode_does_not_have() {
    for opcode in [0x06, 0x27, 0x37, 0x60, 0xce, 0xd4, 0x9a, 0xea] {
        faults(Guest::long(), vector::UD, |a| asm!(a; bytes(&[opcode, 0, 0, 0, 0, 0, 0])));
    }
}

fn ud_by_moving_to_cr1() {
    faults(Guest::long(), vector::UD, |a| asm!(a; bytes(&[0x0f, 0x22, 0xc8])));
}

fn gp_by_an_instruction_of_16_bytes() {
    let mut bytes = vec![0x66; 15];
    bytes.push(0x90);
    let (frame, _) = faults(Guest::long(), vector::GP, |a| asm!(a; bytes(&bytes)));
    assert_eq!(frame.error, Some(0));
}

fn an_instruction_of_15_bytes_is_fine() {
    let mut bytes = vec![0x66; 14];
    bytes.push(0x90);
    let mut g = Guest::long();
    let main = g.code(|a| asm!(a; bytes(&bytes); done()));
    g.run(main).done();
}

fn nm_by_x87_with_task_switched() {
    let mut g = Guest::long();
    g.state.cr0 |= cr0::TS;
    faults(g, vector::NM, |a| asm!(a; fld1()));
}

fn nm_by_sse_with_task_switched_until_clts() {
    let mut g = Guest::long();
    g.state.cr0 |= cr0::TS;
    let (main, [second]) = g.code_with(|a| {
        let mut second = a.create_label();
        asm!(a; clts(); movaps(xmm0, xmm1); mov(rax, cr0); or(rax, cr0::TS as i32); mov(cr0, rax));
        asm!(a; set_label(&mut second); movaps(xmm0, xmm1));
        [second]
    });
    let frame = g.run(main).vector(vector::NM);
    assert_eq!(frame.rip, second);
}

fn nm_by_wait_needs_mp_and_ts() {
    let mut g = Guest::long();
    g.state.cr0 = g.state.cr0 & !cr0::MP | cr0::TS;
    let main = g.code(|a| asm!(a; wait(); done()));
    g.run(main).done();
    let mut g = Guest::long();
    g.state.cr0 |= cr0::MP | cr0::TS;
    faults(g, vector::NM, |a| asm!(a; wait()));
}

fn em_makes_x87_nm_and_sse_ud() {
    let mut g = Guest::long();
    g.state.cr0 |= cr0::EM;
    faults(g, vector::NM, |a| asm!(a; fninit()));
    let mut g = Guest::long();
    g.state.cr0 |= cr0::EM;
    faults(g, vector::UD, |a| asm!(a; addps(xmm0, xmm1)));
}

fn ud_by_sse_without_osfxsr_and_avx_without_osxsave() {
    let mut g = Guest::long();
    g.state.cr4 &= !cr4::OSFXSR;
    faults(g, vector::UD, |a| asm!(a; addps(xmm0, xmm1)));
    let mut g = Guest::long();
    g.state.cr4 &= !cr4::OSXSAVE;
    faults(g, vector::UD, |a| asm!(a; vaddps(ymm0, ymm1, ymm2)));
}

fn ts_by_a_return_stack_that_is_no_stack() {
    // An inner stack selector in the TSS that is code: #TS with that selector.
    let mut g = Guest::user(Mode::Protected32);
    g.set(TSS + 8, 2, u64::from(selector::CODE32));
    // #TS is raised while the interrupt is delivered, and its own delivery needs the same stack: make the gate
    // of #TS conforming to the current level instead.
    let main = g.code(|a| asm!(a; user_done()));
    let end = g.run(main);
    // Delivery of #TS needs the stack again: #TS again, then #DF, then shutdown.
    end.triple_fault();
}

fn ts_with_the_selector_of_the_bad_stack() {
    let mut g = Guest::user(Mode::Protected32);
    g.set(TSS + 8, 2, u64::from(selector::CODE32));
    // A handler for #TS at level 3 needs no other stack.
    let handler = g.code(|a| asm!(a; mov(eax, dword_ptr(esp)); log(); user_done()));
    g.set_gate(vector::TS, Gate { selector: selector::USER_CODE32 | 3, ..g.gate_to(handler) });
    // Only the first delivery may find the bad selector.
    let fix = g.code(|a| asm!(a; mov(word_ptr(TSS + 8), u32::from(selector::DATA)); jmp(handler)));
    g.set_gate(vector::TS, Gate { selector: selector::USER_CODE32 | 3, ..g.gate_to(fix) });
    let main = g.code(|a| asm!(a; user_done()));
    g.run(main).done();
    assert_eq!(g.log(), [u32::from(selector::CODE32)]);
}

fn np_by_a_segment_that_is_not_present() {
    let mut g = Guest::long();
    g.descriptor(selector::FREE, 0x00cf_1300_0000_ffff);
    g.reg(gpr::RAX, u64::from(selector::FREE));
    let (frame, _) = faults(g, vector::NP, |a| asm!(a; mov(ds, ax)));
    assert_eq!(frame.error, Some(u32::from(selector::FREE)));
}

fn np_by_a_gate_that_is_not_present() {
    let mut g = Guest::long();
    g.set_gate(0x21, Gate { present: false, ..g.gate_to(STUBS) });
    let (frame, _) = faults(g, vector::NP, |a| asm!(a; int(0x21)));
    assert_eq!(frame.error, Some(0x21 * 8 + 2));
}

fn ss_by_a_stack_segment_that_is_not_present() {
    let mut g = Guest::mode(Mode::Protected32);
    g.descriptor(selector::FREE, 0x00cf_1300_0000_ffff);
    g.reg(gpr::RAX, u64::from(selector::FREE));
    let (frame, _) = faults(g, vector::SS, |a| asm!(a; mov(ss, ax)));
    assert_eq!(frame.error, Some(u32::from(selector::FREE)));
}

fn ss_by_a_non_canonical_stack() {
    let mut g = Guest::long();
    g.reg(gpr::RBP, 1 << 63);
    let (frame, _) = faults(g, vector::SS, |a| asm!(a; mov(rax, qword_ptr(rbp))));
    assert_eq!(frame.error, Some(0));
}

fn gp_by_a_jump_to_a_non_canonical_address() {
    let mut g = Guest::long();
    g.reg(gpr::RBX, 1 << 60);
    faults(g, vector::GP, |a| asm!(a; jmp(rbx)));
}

fn gp_by_a_call_to_a_non_canonical_address_leaves_rsp() {
    let mut g = Guest::long();
    g.reg(gpr::RBX, 1 << 60);
    let stack = g.state.gpr[gpr::RSP];
    let (frame, _) = faults(g, vector::GP, |a| asm!(a; call(rbx)));
    assert_eq!(frame.rsp, Some(stack));
}

fn gp_by_a_return_to_a_non_canonical_address_leaves_rsp() {
    let mut g = Guest::long();
    let stack = g.state.gpr[gpr::RSP];
    g.set(stack, 8, 1 << 60);
    let (frame, _) = faults(g, vector::GP, |a| asm!(a; ret_1(16)));
    assert_eq!(frame.rsp, Some(stack));
}

fn gp_by_a_non_canonical_address() {
    let mut g = Guest::long();
    g.reg(gpr::RBX, 1 << 63);
    let (frame, _) = faults(g, vector::GP, |a| asm!(a; mov(rax, qword_ptr(rbx))));
    assert_eq!(frame.error, Some(0));
}

fn gp_by_privileged_instructions_at_level_3() {
    let cases: &[&[u8]] = &[
        &[0xf4],             // hlt
        &[0xfa],             // cli
        &[0xfb],             // sti
        &[0x0f, 0x06],       // clts
        &[0x0f, 0x08],       // invd
        &[0x0f, 0x09],       // wbinvd
        &[0x0f, 0x20, 0xc0], // mov rax, cr0
        &[0x0f, 0x22, 0xd8], // mov cr3, rax
        &[0x0f, 0x21, 0xc0], // mov rax, dr0
        &[0x0f, 0x30],       // wrmsr
        &[0x0f, 0x32],       // rdmsr
        &[0x0f, 0x01, 0xf8], // swapgs
        &[0x0f, 0x01, 0x10], // lgdt [rax]
        &[0x0f, 0x01, 0x18], // lidt [rax]
        &[0x0f, 0x00, 0xd8], // ltr ax
        &[0x0f, 0x00, 0xd0], // lldt ax
        &[0x0f, 0x01, 0xf0], // lmsw ax
        &[0x0f, 0x01, 0x38], // invlpg [rax]
        &[0xec],             // in al, dx
        &[0xee],             // out dx, al
    ];
    for code in cases {
        let (frame, _) = faults(Guest::long_user(), vector::GP, |a| asm!(a; bytes(code)));
        assert_eq!(frame.error, Some(0), "{code:02x?}");
    }
}

fn gp_by_a_null_stack_in_32_bit_mode() {
    let (frame, _) = faults(Guest::mode(Mode::Protected32), vector::GP, |a| asm!(a; mov(ss, cx)));
    assert_eq!(frame.error, Some(0));
}

fn gp_by_a_selector_outside_the_table() {
    let mut g = Guest::long();
    g.reg(gpr::RAX, 0x1238);
    let (frame, _) = faults(g, vector::GP, |a| asm!(a; mov(es, ax)));
    assert_eq!(frame.error, Some(0x1238));
}

fn gp_by_a_selector_of_an_absent_ldt() {
    let mut g = Guest::long();
    g.reg(gpr::RAX, 0x0c);
    let (frame, _) = faults(g, vector::GP, |a| asm!(a; mov(fs, ax)));
    assert_eq!(frame.error, Some(0x0c));
}

fn gp_by_misaligned_vector_memory() {
    let mut g = Guest::long();
    g.reg(gpr::RBX, DATA + 8);
    let (frame, _) = faults(g, vector::GP, |a| asm!(a; movaps(xmm0, xmmword_ptr(rbx))));
    assert_eq!(frame.error, Some(0));
    let mut g = Guest::long();
    g.reg(gpr::RBX, DATA + 16);
    faults(g, vector::GP, |a| asm!(a; vmovdqa(ymmword_ptr(rbx), ymm0)));
}

fn gp_by_bad_control_register_values() {
    let cases: &[(&[u8], u64)] = &[
        (&[0x0f, 0x22, 0xc0], 0x8000_0010),           // CR0: PG without PE
        (&[0x0f, 0x22, 0xc0], 1 << 29 | 0x8001_0031), // CR0: NW without CD
        (&[0x0f, 0x22, 0xc0], 1 << 32 | 0x8001_0031), // CR0: bit 32
        (&[0x0f, 0x22, 0xe0], 1 << 15 | 0x620),       // CR4: reserved
        (&[0x0f, 0x22, 0xe0], 0x600),                 // CR4: PAE cleared in long mode
        (&[0x0f, 0x22, 0xd8], 1 << 52),               // CR3: reserved
        (&[0x44, 0x0f, 0x22, 0xc0], 16),              // CR8: 5 bits
        (&[0x0f, 0x23, 0xf8], 1 << 32),               // DR7: bit 32
        (&[0x0f, 0x23, 0xf0], 1 << 32),               // DR6: bit 32
    ];
    for (code, value) in cases {
        let mut g = Guest::long();
        g.reg(gpr::RAX, *value);
        let (frame, _) = faults(g, vector::GP, |a| asm!(a; bytes(code)));
        assert_eq!(frame.error, Some(0), "{code:02x?} {value:#x}");
    }
}

fn mf_comes_at_the_next_waiting_instruction() {
    let mut g = Guest::long();
    g.set(DATA, 2, 0x037f & !4);
    g.reg(gpr::RBX, DATA);
    let main = g.code(|a| asm!(a; fldcw(word_ptr(rbx)); fld1(); fldz(); fdivp(st1, st0); nop(); fld1()));
    let frame = g.run(main).vector(vector::MF);
    assert_eq!(frame.rip, main + 2 + 2 + 2 + 2 + 1);
}

fn mf_is_not_raised_by_non_waiting_instructions() {
    let mut g = Guest::long();
    g.set(DATA, 2, 0x037f & !4);
    g.reg(gpr::RBX, DATA);
    let main = g.code(|a| {
        asm!(a; fldcw(word_ptr(rbx)); fld1(); fldz(); fdivp(st1, st0); fnstsw(ax); fnclex(); fld1(); done());
    });
    let end = g.run(main).done();
    assert_eq!(end.rax() & 0x84, 0x84, "zero divide and the summary bit");
}

fn ac_by_misaligned_data_at_level_3() {
    let mut g = Guest::long_user();
    g.state.cr0 |= cr0::AM;
    g.state.rflags |= rflags::AC;
    g.reg(gpr::RBX, DATA + 2);
    let (frame, _) = faults(g, vector::AC, |a| asm!(a; mov(eax, dword_ptr(rbx))));
    assert_eq!(frame.error, Some(0));
}

fn ac_is_off_at_level_0_and_for_aligned_data() {
    let mut g = Guest::long();
    g.state.cr0 |= cr0::AM;
    g.state.rflags |= rflags::AC;
    g.reg(gpr::RBX, DATA + 2);
    let main = g.code(|a| asm!(a; mov(eax, dword_ptr(rbx)); done()));
    g.run(main).done();
    let mut g = Guest::long_user();
    g.state.cr0 |= cr0::AM;
    g.state.rflags |= rflags::AC;
    g.reg(gpr::RBX, DATA + 2);
    let main = g.code(|a| asm!(a; mov(ax, word_ptr(rbx)); mov(cl, byte_ptr(rbx + 1)); user_done()));
    g.run(main).done();
}

fn xm_by_an_unmasked_sse_exception() {
    let mut g = Guest::long();
    g.set(DATA, 4, 0x1f80 & !(1 << 9));
    g.reg(gpr::RBX, DATA);
    let main = g.code(|a| {
        asm!(a; ldmxcsr(dword_ptr(rbx)); mov(eax, 1); cvtsi2ss(xmm0, eax); xorps(xmm1, xmm1); divss(xmm0, xmm1); nop());
    });
    let end = g.run(main);
    assert_eq!(end.vector(vector::XM).rip, main + 3 + 5 + 4 + 3);
    assert_ne!(end.state.fpu.0[24] & 4, 0, "MXCSR.ZE is set");
}

fn ud_instead_of_xm_without_osxmmexcpt() {
    let mut g = Guest::long();
    g.state.cr4 &= !cr4::OSXMMEXCPT;
    g.set(DATA, 4, 0x1f80 & !(1 << 9));
    g.reg(gpr::RBX, DATA);
    let main = g.code(|a| {
        asm!(a; ldmxcsr(dword_ptr(rbx)); mov(eax, 1); cvtsi2ss(xmm0, eax); xorps(xmm1, xmm1); divss(xmm0, xmm1); nop());
    });
    g.run(main).vector(vector::UD);
}

fn gp_by_reserved_bits_of_mxcsr() {
    let mut g = Guest::long();
    g.set(DATA, 4, 0x1_1f80);
    g.reg(gpr::RBX, DATA);
    let (frame, _) = faults(g, vector::GP, |a| asm!(a; ldmxcsr(dword_ptr(rbx))));
    assert_eq!(frame.error, Some(0));
}

fn df_when_a_contributory_exception_meets_another() {
    let mut g = Guest::long();
    // #GP cannot be delivered: its gate is not present, which is #NP.
    g.set_gate(vector::GP, Gate { present: false, ..g.gate_to(STUBS) });
    g.reg(gpr::RBX, 1 << 63);
    let main = g.code(|a| asm!(a; mov(rax, qword_ptr(rbx))));
    assert_eq!(g.run(main).fault(vector::DF, 0).rip, main);
}

fn df_when_a_page_fault_meets_a_page_fault() {
    let mut g = Guest::long();
    g.reg(gpr::RSP, 0x5000_0000);
    g.set_gate(vector::DF, Gate { ist: 1, ..g.gate_to(STUBS + 8 * STUB_SIZE) });
    let main = g.code(|a| asm!(a; push(rax)));
    let end = g.run(main);
    let frame = end.fault(vector::DF, 0);
    assert_eq!((frame.rip, frame.rsp), (main, Some(0x5000_0000)));
    assert_eq!(end.reg(gpr::RSP), IST_STACK - 48, "on the stack that the IST names");
}

fn a_fault_after_a_benign_one_is_delivered_instead() {
    let mut g = Guest::long();
    // #UD is benign: that its gate is not present is just #NP.
    g.set_gate(vector::UD, Gate { present: false, ..g.gate_to(STUBS) });
    let main = g.code(|a| asm!(a; ud2()));
    assert_eq!(g.run(main).fault(vector::NP, 6 * 8 + 2 + 1).rip, main);
}

fn a_page_fault_while_a_page_fault_is_delivered_leaves_its_own_cr2() {
    let mut g = Guest::long();
    g.reg(gpr::RSP, 0x5000_0000);
    g.reg(gpr::RBX, 0x6000_0000);
    g.set_gate(vector::DF, Gate { ist: 1, ..g.gate_to(STUBS + 8 * STUB_SIZE) });
    let main = g.code(|a| asm!(a; mov(rax, qword_ptr(rbx))));
    let end = g.run(main);
    end.fault(vector::DF, 0);
    assert_eq!(end.state.cr2 & !0xfff, 0x4fff_f000);
}

fn triple_fault_without_any_handler() {
    let mut g = Guest::long();
    g.state.idtr.limit = 0;
    let main = g.code(|a| asm!(a; ud2()));
    g.run(main).triple_fault();
}

fn triple_fault_in_real_mode() {
    let mut g = Guest::mode(Mode::Real);
    g.state.idtr.limit = 3;
    let main = g.code(|a| asm!(a; ud2()));
    g.run(main).triple_fault();
}

fn a_vector_outside_the_idt_is_gp_with_the_idt_bit() {
    let mut g = Guest::long();
    g.state.idtr.limit = 0x40 * 16 - 1;
    let (frame, _) = faults(g, vector::GP, |a| asm!(a; int(0x40)));
    assert_eq!(frame.error, Some(0x40 * 8 + 2));
}

fn sysenter_in_long_mode_follows_the_vendor() {
    let vector = if is_amd() { vector::UD } else { vector::GP };
    faults(Guest::long(), vector, |a| asm!(a; sysenter()));
}

berth_tests_system::cases![
    de_by_zero,
    de_by_quotient_too_large,
    de_by_signed_overflow_of_memory_operand,
    de_of_aam_by_zero,
    db_of_int1,
    bp_is_a_trap,
    bp_from_level_3_needs_dpl_3,
    int_n_pushes_the_next_address,
    of_by_into_only_with_overflow,
    br_by_bound,
    ud_by_ud2,
    ud_by_lock_on_an_instruction_without_it,
    ud_by_instructions_that_64_bit_mode_does_not_have,
    ud_by_moving_to_cr1,
    gp_by_an_instruction_of_16_bytes,
    an_instruction_of_15_bytes_is_fine,
    nm_by_x87_with_task_switched,
    nm_by_sse_with_task_switched_until_clts,
    nm_by_wait_needs_mp_and_ts,
    em_makes_x87_nm_and_sse_ud,
    ud_by_sse_without_osfxsr_and_avx_without_osxsave,
    ts_by_a_return_stack_that_is_no_stack,
    ts_with_the_selector_of_the_bad_stack,
    np_by_a_segment_that_is_not_present,
    np_by_a_gate_that_is_not_present,
    ss_by_a_stack_segment_that_is_not_present,
    ss_by_a_non_canonical_stack,
    gp_by_a_jump_to_a_non_canonical_address,
    gp_by_a_call_to_a_non_canonical_address_leaves_rsp,
    gp_by_a_return_to_a_non_canonical_address_leaves_rsp,
    gp_by_a_non_canonical_address,
    gp_by_privileged_instructions_at_level_3,
    gp_by_a_null_stack_in_32_bit_mode,
    gp_by_a_selector_outside_the_table,
    gp_by_a_selector_of_an_absent_ldt,
    gp_by_misaligned_vector_memory,
    gp_by_bad_control_register_values,
    mf_comes_at_the_next_waiting_instruction,
    mf_is_not_raised_by_non_waiting_instructions,
    ac_by_misaligned_data_at_level_3,
    ac_is_off_at_level_0_and_for_aligned_data,
    xm_by_an_unmasked_sse_exception,
    ud_instead_of_xm_without_osxmmexcpt,
    gp_by_reserved_bits_of_mxcsr,
    df_when_a_contributory_exception_meets_another,
    df_when_a_page_fault_meets_a_page_fault,
    a_fault_after_a_benign_one_is_delivered_instead,
    a_page_fault_while_a_page_fault_is_delivered_leaves_its_own_cr2,
    triple_fault_without_any_handler,
    triple_fault_in_real_mode,
    a_vector_outside_the_idt_is_gp_with_the_idt_bit,
    sysenter_in_long_mode_follows_the_vendor,
];

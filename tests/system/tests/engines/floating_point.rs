//! x87, SSE and AVX state: saving, restoring, availability (SDM volume 1, chapters 8, 10 and 13). Exceptions of
//! floating point are in `exceptions.rs`.

use berth_tests_system::prelude::*;

fn fxsave_and_fxrstor_give_everything_back() {
    let mut g = Guest::long();
    g.set(DATA + 0x800, 8, 0x4009_21fb_5444_2d18);
    let main = g.code(|a| {
        asm!(a; fld(qword_ptr(DATA + 0x800)); fld1(); movq(xmm7, qword_ptr(DATA + 0x800)); movaps(xmm15, xmm7));
        asm!(a; fxsave(ptr(DATA)); fninit(); pxor(xmm7, xmm7); pxor(xmm15, xmm15); fxrstor(ptr(DATA)));
        asm!(a; fstp(qword_ptr(DATA + 0x810)); fstp(qword_ptr(DATA + 0x818)); movq(rax, xmm7); movq(rcx, xmm15); done());
    });
    let end = g.run(main).done();
    assert_eq!(
        (g.get(DATA + 0x810, 8), g.get(DATA + 0x818, 8)),
        (0x3ff0_0000_0000_0000, 0x4009_21fb_5444_2d18)
    );
    assert_eq!((end.rax(), end.reg(gpr::RCX)), (0x4009_21fb_5444_2d18, 0x4009_21fb_5444_2d18));
}

fn the_fxsave_image_has_the_fields_of_the_manual() {
    let mut g = Guest::long();
    let main = g.code(|a| asm!(a; fninit(); fld1(); fld1(); fxsave(ptr(DATA)); done()));
    g.run(main).done();
    assert_eq!(g.get(DATA, 2), 0x37f, "FCW");
    assert_eq!(g.get(DATA + 2, 2) >> 11 & 7, 6, "TOP");
    assert_eq!(g.get(DATA + 4, 1), 0xc0, "abridged tag word: physical registers 7 and 6");
    assert_eq!(g.get(DATA + 24, 4), 0x1f80, "MXCSR");
    assert_eq!((g.get(DATA + 32, 8), g.get(DATA + 40, 2)), (1 << 63, 0x3fff), "ST(0) is 1.0");
}

fn fxsave_needs_16_byte_alignment() {
    let mut g = Guest::long();
    let main = g.code(|a| asm!(a; fxsave(ptr(DATA + 8))));
    g.run(main).fault(vector::GP, 0);
}

fn xsave_and_xrstor_of_the_upper_halves() {
    let mut g = Guest::long();
    for n in 0..4 {
        g.set(DATA + 0x800 + n * 8, 8, 0x1111_1111_1111_1111 * (n + 1));
    }
    let main = g.code(|a| {
        asm!(a; vmovdqu(ymm9, ymmword_ptr(DATA + 0x800)); mov(eax, 7); xor(edx, edx); xsave(ptr(DATA)));
        asm!(a; vzeroall(); xrstor(ptr(DATA)); vmovdqu(ymmword_ptr(DATA + 0x840), ymm9); done());
    });
    g.run(main).done();
    assert_eq!(
        [0, 1, 2, 3].map(|n| g.get(DATA + 0x840 + n * 8, 8)),
        [1, 2, 3, 4].map(|n| 0x1111_1111_1111_1111 * n)
    );
    assert_eq!(g.get(DATA + 512, 8) & 6, 6, "XSTATE_BV says that SSE and AVX are in use");
}

fn xrstor_of_absent_components_initialises_them() {
    let mut g = Guest::long();
    g.set(DATA + 24, 4, 0x1f80);
    let main = g.code(|a| {
        asm!(a; vpcmpeqd(ymm3, ymm3, ymm3); mov(eax, 7); xor(edx, edx); xrstor(ptr(DATA)));
        asm!(a; vmovdqu(ymmword_ptr(DATA + 0x840), ymm3); done());
    });
    g.run(main).done();
    assert_eq!([0, 1, 2, 3].map(|n| g.get(DATA + 0x840 + n * 8, 8)), [0; 4]);
}

fn xrstor_checks_its_header() {
    let refused = |offset: u64, value: u64| {
        let mut g = Guest::long();
        g.set(DATA + 512 + offset, 8, value);
        let main = g.code(|a| asm!(a; mov(eax, 7); xor(edx, edx); xrstor(ptr(DATA))));
        g.run(main).fault(vector::GP, 0);
    };
    refused(0, 1 << 10); // a component that XCR0 does not have
    refused(16, 1); // reserved bytes
}

fn xsetbv_and_xgetbv() {
    let mut g = Guest::long();
    g.state.xcr0 = 1;
    let main = g.code(|a| {
        asm!(a; xor(ecx, ecx); xor(edx, edx); mov(eax, 7); xsetbv(); xor(eax, eax); xgetbv(); vaddps(ymm0, ymm0, ymm0); done());
    });
    assert_eq!(g.run(main).done().rax(), 7);
    for bad in [0, 2, 5, 1 << 9 | 1] {
        let mut g = Guest::long();
        let main = g.code(|a| asm!(a; xor(ecx, ecx); xor(edx, edx); mov(eax, bad); xsetbv()));
        g.run(main).fault(vector::GP, 0);
    }
}

fn avx_needs_its_bit_of_xcr0() {
    let mut g = Guest::long();
    g.state.xcr0 = 3;
    let main = g.code(|a| asm!(a; vaddps(ymm0, ymm0, ymm0)));
    g.run(main).vector(vector::UD);
}

fn sse_instructions_leave_the_upper_half_and_vex_ones_clear_it() {
    let mut g = Guest::long();
    let main = g.code(|a| {
        asm!(a; vpcmpeqd(ymm1, ymm1, ymm1); vmovdqa(ymm2, ymm1); pxor(xmm1, xmm1); vpxor(xmm2, xmm2, xmm2));
        asm!(a; vmovdqu(ymmword_ptr(DATA), ymm1); vmovdqu(ymmword_ptr(DATA + 32), ymm2); done());
    });
    g.run(main).done();
    assert_eq!((g.get(DATA + 8, 8), g.get(DATA + 16, 8)), (0, u64::MAX));
    assert_eq!((g.get(DATA + 40, 8), g.get(DATA + 48, 8)), (0, 0));
}

fn rounding_modes_are_the_guests() {
    let mut g = Guest::long();
    g.set(DATA, 4, 0x7f80); // toward zero
    g.set(DATA + 4, 4, 0x3fc0_0000); // 1.5
    let main = g.code(|a| {
        asm!(a; cvtss2si(eax, dword_ptr(DATA + 4)); mov(ecx, eax); ldmxcsr(dword_ptr(DATA)));
        // In between something that leaves translated code.
        asm!(a; log(); cvtss2si(eax, dword_ptr(DATA + 4)); stmxcsr(dword_ptr(DATA + 8)); done());
    });
    let end = g.run(main).done();
    assert_eq!((end.reg(gpr::RCX), end.rax()), (2, 1));
    assert_eq!(g.get(DATA + 8, 4) & 0x6000, 0x6000);
}

fn the_x87_stack_survives_faults_and_port_accesses() {
    let mut g = Guest::long();
    let handler = g.code(|a| asm!(a; add(qword_ptr(rsp), 2); iretq()));
    g.handler(vector::UD, handler);
    let main = g.code(|a| {
        asm!(a; fninit(); fldpi(); fld1(); ud2(); log(); faddp(st1, st0); mov(rax, cr3); mov(cr3, rax));
        asm!(a; fstp(qword_ptr(DATA)); fnstsw(ax); done());
    });
    let end = g.run(main).done();
    assert_eq!(f64::from_bits(g.get(DATA, 8)), std::f64::consts::PI + 1.0);
    assert_eq!(end.rax() >> 11 & 7, 0, "the stack is empty");
}

fn memory_operands_across_pages() {
    let mut g = Guest::long();
    g.map(0x4000_0000, 0x50_0000, flag::KERNEL);
    g.map(0x4000_1000, 0x70_0000, flag::KERNEL);
    g.reg(gpr::RBX, 0x4000_0ffb);
    g.reg(gpr::RAX, 1.25f64.to_bits());
    let main = g.code(|a| {
        asm!(a; mov(qword_ptr(rbx), rax); fld(qword_ptr(rbx)); fadd(qword_ptr(rbx)); fstp(tbyte_ptr(rbx)); fld(tbyte_ptr(rbx)));
        asm!(a; fstp(qword_ptr(DATA)); done());
    });
    g.run(main).done();
    assert_eq!(f64::from_bits(g.get(DATA, 8)), 2.5);
}

fn an_sse_fault_does_not_change_its_destination() {
    let mut g = Guest::long();
    g.reg(gpr::RBX, 0x7000_0000);
    let main = g.code(|a| asm!(a; pcmpeqd(xmm4, xmm4); addps(xmm4, xmmword_ptr(rbx))));
    let end = g.run(main);
    end.page_fault(0x7000_0000, 0);
    assert_eq!(end.state.fpu.0[160 + 64..][..16], [0xff; 16]);
}

berth_tests_system::cases![
    fxsave_and_fxrstor_give_everything_back,
    the_fxsave_image_has_the_fields_of_the_manual,
    fxsave_needs_16_byte_alignment,
    xsave_and_xrstor_of_the_upper_halves,
    xrstor_of_absent_components_initialises_them,
    xrstor_checks_its_header,
    xsetbv_and_xgetbv,
    avx_needs_its_bit_of_xcr0,
    sse_instructions_leave_the_upper_half_and_vex_ones_clear_it,
    rounding_modes_are_the_guests,
    the_x87_stack_survives_faults_and_port_accesses,
    memory_operands_across_pages,
    an_sse_fault_does_not_change_its_destination,
];

//! Loads and stores at the edges: of pages, of the address space, of RAM; strings that fault in the middle; and
//! input and output.

use berth_tests_system::bus::MmioAccess;
use berth_tests_system::prelude::*;

/// Two pages at [`PAGE`], the frames far apart.
const PAGE: u64 = 0x4000_0000;
const FIRST: u64 = 0x50_0000;
const SECOND: u64 = 0x70_0000;

/// Both pages mapped; RBX points 3 bytes before the boundary.
fn two_pages(second: u64) -> Guest {
    let mut g = Guest::long();
    g.map(PAGE, FIRST, flag::KERNEL);
    g.map(PAGE + 0x1000, SECOND, second);
    g.reg(gpr::RBX, PAGE + 0xffd);
    g.write(FIRST + 0xff0, &[0x11; 16]);
    g.write(SECOND, &[0x22; 64]);
    g
}

/// Runs `build` with RBX before the boundary.
#[track_caller]
fn run(g: &mut Guest, build: impl FnOnce(&mut CodeAssembler)) -> End {
    let main = g.code(|a| {
        build(a);
        asm!(a; done());
    });
    g.run(main)
}

fn loads_across_pages() {
    let end = run(&mut two_pages(flag::KERNEL), |a| {
        asm!(a; mov(rax, qword_ptr(rbx)); mov(cx, word_ptr(rbx + 2)); movups(xmm3, xmmword_ptr(rbx - 4)); movzx(edx, word_ptr(rbx + 2)));
    })
    .done();
    assert_eq!(end.rax(), 0x2222_2222_2211_1111);
    assert_eq!((end.reg(gpr::RCX), end.reg(gpr::RDX)), (0x2211, 0x2211));
    assert_eq!(end.state.fpu.0[160 + 48..][..16], [[0x11; 7].as_slice(), &[0x22; 9]].concat());
}

fn stores_across_pages() {
    let mut g = two_pages(flag::KERNEL);
    g.reg(gpr::RAX, 0x8877_6655_4433_2211);
    run(&mut g, |a| asm!(a; mov(qword_ptr(rbx), rax))).done();
    assert_eq!((g.get(FIRST + 0xffd, 3), g.get(SECOND, 8)), (0x33_2211, 0x2222_2288_7766_5544));
}

fn read_modify_write_across_pages() {
    let mut g = two_pages(flag::KERNEL);
    run(&mut g, |a| asm!(a; add(qword_ptr(rbx), 1); not(dword_ptr(rbx)); lock().inc(qword_ptr(rbx)))).done();
    let expected = ((0x2222_2222_2211_1111u64 + 1) ^ 0xffff_ffff) + 1;
    assert_eq!(g.get(FIRST + 0xffd, 3) | g.get(SECOND, 5) << 24, expected);
}

fn a_wide_vector_across_pages() {
    let mut g = two_pages(flag::KERNEL);
    run(&mut g, |a| asm!(a; vmovdqu(ymm1, ymmword_ptr(rbx)); vpaddb(ymm1, ymm1, ymmword_ptr(rbx)); vmovdqu(ymmword_ptr(rbx), ymm1))).done();
    assert_eq!((g.get(FIRST + 0xffd, 3), g.get(SECOND, 8)), (0x22_2222, 0x4444_4444_4444_4444));
}

fn a_fault_on_the_second_page_has_its_address() {
    let main = |build: fn(&mut CodeAssembler), second: u64, error: u32| {
        let mut g = two_pages(second);
        g.reg(gpr::RAX, u64::MAX);
        let end = run(&mut g, build);
        end.page_fault(PAGE + 0x1000, error);
        assert_eq!(g.get(FIRST + 0xffd, 3), 0x11_1111, "nothing was written");
        assert_eq!(end.rax(), u64::MAX, "nothing was loaded");
    };
    main(|a| asm!(a; mov(rax, qword_ptr(rbx))), 0, 0);
    main(|a| asm!(a; mov(qword_ptr(rbx), rax)), 0, pf_error::WRITE);
    main(|a| asm!(a; mov(qword_ptr(rbx), rax)), flag::P, pf_error::WRITE | pf_error::PRESENT);
    main(|a| asm!(a; add(qword_ptr(rbx), rax)), flag::P, pf_error::WRITE | pf_error::PRESENT);
    main(|a| asm!(a; lock().add(qword_ptr(rbx), rax)), flag::P, pf_error::WRITE | pf_error::PRESENT);
    main(|a| asm!(a; movups(xmmword_ptr(rbx), xmm0)), 0, pf_error::WRITE);
}

fn a_fault_on_the_first_page_comes_first() {
    let mut g = two_pages(0);
    g.unmap(PAGE);
    run(&mut g, |a| asm!(a; mov(rax, qword_ptr(rbx)))).page_fault(PAGE + 0xffd, 0);
}

fn a_push_across_pages_that_faults_leaves_rsp() {
    let mut g = two_pages(flag::KERNEL);
    g.unmap(PAGE);
    g.reg(gpr::RSP, PAGE + 0x1003);
    g.set_gate(vector::PF, Gate { ist: 1, ..g.gate_to(STUBS + 14 * STUB_SIZE) });
    let end = run(&mut g, |a| asm!(a; push(rax)));
    let frame = end.page_fault(PAGE + 0xffb, pf_error::WRITE);
    assert_eq!(frame.rsp, Some(PAGE + 0x1003));
    assert_eq!(g.get(SECOND, 4), 0x2222_2222);
}

fn code_across_pages_faults_with_the_second_address() {
    let mut g = Guest::long();
    g.map(PAGE, FIRST, flag::KERNEL);
    g.write(FIRST + 0xffe, &[0x48, 0xb8]);
    let main = g.code(|a| asm!(a; jmp(PAGE + 0xffe)));
    let frame = g.run(main).page_fault(PAGE + 0x1000, pf_error::FETCH);
    assert_eq!(frame.rip, PAGE + 0xffe);
}

fn code_across_pages_of_different_frames() {
    let mut g = Guest::long();
    g.map(PAGE, FIRST, flag::KERNEL);
    g.map(PAGE + 0x1000, SECOND, flag::KERNEL);
    g.write(FIRST + 0xffe, &[0x48, 0xb8]);
    g.write(SECOND, &[1, 2, 3, 4, 5, 6, 7, 8, 0xc3]);
    let main = g.code(|a| asm!(a; call(PAGE + 0xffe); done()));
    assert_eq!(g.run(main).done().rax(), 0x0807_0605_0403_0201);
}

fn a_string_stops_at_the_page_that_faults() {
    let mut g = two_pages(0);
    g.reg(gpr::RDI, PAGE + 0xff0);
    g.reg(gpr::RCX, 0x20);
    g.reg(gpr::RAX, 0x77);
    let end = run(&mut g, |a| asm!(a; rep().stosb()));
    let frame = end.page_fault(PAGE + 0x1000, pf_error::WRITE);
    assert_ne!(frame.flags & rflags::RF, 0);
    assert_eq!((end.reg(gpr::RCX), end.reg(gpr::RDI)), (0x10, PAGE + 0x1000));
    assert_eq!(g.get(FIRST + 0xff8, 8), 0x7777_7777_7777_7777);
}

fn a_string_goes_on_when_the_page_is_there() {
    let mut g = two_pages(0);
    let entry = g.tables.entry(PAGE + 0x1000, 12);
    g.map(ARENA, entry & !0xfff, flag::KERNEL);
    let handler = g.code(|a| {
        asm!(a; push(rax); inc(ebp); mov(rax, SECOND | flag::KERNEL); mov(qword_ptr(ARENA + (entry & 0xfff)), rax));
        asm!(a; pop(rax); add(rsp, 8); iretq());
    });
    g.handler(vector::PF, handler);
    for n in 0..0x800 {
        g.set(ARENA + 0x1000 + n * 2, 2, n);
    }
    g.reg(gpr::RSI, ARENA + 0x1000);
    g.reg(gpr::RDI, PAGE + 0x801);
    g.reg(gpr::RCX, 0x1000 / 8);
    let end = run(&mut g, |a| asm!(a; rep().movsq())).done();
    assert_eq!((end.reg(gpr::RBP), end.reg(gpr::RCX)), (1, 0));
    assert_eq!(g.get(SECOND + 0x7ff, 2), 0x7ff);
}

fn a_backward_string_stops_at_the_page_that_faults() {
    let mut g = two_pages(flag::KERNEL);
    g.unmap(PAGE);
    g.state.rflags |= rflags::DF;
    g.reg(gpr::RSI, PAGE + 0x1004);
    g.reg(gpr::RDI, DATA + 0x80);
    g.reg(gpr::RCX, 0x10);
    let end = run(&mut g, |a| asm!(a; rep().movsb()));
    end.page_fault(PAGE + 0xfff, 0);
    assert_eq!((end.reg(gpr::RCX), end.reg(gpr::RSI), end.reg(gpr::RDI)), (0xb, PAGE + 0xfff, DATA + 0x7b));
}

fn comparing_strings_fault_with_exact_counts() {
    let mut g = two_pages(0);
    g.write(DATA, &[0x11; 64]);
    g.reg(gpr::RSI, DATA);
    g.reg(gpr::RDI, PAGE + 0xff8);
    g.reg(gpr::RCX, 64);
    let end = run(&mut g, |a| asm!(a; repe().cmpsb()));
    end.page_fault(PAGE + 0x1000, 0);
    assert_eq!((end.reg(gpr::RCX), end.reg(gpr::RSI)), (56, DATA + 8));
}

fn a_string_with_count_zero_does_not_access() {
    let mut g = Guest::long();
    g.reg(gpr::RDI, 1 << 63);
    g.reg(gpr::RSI, 1 << 63);
    run(&mut g, |a| asm!(a; rep().movsb(); rep().stosq(); repne().scasb())).done();
}

fn the_last_and_first_bytes_of_the_address_space() {
    let mut g = Guest::long();
    g.map(0xffff_ffff_ffff_f000, FIRST, flag::KERNEL);
    g.map(0, SECOND, flag::KERNEL);
    g.set(FIRST + 0xffc, 4, 0x1111_1111);
    g.set(SECOND, 4, 0x2222_2222);
    g.reg(gpr::RBX, 0xffff_ffff_ffff_fffc);
    assert_eq!(run(&mut g, |a| asm!(a; mov(rax, qword_ptr(rbx)))).done().rax(), 0x2222_2222_1111_1111);
}

fn an_access_that_leaves_the_canonical_range() {
    let mut g = Guest::long();
    g.map(0x7fff_ffff_f000, FIRST, flag::KERNEL);
    g.reg(gpr::RBX, 0x7fff_ffff_fffc);
    run(&mut g, |a| asm!(a; mov(eax, dword_ptr(rbx)))).done();
    run(&mut g, |a| asm!(a; mov(rax, qword_ptr(rbx)))).fault(vector::GP, 0);
}

fn canonical_high_addresses_work() {
    let mut g = Guest::long();
    g.map(0xffff_8000_0000_0000, FIRST, flag::KERNEL);
    g.assemble(64, 0xffff_8000_0000_0100, FIRST + 0x100, |a| asm!(a; mov(eax, dword_ptr(rbx)); ret()));
    g.set(FIRST, 4, 0x4321);
    g.reg(gpr::RBX, 0xffff_8000_0000_0000);
    assert_eq!(run(&mut g, |a| asm!(a; lea(rcx, ptr(rbx + 0x100)); call(rcx))).done().rax(), 0x4321);
}

fn device_accesses_of_each_size() {
    let mut g = Guest::long();
    g.reg(gpr::RBX, MMIO);
    g.reg(gpr::RAX, 0x8877_6655_4433_2211);
    let end = run(&mut g, |a| {
        asm!(a; mov(byte_ptr(rbx), al); mov(word_ptr(rbx + 2), ax); mov(dword_ptr(rbx + 4), eax); mov(qword_ptr(rbx + 8), rax));
        asm!(a; movzx(ecx, byte_ptr(rbx)); movzx(edx, word_ptr(rbx + 2)); mov(esi, dword_ptr(rbx + 4)); mov(rdi, qword_ptr(rbx + 8)));
    })
    .done();
    use MmioAccess::{Read, Write};
    let expected = [
        Write(0, 1, 0x11),
        Write(2, 2, 0x2211),
        Write(4, 4, 0x4433_2211),
        Write(8, 8, 0x8877_6655_4433_2211),
        Read(0, 1),
        Read(2, 2),
        Read(4, 4),
        Read(8, 8),
    ];
    assert_eq!(g.mmio(), expected);
    assert_eq!(end.reg(gpr::RDI), 0x8877_6655_4433_2211);
    assert_eq!([gpr::RCX, gpr::RDX, gpr::RSI].map(|r| end.reg(r)), [0x11, 0x2211, 0x4433_2211]);
}

fn a_read_modify_write_of_a_device_reads_once_and_writes_once() {
    let mut g = Guest::long();
    g.reg(gpr::RBX, MMIO);
    run(&mut g, |a| asm!(a; add(dword_ptr(rbx), 5); lock().or(dword_ptr(rbx), 8); cmp(dword_ptr(rbx), 13)))
        .done();
    use MmioAccess::{Read, Write};
    assert_eq!(g.mmio(), [Read(0, 4), Write(0, 4, 5), Read(0, 4), Write(0, 4, 13), Read(0, 4)]);
}

fn strings_to_and_from_a_device() {
    let mut g = Guest::long();
    g.set(DATA, 8, 0x0807_0605_0403_0201);
    g.reg(gpr::RSI, DATA);
    g.reg(gpr::RDI, MMIO);
    g.reg(gpr::RCX, 2);
    run(&mut g, |a| {
        asm!(a; rep().movsd(); mov(rsi, MMIO); mov(edi, DATA as u32 + 32); mov(ecx, 2); rep().movsd());
    })
    .done();
    assert_eq!(g.get(DATA + 32, 8), 0x0807_0605_0403_0201);
    assert_eq!(g.mmio().len(), 4);
}

fn an_access_half_in_ram_and_half_in_a_device() {
    let mut g = Guest::long();
    g.map(MMIO - 0x1000, FIRST, flag::KERNEL);
    g.reg(gpr::RBX, MMIO - 4);
    g.reg(gpr::RAX, 0x8877_6655_4433_2211);
    let end = run(&mut g, |a| asm!(a; mov(qword_ptr(rbx), rax); mov(rcx, qword_ptr(rbx)))).done();
    assert_eq!((g.get(FIRST + 0xffc, 4), end.reg(gpr::RCX)), (0x4433_2211, 0x8877_6655_4433_2211));
}

fn memory_that_is_not_there_reads_as_ones() {
    let mut g = Guest::long();
    g.map(PAGE, 0xd800_0000, flag::KERNEL);
    g.reg(gpr::RBX, PAGE);
    assert_eq!(
        run(&mut g, |a| asm!(a; mov(qword_ptr(rbx), 5); mov(rax, qword_ptr(rbx)))).done().rax(),
        u64::MAX
    );
}

fn ports_of_each_size() {
    let mut g = Guest::long();
    g.reg(gpr::RAX, 0x4433_2211);
    let end = run(&mut g, |a| {
        asm!(a; mov(edx, u32::from(port::SCRATCH)); out(dx, eax); out(u32::from(port::SCRATCH + 1), al));
        asm!(a; xor(eax, eax); in_(eax, dx); mov(ecx, eax); mov(eax, -1i32 as u32); in_(al, u32::from(port::SCRATCH)));
        asm!(a; mov(esi, eax); mov(eax, 0); in_(ax, dx); mov(edi, eax));
    })
    .done();
    assert_eq!(end.reg(gpr::RCX), 0x4433_1111);
    assert_eq!(end.reg(gpr::RSI), 0xffff_ff11);
    assert_eq!(end.reg(gpr::RDI), 0x1111);
}

fn string_input_and_output() {
    let mut g = Guest::long();
    g.set(DATA, 8, 0x0000_0002_0000_0001);
    g.reg(gpr::RSI, DATA);
    g.reg(gpr::RDI, DATA + 0x100);
    let end = run(&mut g, |a| {
        asm!(a; mov(edx, u32::from(port::LOG)); mov(ecx, 2); rep().outsd());
        asm!(a; mov(edx, u32::from(port::SCRATCH)); mov(eax, 0x99); out(dx, al); mov(ecx, 3); rep().insb());
    })
    .done();
    assert_eq!(g.log(), [1, 2]);
    assert_eq!(g.get(DATA + 0x100, 4), 0x0099_9999);
    assert_eq!((end.reg(gpr::RSI), end.reg(gpr::RDI)), (DATA + 8, DATA + 0x103));
}

berth_tests_system::cases![
    loads_across_pages,
    stores_across_pages,
    read_modify_write_across_pages,
    a_wide_vector_across_pages,
    a_fault_on_the_second_page_has_its_address,
    a_fault_on_the_first_page_comes_first,
    a_push_across_pages_that_faults_leaves_rsp,
    code_across_pages_faults_with_the_second_address,
    code_across_pages_of_different_frames,
    a_string_stops_at_the_page_that_faults,
    a_string_goes_on_when_the_page_is_there,
    a_backward_string_stops_at_the_page_that_faults,
    comparing_strings_fault_with_exact_counts,
    a_string_with_count_zero_does_not_access,
    the_last_and_first_bytes_of_the_address_space,
    an_access_that_leaves_the_canonical_range,
    canonical_high_addresses_work,
    device_accesses_of_each_size,
    a_read_modify_write_of_a_device_reads_once_and_writes_once,
    strings_to_and_from_a_device,
    an_access_half_in_ram_and_half_in_a_device,
    memory_that_is_not_there_reads_as_ones,
    ports_of_each_size,
    string_input_and_output,
];

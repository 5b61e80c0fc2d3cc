//! What page tables allow, and the error codes of what they do not (SDM volume 3, 4.6 and 4.7).

use berth_tests_system::prelude::*;
use pf_error::{FETCH, PRESENT, RESERVED, USER, WRITE};

/// An address in a table of its own, so that cases can change every level above it.
const PAGE: u64 = 0x4000_0000;
/// What it maps.
const FRAME: u64 = 0x50_0000;

/// A guest with [`PAGE`] mapped and in RBX.
fn with_page(mut g: Guest, flags: u64) -> Guest {
    g.map(PAGE, FRAME, flags);
    g.reg(gpr::RBX, PAGE);
    g
}

fn read(a: &mut CodeAssembler) {
    asm!(a; mov(eax, dword_ptr(rbx)); done());
}
fn write(a: &mut CodeAssembler) {
    asm!(a; mov(dword_ptr(rbx), eax); done());
}
fn user_read(a: &mut CodeAssembler) {
    asm!(a; mov(eax, dword_ptr(rbx)); user_done());
}
fn user_write(a: &mut CodeAssembler) {
    asm!(a; mov(dword_ptr(rbx), eax); user_done());
}
fn jump(a: &mut CodeAssembler) {
    asm!(a; jmp(rbx));
}

/// Runs `build`, which must fault at [`PAGE`] with `error`.
#[track_caller]
fn refused(mut g: Guest, error: u32, build: impl FnOnce(&mut CodeAssembler)) {
    let main = g.code(build);
    let end = g.run(main);
    let frame = end.page_fault(PAGE, error);
    assert!(frame.rip == main || frame.rip == PAGE, "{}", end.account());
}

#[track_caller]
fn allowed(mut g: Guest, build: impl FnOnce(&mut CodeAssembler)) {
    let main = g.code(build);
    g.run(main).done();
}

fn not_present() {
    refused(with_page(Guest::long(), 0), 0, read);
    refused(with_page(Guest::long(), 0), WRITE, write);
    refused(with_page(Guest::long_user(), 0), USER, user_read);
    refused(with_page(Guest::long_user(), 0), USER | WRITE, user_write);
    refused(with_page(Guest::long(), 0), FETCH, jump);
}

fn level_3_needs_the_user_bit() {
    refused(with_page(Guest::long_user(), flag::KERNEL), PRESENT | USER, user_read);
    refused(with_page(Guest::long_user(), flag::KERNEL), PRESENT | USER | WRITE, user_write);
    refused(with_page(Guest::long_user(), flag::KERNEL), PRESENT | USER | FETCH, jump);
    allowed(with_page(Guest::long_user(), flag::USER), user_write);
}

fn level_3_needs_the_user_bit_at_every_level() {
    for shift in [21, 30, 39] {
        let g = with_page(Guest::long_user(), flag::USER);
        // The top level is shared with the code: give the page a slot of its own there.
        let mut g = if shift == 39 { g_with_own_top(g) } else { g };
        let address = if shift == 39 { 1 << 39 } else { PAGE };
        g.reg(gpr::RBX, address);
        let at = g.tables.entry(address, shift);
        g.tables.set(at, g.tables.get(at) & !flag::U);
        let main = g.code(user_read);
        g.run(main).page_fault(address, PRESENT | USER);
    }
}

fn g_with_own_top(mut g: Guest) -> Guest {
    g.map(1 << 39, FRAME, flag::USER);
    g
}

fn level_3_needs_the_write_bit_at_every_level() {
    for shift in [12, 21, 30] {
        let g = with_page(Guest::long_user(), flag::USER);
        let at = g.tables.entry(PAGE, shift);
        g.tables.set(at, g.tables.get(at) & !flag::W);
        refused(g, PRESENT | USER | WRITE, user_write);
    }
}

fn level_0_writes_read_only_pages_without_wp() {
    refused(with_page(Guest::long(), flag::P), PRESENT | WRITE, write);
    let mut g = with_page(Guest::long(), flag::P);
    g.state.cr0 &= !cr0::WP;
    allowed(g, write);
}

fn wp_switched_on_later_counts_for_pages_already_written() {
    let mut g = with_page(Guest::long(), flag::P);
    g.state.cr0 &= !cr0::WP;
    let (main, [last]) = g.code_with(|a| {
        let mut last = a.create_label();
        asm!(a; mov(dword_ptr(rbx), eax); mov(rcx, cr0); bts(rcx, 16); mov(cr0, rcx));
        asm!(a; set_label(&mut last); mov(dword_ptr(rbx), eax));
        [last]
    });
    assert_eq!(g.run(main).page_fault(PAGE, PRESENT | WRITE).rip, last);
}

fn level_3_never_writes_read_only_pages() {
    let mut g = with_page(Guest::long_user(), flag::P | flag::U);
    g.state.cr0 &= !cr0::WP;
    refused(g, PRESENT | USER | WRITE, user_write);
}

fn no_execute() {
    refused(with_page(Guest::long(), flag::KERNEL | flag::NX), PRESENT | FETCH, jump);
    refused(with_page(Guest::long_user(), flag::USER | flag::NX), PRESENT | USER | FETCH, jump);
    allowed(with_page(Guest::long(), flag::KERNEL | flag::NX), write);
}

fn no_execute_at_an_upper_level() {
    let g = with_page(Guest::long(), flag::KERNEL);
    let at = g.tables.entry(PAGE, 30);
    g.tables.set(at, g.tables.get(at) | flag::NX);
    refused(g, PRESENT | FETCH, jump);
}

fn the_nx_bit_is_reserved_without_nxe() {
    let mut g = with_page(Guest::long(), flag::KERNEL | flag::NX);
    g.state.efer &= !efer::NXE;
    refused(g, PRESENT | RESERVED, read);
}

fn fetches_are_not_told_apart_without_nxe_and_smep() {
    let mut g = with_page(Guest::long(), 0);
    g.state.efer &= !efer::NXE;
    refused(g, 0, jump);
}

fn reserved_bits_at_each_level() {
    for shift in [12, 21, 30] {
        let g = with_page(Guest::long(), flag::KERNEL);
        let at = g.tables.entry(PAGE, shift);
        g.tables.set(at, g.tables.get(at) | 1 << 50);
        refused(g, PRESENT | RESERVED, read);
    }
    let g = with_page(Guest::long_user(), flag::USER | 1 << 50);
    refused(g, PRESENT | RESERVED | USER | WRITE, user_write);
}

fn reserved_bits_of_large_pages() {
    // Bits 20 to 13 of an entry for 2 MiB, 29 to 13 of one for 1 GiB.
    for (shift, physical) in [(21, 0x2000), (30, 0x20_0000)] {
        let mut g = Guest::long();
        g.map_large(PAGE, physical, flag::KERNEL, shift);
        g.reg(gpr::RBX, PAGE);
        refused(g, PRESENT | RESERVED, read);
    }
}

fn ps_is_reserved_at_the_top_level() {
    let mut g = Guest::long();
    let address = 1 << 39;
    g.map(address, FRAME, flag::KERNEL);
    let at = g.tables.entry(address, 39);
    g.tables.set(at, g.tables.get(at) | flag::PS);
    g.reg(gpr::RBX, address);
    let main = g.code(read);
    g.run(main).page_fault(address, PRESENT | RESERVED);
}

fn smep_refuses_user_code_at_level_0() {
    let mut g = with_page(Guest::long(), flag::USER);
    g.state.cr4 |= cr4::SMEP;
    refused(g, PRESENT | FETCH, jump);
    let mut g = with_page(Guest::long(), flag::USER);
    g.code_at(FRAME, |a| asm!(a; done()));
    g.reg(gpr::RBX, PAGE);
    allowed(g, jump);
}

fn smep_switched_on_later_counts_for_code_already_executed() {
    let mut g = with_page(Guest::long(), flag::USER);
    g.assemble(64, PAGE, FRAME, |a| asm!(a; ret()));
    let main = g.code(|a| asm!(a; call(rbx); mov(rcx, cr4); bts(rcx, 20); mov(cr4, rcx); call(rbx); done()));
    assert_eq!(g.run(main).page_fault(PAGE, PRESENT | FETCH).rip, PAGE);
}

fn smap_refuses_user_data_at_level_0_unless_ac() {
    let smap = |build: fn(&mut CodeAssembler)| {
        let mut g = with_page(Guest::long(), flag::USER);
        g.state.cr4 |= cr4::SMAP;
        let main = g.code(build);
        g.run(main)
    };
    smap(read).page_fault(PAGE, PRESENT);
    smap(write).page_fault(PAGE, PRESENT | WRITE);
    smap(|a| asm!(a; stac(); mov(dword_ptr(rbx), eax); clac(); done())).done();
    smap(|a| asm!(a; stac(); mov(dword_ptr(rbx), eax); clac(); mov(eax, dword_ptr(rbx))))
        .page_fault(PAGE, PRESENT);
}

fn smap_counts_for_implicit_accesses_whatever_ac_says() {
    // The descriptor table is user memory: loading a segment reads it as the system does.
    let mut g = Guest::long();
    g.state.cr4 |= cr4::SMAP;
    g.state.rflags |= rflags::AC;
    g.map(GDT, GDT, flag::USER);
    g.reg(gpr::RAX, u64::from(selector::DATA));
    let main = g.code(|a| asm!(a; mov(ds, ax)));
    // The handler's code segment is in the same table: #PF while #PF is delivered, and so on.
    g.run(main).triple_fault();
}

fn stac_and_clac_are_undefined_at_level_3() {
    let mut g = Guest::long_user();
    let main = g.code(|a| asm!(a; stac()));
    g.run(main).vector(vector::UD);
}

fn umip_hides_system_registers_from_level_3() {
    let cases: [&[u8]; 5] = [
        &[0x0f, 0x01, 0x03], // sgdt [rbx]
        &[0x0f, 0x01, 0x0b], // sidt [rbx]
        &[0x0f, 0x00, 0xc0], // sldt eax
        &[0x0f, 0x00, 0xc8], // str eax
        &[0x0f, 0x01, 0xe0], // smsw eax
    ];
    for code in cases {
        for umip in [false, true] {
            let mut g = with_page(Guest::long_user(), flag::USER);
            g.state.cr4 |= if umip { cr4::UMIP } else { 0 };
            let main = g.code(|a| asm!(a; bytes(code); user_done()));
            let end = g.run(main);
            if umip {
                end.fault(vector::GP, 0);
            } else {
                end.done();
            }
        }
    }
}

fn accessed_and_dirty_bits_of_a_page() {
    let accessed = |build: fn(&mut CodeAssembler)| {
        let mut g = with_page(Guest::long(), flag::KERNEL);
        let main = g.code(build);
        g.run(main).done();
        g.tables.get(g.tables.entry(PAGE, 12)) & (flag::A | flag::D)
    };
    assert_eq!(accessed(|a| asm!(a; done())), 0);
    assert_eq!(accessed(read), flag::A);
    assert_eq!(accessed(write), flag::A | flag::D);
    assert_eq!(accessed(|a| asm!(a; lock().add(dword_ptr(rbx), 1); done())), flag::A | flag::D);
    assert_eq!(
        accessed(|a| asm!(a; mov(eax, dword_ptr(rbx)); mov(dword_ptr(rbx), eax); done())),
        flag::A | flag::D,
        "a store after a load must still set the dirty bit"
    );
}

fn accessed_bits_of_the_upper_levels() {
    let mut g = with_page(Guest::long(), flag::KERNEL);
    let main = g.code(read);
    let upper =
        |g: &Guest| [21, 30].map(|shift| g.tables.get(g.tables.entry(PAGE, shift)) & (flag::A | flag::D));
    assert_eq!(upper(&g), [0, 0]);
    g.run(main).done();
    assert_eq!(upper(&g), [flag::A, flag::A]);
}

fn refused_writes_do_not_set_the_dirty_bit() {
    let mut g = with_page(Guest::long(), flag::P);
    let main = g.code(write);
    g.run(main).page_fault(PAGE, PRESENT | WRITE);
    assert_eq!(g.tables.get(g.tables.entry(PAGE, 12)) & flag::D, 0);
}

fn a_dirty_bit_that_the_guest_cleared_is_set_again_after_a_flush() {
    let mut g = with_page(Guest::long(), flag::KERNEL);
    let entry = g.tables.entry(PAGE, 12);
    g.map(ARENA, g.tables.entry(PAGE, 12) & !0xfff, flag::KERNEL);
    g.reg(gpr::RSI, ARENA + (entry & 0xfff));
    let main = g.code(|a| {
        asm!(a; mov(dword_ptr(rbx), eax); btr(qword_ptr(rsi), 6); invlpg(byte_ptr(rbx)));
        asm!(a; mov(dword_ptr(rbx), eax); done());
    });
    g.run(main).done();
    assert_eq!(g.tables.get(entry) & flag::D, flag::D);
}

fn two_level_tables() {
    let paged = |flags: u64, build: fn(&mut CodeAssembler)| {
        let mut g = Guest::mode(Mode::Paged32);
        g.map(PAGE, FRAME, flags);
        g.reg(gpr::RBX, PAGE);
        let main = g.code(build);
        g.run(main)
    };
    paged(0, |a| asm!(a; mov(eax, dword_ptr(ebx)))).page_fault(PAGE, 0);
    paged(flag::P, |a| asm!(a; mov(dword_ptr(ebx), eax))).page_fault(PAGE, PRESENT | WRITE);
    paged(flag::P, |a| asm!(a; mov(eax, dword_ptr(ebx)); done())).done();
}

fn two_level_tables_with_4_mib_pages() {
    let mut g = Guest::mode(Mode::Paged32);
    g.map_large(PAGE, 0x40_0000, flag::KERNEL, 22);
    g.reg(gpr::RBX, PAGE + 0x12_3454);
    g.set(0x40_0000 + 0x12_3454, 4, 0x1234_5678);
    let main = g.code(|a| asm!(a; mov(eax, dword_ptr(ebx)); mov(dword_ptr(ebx + 4), eax); done()));
    assert_eq!(g.run(main).done().rax(), 0x1234_5678);
    assert_eq!(g.get(0x40_0000 + 0x12_3458, 4), 0x1234_5678);
    assert_eq!(g.tables.get(g.tables.entry(PAGE, 22)) & (flag::A | flag::D), flag::A | flag::D);
}

fn pae_tables_with_2_mib_pages_and_nx() {
    let mut g = Guest::mode(Mode::Pae);
    g.map_large(PAGE, 0x60_0000, flag::KERNEL | flag::NX, 21);
    g.set(0x60_0000 + 0x1_2340, 4, 77);
    g.reg(gpr::RBX, PAGE + 0x1_2340);
    let main = g.code(|a| asm!(a; mov(eax, dword_ptr(ebx)); jmp(ebx)));
    let end = g.run(main);
    end.page_fault(PAGE + 0x1_2340, PRESENT | FETCH);
    assert_eq!(end.rax(), 77);
}

fn pae_reserved_bits() {
    let mut g = Guest::mode(Mode::Pae);
    g.map(PAGE, FRAME, flag::KERNEL | 1 << 55);
    g.reg(gpr::RBX, PAGE);
    let main = g.code(|a| asm!(a; mov(eax, dword_ptr(ebx))));
    g.run(main).page_fault(PAGE, PRESENT | RESERVED);
}

fn pae_checks_the_directory_pointers_when_cr3_is_loaded() {
    let mut g = Guest::mode(Mode::Pae);
    g.set(ARENA, 8, 1 << 2 | flag::P);
    g.reg(gpr::RAX, ARENA);
    let main = g.code(|a| asm!(a; mov(cr3, eax)));
    assert_eq!(g.run(main).fault(vector::GP, 0).rip, main);
}

fn large_pages_of_four_level_tables() {
    for (shift, physical) in [(21, 0x60_0000), (30, 0)] {
        let mut g = Guest::long();
        g.map_large(PAGE, physical, flag::KERNEL, shift);
        let offset = 0x18_7654;
        g.set(physical + offset, 8, 0x0123_4567_89ab_cdef);
        g.reg(gpr::RBX, PAGE + offset);
        let main = g.code(|a| asm!(a; mov(rax, qword_ptr(rbx)); not(qword_ptr(rbx)); done()));
        assert_eq!(g.run(main).done().rax(), 0x0123_4567_89ab_cdef);
        assert_eq!(g.get(physical + offset, 8), !0x0123_4567_89ab_cdef);
    }
}

berth_tests_system::cases![
    not_present,
    level_3_needs_the_user_bit,
    level_3_needs_the_user_bit_at_every_level,
    level_3_needs_the_write_bit_at_every_level,
    level_0_writes_read_only_pages_without_wp,
    wp_switched_on_later_counts_for_pages_already_written,
    level_3_never_writes_read_only_pages,
    no_execute,
    no_execute_at_an_upper_level,
    the_nx_bit_is_reserved_without_nxe,
    fetches_are_not_told_apart_without_nxe_and_smep,
    reserved_bits_at_each_level,
    reserved_bits_of_large_pages,
    ps_is_reserved_at_the_top_level,
    smep_refuses_user_code_at_level_0,
    smep_switched_on_later_counts_for_code_already_executed,
    smap_refuses_user_data_at_level_0_unless_ac,
    smap_counts_for_implicit_accesses_whatever_ac_says,
    stac_and_clac_are_undefined_at_level_3,
    umip_hides_system_registers_from_level_3,
    accessed_and_dirty_bits_of_a_page,
    accessed_bits_of_the_upper_levels,
    refused_writes_do_not_set_the_dirty_bit,
    a_dirty_bit_that_the_guest_cleared_is_set_again_after_a_flush,
    two_level_tables,
    two_level_tables_with_4_mib_pages,
    pae_tables_with_2_mib_pages_and_nx,
    pae_reserved_bits,
    pae_checks_the_directory_pointers_when_cr3_is_loaded,
    large_pages_of_four_level_tables,
];

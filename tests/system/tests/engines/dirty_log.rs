//! Which pages were written: by vCPUs, by devices, and while the log is fetched.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use berth_engine::Engine;
use berth_memory::{GuestMemory, GuestPhysAddr};
use berth_tests_system::engine::rounds;
use berth_tests_system::prelude::*;

const PAGE: u64 = 0x1000;

/// The log of the only region, as guest physical addresses.
fn take(engine: &dyn Engine) -> BTreeSet<u64> {
    engine.take_dirty(0).unwrap().pages().map(|page| page * PAGE).collect()
}

fn set<const N: usize>(pages: [u64; N]) -> BTreeSet<u64> {
    BTreeSet::from(pages)
}

/// Stores to a page, across two pages, by a string instruction, by XCHG; loads from another; ends; and once more.
fn stores(a: &mut CodeAssembler) {
    for _ in 0..3 {
        asm!(a; mov(eax, 1); mov(dword_ptr(ARENA), eax); mov(qword_ptr(ARENA + 0x3ffc), rax));
        asm!(a; mov(edi, (ARENA + 0x6010) as u32); mov(ecx, 8); rep().stosd(); xchg(dword_ptr(ARENA + 0x8000), eax));
        // As `done`, but without the HLT behind it.
        asm!(a; mov(eax, dword_ptr(ARENA + 0xa000)); mov(edx, u32::from(port::DONE)); out(dx, al));
    }
}

fn pages_that_are_written_are_logged_and_only_those() {
    let mut g = Guest::long();
    let main = g.code(stores);
    // Once before: the page tables have their accessed and dirty bits then.
    g.run(main).done();
    g.engine.start_dirty_log().unwrap();
    let expected = set([ARENA, ARENA + 0x3000, ARENA + 0x4000, ARENA + 0x6000, ARENA + 0x8000]);
    for _ in 0..2 {
        assert_eq!(take(&*g.engine), set([]));
        // The same stores by the same vCPU, which knows its way to the pages by now.
        g.resume().done();
        assert_eq!(take(&*g.engine), expected);
    }
    g.engine.stop_dirty_log().unwrap();
    g.run(main).done();
    assert_eq!(take(&*g.engine), set([]));
    g.engine.start_dirty_log().unwrap();
    assert_eq!(take(&*g.engine), set([]));
}

fn bits_that_the_cpu_sets_in_page_tables_are_logged() {
    let mut g = Guest::long();
    let main =
        g.code(|a| asm!(a; mov(eax, dword_ptr(ARENA + 0x5000)); mov(dword_ptr(ARENA + 0x7000), eax); done()));
    g.engine.start_dirty_log().unwrap();
    g.run(main).done();
    let pages = take(&*g.engine);
    let table = g.tables.entry(ARENA, 12) & !(PAGE - 1);
    assert!(pages.contains(&table) && pages.contains(&(ARENA + 0x7000)), "{pages:x?}");
    assert!(!pages.contains(&(ARENA + 0x5000)), "{pages:x?}");
}

fn what_devices_write_is_logged() {
    let mut g = Guest::long();
    g.engine.start_dirty_log().unwrap();
    g.write(ARENA + 0x2ff0, &[1; 0x20]);
    g.engine.memory_written(GuestPhysAddr(ARENA + 0x2ff0), 0x20);
    assert_eq!(take(&*g.engine), set([ARENA + 0x2000, ARENA + 0x3000]));
    // Beyond the end of RAM there is nothing to log.
    g.engine.memory_written(GuestPhysAddr(RAM - 1), 0x2000);
    assert_eq!(take(&*g.engine), set([RAM - PAGE]));
    assert_eq!(take(&*g.engine), set([]));
}

/// Copies the logged pages of `memory` to `copy`.
fn copy(engine: &dyn Engine, memory: &GuestMemory, copy: &GuestMemory) -> usize {
    let pages = take(engine);
    let mut page = [0; PAGE as usize];
    for &at in &pages {
        memory.read(GuestPhysAddr(at), &mut page).unwrap();
        copy.write(GuestPhysAddr(at), &page).unwrap();
    }
    pages.len()
}

/// What a migration does: the log is fetched and the pages are copied while the guest writes; what is left is copied
/// when it has ended. The copy is the memory then.
fn a_copy_that_follows_the_log_is_the_memory(vcpus: u8) {
    const PAGES: u64 = 64;
    let mut g = Guest::smp(vcpus);
    let main = g.code(|a| {
        let (mut round, mut page) = (a.create_label(), a.create_label());
        // Each vCPU has pages of its own: RDI is its number.
        asm!(a; mov(ebx, edi); shl(ebx, 18); add(ebx, ARENA as u32); mov(ebp, rounds(200_000)); set_label(&mut round));
        asm!(a; mov(rsi, rbx); mov(ecx, PAGES as u32); set_label(&mut page); inc(qword_ptr(rsi)); add(rsi, PAGE as i32));
        asm!(a; dec(ecx); jnz(page); dec(ebp); jnz(round); lock().inc(dword_ptr(DATA)); done());
    });
    let first = g.code(|a| {
        let mut wait = a.create_label();
        asm!(a; mov(ebx, u32::from(vcpus)); set_label(&mut wait); pause(); cmp(dword_ptr(DATA), ebx); jne(wait); done());
    });
    // vCPU 0 only waits if there are others.
    let entry = if vcpus == 1 { main } else { first };
    for n in 1..vcpus {
        g.start(n.into(), main, Guest::stack_of(n.into()));
    }
    if vcpus > 1 {
        g.set(DATA, 4, 1);
    }
    let target = GuestMemory::new(RAM).unwrap();
    g.engine.start_dirty_log().unwrap();
    // Everything once.
    let mut page = [0; PAGE as usize];
    for at in (0..RAM).step_by(PAGE as usize) {
        g.memory.read(GuestPhysAddr(at), &mut page).unwrap();
        target.write(GuestPhysAddr(at), &page).unwrap();
    }
    let over = Arc::new(AtomicBool::new(false));
    let (engine, memory, seen) = (g.engine.clone(), g.memory.clone(), over.clone());
    let copying = thread::spawn(move || {
        let mut pages = 0;
        while !seen.load(Ordering::SeqCst) {
            pages += copy(&*engine, &memory, &target);
            thread::sleep(Duration::from_millis(2));
        }
        (target, pages)
    });
    let ends = g.run_smp(entry);
    over.store(true, Ordering::SeqCst);
    let (target, pages) = copying.join().unwrap();
    assert!(ends[0].state.rip != entry && pages > 0);
    copy(&*g.engine, &g.memory, &target);
    let mut copied = [0; PAGE as usize];
    for at in (0..RAM).step_by(PAGE as usize) {
        g.memory.read(GuestPhysAddr(at), &mut page).unwrap();
        target.read(GuestPhysAddr(at), &mut copied).unwrap();
        assert!(page == copied, "the page at {at:#x} is not the one that was copied");
    }
}

fn a_copy_follows_one_vcpu() {
    a_copy_that_follows_the_log_is_the_memory(1);
}

fn a_copy_follows_three_vcpus() {
    a_copy_that_follows_the_log_is_the_memory(3);
}

berth_tests_system::cases![
    pages_that_are_written_are_logged_and_only_those,
    bits_that_the_cpu_sets_in_page_tables_are_logged,
    what_devices_write_is_logged,
    a_copy_follows_one_vcpu,
    a_copy_follows_three_vcpus,
];

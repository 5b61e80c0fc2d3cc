//! What the machine relies on besides instructions: stopping and going on, state that moves between engines,
//! bounded code caches.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use berth_cpu::apic;
use berth_engine::{InterruptControllers, LocalApic};
use berth_tests_system::apic::TestApic;
use berth_tests_system::engine::{EngineKind, current, rounds, with_engine};
use berth_tests_system::prelude::*;

/// Something long whose result depends on every step: a generator of random numbers, with some memory and vector
/// state. The result is in RAX.
fn work(a: &mut CodeAssembler, rounds: u32) {
    let mut again = a.create_label();
    asm!(a; mov(ecx, rounds); mov(rax, 0x9e37_79b9_7f4a_7c15u64); xor(edx, edx); pxor(xmm1, xmm1); fninit(); fldz());
    asm!(a; set_label(&mut again); mov(rdx, rax); shl(rdx, 13); xor(rax, rdx); mov(rdx, rax); shr(rdx, 7));
    asm!(a; xor(rax, rdx); mov(rdx, rax); shl(rdx, 17); xor(rax, rdx); movq(xmm0, rax); paddq(xmm1, xmm0));
    asm!(a; mov(esi, eax); and(esi, 0xff8); adc(qword_ptr(rsi + DATA), rax); push(rax); fld1(); faddp(st1, st0); pop(rdi));
    asm!(a; add(rax, rdi); rol(rax, 3); dec(ecx); jnz(again); movq(rbx, xmm1); fstp(qword_ptr(DATA + 0x1800)); done());
}

/// What is compared after a run of [`work`].
fn result(g: &Guest, end: &End) -> (u64, u64, u64, Vec<u64>) {
    let memory = (0..0x200).map(|n| g.get(DATA + n * 8, 8)).collect();
    (end.rax(), end.reg(gpr::RBX), g.get(DATA + 0x1800, 8), memory)
}

fn stop_and_run_again_continue_exactly() {
    let rounds = rounds(3_000_000);
    let mut g = Guest::long();
    let main = g.code(|a| work(a, rounds));
    let end = g.run(main).done();
    let expected = result(&g, &end);

    // Where the stopping thread gets no CPU in time, it is tried again.
    let mut stops = 0;
    for _ in 0..100 {
        let mut g = Guest::long();
        let main = g.code(|a| work(a, rounds));
        let stop = g.stopper();
        let over = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&over);
        let stopping = thread::spawn(move || {
            while !seen.load(Ordering::SeqCst) {
                thread::sleep(Duration::from_micros(300));
                stop();
            }
        });
        let mut end = g.run(main);
        while end.why == Why::Stopped {
            stops += 1;
            end = g.resume();
        }
        over.store(true, Ordering::SeqCst);
        stopping.join().unwrap();
        assert_eq!(result(&g, &end.done()), expected);
        if stops > 3 {
            return;
        }
    }
    panic!("it was stopped {stops} times");
}

fn state_moves_to_another_engine_in_the_middle() {
    let rounds = rounds(20_000_000);
    let mut g = Guest::long();
    let main = g.code(|a| work(a, rounds));
    let end = g.run(main).done();
    let expected = result(&g, &end);

    let mut from = Guest::long();
    from.code(|a| work(a, rounds));
    let mut moves = 0;
    let mut entry = main;
    let end = loop {
        let stop = from.stopper();
        let stopping = thread::spawn(move || {
            thread::sleep(Duration::from_millis(5));
            stop();
        });
        let end = from.run(entry);
        stopping.join().unwrap();
        if end.why != Why::Stopped {
            break end;
        }
        // A new engine with a copy of the memory takes over.
        let mut to = Guest::long();
        copy_memory(&from, &mut to);
        entry = end.state.rip;
        to.state = end.state;
        from = to;
        moves += 1;
    };
    assert!(moves > 0, "the work was over before it could be moved");
    assert_eq!(result(&from, &end.done()), expected);
}

/// The same at level 3, which every KVM executes without emulation: from the soft engine to the one under test and
/// back, and again, until the work is done. What one engine is given it must give back, and the result must be that
/// of a guest that was never moved.
fn a_guest_moves_from_soft_to_this_engine_and_back() {
    const ROUNDS: u32 = 20_000_000;
    let user_work = |a: &mut CodeAssembler| work(a, ROUNDS);
    let engine = current();
    let (expected, entry) = with_engine(EngineKind::Soft, || {
        let mut g = Guest::long_user();
        let main = g.code(user_work);
        let end = g.run(main).done();
        (result(&g, &end), main)
    });

    let mut from = with_engine(EngineKind::Soft, Guest::long_user);
    from.code(user_work);
    let mut at = entry;
    let mut moves = 0;
    let end = loop {
        let stop = from.stopper();
        let stopping = thread::spawn(move || {
            thread::sleep(Duration::from_millis(5));
            stop();
        });
        let end = from.run(at);
        stopping.join().unwrap();
        if end.why != Why::Stopped {
            break end;
        }
        let next = if moves % 2 == 0 { engine } else { EngineKind::Soft };
        let mut to = with_engine(next, Guest::long_user);
        copy_memory(&from, &mut to);
        to.give(&end.state);
        let taken = to.cpu_state();
        assert_eq!(comparable(&taken), comparable(&end.state), "move {moves}, to {next}");
        at = end.state.rip;
        to.state = end.state;
        from = to;
        moves += 1;
    };
    assert!(moves >= 2, "{moves} moves: the work was over too soon");
    assert_eq!(result(&from, &end.done()), expected);
}

/// What both engines have of a state: without the registers that only one of them has, the time-stamp counter,
/// which goes on, and the local APIC's version.
fn comparable(state: &CpuState) -> CpuState {
    let mut state = state.clone();
    state.msrs.retain(|&(number, value)| msr::is_essential(number) && number != msr::IA32_TSC && value != 0);
    state.msrs.sort_unstable();
    state.fpu.0[28..32].fill(0);
    state.fpu.0[512..576].fill(0);
    if let Some(apic) = &mut state.apic {
        apic.set(apic::offset::ID, 0);
        apic.set(apic::offset::VERSION, 0);
        apic.set(apic::offset::LDR, 0);
        apic.set(apic::offset::PPR, 0);
    }
    state
}

fn copy_memory(from: &Guest, to: &mut Guest) {
    let mut page = [0; 4096];
    for at in (0..MAPPED_END).step_by(4096) {
        from.memory.read(berth_memory::GuestPhysAddr(at), &mut page).unwrap();
        to.write(at, &page);
    }
}

fn set_state_gives_the_same_state_back() {
    let mut g = Guest::long_user();
    for (n, value) in (0..16).zip(0x1111_u64..) {
        g.reg(n, value << 32 | 0x8000_0000);
    }
    g.reg(gpr::RSP, STACK);
    g.state.rflags = 0x2 | rflags::CF | rflags::OF | rflags::DF | rflags::ID | rflags::AC;
    g.state.cr2 = 0xffff_8000_1234_5678;
    g.state.dr[3] = 0x1234;
    g.state.fs.base = 0xffff_8888_0000_0000;
    g.state.interrupt_shadow = true;
    g.state.nmi_blocked = true;
    for (n, byte) in g.state.fpu.0.iter_mut().enumerate().skip(160).take(256) {
        *byte = n as u8;
    }
    let given = g.state.clone();
    let stop = g.stopper();
    stop();
    // Stopped before the first instruction.
    let main = g.code(|a| asm!(a; user_done()));
    let end = g.run(main);
    let mut got = CpuState { apic: None, ..end.state };
    assert_eq!(end.why, Why::Stopped);
    got.msrs = given.msrs.clone();
    got.fpu.0[512..520].fill(0);
    got.fpu.0[28..32].fill(0);
    let mut given = CpuState { rip: main, ..given };
    given.fpu.0[512..520].fill(0);
    given.fpu.0[28..32].fill(0);
    assert_eq!(got, given);
}

fn impossible_states_are_refused() {
    let memory = berth_memory::GuestMemory::new(1 << 20).unwrap();
    let engine = berth_tests_system::engine::create(&memory, 1, 8 << 20);
    let apic = match engine.interrupt_controllers() {
        InterruptControllers::Engine(_) | InterruptControllers::LocalApics(_) => None,
        controllers @ InterruptControllers::Devices => {
            let apics = Arc::new(std::sync::OnceLock::new());
            Some(Arc::new(TestApic::new(0, &apics, controllers)) as Arc<dyn LocalApic>)
        }
    };
    let mut vcpu = engine.create_vcpu(berth_cpu::VcpuId(0), apic).unwrap();
    let paging_without_protection = CpuState { cr0: 1 << 31, ..CpuState::reset() };
    assert!(vcpu.set_state(&paging_without_protection).is_err());
    let long_mode_without_paging = CpuState { efer: efer::LMA, ..CpuState::reset() };
    assert!(vcpu.set_state(&long_mode_without_paging).is_err());
    assert!(vcpu.set_state(&CpuState::reset()).is_ok());
}

fn stop_ends_hlt_and_it_goes_on_waiting() {
    let mut g = Guest::long();
    g.state.rflags |= rflags::IF;
    let main = g.code(|a| asm!(a; hlt(); done()));
    let mut halts = 0;
    // A stop may come before the HLT.
    for round in 0..100 {
        let stop = g.stopper();
        let stopping = thread::spawn(move || {
            thread::sleep(Duration::from_millis(10));
            stop();
        });
        let end = if round == 0 { g.run(main) } else { g.resume() };
        stopping.join().unwrap();
        assert_eq!(end.why, Why::Stopped);
        halts += u32::from(end.state.mp_state == MpState::Halted);
        if halts == 3 {
            break;
        }
    }
    assert_eq!(halts, 3);
    g.apic(0).post(0x25);
    assert_eq!(g.resume().vector(0x25).rip, main + 1);
}

/// Functions of some 100 bytes, `count` of them one after the other, called in turn `rounds` times. Each adds a
/// number of its own to RAX; the sum says that all were executed.
fn much_code(count: u64, rounds: u64, code_cache: u64) {
    let mut g = Guest::new(Options { code_cache, ..Options::default() });
    const SIZE: u64 = 128;
    assert!(ARENA + count * SIZE <= MAPPED_END);
    let mut one = CodeAssembler::new(64).unwrap();
    for n in 0..count {
        one.reset();
        asm!(one; add(rax, n as i32));
        for k in 0..12 {
            asm!(one; lea(rdx, ptr(rdx + k)); xor(ecx, edx));
        }
        asm!(one; ret());
        let bytes = one.assemble(ARENA + n * SIZE).unwrap();
        assert!(bytes.len() as u64 <= SIZE);
        g.write(ARENA + n * SIZE, &bytes);
    }
    let main = g.code(|a| {
        let (mut round, mut again) = (a.create_label(), a.create_label());
        asm!(a; xor(eax, eax); mov(ebp, rounds as u32); set_label(&mut round); mov(ebx, ARENA as u32); mov(esi, count as u32));
        asm!(a; set_label(&mut again); call(rbx); add(rbx, SIZE as i32); dec(esi); jnz(again); dec(ebp); jnz(round); done());
    });
    assert_eq!(g.run(main).done().rax(), rounds * count * (count - 1) / 2);
}

fn more_code_than_the_smallest_code_cache_holds() {
    much_code(20_000, 3, 1 << 20);
}

fn the_same_with_room_for_all_of_it() {
    much_code(20_000, 3, 64 << 20);
}

fn eviction_while_other_vcpus_run() {
    const COUNT: u64 = 20_000;
    let mut g = Guest::new(Options { code_cache: 1 << 20, vcpus: 2, ..Options::default() });
    for n in 0..COUNT {
        // ADD RAX, n; and much that is nothing; RET.
        let mut bytes = vec![0x48, 0x05];
        bytes.extend((n as u32).to_le_bytes());
        for _ in 0..16 {
            bytes.extend([0x48, 0x8d, 0x52, 0x01]);
        }
        bytes.push(0xc3);
        g.write(ARENA + n * 128, &bytes);
    }
    let main = g.code(|a| {
        let (mut round, mut again, mut first, mut wait) =
            (a.create_label(), a.create_label(), a.create_label(), a.create_label());
        asm!(a; xor(eax, eax); mov(ebp, 2); set_label(&mut round); mov(ebx, ARENA as u32); mov(esi, COUNT as u32));
        asm!(a; set_label(&mut again); call(rbx); sub(rbx, -128); dec(esi); jnz(again); dec(ebp); jnz(round));
        asm!(a; mov(qword_ptr(rdi * 8 + DATA), rax); lock().inc(dword_ptr(DATA + 64)); test(edi, edi); jz(first); done());
        asm!(a; set_label(&mut first); nop(); set_label(&mut wait); pause(); cmp(dword_ptr(DATA + 64), 2); jne(wait); done());
    });
    g.start(1, main, Guest::stack_of(1) - 0x1000);
    g.run(main).done();
    let expected = 2 * COUNT * (COUNT - 1) / 2;
    assert_eq!((g.get(DATA, 8), g.get(DATA + 8, 8)), (expected, expected));
}

fn a_kick_without_anything_pending_changes_nothing() {
    let mut g = Guest::long();
    let main = g.code(|a| work(a, rounds(1_000_000)));
    let end = g.run(main).done();
    let expected = result(&g, &end);
    let mut g = Guest::long();
    let main = g.code(|a| work(a, rounds(1_000_000)));
    g.state.rflags |= rflags::IF;
    let apic = g.apic(0);
    let over = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&over);
    let kicking = thread::spawn(move || {
        while !seen.load(Ordering::SeqCst) {
            // Priority class 0 is never delivered: only a kick remains.
            apic.post(0x05);
            thread::sleep(Duration::from_micros(50));
        }
    });
    let end = g.run(main).done();
    over.store(true, Ordering::SeqCst);
    kicking.join().unwrap();
    assert_eq!(result(&g, &end), expected);
}

berth_tests_system::cases![
    stop_and_run_again_continue_exactly,
    state_moves_to_another_engine_in_the_middle,
    a_guest_moves_from_soft_to_this_engine_and_back,
    set_state_gives_the_same_state_back,
    impossible_states_are_refused,
    stop_ends_hlt_and_it_goes_on_waiting,
    more_code_than_the_smallest_code_cache_holds,
    the_same_with_room_for_all_of_it,
    eviction_while_other_vcpus_run,
    a_kick_without_anything_pending_changes_nothing,
];

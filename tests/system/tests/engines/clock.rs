//! The paravirtual clock and steal time, in one place and when a guest moves.

use std::time::Instant;

use berth_tests_system::engine::{EngineKind, current, with_engine};
use berth_tests_system::prelude::*;

/// Where the guest asks for struct pvclock_vcpu_time_info, and for struct kvm_steal_time.
const TIME: u64 = ARENA + 0x1000;
const STEAL: u64 = ARENA + 0x2000;
/// Where it stores its TSC.
const TSC: u64 = ARENA + 0x3000;

/// Stores the TSC and ends.
fn read_tsc(a: &mut CodeAssembler) {
    asm!(a; rdtsc(); shl(rdx, 32); or(rax, rdx); mov(qword_ptr(TSC), rax); done());
}

/// Asks for clock and steal time, then [`read_tsc`].
fn begin(a: &mut CodeAssembler) {
    for (number, value) in [(msr::KVM_SYSTEM_TIME_NEW, TIME | 1), (msr::KVM_STEAL_TIME, STEAL | 1)] {
        asm!(a; mov(ecx, number); mov(eax, value as u32); xor(edx, edx); wrmsr());
    }
    read_tsc(a);
}

/// The guest's time in nanoseconds, as its kernel computes it (Documentation/virt/kvm/x86/msr.rst).
fn guest_time(g: &Guest) -> u64 {
    assert!(g.get(TIME, 4).is_multiple_of(2), "the structure is being changed");
    let (base, time, multiplier) = (g.get(TIME + 8, 8), g.get(TIME + 16, 8), g.get(TIME + 24, 4));
    let shift = g.get(TIME + 28, 1) as u8 as i8;
    let ticks = u128::from(g.get(TSC, 8).wrapping_sub(base));
    let shifted = if shift < 0 { ticks >> -shift } else { ticks << shift };
    time + ((shifted * u128::from(multiplier)) >> 32) as u64
}

fn the_clock_begins_near_zero_and_goes_on() {
    let mut g = Guest::long();
    let main = g.code(begin);
    let again = g.code(read_tsc);
    let begun = Instant::now();
    g.run(main).done();
    let first = guest_time(&g);
    g.run(again).done();
    let second = guest_time(&g);
    assert!(second > first, "{first} {second}");
    // It began when the engine was made, a little before; twice, because the cases' soft engine has a TSC of its own.
    let most = 2 * begun.elapsed().as_nanos() as u64 + 10_000_000_000;
    assert!(second < most, "{second} ns, and not {most} have passed");
    assert!(g.engine.clock().unwrap() >= second / 2);
}

fn set_clock_is_what_the_guest_sees() {
    const DAY: u64 = 86_400_000_000_000;
    let mut g = Guest::long();
    let main = g.code(begin);
    let again = g.code(read_tsc);
    g.run(main).done();
    g.engine.set_clock(DAY).unwrap();
    let state = g.cpu_state();
    g.state = state;
    g.run(again).done();
    let time = guest_time(&g);
    assert!((DAY..DAY + DAY / 24).contains(&time), "{time}");
}

/// From the soft engine to the one under test and back: the guest's clock neither stands back nor jumps ahead, and its
/// steal time never falls.
fn the_clock_does_not_jump_when_a_guest_moves() {
    let engine = current();
    let mut from = with_engine(EngineKind::Soft, Guest::long);
    let main = from.code(begin);
    let again = from.code(read_tsc);
    let begun = Instant::now();
    let mut end = from.run(main).done();
    let (mut time, mut steal) = (guest_time(&from), from.get(STEAL, 8));
    for next in [engine, EngineKind::Soft, engine, EngineKind::Soft] {
        let mut to = with_engine(next, Guest::long);
        let mut page = [0; 4096];
        for at in (0..MAPPED_END).step_by(4096) {
            from.memory.read(berth_memory::GuestPhysAddr(at), &mut page).unwrap();
            to.write(at, &page);
        }
        to.engine.set_clock(from.engine.clock().unwrap()).unwrap();
        to.state = end.state.clone();
        end = to.run(again).done();
        let (now, stolen) = (guest_time(&to), to.get(STEAL, 8));
        assert!(now >= time, "on {next}: {now} after {time}");
        // The cases' soft engine counts a TSC of 2 GHz, so its time may go up to thrice as fast.
        let most = 4 * begun.elapsed().as_nanos() as u64 + 10_000_000_000;
        assert!(now < most, "on {next}: {now} ns, and not {most} have passed");
        assert!(stolen >= steal, "on {next}: {stolen} after {steal}");
        (time, steal, from) = (now, stolen, to);
    }
}

berth_tests_system::cases![
    the_clock_begins_near_zero_and_goes_on,
    set_clock_is_what_the_guest_sees,
    the_clock_does_not_jump_when_a_guest_moves,
];

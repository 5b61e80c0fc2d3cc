//! The policy with numbers.

use super::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn vm(name: &str, priority: u16, resident: u64) -> Vm {
    Vm {
        name: name.to_owned(),
        priority,
        size: 512 * MIB,
        resident: resident * MIB,
        overhead: 10 * MIB,
        ..Vm::default()
    }
}

/// A budget of 1 GiB on a host that has more.
fn seen(now: f64, vms: Vec<Vm>) -> Seen {
    let host = Host { budget: GIB, total: 16 * GIB, available: Some(12 * GIB), pressure: Some(0.0) };
    Seen { now, host, vms }
}

fn short(decisions: &[Decision]) -> Vec<(&str, Step)> {
    decisions.iter().map(|d| (d.vm.as_str(), d.step)).collect()
}

fn reclaimed(decisions: &[Decision], name: &str) -> u64 {
    let of_it = decisions.iter().filter(|d| d.vm == name);
    of_it.map(|d| if let Action::Reclaim { bytes, .. } = d.action { bytes } else { 0 }).sum()
}

#[test]
fn nothing_happens_while_there_is_enough() {
    let mut policy = Policy::new();
    assert_eq!(policy.decide(&seen(0.0, vec![])), []);
    assert_eq!(policy.decide(&seen(0.0, vec![vm("a", 100, 400), vm("b", 100, 500)])), []);
}

#[test]
fn cold_pages_of_the_lowest_priority_go_first() {
    let mut policy = Policy::new();
    let vms = vec![vm("low", 10, 300), vm("high", 200, 450), vm("middle", 100, 220)];
    let decisions = policy.decide(&seen(0.0, vms));
    assert_eq!(short(&decisions), [("low", Step::Cold)]);
    // 1000 MiB are to become 921.6; what is taken leaves a third of it in the store.
    let bytes = reclaimed(&decisions, "low");
    assert!((115 * MIB..120 * MIB).contains(&bytes), "{}", show(bytes));
    assert!(decisions[0].reason.contains("VMs cost 1000.0 MiB of 1.00 GiB"), "{}", decisions[0].reason);
    assert!(decisions[0].reason.contains("priority 10"), "{}", decisions[0].reason);
}

#[test]
fn vms_of_one_priority_share_by_what_is_above_their_reserves() {
    let mut policy = Policy::new();
    let reserved = Vm { reserve: 250 * MIB, ..vm("reserved", 100, 350) };
    let all_reserved = Vm { reserve: 300 * MIB, ..vm("all", 0, 300) };
    let vms = vec![reserved, vm("free", 100, 200), all_reserved, vm("more", 100, 100)];
    let decisions = policy.decide(&seen(0.0, vms));
    let got = ["all", "reserved", "free", "more"].map(|name| reclaimed(&decisions, name));
    assert_eq!(got[0], 0, "a reserve is never touched: {decisions:#?}");
    assert!(got[1].abs_diff(got[3]) < MIB && got[2].abs_diff(2 * got[1]) < 2 * MIB, "{got:?}");
}

#[test]
fn a_reserve_is_never_touched_whatever_is_missing() {
    for file in [false, true] {
        let mut policy = Policy::new();
        let full = |name, priority| Vm {
            reserve: 600 * MIB,
            has_file: file,
            store_memory: 0,
            balloon: Some(Balloon { available: Some(500 * MIB), ..Balloon::default() }),
            ..vm(name, priority, 600)
        };
        let decisions = policy.decide(&seen(0.0, vec![full("a", 1), full("b", 2)]));
        assert_eq!(short(&decisions), [("", Step::Stuck)], "{decisions:#?}");
    }
}

#[test]
fn who_gave_little_or_waits_for_pages_is_left_alone() {
    let mut policy = Policy::new();
    let vms = || vec![vm("a", 10, 490), vm("b", 100, 490)];
    let first = policy.decide(&seen(0.0, vms()));
    assert_eq!(short(&first), [("a", Step::Cold)]);
    policy.done(6.0, &first[0], first[0].gain / 8);
    assert_eq!(short(&policy.decide(&seen(6.0, vms()))), [("b", Step::Cold)]);
    // After a while it may have cold pages again.
    assert_eq!(short(&policy.decide(&seen(60.0, vms()))), [("a", Step::Cold)]);
    let mut thrashing = vms();
    (thrashing[0].refaults, thrashing[0].refault_time) = (10_000.0, 100e-6);
    assert_eq!(short(&policy.decide(&seen(61.0, thrashing))), [("b", Step::Cold)]);
    // What is awaited counts as given, and who is asked is not asked again.
    let mut asked = vms();
    asked[0].awaited = Some(GIB);
    assert_eq!(policy.decide(&seen(62.0, asked)), []);
}

#[test]
fn then_the_store_goes_to_its_file_and_balloons_grow() {
    let mut policy = Policy::new();
    let with = |name, priority| Vm {
        has_file: true,
        store_memory: 60 * MIB,
        overhead: 70 * MIB,
        balloon: Some(Balloon { target: 5 * MIB, actual: 5 * MIB, available: Some(150 * MIB), others: None }),
        ..vm(name, priority, 430)
    };
    let vms = || vec![with("a", 10), with("b", 100)];
    let exhaust = |policy: &mut Policy, step, names: &[&str]| {
        for vm in names {
            let vm = (*vm).to_owned();
            let decision = Decision { vm, step, action: Action::None, gain: GIB, reason: String::new() };
            policy.done(0.0, &decision, 0);
        }
    };
    exhaust(&mut policy, Step::Cold, &["a", "b"]);
    let decisions = policy.decide(&seen(1.0, vms()));
    assert_eq!(short(&decisions), [("a", Step::File), ("b", Step::File)]);
    assert_eq!(decisions[0].action, Action::ToFile { bytes: 60 * MIB });
    exhaust(&mut policy, Step::File, &["a", "b"]);
    let decisions = policy.decide(&seen(1.0, vms()));
    // 150 MiB could be done without, 64 MiB of which the guest keeps.
    assert_eq!(short(&decisions), [("a", Step::Balloon)]);
    let Action::Balloon { target } = decisions[0].action else { panic!("{decisions:#?}") };
    assert!((80 * MIB..=91 * MIB).contains(&target), "{}", show(target));
    // A guest that does not follow is not asked for more.
    let mut slow = vms();
    slow[0].balloon = Some(Balloon { target: 91 * MIB, actual: 5 * MIB, ..slow[0].balloon.unwrap() });
    assert_eq!(short(&policy.decide(&seen(1.0, slow))), [("b", Step::Balloon)]);
}

#[test]
fn the_last_step_freezes_the_lowest_priority_and_never_the_last_vm() {
    let mut policy = Policy::new();
    let busy = |name, priority| Vm { cpus: 1.0, ..vm(name, priority, 500) };
    let vms = vec![busy("b", 10), Vm { cpus: 0.0, ..vm("idle", 10, 400) }, busy("c", 50)];
    let decisions = policy.decide(&seen(0.0, vms.clone()));
    let frozen: Vec<&str> =
        decisions.iter().filter(|d| d.step == Step::Freeze).map(|d| d.vm.as_str()).collect();
    assert_eq!(frozen, ["idle"], "{decisions:#?}");
    assert_eq!(decisions.iter().filter(|d| d.vm == "idle").count(), 1);
    // One that was thawed just now because it was used runs on.
    let mut used = vms;
    used[1].thawed_for = Some(3.0);
    let decisions = policy.decide(&seen(0.0, used));
    assert!(decisions.iter().any(|d| d.step == Step::Freeze && d.vm == "b"), "{decisions:#?}");
    // Alone it is not frozen.
    let decisions =
        policy.decide(&seen(0.0, vec![busy("one", 1), Vm { state: State::Other, ..busy("p", 1) }]));
    assert!(decisions.iter().all(|d| d.step != Step::Freeze), "{decisions:#?}");
    let alone = Vm { cpus: 1.0, ..vm("one", 1, 2000) };
    let decisions = policy.decide(&seen(0.0, vec![alone]));
    assert!(decisions.iter().all(|d| d.step != Step::Freeze), "{decisions:#?}");
}

#[test]
fn paused_vms_are_left_alone() {
    let mut policy = Policy::new();
    let paused = Vm { state: State::Other, ..vm("paused", 0, 600) };
    let decisions = policy.decide(&seen(0.0, vec![paused, vm("runs", 500, 600)]));
    assert!(decisions.iter().all(|d| d.vm == "runs"), "{decisions:#?}");
}

#[test]
fn frozen_vms_go_on_when_there_is_room_the_most_important_first() {
    let mut policy = Policy::new();
    let frozen =
        |name, priority| Vm { state: State::Frozen, before_freeze: 200 * MIB, ..vm(name, priority, 0) };
    let vms = || vec![frozen("low", 10), frozen("high", 100), vm("runs", 50, 300)];
    let decisions = policy.decide(&seen(0.0, vms()));
    assert_eq!(short(&decisions), [("high", Step::Thaw)]);
    assert!(decisions[0].reason.contains("there is room"), "{}", decisions[0].reason);
    // What the first one takes shows only after a while.
    assert_eq!(policy.decide(&seen(1.0, vms())), []);
    assert_eq!(short(&policy.decide(&seen(9.0, vms()))), [("high", Step::Thaw)]);
    // Without room others make some, as long as that costs them little.
    let tight = vec![frozen("high", 100), vm("runs", 50, 880)];
    let decisions = policy.decide(&seen(20.0, tight));
    assert_eq!(short(&decisions), [("runs", Step::Cold)]);
    assert!(decisions[0].reason.contains("high is frozen"), "{}", decisions[0].reason);
}

#[test]
fn vms_that_do_not_fit_together_take_turns() {
    let mut policy = Policy::new();
    let frozen = |seconds, priority| Vm {
        state: State::Frozen,
        before_freeze: 400 * MIB,
        frozen_for: Some(seconds),
        ..vm("waits", priority, 0)
    };
    // What the others have is in use.
    let used = |name, priority, ran| Vm {
        thawed_for: ran,
        refaults: 9000.0,
        refault_time: 100e-6,
        ..vm(name, priority, 430)
    };
    let others = [used("long", 100, Some(70.0)), used("short", 100, Some(10.0))];
    let with = |seen_frozen: Vm| seen(0.0, [&[seen_frozen][..], &others].concat());
    assert_eq!(policy.decide(&with(frozen(20.0, 100))), [], "it is not its turn yet");
    let decisions = policy.decide(&with(frozen(40.0, 100)));
    assert_eq!(short(&decisions), [("long", Step::Freeze)]);
    assert!(decisions[0].reason.contains("waits was frozen for 40 s"), "{}", decisions[0].reason);
    // Nobody stands still for one that is less important.
    assert_eq!(policy.decide(&with(frozen(40.0, 99))), []);
    // Then there is room, and who waits for longest goes on; not at once who was frozen just now.
    let now = Vm { frozen_for: Some(1.0), ..frozen(1.0, 100) };
    let both = vec![Vm { name: "just".to_owned(), ..now }, frozen(41.0, 100), used("short", 100, Some(11.0))];
    assert_eq!(short(&policy.decide(&seen(50.0, both))), [("waits", Step::Thaw)]);
}

#[test]
fn balloons_shrink_again_but_only_by_what_a_keeper_asked_for() {
    let mut policy = Policy::new();
    let with = |name, others| Vm {
        balloon: Some(Balloon { target: 100 * MIB, actual: 100 * MIB, available: None, others }),
        ..vm(name, 100, 100)
    };
    let decisions = policy.decide(&seen(0.0, vec![with("ours", Some(30 * MIB)), with("theirs", None)]));
    assert_eq!(short(&decisions), [("ours", Step::Deflate)]);
    assert_eq!(decisions[0].action, Action::Balloon { target: 30 * MIB });
}

#[test]
fn the_host_counts_too() {
    let mut policy = Policy::new();
    let mut short_of = seen(0.0, vec![vm("a", 100, 300)]);
    short_of.host.available = Some(GIB / 2);
    let decisions = policy.decide(&short_of);
    assert_eq!(short(&decisions), [("a", Step::Cold)]);
    assert!(decisions[0].reason.contains("the host has 512.0 MiB available"), "{}", decisions[0].reason);
    let mut waits = seen(0.0, vec![vm("a", 100, 300)]);
    (waits.host.available, waits.host.pressure) = (Some(3 * GIB), Some(42.0));
    let decisions = policy.decide(&waits);
    assert_eq!(short(&decisions), [("a", Step::Cold)]);
    assert!(decisions[0].reason.contains("42 %"), "{}", decisions[0].reason);
    // Somebody's control group has no memory left; the host has.
    waits.host.available = Some(12 * GIB);
    assert_eq!(policy.decide(&waits), []);
}

/// Guests that use more and more, and give what they are asked for: the cost comes below the budget, and nobody gets
/// below a reserve.
#[test]
fn a_host_with_growing_guests_settles_below_its_budget() {
    let mut policy = Policy::new();
    let mut vms: Vec<Vm> = (0..24u16)
        .map(|n| Vm { reserve: 10 * MIB, has_file: true, ..vm(&format!("vm{n}"), n % 3, 20) })
        .collect();
    let mut froze = 0;
    for round in 0..200 {
        for vm in &mut vms {
            if vm.state == State::Running && round < 60 {
                vm.resident = (vm.resident + 6 * MIB).min(200 * MIB);
            }
        }
        let seen = seen(f64::from(round), vms.clone());
        for decision in policy.decide(&seen) {
            let Some(vm) = vms.iter_mut().find(|vm| vm.name == decision.vm) else { continue };
            let before = vm.cost();
            match decision.action {
                Action::Reclaim { bytes, .. } => {
                    // Half of what is there is in use.
                    let taken = bytes.min(vm.above_reserve() / 2);
                    vm.resident -= taken;
                    vm.stored += taken;
                    vm.overhead += taken / 3;
                    vm.store_memory += taken / 3;
                }
                Action::ToFile { bytes } => {
                    let moved = bytes.min(vm.store_memory);
                    vm.overhead -= moved;
                    vm.store_memory -= moved;
                }
                Action::Freeze => {
                    froze += 1;
                    vm.before_freeze = vm.resident;
                    vm.resident = vm.reserve;
                    vm.state = State::Frozen;
                }
                Action::Thaw => (vm.state, vm.thawed_for) = (State::Running, Some(0.0)),
                _ => {}
            }
            let got = before.saturating_sub(vm.cost());
            assert!(vm.resident >= vm.reserve.min(20 * MIB), "{decision:#?}");
            policy.done(f64::from(round), &decision, got);
        }
        vms.iter_mut().filter_map(|vm| vm.thawed_for.as_mut()).for_each(|seconds| *seconds += 1.0);
    }
    let cost: u64 = vms.iter().map(Vm::cost).sum();
    assert!(cost <= GIB, "{} with {froze} times frozen", show(cost));
    assert!(froze > 0);
}

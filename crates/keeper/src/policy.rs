//! From what is seen to what is done.
//!
//! ```text
//!             cost of all VMs
//!   ──────────────────┬──────────┬──────────┬─────────► bytes
//!                    low        high      budget
//!    room: thaw,      │ nothing  │ take,    │ take, and freeze if nothing
//!    give back        │          │ to low   │ else is left
//! ```
//! The host counts too: with little memory available, or with tasks that wait for memory, something is taken although the
//! budget is kept. Each step is tried for all VMs before the next one, in each step those of the lowest priority first,
//! and VMs of one priority share what is wanted by what they have above their reserves. A VM that gave much less than it
//! was asked for is left alone in this step for a while; so is one that waits much for pages that were taken before.

use std::collections::HashMap;

use crate::seen::{Seen, State, Vm};
use crate::step::{Action, Decision, Step, show};

const MIB: u64 = 1 << 20;

/// The largest part of the budget that is used without that something happens, as a divisor of what is left free.
const HIGH: u64 = 20;
/// To what the cost is brought, likewise.
const LOW: u64 = 10;
/// The host's memory that is to be available, as a divisor: below the first something is taken, up to the second.
const HOST_LEAST: u64 = 20;
const HOST_ENOUGH: u64 = 12;
/// Percent of the time that tasks may wait for memory, and how much of the budget is taken then, as a divisor.
const PRESSURE: f64 = 10.0;
const PRESSURE_TAKES: u64 = 50;
/// Pressure on memory counts only if less than this part of the host's memory is available: tasks also wait for memory when
/// a control group of theirs has none left.
const PRESSURE_COUNTS: u64 = 4;
/// Least that is worth a request.
const LEAST: u64 = MIB;
/// Seconds that a VM is left alone which gave less than a quarter of what it was asked for.
const EXHAUSTED: f64 = 20.0;
/// A VM whose vCPUs wait this share of the time for stored pages gives no more.
const STALL: f64 = 0.2;
/// What a compressed page takes at least, as a divisor: so much less than the page is gained in memory.
const COMPRESSED: u64 = 3;
/// Seconds that pages must not have been used: usually, and when the budget is exceeded.
const IDLE: u32 = 5;
const IDLE_SOON: u32 = 1;
/// What a guest keeps of what it could do without, at least, and as a divisor of its size.
const KEEP: u64 = 32 * MIB;
const KEEP_PART: u64 = 8;
/// A guest that is behind its balloon's target by so much is not asked for more.
const BEHIND: u64 = 16 * MIB;
/// Seconds that a VM which was thawed runs at least, and between two changes of the same kind.
const RUNS_AT_LEAST: f64 = 20.0;
const BETWEEN_THAWS: f64 = 3.0;
/// Seconds that a VM stays frozen at least, unless it is used: there may be room for a moment only.
const FROZEN_AT_LEAST: f64 = 6.0;
/// Seconds after which a frozen VM has its turn, and one that is no more important stands still in its place.
const TURN: f64 = 30.0;
/// Seconds between two turns: what the last one brought shows only then.
const BETWEEN_TURNS: f64 = 10.0;
/// Least room for a VM that is to be thawed.
const THAW_LEAST: u64 = 8 * MIB;

/// What was learnt from actions.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// Until when a VM is left alone in a step.
    exhausted: HashMap<(String, Step), f64>,
    last_thaw: Option<f64>,
    last_turn: Option<f64>,
}

/// What is still wanted.
struct Want {
    bytes: u64,
    /// Why, for people.
    because: String,
    /// More than the budget is used, or the host has nearly nothing left.
    urgent: bool,
}

impl Policy {
    /// One that has learnt nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Learns what came of an action: `got` is what the VM gave.
    pub fn done(&mut self, now: f64, decision: &Decision, got: u64) {
        if matches!(decision.step, Step::Cold | Step::File | Step::Balloon) && got < decision.gain / 4 {
            self.exhausted.insert((decision.vm.clone(), decision.step), now + EXHAUSTED);
        }
    }

    /// What is to be done now.
    pub fn decide(&mut self, seen: &Seen) -> Vec<Decision> {
        self.exhausted.retain(|_, until| *until > seen.now);
        let used: u64 = seen.vms.iter().map(Vm::cost).sum();
        let awaited: u64 = seen.vms.iter().filter_map(|vm| vm.awaited).sum();
        let mut decisions = Vec::new();
        match self.want(seen, used) {
            Some(want) => {
                let mut left = want.bytes.saturating_sub(awaited);
                self.take(seen, &want, &mut left, &mut decisions);
                if want.urgent {
                    freeze(seen, used, &mut left, &mut decisions);
                }
                if left >= LEAST && want.urgent && decisions.is_empty() && awaited == 0 {
                    decisions.push(Decision {
                        vm: String::new(),
                        step: Step::Stuck,
                        action: Action::None,
                        gain: 0,
                        reason: format!(
                            "{}, and nothing is left to take: all is in reserves, in use, or young",
                            want.because
                        ),
                    });
                }
            }
            None => self.give(seen, used, awaited, &mut decisions),
        }
        if decisions.iter().all(|d| !matches!(d.step, Step::Freeze | Step::Thaw)) {
            self.turns(seen, used, &mut decisions);
        }
        decisions
    }

    /// Who was frozen for long enough has its turn, if cold pages of others have not made room until then.
    fn turns(&mut self, seen: &Seen, used: u64, decisions: &mut Vec<Decision>) {
        let next = frozen(seen).into_iter().find(|vm| vm.frozen_for.is_some_and(|seconds| seconds >= TURN));
        let soon = self.last_turn.is_some_and(|at| seen.now < at + BETWEEN_TURNS);
        let Some(vm) = next.filter(|vm| !soon && need(vm) > room(seen, used)) else { return };
        if take_turns(seen, vm, decisions) {
            self.last_turn = Some(seen.now);
        }
    }

    /// What is wanted of the VMs now.
    fn want(&self, seen: &Seen, used: u64) -> Option<Want> {
        let host = &seen.host;
        let mut want: Option<Want> = None;
        let mut ask = |bytes: u64, urgent: bool, because: String| {
            if bytes > want.as_ref().map_or(0, |w| w.bytes) {
                let urgent = urgent || want.as_ref().is_some_and(|w| w.urgent);
                want = Some(Want { bytes, because, urgent });
            }
        };
        if used > host.budget - host.budget / HIGH {
            let because = format!("VMs cost {} of {}", show(used), show(host.budget));
            ask(used - (host.budget - host.budget / LOW), used > host.budget, because);
        }
        if let Some(available) = host.available {
            if available < host.total / HOST_LEAST {
                let because = format!("the host has {} available of {}", show(available), show(host.total));
                ask(host.total / HOST_ENOUGH - available, available < host.total / HOST_LEAST / 2, because);
            }
            if let Some(pressure) = host.pressure.filter(|p| *p > PRESSURE)
                && available < host.total / PRESSURE_COUNTS
            {
                let because = format!("tasks of the host wait for memory {pressure:.0} % of the time");
                ask(used.min(host.budget) / PRESSURE_TAKES, false, because);
            }
        }
        want
    }

    /// Steps that cost a guest time, but do not stop it.
    fn take(&self, seen: &Seen, want: &Want, left: &mut u64, decisions: &mut Vec<Decision>) {
        let idle = if want.urgent { IDLE_SOON } else { IDLE };
        self.step(seen, Step::Cold, left, decisions, |vm, wanted| {
            // The copy in the store takes room too.
            let kept = if vm.has_file { 0 } else { COMPRESSED };
            let asked = if kept == 0 { wanted } else { wanted + wanted / (kept - 1) };
            let bytes = asked.min(vm.above_reserve());
            let gain = bytes - bytes.checked_div(kept).unwrap_or(0);
            (vm.state == State::Running && vm.stall() < STALL).then(|| {
                let reason = format!(
                    "{}: takes up to {} that {} does not use (priority {}, {} above its reserve, {:.0} pages/s \
                     come back)",
                    want.because,
                    show(bytes),
                    vm.name,
                    vm.priority,
                    show(vm.above_reserve()),
                    vm.refaults
                );
                (Action::Reclaim { bytes, idle }, gain, reason)
            })
        });
        self.step(seen, Step::File, left, decisions, |vm, wanted| {
            let bytes = wanted.min(vm.store_memory);
            (vm.has_file && vm.state != State::Other).then(|| {
                let reason = format!(
                    "{}: moves {} of {} in the cold store of {} to its file (priority {})",
                    want.because,
                    show(bytes),
                    show(vm.store_memory),
                    vm.name,
                    vm.priority
                );
                (Action::ToFile { bytes }, bytes, reason)
            })
        });
        self.step(seen, Step::Balloon, left, decisions, |vm, wanted| {
            let balloon = vm.balloon.filter(|b| b.target < b.actual + BEHIND)?;
            let available = balloon.available?;
            let spare = available.saturating_sub(KEEP.max(vm.size / KEEP_PART));
            let bytes = wanted.min(spare).min(vm.above_reserve());
            (vm.state == State::Running).then(|| {
                let reason = format!(
                    "{}: asks {} for {} by its balloon (priority {}; its guest could do without {})",
                    want.because,
                    vm.name,
                    show(bytes),
                    vm.priority,
                    show(available)
                );
                (Action::Balloon { target: balloon.target + bytes }, bytes, reason)
            })
        });
    }

    /// Offers a step to all VMs, those of the lowest priority first. `offer`: what a VM would do of so many bytes that are
    /// wanted, what that gains, and why.
    fn step(
        &self,
        seen: &Seen,
        step: Step,
        left: &mut u64,
        decisions: &mut Vec<Decision>,
        offer: impl Fn(&Vm, u64) -> Option<(Action, u64, String)>,
    ) {
        let weight = |vm: &Vm| if step == Step::File { vm.store_memory } else { vm.above_reserve() };
        let free = |vm: &&Vm| {
            vm.awaited.is_none()
                && !self.exhausted.contains_key(&(vm.name.clone(), step))
                && decisions.iter().all(|d| d.vm != vm.name)
        };
        let mut vms: Vec<&Vm> = seen.vms.iter().filter(free).collect();
        // Who has most comes first, so that few are asked.
        vms.sort_by_key(|vm| (vm.priority, std::cmp::Reverse(weight(vm))));
        for group in vms.chunk_by(|a, b| a.priority == b.priority) {
            let mut rest: u64 = group.iter().map(|vm| weight(vm)).sum();
            for vm in group {
                if *left < LEAST {
                    return;
                }
                let share = (u128::from(*left) * u128::from(weight(vm)) / u128::from(rest.max(1))) as u64;
                rest -= weight(vm);
                let Some((action, gain, reason)) = offer(vm, share.max(LEAST)) else { continue };
                if gain < LEAST / 2 {
                    continue;
                }
                *left = left.saturating_sub(gain);
                decisions.push(Decision { vm: vm.name.clone(), step, action, gain, reason });
            }
        }
    }

    /// There is room: what stands still goes on, what was given is given back.
    fn give(&mut self, seen: &Seen, used: u64, awaited: u64, decisions: &mut Vec<Decision>) {
        let mut room = room(seen, used);
        // One after the other: what it takes shows only then.
        let waits = self.last_thaw.is_some_and(|at| seen.now < at + BETWEEN_THAWS);
        if let Some(vm) = frozen(seen).first()
            && !waits
        {
            let need = need(vm);
            if need <= room {
                self.last_thaw = Some(seen.now);
                room -= need;
                let reason = format!(
                    "there is room: {} of {} are used, and {} had {} resident when it was frozen (priority {})",
                    show(used),
                    show(seen.host.budget),
                    vm.name,
                    show(vm.before_freeze),
                    vm.priority
                );
                let (vm, step) = (vm.name.clone(), Step::Thaw);
                decisions.push(Decision { vm, step, action: Action::Thaw, gain: 0, reason });
            } else {
                let want = Want {
                    bytes: need - room,
                    because: format!("{} is frozen and would need {}", vm.name, show(need)),
                    urgent: false,
                };
                let mut left = want.bytes.saturating_sub(awaited);
                self.take(seen, &want, &mut left, decisions);
                return;
            }
        }
        let mut squeezed: Vec<_> = seen
            .vms
            .iter()
            .filter(|vm| vm.state == State::Running && vm.awaited.is_none())
            .filter_map(|vm| Some((vm, vm.balloon?, vm.balloon?.others?)))
            .collect();
        squeezed.sort_by_key(|(vm, ..)| std::cmp::Reverse(vm.priority));
        for (vm, balloon, others) in squeezed {
            let bytes = room.min(balloon.target.saturating_sub(others));
            if bytes < LEAST {
                continue;
            }
            room -= bytes;
            let reason = format!(
                "there is room: {} gets {} of its balloon back (priority {})",
                vm.name,
                show(bytes),
                vm.priority
            );
            let action = Action::Balloon { target: balloon.target - bytes };
            decisions.push(Decision { vm: vm.name.clone(), step: Step::Deflate, action, gain: 0, reason });
        }
    }
}

/// What may be used without that something would be taken again soon.
fn room(seen: &Seen, used: u64) -> u64 {
    (seen.host.budget - seen.host.budget / LOW).saturating_sub(used)
}

/// What a frozen VM needs to go on: the rest comes back when it is touched.
fn need(vm: &Vm) -> u64 {
    (vm.before_freeze / 2).max(THAW_LEAST)
}

/// Frozen VMs that may go on, the most important first, of those with one priority the one that waits for longest.
fn frozen(seen: &Seen) -> Vec<&Vm> {
    let ripe = |vm: &&Vm| {
        vm.state == State::Frozen
            && vm.awaited.is_none()
            && vm.frozen_for.is_none_or(|seconds| seconds >= FROZEN_AT_LEAST)
    };
    let mut frozen: Vec<&Vm> = seen.vms.iter().filter(ripe).collect();
    let waiting = |vm: &Vm| vm.frozen_for.unwrap_or(0.0);
    frozen.sort_by(|a, b| {
        b.priority.cmp(&a.priority).then(waiting(b).total_cmp(&waiting(a))).then(a.name.cmp(&b.name))
    });
    frozen
}

/// A VM that has run for long enough stands still for one that was frozen for long enough and is no less important: when
/// all of one priority use more than there is, each gets on. Returns whether there is one.
fn take_turns(seen: &Seen, frozen: &Vm, decisions: &mut Vec<Decision>) -> bool {
    let ran = |vm: &Vm| vm.thawed_for.unwrap_or(f64::INFINITY);
    let can = |vm: &&Vm| {
        vm.state == State::Running
            && vm.priority <= frozen.priority
            && ran(vm) >= TURN
            && vm.above_reserve() >= LEAST
    };
    let order = |a: &&Vm, b: &&Vm| {
        (b.priority.cmp(&a.priority))
            .then(ran(a).total_cmp(&ran(b)))
            .then(a.above_reserve().cmp(&b.above_reserve()))
    };
    let Some(vm) = seen.vms.iter().filter(can).max_by(order) else { return false };
    decisions.retain(|d| d.vm != vm.name);
    let reason = format!(
        "{} was frozen for {:.0} s and has its turn: freezes {} (priority {}, {} above its reserve) until there is room or \
         it is used",
        frozen.name,
        frozen.frozen_for.unwrap_or(0.0),
        vm.name,
        vm.priority,
        show(vm.above_reserve())
    );
    let (gain, name, step) = (vm.above_reserve(), vm.name.clone(), Step::Freeze);
    decisions.push(Decision { vm: name, step, action: Action::Freeze, gain, reason });
    true
}

/// The last step: VMs of the lowest priority stand still, until those that go on fit. What other steps are expected to give
/// counts for less than half, because the budget is exceeded now.
fn freeze(seen: &Seen, used: u64, left: &mut u64, decisions: &mut Vec<Decision>) {
    let over = used.saturating_sub(seen.host.budget);
    let expected: u64 = decisions.iter().map(|d| d.gain).sum::<u64>()
        + seen.vms.iter().filter_map(|vm| vm.awaited).sum::<u64>();
    // A little too much is waited for.
    let bearable = seen.host.budget / HIGH;
    if *left < LEAST && over <= expected / 2 + bearable {
        return;
    }
    let mut missing = (*left).max(over.saturating_sub(expected / 2));
    let can = |vm: &&Vm| {
        let young = vm.thawed_for.is_some_and(|seconds| seconds < RUNS_AT_LEAST);
        // What it was asked for is no obstacle: it is taken all the same.
        vm.state == State::Running && !young && vm.above_reserve() >= LEAST
    };
    let mut vms: Vec<&Vm> = seen.vms.iter().filter(can).collect();
    // Of those with one priority the idle ones first; of these the largest.
    vms.sort_by(|a, b| {
        let idle = |vm: &Vm| vm.cpus < 0.05;
        (a.priority.cmp(&b.priority))
            .then(idle(b).cmp(&idle(a)))
            .then(b.above_reserve().cmp(&a.above_reserve()))
    });
    // The last one that runs goes on: it alone must fit.
    let running = seen.vms.iter().filter(|vm| vm.state == State::Running).count();
    for vm in vms.into_iter().take(running.saturating_sub(1)) {
        if missing < LEAST {
            break;
        }
        let gain = vm.above_reserve();
        missing = missing.saturating_sub(gain);
        *left = left.saturating_sub(gain);
        let reason = format!(
            "VMs cost {} of {}, and what else can be taken is not enough: freezes {} (priority {}, {:.2} CPUs, {} above \
             its reserve) until there is room or it is used",
            show(used),
            show(seen.host.budget),
            vm.name,
            vm.priority,
            vm.cpus,
            show(gain)
        );
        decisions.retain(|d| d.vm != vm.name);
        let (vm, step) = (vm.name.clone(), Step::Freeze);
        decisions.push(Decision { vm, step, action: Action::Freeze, gain, reason });
    }
}

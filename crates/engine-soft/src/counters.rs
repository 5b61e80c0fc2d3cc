//! What the engine counts: the ground that work on speed starts from.
//!
//! Each vCPU counts for itself, with plain loads and stores of its own cache lines, so counting is always on. What
//! would cost translated code something (hits of the TLB and of slots) is not counted.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use iced_x86::Mnemonic;

use crate::code::reason;
use crate::vm::Vm;

/// A number that one thread increases and all may read.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    /// Only ever called by the thread of the vCPU that it belongs to.
    pub(crate) fn add(&self, n: u64) {
        self.0.store(self.get() + n, Ordering::Relaxed);
    }

    /// The same, for a number that is counted elsewhere.
    pub(crate) fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Names of [`reason`]s, in their order.
const EXITS: [(&str, u64); 7] = [
    ("lookup", reason::LOOKUP),
    ("link", reason::LINK),
    ("helper", reason::FLOW),
    ("fault", reason::FAULT),
    ("signal", reason::SIGNAL),
    ("alone", reason::ALONE),
    ("dead_block", reason::TOMB),
];

/// What one vCPU did since it was made.
#[derive(Debug)]
pub(crate) struct Counters {
    exits: [Count; EXITS.len()],
    /// By mnemonic; they may wrap.
    helpers: Box<[AtomicU32]>,
    /// Ticks of the time-stamp counter.
    pub translation_ticks: Count,
    /// Accesses whose slot had another page.
    pub slot_misses: Count,
    /// Accesses that took the slow path.
    pub slow_accesses: Count,
    /// Accesses that were translated again without a slot, or with one of their own.
    pub slots_given_up: Count,
    /// Page walks.
    pub walks: Count,
    /// Flushes of the whole TLB, of an address space (writes of CR3 included), of a page.
    pub flushes: [Count; 3],
    /// Flushes that other vCPUs left for this one while it waited.
    pub flushes_left: Count,
    /// Interrupts delivered.
    pub interrupts: Count,
    /// Exceptions delivered.
    pub exceptions: Count,
    /// Times that another thread asked for something.
    pub requests: Count,
    /// Times that it waited for an event.
    pub waits: Count,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            exits: Default::default(),
            helpers: (0..Mnemonic::values().len()).map(|_| AtomicU32::new(0)).collect(),
            translation_ticks: Count::default(),
            slot_misses: Count::default(),
            slow_accesses: Count::default(),
            slots_given_up: Count::default(),
            walks: Count::default(),
            flushes: Default::default(),
            flushes_left: Count::default(),
            interrupts: Count::default(),
            exceptions: Count::default(),
            requests: Count::default(),
            waits: Count::default(),
        }
    }
}

impl Counters {
    /// Translated code was left for this [`reason`].
    pub(crate) fn left(&self, reason: u64) {
        if let Some(count) = self.exits.get(reason as usize) {
            count.add(1);
        }
    }

    /// A helper executes an instruction.
    pub(crate) fn helped(&self, mnemonic: Mnemonic) {
        if let Some(count) = self.helpers.get(mnemonic as usize) {
            count.store(count.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        }
    }
}

/// All counters of a VM: the cache's, then the sums over all vCPUs.
pub(crate) fn list(vm: &Vm) -> Vec<(String, u64)> {
    let cache = vm.cache.stats();
    let vcpus = vm.vcpu_list();
    let sum = |one: &dyn Fn(&Counters) -> u64| vcpus.iter().map(|v| one(&v.counters)).sum::<u64>();
    let ticks = u128::from(sum(&|c| c.translation_ticks.get()));
    let nanos = ticks * 1_000_000_000 / u128::from(vm.tsc_hz.max(1));
    let mut list: Vec<(String, u64)> = [
        ("code.blocks", cache.blocks),
        ("code.host_bytes", cache.host_bytes),
        ("code.guest_bytes", cache.guest_bytes),
        ("code.translation_ns", nanos as u64),
        ("code.invalidated_blocks", cache.invalidated),
        ("code.evictions", cache.evictions),
        ("code.used_bytes", cache.used),
        ("code.size_bytes", cache.size),
        ("memory.slot_misses", sum(&|c| c.slot_misses.get())),
        ("memory.slow_accesses", sum(&|c| c.slow_accesses.get())),
        ("memory.slots_given_up", sum(&|c| c.slots_given_up.get())),
        ("memory.page_walks", sum(&|c| c.walks.get())),
        ("memory.flushes_all", sum(&|c| c.flushes[0].get())),
        ("memory.flushes_address_space", sum(&|c| c.flushes[1].get())),
        ("memory.flushes_page", sum(&|c| c.flushes[2].get())),
        ("memory.flushes_left_by_others", sum(&|c| c.flushes_left.get())),
        ("events.interrupts", sum(&|c| c.interrupts.get())),
        ("events.exceptions", sum(&|c| c.exceptions.get())),
        ("events.requests", sum(&|c| c.requests.get())),
        ("events.waits", sum(&|c| c.waits.get())),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into();
    list.extend(
        EXITS.map(|(name, reason)| (format!("exits.{name}"), sum(&|c| c.exits[reason as usize].get()))),
    );
    let helper = |n: usize| sum(&|c| c.helpers[n].load(Ordering::Relaxed).into());
    let mut helpers: Vec<_> = Mnemonic::values().map(|m| (m, helper(m as usize))).collect();
    helpers.retain(|(_, n)| *n > 0);
    helpers.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
    list.extend(helpers.into_iter().map(|(m, n)| (format!("helpers.{m:?}").to_lowercase(), n)));
    list
}

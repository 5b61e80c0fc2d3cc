//! Integer work: arithmetic, branches, memory.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, DefaultHasher};
use std::hint::black_box;

use crate::{Outcome, Stop, Task, expect};

/// CoreMark's checksums of list, matrix and state work in its 2K performance run (EEMBC's core_main.c). They do
/// not depend on the number of iterations.
const COREMARK_CRCS: (u16, u16, u16) = (0xe714, 0x1fd7, 0x8e3a);
const NUMBERS: usize = 100_000;
/// 16 MiB: more than the second-level TLB of a CPU covers with pages of 4 KiB.
const NODES: usize = 1 << 18;

pub fn coremark(task: &Task) -> Outcome {
    let configuration = coremark::Config { iterations: task.count, ..coremark::Config::default() };
    let results = coremark::run(&configuration);
    expect("its checksum", (results.crclist, results.crcmatrix, results.crcstate), COREMARK_CRCS)
}

pub fn sieve(task: &Task) -> Outcome {
    (0..task.count).try_for_each(|_| expect("the number of primes", primes_below(1_000_000), 78_498))
}

/// How many primes there are below `end`, by Eratosthenes.
pub fn primes_below(end: usize) -> usize {
    let mut composite = vec![false; black_box(end)];
    let mut count = 0;
    for number in 2..end {
        if composite[number] {
            continue;
        }
        count += 1;
        for multiple in (number * number..end).step_by(number) {
            composite[multiple] = true;
        }
    }
    count
}

pub fn sort(task: &Task) -> Outcome {
    let mut random = fastrand::Rng::with_seed(1);
    for _ in 0..task.count {
        let mut numbers: Vec<u64> = (0..NUMBERS).map(|_| random.u64(..)).collect();
        let sum = numbers.iter().fold(0, |sum: u64, n| sum.wrapping_add(*n));
        // By comparison of two keys, as records are sorted.
        black_box(&mut numbers).sort_unstable_by_key(|n| (n >> 48, *n as u32));
        let ordered = numbers.is_sorted_by_key(|n| (n >> 48, *n as u32));
        expect("the order", ordered, true)?;
        expect("the sum", numbers.iter().fold(0, |sum: u64, n| sum.wrapping_add(*n)), sum)?;
    }
    Ok(())
}

pub fn hash_table(task: &Task) -> Outcome {
    for round in 0..u64::from(task.count) {
        // SipHash as always in Rust, but with the same key in every run.
        let mut table: HashMap<u64, u64, BuildHasherDefault<DefaultHasher>> = HashMap::default();
        let key = |i: u64| (i + round).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (0..NUMBERS as u64).for_each(|i| {
            table.insert(key(i), i);
        });
        let found: u64 = (0..NUMBERS as u64 * 2).filter_map(|i| black_box(&table).get(&key(i))).sum();
        expect("the sum of what was found", found, NUMBERS as u64 * (NUMBERS as u64 - 1) / 2)?;
        let removed = (0..NUMBERS as u64).filter(|i| table.remove(&key(*i)).is_some()).count();
        expect("the number of removed entries", removed, NUMBERS)?;
    }
    Ok(())
}

/// As long as a cache line.
#[derive(Clone)]
struct Node {
    next: usize,
    _payload: [u64; 7],
}

pub fn pointer_chase(task: &Task) -> Outcome {
    // Sattolo's algorithm: a permutation that is one ring.
    let mut random = fastrand::Rng::with_seed(2);
    let mut order: Vec<usize> = (0..NODES).collect();
    for i in (1..NODES).rev() {
        order.swap(i, random.usize(..i));
    }
    let nodes: Vec<Node> = order.iter().map(|next| Node { next: *next, _payload: [0; 7] }).collect();
    let nodes = black_box(&nodes);
    for _ in 0..task.count {
        let (mut at, mut steps) = (0, 0);
        loop {
            at = nodes.get(at).ok_or_else(|| Stop::Failed(format!("there is no node {at}")))?.next;
            steps += 1;
            if at == 0 || steps > NODES {
                break;
            }
        }
        expect("the length of the ring", steps, NODES)?;
    }
    Ok(())
}

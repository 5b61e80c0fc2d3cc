//! The store with guest memory in this process: what goes out comes back, whoever touches it and when.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::{Ages, GuestMemory, GuestPhysAddr, PageState};

const SIZE: u64 = 16 << 20;
const PAGES: usize = (SIZE / PAGE_SIZE) as usize;

fn at(page: usize) -> GuestPhysAddr {
    GuestPhysAddr(page as u64 * PAGE_SIZE)
}

/// Memory with a store, or `None` where the host lacks what it needs.
fn with_store(faults: Faults) -> Option<GuestMemory> {
    let memory = GuestMemory::new(SIZE).unwrap();
    match memory.begin_store(faults, "test-faults") {
        Ok(()) => Some(memory),
        Err(e @ (StoreError::Userfault(_) | StoreError::UserModeOnly)) => {
            println!("skipped: {e}");
            None
        }
        Err(e) => panic!("{e}"),
    }
}

fn content(seed: u64) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut page = vec![0; PAGE_SIZE as usize];
    page[..2000].iter_mut().for_each(|b| *b = rng.u8(..));
    page
}

fn read(memory: &GuestMemory, page: usize) -> Vec<u8> {
    let mut bytes = vec![0; PAGE_SIZE as usize];
    memory.read(at(page), &mut bytes).unwrap();
    bytes
}

fn evict_all(memory: &GuestMemory) -> Evicted {
    let mut ages = Ages::new(memory);
    ages.end_period(memory);
    ages.end_period(memory);
    memory.evict_cold(&ages, u64::MAX, 1).unwrap()
}

#[test]
fn what_goes_out_comes_back() {
    let Some(m) = with_store(Faults::User) else { return };
    for page in 0..1000 {
        m.write(at(page), &content(page as u64 % 700)).unwrap();
    }
    for page in 1000..1500 {
        m.write(at(page), &[0]).unwrap();
    }
    assert_eq!(evict_all(&m), Evicted { pages: 1500, zero: 500, kept: 0 });
    let counts = m.state_counts().unwrap();
    assert_eq!((counts.resident, counts.stored, counts.total()), (0, 1500 * PAGE_SIZE, SIZE));
    let counters = m.store_counters().unwrap();
    assert_eq!((counters.stored_pages, counters.zero_pages, counters.distinct_pages), (1500, 500, 700));
    assert_eq!(counters.duplicates, 300);
    assert!(counters.compressed_bytes < 700 * 2300, "{counters:?}");
    for page in (0..1000).rev() {
        assert_eq!(read(&m, page), content(page as u64 % 700), "{page}");
    }
    assert!((1000..1500).all(|page| read(&m, page).iter().all(|b| *b == 0)));
    let counters = m.store_counters().unwrap();
    assert_eq!((counters.stored_pages, counters.compressed_bytes, counters.memory_bytes), (0, 0, 0));
    assert_eq!(counters.refaults, counters.latency.buckets.iter().sum::<u64>());
    assert_eq!(m.state_counts().unwrap().stored, 0);
}

#[test]
fn pages_that_were_never_touched_read_as_zero() {
    let Some(m) = with_store(Faults::User) else { return };
    m.write(at(70), b"something").unwrap();
    assert!((0..200).filter(|page| *page != 70).all(|page| read(&m, page).iter().all(|b| *b == 0)));
    m.write(at(71), b"more").unwrap();
    assert_eq!(read(&m, 71)[..4], *b"more");
    assert_eq!(read(&m, 70)[..9], *b"something");
    assert_eq!(m.state_counts().unwrap().resident, 2 * PAGE_SIZE);
}

#[test]
fn discarded_pages_are_forgotten() {
    let Some(m) = with_store(Faults::User) else { return };
    (0..64).for_each(|page| m.write(at(page), &content(page as u64)).unwrap());
    evict_all(&m);
    m.discard(at(0), 32 * PAGE_SIZE).unwrap();
    assert_eq!(m.store_counters().unwrap().stored_pages, 32);
    let mut states = Vec::new();
    m.for_each_state(|range| states.push((range.len / PAGE_SIZE, range.state))).unwrap();
    assert_eq!(states[..2], [(32, PageState::Released), (32, PageState::Stored)]);
    assert!(read(&m, 3).iter().all(|b| *b == 0));
    assert_eq!(read(&m, 40), content(40));
}

#[test]
fn accessed_pages_stay() {
    let Some(m) = with_store(Faults::User) else { return };
    (0..64).for_each(|page| m.write(at(page), &content(page as u64)).unwrap());
    let mut ages = Ages::new(&m);
    ages.end_period(&m);
    (0..10).for_each(|page| m.mark_accessed(at(page)));
    ages.end_period(&m);
    assert_eq!(m.evict_cold(&ages, u64::MAX, 1).unwrap().pages, 54);
    assert_eq!(m.evict_cold(&ages, u64::MAX, 1).unwrap().pages, 0);
}

/// Where only faults of user mode are handled a system call on a stored page fails; with a hold it does not.
#[test]
fn system_calls_find_pages_that_are_held() {
    let Some(m) = with_store(Faults::UserOnly) else { return };
    let mut file = tempfile::tempfile().unwrap();
    std::io::Write::write_all(&mut file, &[5; 3 * PAGE_SIZE as usize]).unwrap();
    (0..3).for_each(|page| m.write(at(page), &content(page as u64)).unwrap());
    let pread = |m: &GuestMemory| {
        let to = m.host_address(at(0), 3 * PAGE_SIZE).unwrap().0 as *mut libc::c_void;
        // SAFETY: guest memory of that length, to which nobody has references.
        unsafe { libc::pread(file.as_raw_fd(), to, 3 * PAGE_SIZE as usize, 0) }
    };
    evict_all(&m);
    assert_eq!(pread(&m), -1);
    let hold = m.hold([(at(0) + 5, 2 * PAGE_SIZE)]);
    assert_eq!(evict_all(&m).pages, 0);
    assert_eq!(pread(&m), 3 * PAGE_SIZE as isize);
    drop(hold);
    assert_eq!(evict_all(&m).pages, 3);
    assert!((0..3).all(|page| read(&m, page).iter().all(|b| *b == 5)));
}

#[test]
fn memory_outlives_its_evictions() {
    let Some(m) = with_store(Faults::User) else { return };
    (0..500).for_each(|page| m.write(at(page), &content(page as u64)).unwrap());
    evict_all(&m);
    let clone = m.clone();
    drop(m);
    assert_eq!(read(&clone, 77), content(77));
}

/// Hunts for lost writes: threads write and verify pages of their own and count in shared ones, one discards, while all
/// pages are evicted again and again.
#[test]
fn no_write_is_lost() {
    let Some(m) = with_store(Faults::User) else { return };
    const OWN: usize = 200;
    const SHARED: usize = 64;
    let seconds = std::env::var("BERTH_STRESS_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(2);
    let end = Instant::now() + Duration::from_secs(seconds);
    let stop = AtomicBool::new(false);
    let counted = AtomicU64::new(0);
    let shared_base = PAGES - SHARED;
    let word = |page: usize, word: usize| {
        let host = m.host_address(at(page) + word as u64 * 8, 8).unwrap();
        // SAFETY: aligned, and guest memory lives as long as `m`.
        unsafe { AtomicU64::from_ptr(host.0 as *mut u64) }
    };
    let (mut evicted, mut rounds) = (0, 0);
    thread::scope(|scope| {
        for thread in 0..4usize {
            let (stop, counted, m, word) = (&stop, &counted, &m, &word);
            scope.spawn(move || {
                let mut rng = fastrand::Rng::with_seed(thread as u64);
                let mut expected = vec![0u64; OWN];
                while !stop.load(Ordering::Relaxed) {
                    let n = rng.usize(..OWN);
                    let page = thread * OWN + n;
                    for i in 0..512 {
                        let value = word(page, i).load(Ordering::Relaxed);
                        let want = if expected[n] == 0 { 0 } else { expected[n] + i as u64 % 7 };
                        assert_eq!(value, want, "page {page}, word {i}");
                    }
                    if thread == 3 && rng.u8(..) < 64 {
                        m.discard(at(page), PAGE_SIZE).unwrap();
                        expected[n] = 0;
                    } else {
                        // Few values, so that pages are equal now and then.
                        expected[n] = if rng.bool() { rng.u64(1..20) } else { rng.u64(1..) >> 8 };
                        (0..512)
                            .for_each(|i| word(page, i).store(expected[n] + i as u64 % 7, Ordering::Relaxed));
                    }
                    for _ in 0..8 {
                        let (page, i) = (shared_base + rng.usize(..SHARED), rng.usize(..512));
                        word(page, i).fetch_add(1, Ordering::Relaxed);
                        counted.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        while Instant::now() < end {
            evicted += evict_all(&m).pages;
            rounds += 1;
        }
        stop.store(true, Ordering::Relaxed);
    });
    let sum: u64 = (shared_base..PAGES)
        .flat_map(|page| (0..512).map(move |i| (page, i)))
        .map(|(p, i)| word(p, i).load(Ordering::Relaxed))
        .sum();
    assert_eq!(sum, counted.load(Ordering::Relaxed));
    let counters = m.store_counters().unwrap();
    println!(
        "{rounds} rounds, {evicted} pages evicted, {} brought back, p99 {:?}",
        counters.refaults,
        counters.latency.quantile(0.99)
    );
    assert!(evicted > 0 && counters.refaults > 0);
}

/// Prints how long it takes to touch a page that is in the store, the whole way of a thread that does.
#[test]
#[ignore = "measures; run by hand"]
fn touch_latency() {
    let Some(m) = with_store(Faults::User) else { return };
    (0..4000).for_each(|page| m.write(at(page), &content(page as u64)).unwrap());
    evict_all(&m);
    let mut times: Vec<Duration> = (0..4000)
        .map(|page| {
            let start = Instant::now();
            m.read(at(page), &mut [0]).unwrap();
            start.elapsed()
        })
        .collect();
    times.sort_unstable();
    println!(
        "p50 {:?}, p99 {:?}, handler p99 {:?}",
        times[2000],
        times[3960],
        m.store_counters().unwrap().latency.quantile(0.99)
    );
}

#[test]
fn what_goes_to_the_file_comes_back() {
    let Some(m) = with_store(Faults::User) else { return };
    let directory = tempfile::tempdir().unwrap();
    for page in 0..2000 {
        m.write(at(page), &content(page as u64)).unwrap();
    }
    assert_eq!(m.move_store_to_file(directory.path(), u64::MAX, || true).unwrap(), 0);
    let ages = Ages::new(&m);
    assert_eq!(m.evict_all(&ages, 0, || true).unwrap().pages, 0);
    assert_eq!(m.evict_all(&ages, u64::MAX, || false).unwrap().pages, 0);
    assert_eq!(m.evict_all(&ages, u64::MAX, || true).unwrap().pages, 2000);
    let before = m.store_counters().unwrap();
    // As much as was asked for, in whole segments; then the rest.
    let some = m.move_store_to_file(directory.path(), 1 << 20, || true).unwrap();
    assert!((1 << 20..2 << 20).contains(&some), "{some}");
    assert_eq!(m.move_store_to_file(directory.path(), u64::MAX, || false).unwrap(), 0);
    let rest = m.move_store_to_file(directory.path(), u64::MAX, || true).unwrap();
    let after = m.store_counters().unwrap();
    assert_eq!((after.memory_bytes, after.file_bytes), (0, before.memory_bytes));
    assert_eq!((some + rest, after.compressed_bytes), (after.file_bytes, before.compressed_bytes));
    // It has no name.
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    m.store_file_will_be_read();
    for page in (0..2000).rev() {
        assert_eq!(read(&m, page), content(page as u64), "{page}");
    }
    assert_eq!(m.store_counters().unwrap().file_bytes, 0);
}

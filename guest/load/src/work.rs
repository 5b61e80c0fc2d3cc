//! What the workers do. Each checks its results: a wrong one is counted, never ignored.

use std::hint::black_box;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use berth_agent_protocol::load::Kind;

use crate::Tally;

/// Steps of a unit of [`Kind::Cpu`].
const STEPS: u32 = 200_000;
/// Mappings, locks and bytes of a unit of [`Kind::Lock`].
const LOCKS: u32 = 20;
/// Size of such a mapping in bytes.
const MAPPING: usize = 64 << 10;
const PAGE: usize = 4096;
/// Pages of a unit of [`Kind::Memory`].
const PAGES: usize = 256;
/// How often a burst of [`Kind::Mixed`] is due, and how many units of [`Kind::Cpu`] are in it.
const BURSTS: Duration = Duration::from_millis(100);
const BURST_ROUNDS: u32 = 32;
/// How often [`Kind::Idle`] wakes.
const WAKE_UPS: Duration = Duration::from_secs(1);

/// What the workers of a guest share.
struct Shared {
    tally: Arc<Tally>,
    counter: Mutex<u64>,
    pipe: (PipeReader, PipeWriter),
}

/// Starts so many workers.
///
/// # Errors
/// What the kernel says when it refuses a thread or a pipe.
pub fn start(kind: Kind, workers: usize, tally: &Arc<Tally>) -> io::Result<()> {
    let shared = Arc::new(Shared { tally: tally.clone(), counter: Mutex::new(0), pipe: io::pipe()? });
    for number in 0..workers {
        let shared = shared.clone();
        thread::Builder::new().spawn(move || Worker::new(number as u64, &shared).work(kind, workers))?;
    }
    Ok(())
}

struct Worker<'a> {
    number: u64,
    shared: &'a Shared,
    units: &'a AtomicU64,
    /// Each mapping and page gets a value that was not there before.
    stamp: u64,
}

impl<'a> Worker<'a> {
    fn new(number: u64, shared: &'a Shared) -> Self {
        Self { number, shared, units: &shared.tally.units, stamp: number << 48 }
    }

    fn work(mut self, kind: Kind, workers: usize) {
        let mut memory = match kind {
            Kind::Memory => Memory::new(available_bytes() / 2 / workers, self.number),
            Kind::Mixed => Memory::new(available_bytes() / 8 / workers, self.number),
            Kind::Cpu | Kind::Lock | Kind::Idle => Memory::new(0, self.number),
        };
        self.shared.tally.ready.fetch_add(1, Ordering::Release);
        let mut due = Instant::now();
        loop {
            match kind {
                Kind::Cpu => self.compute(),
                Kind::Lock => self.lock(LOCKS),
                Kind::Memory => self.expect(memory.check(PAGES)),
                Kind::Mixed => {
                    for _ in 0..BURST_ROUNDS {
                        self.compute();
                    }
                    self.lock(LOCKS);
                    self.expect(memory.check(PAGES));
                    due = wait(due, BURSTS);
                }
                Kind::Idle => {
                    self.compute();
                    due = wait(due, WAKE_UPS);
                }
            }
            self.units.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn expect(&self, right: bool) {
        if !right {
            self.shared.tally.errors.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Steps of a generator that goes through all numbers once (xorshift64), and the same way back.
    fn compute(&mut self) {
        self.stamp += 1;
        let start = black_box(self.stamp);
        let mut x = start;
        for _ in 0..STEPS / 2 {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
        }
        for _ in 0..STEPS / 2 {
            x ^= x << 17 ^ x << 34 ^ x << 51;
            x = (1..10).fold(x, |y, n| y ^ x >> (7 * n));
            x ^= x << 13 ^ x << 26 ^ x << 39 ^ x << 52;
        }
        self.expect(black_box(x) == start);
    }

    /// Kernel work under locks: mappings of the one address space, a mutex that all want, a pipe that all use.
    fn lock(&mut self, times: u32) {
        for _ in 0..times {
            self.stamp += 1;
            self.expect(map_and_unmap(self.stamp));
            if let Ok(mut counter) = self.shared.counter.lock() {
                *counter += 1;
            }
            let mut byte = [self.stamp as u8];
            let (mut reader, mut writer) = (&self.shared.pipe.0, &self.shared.pipe.1);
            // Who writes before it reads never finds the pipe empty, whose byte ever it gets.
            self.expect(writer.write_all(&byte).and_then(|()| reader.read_exact(&mut byte)).is_ok());
        }
    }
}

/// Sleeps until `period` after `due`; who is late already goes on at once, and does not make up for it. The time that is
/// due next.
fn wait(due: Instant, period: Duration) -> Instant {
    let next = due + period;
    let now = Instant::now();
    if next > now {
        thread::sleep(next - now);
        next
    } else {
        now
    }
}

/// Maps some pages, writes to each, looks whether they have it, and unmaps them.
fn map_and_unmap(stamp: u64) -> bool {
    // SAFETY: a new mapping where the kernel likes.
    let mapping = unsafe {
        libc::mmap(
            ptr::null_mut(),
            MAPPING,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if mapping == libc::MAP_FAILED {
        return false;
    }
    let words = mapping.cast::<u64>();
    let mut right = true;
    for page in 0..MAPPING / PAGE {
        // SAFETY: inside of the mapping, which is this thread's.
        unsafe {
            let word = words.add(page * PAGE / 8);
            right &= word.read_volatile() == 0;
            word.write_volatile(stamp + page as u64);
        }
    }
    for page in 0..MAPPING / PAGE {
        // SAFETY: as above.
        right &= unsafe { words.add(page * PAGE / 8).read_volatile() } == stamp + page as u64;
    }
    // SAFETY: the mapping is this function's, and nothing of it is used any more.
    (unsafe { libc::munmap(mapping, MAPPING) }) == 0 && right
}

/// Memory with known contents.
struct Memory {
    words: Vec<u64>,
    seed: u64,
    /// Which page is next, and how often all were rewritten.
    next: usize,
    round: u64,
}

impl Memory {
    fn new(bytes: usize, seed: u64) -> Self {
        let pages = bytes / PAGE;
        let mut memory = Self { words: vec![0; pages * PAGE / 8], seed, next: 0, round: 0 };
        for page in 0..pages {
            memory.write(page, 0);
        }
        memory
    }

    /// What stands in a word of a page in a round: different in each page, so that no two are the same.
    fn value(&self, page: usize, word: usize, round: u64) -> u64 {
        let x = (self.seed << 40 ^ (page as u64) << 12 ^ word as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        // A quarter of a page is noise, as programs' pages are partly; the rest repeats.
        if word < PAGE / 32 { x ^ round } else { (page as u64) ^ round }
    }

    fn write(&mut self, page: usize, round: u64) {
        for word in 0..PAGE / 8 {
            self.words[page * PAGE / 8 + word] = self.value(page, word, round);
        }
    }

    /// Checks so many pages and rewrites them. Whether they were as they should be.
    fn check(&mut self, pages: usize) -> bool {
        let all = self.words.len() * 8 / PAGE;
        let mut right = true;
        for _ in 0..pages.min(all) {
            let page = self.next;
            right &= (0..PAGE / 8)
                .all(|word| self.words[page * PAGE / 8 + word] == self.value(page, word, self.round));
            self.write(page, self.round + 1);
            self.next += 1;
            if self.next == all {
                self.next = 0;
                self.round += 1;
            }
        }
        right
    }
}

/// Memory that programs of this guest can have, in bytes (proc(5), `MemAvailable`).
fn available_bytes() -> usize {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<usize>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared() -> Shared {
        Shared { tally: Arc::default(), counter: Mutex::new(0), pipe: io::pipe().unwrap() }
    }

    #[test]
    fn right_work_has_no_errors() {
        let shared = shared();
        let mut worker = Worker::new(3, &shared);
        for _ in 0..3 {
            worker.compute();
            worker.lock(2);
        }
        assert_eq!(*shared.counter.lock().unwrap(), 6);
        let mut memory = Memory::new(5 * PAGE + 1, 1);
        for _ in 0..7 {
            assert!(memory.check(2));
        }
        assert_eq!((memory.next, memory.round), (4, 2));
        assert_eq!(shared.tally.errors.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_wrong_byte_is_seen() {
        let mut memory = Memory::new(3 * PAGE, 1);
        memory.words[2 * PAGE / 8 + 400] ^= 1 << 60;
        assert!(memory.check(2));
        assert!(!memory.check(1));
        assert!(memory.check(3), "it was rewritten");
    }

    #[test]
    fn who_is_late_does_not_make_up_for_it() {
        let long_ago = Instant::now() - Duration::from_secs(3600);
        let next = wait(long_ago, Duration::from_millis(1));
        assert!(next.elapsed() < Duration::from_secs(1800));
        let due = Instant::now();
        assert_eq!(wait(due, Duration::from_millis(5)), due + Duration::from_millis(5));
        assert!(due.elapsed() >= Duration::from_millis(5));
    }
}

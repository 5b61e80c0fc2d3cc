//! As many threads as there are CPUs, which share a fixed amount of work: the time tells the throughput of all CPUs
//! together.

use std::hint::{black_box, spin_loop};
use std::io::{self, Read, Write};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread;

use crate::compute::primes_below;
use crate::{Outcome, Stop, Task, expect, system};

/// Shares that a thread takes at a time.
struct Work {
    left: AtomicU32,
}

impl Work {
    fn new(count: u32) -> Self {
        Self { left: AtomicU32::new(count) }
    }

    /// Whether there is one more; takes it.
    fn take(&self) -> bool {
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
    }
}

fn cpus() -> usize {
    thread::available_parallelism().map_or(1, |n| n.get())
}

/// Does `work` in so many threads.
fn in_threads(threads: usize, work: impl Fn() -> Outcome + Sync) -> Outcome {
    thread::scope(|scope| {
        let all: Vec<_> = (0..threads).map(|_| scope.spawn(&work)).collect();
        all.into_iter()
            .try_for_each(|thread| thread.join().map_err(|_| Stop::Failed("a thread panicked".to_owned()))?)
    })
}

pub fn compute(task: &Task) -> Outcome {
    let work = Work::new(task.count);
    in_threads(cpus(), || {
        while work.take() {
            expect("the number of primes", primes_below(black_box(100_000)), 9_592)?;
        }
        Ok(())
    })
}

/// Pairs of threads: one writes a byte, the other sends it back.
pub fn pipes(task: &Task) -> Outcome {
    const ROUNDS: u32 = 100;
    let work = Work::new(task.count);
    in_threads((cpus() / 2).max(1), || {
        let (mut their_input, mut my_output) = io::pipe()?;
        let (mut my_input, mut their_output) = io::pipe()?;
        thread::scope(|scope| {
            let other = scope.spawn(move || -> io::Result<()> {
                let mut byte = [0];
                while their_input.read(&mut byte)? == 1 {
                    their_output.write_all(&[byte[0].wrapping_add(1)])?;
                }
                Ok(())
            });
            let mine = (|| {
                while work.take() {
                    for round in 0..ROUNDS {
                        let sent = round as u8;
                        my_output.write_all(&[sent])?;
                        let mut byte = [0];
                        my_input.read_exact(&mut byte)?;
                        expect("the byte that came back", byte[0], sent.wrapping_add(1))?;
                    }
                }
                Ok(())
            })();
            // The other reads the end of the pipe.
            drop(my_output);
            other.join().map_err(|_| Stop::Failed("a thread panicked".to_owned()))??;
            mine
        })
    })
}

pub fn mappings(task: &Task) -> Outcome {
    let work = Work::new(task.count);
    in_threads(cpus(), || {
        while work.take() {
            system::map_and_unmap_times(10)?;
        }
        Ok(())
    })
}

/// A mutex of the standard library: who has to wait long sleeps in futex(2).
pub fn mutex(task: &Task) -> Outcome {
    const LOCKS: u64 = 1000;
    let (work, counter) = (Work::new(task.count), Mutex::new(0));
    in_threads(cpus(), || {
        while work.take() {
            for n in 0..LOCKS {
                *counter.lock().map_err(|e| Stop::Failed(e.to_string()))? += 1;
                black_box((0..50).fold(n, |x, y| x ^ x << 3 ^ y));
            }
        }
        Ok(())
    })?;
    let found = *counter.lock().map_err(|e| Stop::Failed(e.to_string()))?;
    expect("the counter", found, LOCKS * u64::from(task.count))
}

/// A lock that never sleeps: test, and set when it looks free; PAUSE between the tests.
pub fn spinlock(task: &Task) -> Outcome {
    const LOCKS: u64 = 1000;
    let (work, lock, counter) = (Work::new(task.count), AtomicBool::new(false), AtomicU64::new(0));
    in_threads(cpus(), || {
        while work.take() {
            for n in 0..LOCKS {
                while lock.swap(true, Ordering::Acquire) {
                    while lock.load(Ordering::Relaxed) {
                        spin_loop();
                    }
                }
                // Not atomic together: only the lock makes it right.
                let old = counter.load(Ordering::Relaxed);
                black_box((0..50).fold(n, |x, y| x ^ x << 3 ^ y));
                counter.store(old + 1, Ordering::Relaxed);
                lock.store(false, Ordering::Release);
                black_box((0..50).fold(n, |x, y| x ^ x << 3 ^ y));
            }
        }
        Ok(())
    })?;
    expect("the counter", counter.into_inner(), LOCKS * u64::from(task.count))
}

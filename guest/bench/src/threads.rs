//! Two threads of one process.

use std::hint::black_box;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread;

use crate::compute::primes_below;
use crate::{Outcome, Stop, Task, expect, system};

/// Does `work` in two threads, which are told 0 and 1.
fn in_two(work: impl Fn(u32) -> Outcome + Sync) -> Outcome {
    thread::scope(|scope| {
        let other = scope.spawn(|| work(1));
        let mine = work(0);
        other.join().map_err(|_| Stop::Failed("the second thread panicked".to_owned()))?.and(mine)
    })
}

pub fn map_and_unmap(task: &Task) -> Outcome {
    in_two(|_| system::map_and_unmap_times(u64::from(task.count) * 1000))
}

pub fn mutex(task: &Task) -> Outcome {
    let times = u64::from(task.count) * 100_000;
    let counter = Mutex::new(0);
    in_two(|_| {
        for _ in 0..times {
            *counter.lock().map_err(|e| Stop::Failed(e.to_string()))? += 1;
        }
        Ok(())
    })?;
    expect("the counter", *counter.lock().map_err(|e| Stop::Failed(e.to_string()))?, 2 * times)
}

pub fn atomics(task: &Task) -> Outcome {
    let times = u64::from(task.count) * 100_000;
    let (added, exchanged) = (AtomicU64::new(0), AtomicU64::new(0));
    in_two(|_| {
        for _ in 0..times {
            added.fetch_add(1, Ordering::SeqCst);
            let mut old = exchanged.load(Ordering::SeqCst);
            while let Err(now) =
                exchanged.compare_exchange_weak(old, old + 3, Ordering::SeqCst, Ordering::SeqCst)
            {
                old = now;
            }
        }
        Ok(())
    })?;
    expect("the counters", (added.into_inner(), exchanged.into_inner()), (2 * times, 6 * times))
}

pub fn futex(task: &Task) -> Outcome {
    let rounds = task.count.saturating_mul(1000);
    // Whose turn it is, and how often it was handed over.
    let (turn, handed) = (AtomicU32::new(0), AtomicU32::new(0));
    in_two(|me| {
        for _ in 0..rounds {
            while turn.load(Ordering::Acquire) != me {
                // SAFETY: the word outlives the call. It waits only while it is the other's turn.
                unsafe {
                    libc::syscall(
                        libc::SYS_futex,
                        turn.as_ptr(),
                        libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
                        1 - me,
                        std::ptr::null::<libc::timespec>(),
                    )
                };
            }
            handed.fetch_add(1, Ordering::Relaxed);
            turn.store(1 - me, Ordering::Release);
            // SAFETY: as above; it wakes one thread.
            unsafe {
                libc::syscall(libc::SYS_futex, turn.as_ptr(), libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, 1)
            };
        }
        Ok(())
    })?;
    expect("the number of turns", handed.into_inner(), 2 * rounds)
}

pub fn compute_one(task: &Task) -> Outcome {
    sieves(task.count)
}

pub fn compute_two(task: &Task) -> Outcome {
    in_two(|_| sieves(task.count))
}

fn sieves(count: u32) -> Outcome {
    (0..count).try_for_each(|_| expect("the number of primes", primes_below(black_box(1_000_000)), 78_498))
}

//! Gives translated code back when the whole VM is idle.
//!
//! A guest that booted an hour ago and now waits needs a hundredth of the code that was translated for it. When
//! every vCPU has used, and waited for, less than [`IDLE_SHARE`] of a host CPU for [`IDLE_WINDOWS`] windows in a row, the code cache
//! is emptied; what the guest still executes is translated again, which takes milliseconds.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::cpu::Cpu;

/// Length of a window.
const WINDOW: Duration = Duration::from_secs(1);
/// So many windows in a row must be idle.
const IDLE_WINDOWS: u32 = 5;
/// Share of a host CPU below which a vCPU is idle, as a divisor: 1/25.
const IDLE_SHARE: u32 = 25;
/// Less than this is not worth emptying, in bytes of code.
const WORTHWHILE: u64 = 4 << 20;

/// How busy a vCPU was of late.
#[derive(Debug)]
pub(crate) struct IdleWatch {
    window_start: Instant,
    busy_at_start: Duration,
    idle_windows: u32,
}

impl Default for IdleWatch {
    fn default() -> Self {
        Self { window_start: Instant::now(), busy_at_start: Duration::ZERO, idle_windows: 0 }
    }
}

/// How long this thread has executed or wanted to: on a busy host a busy guest gets little CPU time.
fn busy_time() -> Duration {
    let schedstat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let mut numbers = schedstat.split_ascii_whitespace().map_while(|word| word.parse::<u64>().ok());
    if let (Some(executed), Some(waited)) = (numbers.next(), numbers.next()) {
        return Duration::from_nanos(executed.saturating_add(waited));
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: fills the structure it is given; the clock always exists for the calling thread.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

impl Cpu {
    /// Called before the vCPU waits. Returns until when it may wait at most, so that it can be called again.
    pub(crate) fn before_idle(&mut self) -> Option<Instant> {
        if self.vm.debug.no_trim {
            return None;
        }
        let now = Instant::now();
        let elapsed = now - self.idle_watch.window_start;
        if elapsed >= WINDOW {
            let busy = busy_time();
            let used = busy.saturating_sub(self.idle_watch.busy_at_start);
            let windows = (elapsed.as_secs() as u32).clamp(1, IDLE_WINDOWS);
            let idle = used * IDLE_SHARE < elapsed;
            let so_far = if idle { self.idle_watch.idle_windows.saturating_add(windows) } else { 0 };
            self.idle_watch = IdleWatch { window_start: now, busy_at_start: busy, idle_windows: so_far };
            self.shared.idle.store(so_far >= IDLE_WINDOWS, Ordering::SeqCst);
        }
        if self.shared.idle.load(Ordering::SeqCst) {
            if self.vm.all_idle() && self.vm.cache.stats().used > WORTHWHILE {
                self.give_code_back();
            }
            return None;
        }
        (self.vm.cache.stats().used > WORTHWHILE).then(|| now + WINDOW)
    }

    fn give_code_back(&mut self) {
        let vm = std::sync::Arc::clone(&self.vm);
        let alone = vm.alone(self.id);
        tracing::debug!("the VM is idle: dropping {} bytes of translated code", vm.cache.stats().used);
        vm.drop_translations();
        drop(alone);
        // SAFETY: no arguments that could be wrong; returns free memory of the C allocator to the host.
        unsafe { libc::malloc_trim(0) };
    }
}

//! The deadline queue and its thread.
//!
//! A VM has about as many timers as vCPUs, and each at most one deadline, so the queue is an array that is
//! searched when the thread wakes: arming a timer is then one store. The thread sleeps until the deadline that
//! was the earliest when it last looked; arming to a later one does not wake it.

use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use parking_lot::{Condvar, Mutex};
use tracing::warn;

use super::{Clock, Nanos};

/// Why the timers of a VM cannot work.
#[derive(Debug, thiserror::Error)]
pub enum TimerError {
    /// The host refused a thread.
    #[error("the host refused the timer thread of the VM: {0}; raise its limit of threads (ulimit -u)")]
    Thread(#[source] io::Error),
}

type Callback = Arc<dyn Fn() + Send + Sync>;

/// The deadline of a timer that is not armed.
const IDLE: Nanos = Nanos::MAX;
/// The longest name of a Linux thread, in bytes.
const THREAD_NAME_MAX: usize = 15;

#[derive(Default)]
struct Queue {
    /// Deadlines by slot; [`IDLE`] when not armed.
    deadlines: Vec<Nanos>,
    /// Callbacks by slot; `None` marks a free slot.
    callbacks: Vec<Option<Callback>>,
    /// The thread looks again at this time without being woken. 0 while it is awake.
    sleeping_until: Nanos,
    stop: bool,
}

impl Queue {
    /// Takes one timer whose deadline has come.
    fn pop_due(&mut self, now: Nanos) -> Option<Callback> {
        let (slot, &deadline) = self.deadlines.iter().enumerate().min_by_key(|&(_, d)| d)?;
        if deadline == IDLE || deadline > now {
            return None;
        }
        self.deadlines[slot] = IDLE;
        self.callbacks[slot].clone()
    }
    fn earliest(&self) -> Nanos {
        self.deadlines.iter().copied().min().unwrap_or(IDLE)
    }
}

struct Shared {
    clock: Clock,
    queue: Mutex<Queue>,
    wake: Condvar,
}

impl Shared {
    /// Calls back whoever is due at `now`, with no lock held.
    fn run_due(&self, now: Nanos) {
        loop {
            // The guard is gone when the callback runs.
            let due = self.queue.lock().pop_due(now);
            match due {
                Some(callback) => callback(),
                None => break,
            }
        }
    }

    fn thread(&self) {
        loop {
            self.run_due(self.clock.now());
            let mut queue = self.queue.lock();
            if queue.stop {
                break;
            }
            let earliest = queue.earliest();
            if earliest <= self.clock.now() {
                continue;
            }
            queue.sleeping_until = earliest;
            match self.clock.instant(earliest).filter(|_| earliest != IDLE) {
                Some(instant) => {
                    self.wake.wait_until(&mut queue, instant);
                }
                None => self.wake.wait(&mut queue),
            }
            queue.sleeping_until = 0;
        }
    }
}

/// The timers of one VM, and the thread that serves them, which ends when this is dropped.
pub struct Timers {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Timers {
    /// Timers on the host's clock, with a thread named after the VM.
    ///
    /// # Errors
    /// [`TimerError::Thread`] when the host refuses the thread.
    pub fn start(vm_name: &str) -> Result<Self, TimerError> {
        let shared = Arc::new(Shared { clock: Clock::host(), queue: Mutex::default(), wake: Condvar::new() });
        let theirs = shared.clone();
        let thread = thread::Builder::new()
            .name(thread_name(vm_name))
            .spawn(move || {
                shorten_timer_slack();
                theirs.thread();
            })
            .map_err(TimerError::Thread)?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Timers on a clock that moves only by [`Self::advance`], without a thread: deterministic.
    pub fn manual() -> Self {
        let shared = Shared { clock: Clock::manual(), queue: Mutex::default(), wake: Condvar::new() };
        Self { shared: Arc::new(shared), thread: None }
    }

    /// The clock that deadlines are in.
    pub fn clock(&self) -> &Clock {
        &self.shared.clock
    }

    /// Lets the clock stand still: no timer comes due until [`Self::go_on`].
    pub fn stop(&self) {
        self.shared.clock.stop();
    }

    /// Lets the clock go on from where it was stopped; deadlines are as far away as they were then.
    pub fn go_on(&self) {
        let mut queue = self.shared.queue.lock();
        self.shared.clock.go_on();
        // The thread sleeps without an end, or until an instant that is too early now.
        queue.sleeping_until = 0;
        drop(queue);
        self.shared.wake.notify_one();
    }

    /// A timer that calls `callback` on the timer thread, with no lock of the queue held, each time that its
    /// deadline has come. The callback lives as long as the timer: to avoid a cycle let it hold a `Weak` to what
    /// owns the timer. It may arm the timer again. A callback that was already due may still run after
    /// [`Timer::arm`] or [`Timer::cancel`]: it checks for itself whether there is something to do.
    pub fn timer(&self, callback: impl Fn() + Send + Sync + 'static) -> Timer {
        let callback: Callback = Arc::new(callback);
        let mut queue = self.shared.queue.lock();
        let free = queue.callbacks.iter().position(Option::is_none);
        let slot = free.unwrap_or(queue.callbacks.len());
        match free {
            Some(slot) => queue.callbacks[slot] = Some(callback),
            None => {
                queue.callbacks.push(Some(callback));
                queue.deadlines.push(IDLE);
            }
        }
        Timer { shared: self.shared.clone(), slot }
    }

    /// Moves a manual clock `nanos` further and calls back, on this thread and in order of their deadlines,
    /// whoever becomes due on the way; the clock then shows the deadline. Does nothing on the host's clock.
    pub fn advance(&self, nanos: Nanos) {
        let end = self.shared.clock.now().saturating_add(nanos);
        if !self.shared.clock.is_manual() {
            return;
        }
        loop {
            let next = self.shared.queue.lock().earliest();
            if next == IDLE || next > end {
                break;
            }
            self.shared.clock.set(next.max(self.shared.clock.now()));
            self.shared.run_due(next);
        }
        self.shared.clock.set(end);
    }
}

impl Drop for Timers {
    fn drop(&mut self) {
        self.shared.queue.lock().stop = true;
        self.shared.wake.notify_all();
        if let Some(thread) = self.thread.take()
            // The last owner may be a callback: a thread cannot wait for itself.
            && thread.thread().id() != thread::current().id()
            && thread.join().is_err()
        {
            warn!("the timer thread panicked");
        }
    }
}

/// One timer of a device, with at most one deadline. Its slot is freed when it is dropped.
pub struct Timer {
    shared: Arc<Shared>,
    slot: usize,
}

impl Timer {
    /// Sets the deadline, in the time of the VM's clock, replacing an earlier one. A time in the past is due at
    /// once.
    pub fn arm(&self, deadline: Nanos) {
        let mut queue = self.shared.queue.lock();
        let deadline = deadline.min(IDLE - 1);
        queue.deadlines[self.slot] = deadline;
        if deadline < queue.sleeping_until {
            // Only the first of several earlier deadlines wakes the thread.
            queue.sleeping_until = 0;
            drop(queue);
            self.shared.wake.notify_one();
        }
    }
    /// Takes the deadline back.
    pub fn cancel(&self) {
        self.shared.queue.lock().deadlines[self.slot] = IDLE;
    }
    /// [`Self::arm`] or [`Self::cancel`].
    pub fn set(&self, deadline: Option<Nanos>) {
        match deadline {
            Some(deadline) => self.arm(deadline),
            None => self.cancel(),
        }
    }
    /// The deadline, if the timer is armed and it has not come.
    pub fn deadline(&self) -> Option<Nanos> {
        Some(self.shared.queue.lock().deadlines[self.slot]).filter(|&d| d != IDLE)
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        let mut queue = self.shared.queue.lock();
        queue.deadlines[self.slot] = IDLE;
        let callback = queue.callbacks[self.slot].take();
        drop(queue);
        // Outside the lock: it may own whatever its maker put into it.
        drop(callback);
    }
}

impl std::fmt::Debug for Timer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Timer").field("deadline", &self.deadline()).finish()
    }
}

/// `NAME/timer`, with the name cut so that Linux takes all of it.
fn thread_name(vm_name: &str) -> String {
    const SUFFIX: &str = "/timer";
    let mut name: String = vm_name.chars().filter(|&c| c != '\0').collect();
    name.truncate(name.floor_char_boundary(THREAD_NAME_MAX - SUFFIX.len()));
    name + SUFFIX
}

/// Lets this thread wake within a microsecond of its deadline instead of Linux's usual 50 (prctl(2),
/// PR_SET_TIMERSLACK).
fn shorten_timer_slack() {
    const SLACK_NANOS: libc::c_ulong = 1000;
    // SAFETY: PR_SET_TIMERSLACK takes one number, changes only this thread's scheduling, and accesses no memory.
    let result = unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, SLACK_NANOS) };
    if result != 0 {
        warn!("timers will be up to 50 µs late: {}", io::Error::last_os_error());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::{Duration, Instant};

    #[test]
    fn manual_time_fires_in_order_and_once() {
        let timers = Timers::manual();
        let log = Arc::new(Mutex::new(Vec::new()));
        let timer = |name: &'static str| {
            let (log, clock) = (log.clone(), timers.clock().clone());
            timers.timer(move || log.lock().push((name, clock.now())))
        };
        let (a, b, c) = (timer("a"), timer("b"), timer("c"));
        a.arm(30);
        b.arm(10);
        c.arm(20);
        c.cancel();
        timers.advance(100);
        assert_eq!(*log.lock(), [("b", 10), ("a", 30)]);
        assert_eq!(a.deadline(), None);
        assert_eq!(timers.clock().now(), 100);
    }

    #[test]
    fn slots_of_dropped_timers_are_used_again() {
        let timers = Timers::manual();
        for _ in 0..1000 {
            timers.timer(|| ()).arm(5);
        }
        assert_eq!(timers.shared.queue.lock().deadlines.len(), 1);
    }

    #[test]
    fn the_thread_serves_an_earlier_deadline_than_it_sleeps_for() {
        let timers = Timers::start("test").unwrap();
        let (send, fired) = mpsc::channel();
        let (late, early) = (send.clone(), send);
        let late = timers.timer(move || late.send("late").unwrap());
        let early = timers.timer(move || early.send("early").unwrap());
        let start = Instant::now();
        late.arm(timers.clock().now() + 60_000_000_000);
        thread::sleep(Duration::from_millis(5));
        early.arm(timers.clock().now() + 1_000_000);
        assert_eq!(fired.recv_timeout(Duration::from_secs(20)).unwrap(), "early");
        assert!(start.elapsed() >= Duration::from_millis(6));
        assert!(late.deadline().is_some());
        drop(timers);
    }

    #[test]
    fn a_callback_can_arm_its_own_timer() {
        let timers = Timers::start("test").unwrap();
        let (send, fired) = mpsc::channel();
        let clock = timers.clock().clone();
        let timer = Arc::new_cyclic(|me: &std::sync::Weak<Timer>| {
            let me = me.clone();
            timers.timer(move || {
                send.send(()).unwrap();
                if let Some(me) = me.upgrade() {
                    me.arm(clock.now() + 1000);
                }
            })
        });
        timer.arm(0);
        for _ in 0..10 {
            fired.recv_timeout(Duration::from_secs(20)).unwrap();
        }
    }

    #[test]
    fn nothing_comes_due_while_the_clock_stands_still() {
        let timers = Timers::start("test").unwrap();
        let (send, fired) = mpsc::channel();
        let timer = timers.timer(move || send.send(()).unwrap());
        timer.arm(timers.clock().now() + 1_000_000);
        timers.stop();
        let first = fired.recv_timeout(Duration::from_millis(50));
        // It may have been due before the clock stood still; then another one is not.
        if first.is_ok() {
            timer.arm(timers.clock().now() + 1_000_000);
            assert!(fired.recv_timeout(Duration::from_millis(50)).is_err());
        }
        timers.go_on();
        fired.recv_timeout(Duration::from_secs(20)).unwrap();
    }

    #[test]
    fn thread_names_fit() {
        assert_eq!(thread_name("web"), "web/timer");
        assert_eq!(thread_name("a-long-machine-name"), "a-long-ma/timer");
        assert_eq!(thread_name("ääääää"), "ääää/timer");
        assert_eq!(thread_name("a\0b"), "ab/timer");
    }
}

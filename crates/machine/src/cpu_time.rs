//! How much CPU time the VM gets: its weight beside others, and its limit.
//!
//! ```text
//!   CpuTime ──┬── a control group of the VM's own (berth_host::CpuGroup): all threads, by the host's scheduler
//!             └── where there can be none: weight by nice values, limit by the governor ── Gate ──► vCPU threads
//! ```
//! The governor counts the CPU time of the whole process, devices too, against what the limit allows for the time that
//! has passed. When more was used it closes the [`Gate`] and stops the vCPUs until the rest is made up for. What one
//! period used too much the next ones have less, so that the limit holds on average however late the governor wakes.

use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use berth_devices::thread_name;
use berth_engine::VcpuHandle;
use berth_host::{CpuGroup, CpuGroupError, DEFAULT_WEIGHT};
use parking_lot::{Condvar, Mutex};
use tracing::{info, warn};

use crate::options::CpuLimit;

/// How often the governor looks while the VM is busy, and while it is not.
const BUSY: Duration = Duration::from_millis(5);
const IDLE: Duration = Duration::from_millis(50);
/// The shortest and the longest time for which the vCPUs stand still at once.
const HOLD: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(200));
/// Nice values that threads can have (sched(7)).
const NICE: std::ops::RangeInclusive<i32> = -20..=19;
/// CPU time of a thread falls by this factor with each nice value.
const NICE_STEP: f64 = 1.25;

/// Why CPU time cannot be had as asked for. One line for people.
#[derive(Debug, thiserror::Error)]
pub enum CpuTimeError {
    /// The control group.
    #[error(transparent)]
    Group(#[from] CpuGroupError),
    /// Nice values.
    #[error(
        "a weight of {weight} needs nice value {nice} on this host, which this user may not have (see RLIMIT_NICE): \
         {source}"
    )]
    Nice {
        /// The weight.
        weight: u32,
        /// The nice value.
        nice: i32,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The governor.
    #[error("the host refused a thread for the limit of CPU time: {0}")]
    Thread(#[source] io::Error),
}

/// Where vCPU threads wait while the VM has used its CPU time.
#[derive(Default)]
pub struct Gate {
    closed: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    /// Waits until the gate is open, or `wanted` says that the supervisor wants something of the thread.
    pub fn wait(&self, wanted: impl Fn() -> bool) {
        let mut closed = self.closed.lock();
        while *closed && !wanted() {
            self.changed.wait(&mut closed);
        }
    }

    /// Lets waiting threads look whether they are wanted.
    pub fn nudge(&self) {
        drop(self.closed.lock());
        self.changed.notify_all();
    }

    fn set(&self, closed: bool) {
        *self.closed.lock() = closed;
        self.changed.notify_all();
    }
}

/// A VM's share of the host's CPUs.
pub struct CpuTime {
    means: Mutex<Means>,
    vm_name: String,
    gate: Arc<Gate>,
    vcpus: Vec<Arc<dyn VcpuHandle>>,
}

enum Means {
    /// Nothing was asked for yet: the VM is like any process.
    None,
    Group(CpuGroup),
    /// The governor runs if there is a limit.
    UserSpace(Option<Governor>),
}

impl CpuTime {
    /// Of the VM `vm_name`, whose vCPU threads wait at `gate`.
    pub fn new(vm_name: &str, gate: Arc<Gate>, vcpus: Vec<Arc<dyn VcpuHandle>>) -> Self {
        Self { means: Mutex::new(Means::None), vm_name: vm_name.to_owned(), gate, vcpus }
    }

    /// Changes the weight, or the limit (`Some(None)`: no limit any more), or both.
    ///
    /// # Errors
    /// [`CpuTimeError`].
    pub fn set(&self, weight: Option<u32>, limit: Option<Option<CpuLimit>>) -> Result<(), CpuTimeError> {
        let mut means = self.means.lock();
        if matches!(*means, Means::None) {
            let ordinary = weight.is_none_or(|w| w == DEFAULT_WEIGHT) && limit.flatten().is_none();
            if ordinary {
                return Ok(());
            }
            *means = match CpuGroup::enter(&self.vm_name) {
                Ok(group) => {
                    info!("CPU time is divided by the control group {}", group.directory().display());
                    Means::Group(group)
                }
                Err(e) => {
                    warn!("{e}: CPU time is divided by nice values, and limited by stopping vCPUs");
                    Means::UserSpace(None)
                }
            };
        }
        match &mut *means {
            Means::None => {}
            Means::Group(group) => {
                weight.map_or(Ok(()), |weight| group.set_weight(weight))?;
                limit.map_or(Ok(()), |limit| group.set_limit(limit.map(CpuLimit::cpus)))?;
            }
            Means::UserSpace(governor) => {
                weight.map_or(Ok(()), set_nice)?;
                if let Some(limit) = limit {
                    // The old one first, so that it opens the gate.
                    *governor = None;
                    *governor = limit.map(|limit| self.govern(limit)).transpose()?;
                }
            }
        }
        Ok(())
    }

    /// Gives back what was made for it: the process leaves its group, and the governor ends.
    pub fn release(&self) {
        *self.means.lock() = Means::None;
    }

    fn govern(&self, limit: CpuLimit) -> Result<Governor, CpuTimeError> {
        Governor::start(&self.vm_name, limit.cpus(), self.gate.clone(), self.vcpus.clone())
            .map_err(CpuTimeError::Thread)
    }
}

/// The nice value whose threads get about `weight` hundredths of an ordinary thread's time.
fn nice_of(weight: u32) -> i32 {
    let steps = (f64::from(weight) / f64::from(DEFAULT_WEIGHT)).ln() / NICE_STEP.ln();
    (-steps.round() as i32).clamp(*NICE.start(), *NICE.end())
}

/// Gives all threads of this process the nice value of `weight`; threads that they start later inherit it.
fn set_nice(weight: u32) -> Result<(), CpuTimeError> {
    let nice = nice_of(weight);
    let threads = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let threads = threads.filter_map(|t| t.file_name().to_str()?.parse::<libc::id_t>().ok());
    for thread in threads {
        // SAFETY: takes numbers.
        if unsafe { libc::setpriority(libc::PRIO_PROCESS, thread, nice) } != 0 {
            let source = io::Error::last_os_error();
            // A thread that has ended meanwhile needs nothing.
            if source.raw_os_error() != Some(libc::ESRCH) {
                return Err(CpuTimeError::Nice { weight, nice, source });
            }
        }
    }
    Ok(())
}

/// Keeps the process within a limit of CPU time by stopping its vCPUs. When it is dropped they go on.
struct Governor {
    end: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Governor {
    fn start(
        vm_name: &str,
        limit: f64,
        gate: Arc<Gate>,
        vcpus: Vec<Arc<dyn VcpuHandle>>,
    ) -> io::Result<Self> {
        let end = Arc::new((Mutex::new(false), Condvar::new()));
        let ended = end.clone();
        let thread = thread::Builder::new().name(thread_name(vm_name, "governor")).spawn(move || {
            let mut account = Account::new(limit);
            let mut wait = BUSY;
            let mut ended_flag = ended.0.lock();
            while !*ended_flag {
                ended.1.wait_for(&mut ended_flag, wait);
                match account.settle(Instant::now(), process_cpu_time()) {
                    Verdict::Hold(time) => {
                        gate.set(true);
                        vcpus.iter().for_each(|vcpu| vcpu.stop());
                        wait = time;
                    }
                    Verdict::Run(time) => {
                        gate.set(false);
                        wait = time;
                    }
                }
            }
            gate.set(false);
        })?;
        Ok(Self { end, thread: Some(thread) })
    }
}

impl Drop for Governor {
    fn drop(&mut self) {
        *self.end.0.lock() = true;
        self.end.1.notify_all();
        if let Some(thread) = self.thread.take() {
            // Only a panic, which it has reported.
            let _ = thread.join();
        }
    }
}

/// What the governor does until it looks again.
#[derive(Debug, PartialEq)]
enum Verdict {
    Run(Duration),
    Hold(Duration),
}

/// CPU time that is allowed and used.
struct Account {
    limit: f64,
    /// Seconds of CPU time that may be used now; below zero: that were used too much.
    balance: f64,
    /// The vCPUs stand still: that little was used says nothing of what they would use.
    held: bool,
    last: Option<(Instant, Duration)>,
}

impl Account {
    fn new(limit: f64) -> Self {
        Self { limit, balance: 0.0, held: false, last: None }
    }

    /// Settles what was used until `now`; `used` is the CPU time of the process since it began.
    fn settle(&mut self, now: Instant, used: Duration) -> Verdict {
        let Some((then, before)) = self.last.replace((now, used)) else { return Verdict::Run(BUSY) };
        let passed = now.saturating_duration_since(then).as_secs_f64();
        let spent = used.saturating_sub(before).as_secs_f64();
        // What was not used is not kept for long: a limit is no average of hours.
        let most = self.limit * IDLE.as_secs_f64();
        self.balance = (self.balance + passed * self.limit - spent).min(most);
        let was_held = std::mem::replace(&mut self.held, self.balance < 0.0);
        if self.held {
            let time = Duration::from_secs_f64((-self.balance / self.limit).min(HOLD.1.as_secs_f64()));
            return Verdict::Hold(time.max(HOLD.0));
        }
        Verdict::Run(if was_held || spent * 4.0 > passed * self.limit { BUSY } else { IDLE })
    }
}

/// CPU time of all threads of this process.
fn process_cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: fills the structure it is given; the clock always exists for the calling process.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nice_values_follow_weights() {
        assert_eq!([100, 300, 33, 1, 10_000].map(nice_of), [0, -5, 5, 19, -20]);
    }

    /// A process of `threads` busy threads on as many host CPUs, with a clock of its own.
    fn share(limit: f64, threads: f64) -> f64 {
        let start = Instant::now();
        let (mut now, mut used) = (0.0, 0.0);
        let mut account = Account::new(limit);
        while now < 100.0 {
            let verdict = account.settle(start + Duration::from_secs_f64(now), Duration::from_secs_f64(used));
            let time = match verdict {
                Verdict::Run(time) | Verdict::Hold(time) => time.as_secs_f64(),
            };
            // A governor never wakes in time.
            let late = time + 0.002;
            now += late;
            used += if matches!(verdict, Verdict::Run(_)) { late * threads } else { 0.0 };
        }
        used / now
    }

    #[test]
    fn limits_hold_on_average() {
        for (limit, threads) in [(0.5, 1.0), (0.1, 1.0), (1.5, 4.0), (0.05, 8.0), (3.9, 4.0)] {
            let share = share(limit, threads);
            assert!((share / limit - 1.0).abs() < 0.03, "{limit} of {threads}: {share}");
        }
        assert!(share(2.0, 1.0) > 0.999, "a limit that is not reached stops nobody");
    }

    #[test]
    fn a_closed_gate_holds_until_it_opens_or_somebody_is_wanted() {
        let gate = Arc::new(Gate::default());
        gate.wait(|| false);
        gate.set(true);
        gate.wait(|| true);
        let waiting = gate.clone();
        let thread = thread::spawn(move || waiting.wait(|| false));
        gate.nudge();
        gate.set(false);
        thread.join().unwrap();
    }
}

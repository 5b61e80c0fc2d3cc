//! One step: all guests work, and for some seconds it is measured what they get.
//!
//! Throughput is what guests count, by their own clocks, which go on at the host's speed. Each guest is asked for that count
//! twenty times a second, by a thread of its own; how long the answers take is the latency.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use berth_api::ask_all;
use berth_api::types::VmStats;
use berth_host::{Pressure, PressureSome};
use serde::Serialize;

use super::guests::{Guest, GuestError, Guests};
use super::probe::{Probe, ProbeError};

/// How long the guests work before anything counts.
const WARM_UP: Duration = Duration::from_secs(2);
/// How often each guest is asked.
const ASK_EVERY: Duration = Duration::from_millis(50);
/// How often it is looked whether the user has had enough.
const LOOK: Duration = Duration::from_millis(100);
/// How long a VM has to say what it uses.
const PATIENCE: Duration = Duration::from_secs(10);

/// What was measured with so many VMs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Step {
    /// VMs.
    pub vms: u16,
    /// vCPUs of all VMs for each host CPU.
    pub cpu_ratio: f64,
    /// Memory of all VMs, as they were promised, for each byte of the host's.
    pub memory_ratio: f64,
    /// How long it was measured, in seconds.
    pub seconds: f64,
    /// Units of work a second, of all VMs.
    pub total_per_second: f64,
    /// Units of work a second of one VM: the mean of all.
    pub vm_per_second: f64,
    /// Of the VM that did least.
    pub least_per_second: f64,
    /// Of the VM that did most.
    pub most_per_second: f64,
    /// How long half of all requests took at most, in seconds.
    pub latency_p50_seconds: f64,
    /// How long 99 of 100 requests took at most, in seconds.
    pub latency_p99_seconds: f64,
    /// Requests.
    pub requests: usize,
    /// Percent of the time in which a vCPU waited for a host CPU, the mean of all vCPUs; where the host counts it.
    pub steal_percent: Option<f64>,
    /// Percent of the time in which something on the host waited for a CPU (PSI, some).
    pub pressure_cpu_percent: Option<f64>,
    /// As before, for memory.
    pub pressure_memory_percent: Option<f64>,
    /// As before, for storage.
    pub pressure_io_percent: Option<f64>,
    /// What of all VMs' processes is in the host's memory, in bytes.
    pub resident_bytes: u64,
    /// Guest memory in cold stores or in the host's swap, in bytes.
    pub stored_bytes: u64,
    /// Host CPUs that were busy with something else than the VMs; where the host tells it.
    pub others_cpus: Option<f64>,
    /// Wrong results that guests have seen since they started.
    pub errors: u64,
}

/// What one guest did.
#[derive(Debug)]
struct Work {
    units_per_second: f64,
    latencies: Vec<Duration>,
    errors: u64,
}

/// Measures for so long. `progress` is told how much of it is over.
///
/// # Errors
/// [`GuestError`].
pub fn measure(guests: &mut Guests, time: Duration, progress: &dyn Fn(f64)) -> Result<Step, GuestError> {
    let all = WARM_UP + time;
    let begun = Instant::now();
    wait(guests, begun, WARM_UP, &|part| progress(part * WARM_UP.as_secs_f64() / all.as_secs_f64()))?;

    let sockets = guests.sockets();
    let (before, busy) = (stats(&sockets), busy_seconds());
    let (pressure, since) = (Pressure::read(Path::new("/")), Instant::now());
    let probes = guests.list().iter_mut().filter_map(|g| Some((g.name.clone(), g.probe.take()?))).collect();
    let end = AtomicBool::new(false);
    let (waited, asked) = thread::scope(|scope| {
        let end = &end;
        let asking: Vec<_> = with_starts(probes)
            .map(|(name, probe, start)| scope.spawn(move || (name, ask_until(probe, start, end))))
            .collect();
        let waited = wait(guests, since, time, &|part| {
            progress((WARM_UP.as_secs_f64() + part * time.as_secs_f64()) / all.as_secs_f64());
        });
        end.store(true, Ordering::Relaxed);
        let asked: Vec<_> = asking.into_iter().filter_map(|thread| thread.join().ok()).collect();
        (waited, asked)
    });
    let seconds = since.elapsed().as_secs_f64();
    let pressure = Pressure::read(Path::new("/")).zip(pressure);
    let (after, busy) = (stats(&sockets), busy_seconds().zip(busy));
    // Why it was not waited to the end, and then what a guest that died would only hide.
    waited?;
    guests.check()?;
    let mut work = Vec::with_capacity(asked.len());
    for (name, result) in asked {
        let (probe, done) = result.map_err(|source| GuestError::Probe { name: name.clone(), source })?;
        if let Some(guest) = guests.list().iter_mut().find(|g: &&mut Guest| g.name == name) {
            guest.probe = Some(probe);
        }
        work.push(done);
    }
    let share = |of: fn(&Pressure) -> Option<PressureSome>| {
        let (after, before) = pressure.as_ref()?;
        let micros = of(after)?.total_micros.checked_sub(of(before)?.total_micros)?;
        Some((micros as f64 / 1e4 / seconds).min(100.0))
    };
    let vcpus = f64::from(guests.cpus()) * guests.len() as f64;
    let promised = guests.memory().saturating_mul(guests.len() as u64);
    let mut step = Step {
        vms: u16::try_from(guests.len()).unwrap_or(u16::MAX),
        cpu_ratio: vcpus / host_cpus(),
        memory_ratio: host_memory().map_or(0.0, |host| promised as f64 / host as f64),
        seconds,
        steal_percent: steal_percent(&before, &after),
        others_cpus: busy
            .and_then(|(now, then)| Some((now - then - cpu_seconds(&before, &after)?) / seconds)),
        pressure_cpu_percent: share(|p| p.cpu),
        pressure_memory_percent: share(|p| p.memory),
        pressure_io_percent: share(|p| p.io),
        resident_bytes: sum(&after, |s| s.memory.resident_bytes),
        stored_bytes: sum(&after, |s| {
            s.memory.guest.as_ref().map_or(s.memory.swapped_bytes, |guest| guest.stored_bytes)
        }),
        ..Step::of_work(&work)
    };
    // Guests that were not asked, because there is no thread for it, count as having done nothing.
    step.vm_per_second = step.total_per_second / f64::from(step.vms.max(1));
    Ok(step)
}

impl Step {
    /// What follows from the work of all guests.
    fn of_work(work: &[Work]) -> Self {
        let rates = || work.iter().map(|w| w.units_per_second);
        let mut latencies: Vec<Duration> = work.iter().flat_map(|w| w.latencies.iter().copied()).collect();
        latencies.sort_unstable();
        Self {
            total_per_second: rates().sum(),
            vm_per_second: rates().sum::<f64>() / work.len().max(1) as f64,
            least_per_second: rates().reduce(f64::min).unwrap_or(0.0),
            most_per_second: rates().reduce(f64::max).unwrap_or(0.0),
            latency_p50_seconds: part(&latencies, 50).as_secs_f64(),
            latency_p99_seconds: part(&latencies, 99).as_secs_f64(),
            requests: latencies.len(),
            errors: work.iter().map(|w| w.errors).sum(),
            vms: 0,
            cpu_ratio: 0.0,
            memory_ratio: 0.0,
            seconds: 0.0,
            steal_percent: None,
            pressure_cpu_percent: None,
            pressure_memory_percent: None,
            pressure_io_percent: None,
            resident_bytes: 0,
            stored_bytes: 0,
            others_cpus: None,
        }
    }
}

/// The smallest of the sorted times that `percent` of them do not exceed.
fn part(sorted: &[Duration], percent: usize) -> Duration {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

/// When each of them begins to ask: not all at once.
fn with_starts(probes: Vec<(String, Probe)>) -> impl Iterator<Item = (String, Probe, Duration)> {
    let all = u32::try_from(probes.len().max(1)).unwrap_or(u32::MAX);
    (0_u32..).zip(probes).map(move |(i, (name, probe))| (name, probe, ASK_EVERY * i / all))
}

/// Asks a guest again and again.
fn ask_until(mut probe: Probe, start: Duration, end: &AtomicBool) -> Result<(Probe, Work), ProbeError> {
    thread::sleep(start);
    let (first, _) = probe.ask()?;
    let mut last = first;
    let mut latencies = Vec::new();
    let mut due = Instant::now() + ASK_EVERY;
    while !end.load(Ordering::Relaxed) {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let (count, took) = probe.ask()?;
        latencies.push(took);
        last = count;
        due = (due + ASK_EVERY).max(Instant::now());
    }
    let seconds = last.nanos.saturating_sub(first.nanos) as f64 / 1e9;
    let units = last.units.saturating_sub(first.units) as f64;
    let units_per_second = if seconds > 0.0 { units / seconds } else { 0.0 };
    Ok((probe, Work { units_per_second, latencies, errors: last.errors }))
}

fn wait(
    guests: &mut Guests,
    since: Instant,
    time: Duration,
    progress: &dyn Fn(f64),
) -> Result<(), GuestError> {
    loop {
        guests.check()?;
        let left = time.saturating_sub(since.elapsed());
        progress(1.0 - left.as_secs_f64() / time.as_secs_f64());
        if left.is_zero() {
            return Ok(());
        }
        thread::sleep(left.min(LOOK));
    }
}

/// What each VM uses; none of those that do not say it.
fn stats(sockets: &[PathBuf]) -> Vec<Option<VmStats>> {
    let answers = ask_all::<VmStats>(sockets, "/stats", PATIENCE).unwrap_or_default();
    answers.into_iter().map(Result::ok).collect()
}

fn sum(stats: &[Option<VmStats>], of: fn(&VmStats) -> u64) -> u64 {
    stats.iter().flatten().map(of).sum()
}

/// CPU time of all VMs between two looks; none if one of them did not say it.
fn cpu_seconds(before: &[Option<VmStats>], after: &[Option<VmStats>]) -> Option<f64> {
    let used = before.iter().zip(after).map(|(a, b)| Some(b.as_ref()?.cpu_seconds - a.as_ref()?.cpu_seconds));
    used.sum()
}

/// Time that all CPUs of the host were busy, since it started.
fn busy_seconds() -> Option<f64> {
    let cpus = berth_host::CpuTimes::read(Path::new("/"));
    let ticks = rustix::param::clock_ticks_per_second() as f64;
    (!cpus.is_empty()).then(|| cpus.iter().map(|cpu| cpu.busy).sum::<u64>() as f64 / ticks)
}

/// Percent of the time that vCPUs waited for a host CPU, of those VMs that said it both times.
fn steal_percent(before: &[Option<VmStats>], after: &[Option<VmStats>]) -> Option<f64> {
    let waited = |s: &VmStats| s.vcpus.iter().map(|v| v.thread.run_queue_wait_seconds).sum::<f64>();
    let (mut stolen, mut time) = (0.0, 0.0);
    for (a, b) in before.iter().zip(after).filter_map(|(a, b)| a.as_ref().zip(b.as_ref())) {
        stolen += waited(b) - waited(a);
        time += (b.at - a.at) * b.vcpus.len() as f64;
    }
    (time > 0.0).then(|| (stolen / time * 100.0).max(0.0))
}

/// CPUs that this process, and so the guests, may use.
pub fn host_cpus() -> f64 {
    thread::available_parallelism().map_or(1.0, |n| n.get() as f64)
}

/// The host's memory in bytes.
pub fn host_memory() -> Option<u64> {
    berth_host::Memory::read(Path::new("/")).total
}

#[cfg(test)]
mod tests {
    use super::*;

    fn millis(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let all: Vec<_> = (1..=200).map(millis).collect();
        assert_eq!((part(&all, 50), part(&all, 99)), (millis(100), millis(198)));
        assert_eq!(part(&all[..1], 99), millis(1));
        assert_eq!(part(&[], 99), Duration::ZERO);
    }

    #[test]
    fn a_step_sums_up_what_guests_did() {
        let work = |rate, latencies: &[u64], errors| Work {
            units_per_second: rate,
            latencies: latencies.iter().copied().map(millis).collect(),
            errors,
        };
        let step = Step::of_work(&[work(30.0, &[5, 1], 0), work(10.0, &[3], 2)]);
        assert_eq!((step.total_per_second, step.vm_per_second), (40.0, 20.0));
        assert_eq!((step.least_per_second, step.most_per_second), (10.0, 30.0));
        assert_eq!((step.latency_p50_seconds, step.latency_p99_seconds), (0.003, 0.005));
        assert_eq!((step.requests, step.errors), (3, 2));
        assert_eq!(Step::of_work(&[]).vm_per_second, 0.0);
    }
}

//! What happened between two samples.

use std::collections::BTreeMap;

use berth_api::types::{DiskStats, NetStats, VcpuStats, VmState, VmStats};
use serde::Serialize;

use super::sample::{HostSample, Sample, VmSample};

/// All that is shown.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Rates {
    /// The host.
    pub host: HostRates,
    /// The VMs, by name.
    pub vms: Vec<VmRates>,
}

/// The host.
#[derive(Clone, Debug, Default, Serialize)]
pub struct HostRates {
    /// Load averages over 1, 5 and 15 minutes.
    pub load: Option<[f64; 3]>,
    /// Percent of the last 10 seconds in which something waited for a CPU, for memory, for storage.
    pub pressure_cpu: Option<f64>,
    /// As `pressure_cpu`, for memory.
    pub pressure_memory: Option<f64>,
    /// As `pressure_cpu`, for storage.
    pub pressure_io: Option<f64>,
    /// Memory in bytes.
    pub memory_bytes: Option<u64>,
    /// Memory that programs could have without swapping, in bytes.
    pub memory_available_bytes: Option<u64>,
    /// The CPUs.
    pub cpus: Vec<CpuRates>,
}

/// A CPU of the host.
#[derive(Clone, Debug, Serialize)]
pub struct CpuRates {
    /// Its number.
    pub cpu: u32,
    /// Percent of the time in which it was not idle.
    pub busy_percent: Option<f64>,
}

/// A VM.
#[derive(Clone, Debug, Serialize)]
pub struct VmRates {
    /// Its name.
    pub name: String,
    /// Its process.
    pub pid: Option<u32>,
    /// How it is.
    pub state: VmState,
    /// CPU time of its process, in percent of one host CPU.
    pub cpu_percent: Option<f64>,
    /// Time in which its vCPUs waited for a host CPU, in percent of one vCPU.
    pub steal_percent: Option<f64>,
    /// What its guest was promised, in bytes.
    pub memory_bytes: Option<u64>,
    /// What of its process is in the host's memory, in bytes.
    pub resident_bytes: Option<u64>,
    /// Guest memory in the cold store in bytes.
    pub stored_bytes: Option<u64>,
    /// What of its process is in the host's swap, in bytes.
    pub swapped_bytes: Option<u64>,
    /// Bytes a second that the guest reads from its disks.
    pub disk_read: Option<f64>,
    /// Bytes a second that the guest writes to its disks.
    pub disk_written: Option<f64>,
    /// Bytes a second that the guest receives.
    pub net_received: Option<f64>,
    /// Bytes a second that the guest sends.
    pub net_sent: Option<f64>,
    /// Its vCPUs.
    pub vcpus: Vec<VcpuRates>,
}

/// A vCPU.
#[derive(Clone, Debug, Serialize)]
pub struct VcpuRates {
    /// Its number.
    pub id: u8,
    /// Its thread on the host.
    pub tid: u32,
    /// The thread's state, as `ps` shows it.
    pub state: String,
    /// The host CPU that it ran on last.
    pub host_cpu: u32,
    /// CPU time in percent of one host CPU.
    pub cpu_percent: Option<f64>,
    /// Time in which it waited for a host CPU, in percent.
    pub steal_percent: Option<f64>,
}

impl Rates {
    /// What a single sample tells: no rates.
    pub fn of_first(sample: &Sample) -> Self {
        Self::between(&Sample::default(), sample)
    }

    /// What happened from `old` to `new`. A VM that is new, or was started again, has no rates yet.
    pub fn between(old: &Sample, new: &Sample) -> Self {
        let before: BTreeMap<&str, &VmSample> = old.vms.iter().map(|vm| (vm.name.as_str(), vm)).collect();
        let rates = |vm: &VmSample| {
            let before = before.get(vm.name.as_str()).filter(|b| b.pid == vm.pid);
            VmRates::between(before.and_then(|b| b.stats.as_ref()), vm)
        };
        Self { host: HostRates::between(&old.host, &new.host), vms: new.vms.iter().map(rates).collect() }
    }
}

impl VmRates {
    fn between(before: Option<&VmStats>, vm: &VmSample) -> Self {
        let now = vm.stats.as_ref();
        let both = before.zip(now);
        let seconds = both.map(|(a, b)| b.at - a.at).filter(|s| *s > 0.0);
        let rate = |count: fn(&VmStats) -> f64| {
            let (a, b) = both?;
            per_second(count(a), count(b), seconds?)
        };
        let percent = |count| rate(count).map(|r| r * 100.0);
        Self {
            name: vm.name.clone(),
            pid: vm.pid,
            state: vm.state,
            cpu_percent: percent(|s| s.cpu_seconds),
            steal_percent: percent(|s| s.vcpus.iter().map(|v| v.thread.run_queue_wait_seconds).sum()),
            memory_bytes: now.map(|s| s.memory.size_bytes),
            resident_bytes: now.map(|s| s.memory.resident_bytes),
            stored_bytes: now.and_then(|s| Some(s.memory.guest.as_ref()?.stored_bytes)),
            swapped_bytes: now.map(|s| s.memory.swapped_bytes),
            disk_read: rate(|s| sum(&s.disks, |d: &DiskStats| d.read_bytes)),
            disk_written: rate(|s| sum(&s.disks, |d: &DiskStats| d.written_bytes)),
            net_received: rate(|s| sum(&s.nets, |n: &NetStats| n.received_bytes)),
            net_sent: rate(|s| sum(&s.nets, |n: &NetStats| n.sent_bytes)),
            vcpus: now.map_or(Vec::new(), |now| vcpus(before, now, seconds)),
        }
    }
}

fn vcpus(before: Option<&VmStats>, now: &VmStats, seconds: Option<f64>) -> Vec<VcpuRates> {
    let rates = |vcpu: &VcpuStats| {
        let old = before
            .and_then(|b| b.vcpus.iter().find(|v| v.id == vcpu.id))
            .filter(|v| v.thread.tid == vcpu.thread.tid);
        let percent =
            |count: fn(&VcpuStats) -> f64| Some(per_second(count(old?), count(vcpu), seconds?)? * 100.0);
        VcpuRates {
            id: vcpu.id,
            tid: vcpu.thread.tid,
            state: vcpu.thread.state.clone(),
            host_cpu: vcpu.thread.host_cpu,
            cpu_percent: percent(|v| v.thread.cpu_seconds),
            steal_percent: percent(|v| v.thread.run_queue_wait_seconds),
        }
    };
    now.vcpus.iter().map(rates).collect()
}

/// `None` for a counter that went backwards: then something else is counted than before.
fn per_second(before: f64, now: f64, seconds: f64) -> Option<f64> {
    let rate = (now - before) / seconds;
    (rate >= 0.0).then_some(rate)
}

/// Exact up to 2^53.
fn sum<T>(list: &[T], count: impl Fn(&T) -> u64) -> f64 {
    list.iter().map(count).fold(0u64, u64::saturating_add) as f64
}

impl HostRates {
    fn between(old: &HostSample, new: &HostSample) -> Self {
        let pressure = new.pressure.as_ref();
        let cpus = new.cpus.iter().map(|cpu| {
            let before = old.cpus.iter().find(|c| c.cpu == cpu.cpu);
            let percent = before.and_then(|b| {
                let total = cpu.total.checked_sub(b.total).filter(|t| *t > 0)?;
                Some(cpu.busy.checked_sub(b.busy)? as f64 / total as f64 * 100.0)
            });
            CpuRates { cpu: cpu.cpu, busy_percent: percent }
        });
        Self {
            load: new.load.as_ref().map(|l| l.0),
            pressure_cpu: pressure.and_then(|p| p.cpu).map(|p| p.avg10),
            pressure_memory: pressure.and_then(|p| p.memory).map(|p| p.avg10),
            pressure_io: pressure.and_then(|p| p.io).map(|p| p.avg10),
            memory_bytes: new.memory.total,
            memory_available_bytes: new.memory.available,
            cpus: cpus.collect(),
        }
    }

    /// Percent of all CPUs' time in which they were not idle.
    pub fn busy_percent(&self) -> Option<f64> {
        let known: Vec<f64> = self.cpus.iter().filter_map(|c| c.busy_percent).collect();
        (!known.is_empty()).then(|| known.iter().sum::<f64>() / known.len() as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::top::testing::{sample, vm};

    #[test]
    fn rates_are_differences_by_the_time_between() {
        let old = sample(vec![vm("a", 10.0, 5.0)]);
        let mut new = sample(vec![vm("a", 12.0, 6.0)]);
        let stats = new.vms[0].stats.as_mut().unwrap();
        stats.disks[0].read_bytes += 4000;
        stats.nets[0].sent_bytes += 200;
        stats.vcpus[1].thread.run_queue_wait_seconds += 0.5;
        stats.vcpus[0].thread.cpu_seconds += 1.0;
        let rates = Rates::between(&old, &new);
        let a = &rates.vms[0];
        assert_eq!((a.cpu_percent, a.steal_percent), (Some(50.0), Some(25.0)));
        assert_eq!((a.disk_read, a.disk_written), (Some(2000.0), Some(0.0)));
        assert_eq!((a.net_received, a.net_sent), (Some(0.0), Some(100.0)));
        assert_eq!((a.vcpus[0].cpu_percent, a.vcpus[1].steal_percent), (Some(50.0), Some(25.0)));
    }

    #[test]
    fn without_a_comparable_sample_there_are_no_rates() {
        let new = sample(vec![vm("a", 12.0, 6.0)]);
        let none = |rates: Rates| {
            let a = &rates.vms[0];
            assert!(a.cpu_percent.is_none() && a.disk_read.is_none() && a.vcpus[0].cpu_percent.is_none());
            assert_eq!(a.memory_bytes, Some(512 << 20));
        };
        none(Rates::of_first(&new));
        // Another process of the same name.
        let mut other = sample(vec![vm("a", 10.0, 100.0)]);
        other.vms[0].pid = Some(1);
        none(Rates::between(&other, &new));
        // The same moment.
        none(Rates::between(&new, &new));
        // It does not answer.
        let mut silent = new.clone();
        silent.vms[0].stats = None;
        let rates = Rates::between(&new, &silent);
        assert!(rates.vms[0].memory_bytes.is_none() && rates.vms[0].vcpus.is_empty());
        none(Rates::between(&silent, &new));
    }

    #[test]
    fn a_cpu_is_busy_when_it_is_not_idle() {
        let mut old = Sample::default();
        let mut new = Sample::default();
        let cpu = |cpu, busy, total| berth_host::CpuTimes { cpu, busy, total };
        old.host.cpus = vec![cpu(0, 100, 1000), cpu(2, 0, 0)];
        new.host.cpus = vec![cpu(0, 150, 1100), cpu(2, 0, 100), cpu(3, 5, 5)];
        let host = Rates::between(&old, &new).host;
        let busy: Vec<_> = host.cpus.iter().map(|c| (c.cpu, c.busy_percent)).collect();
        assert_eq!(busy, [(0, Some(50.0)), (2, Some(0.0)), (3, None)]);
        assert_eq!(host.busy_percent(), Some(25.0));
    }
}

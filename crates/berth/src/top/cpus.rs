//! The CPU view: host CPUs with the vCPU threads that ran there.

use super::format::percent;
use super::placement::Placement;
use super::rates::{Rates, VcpuRates, VmRates};

/// A host CPU.
#[derive(Clone, Debug, PartialEq)]
pub struct CpuRow {
    /// Its number.
    pub cpu: u32,
    /// Percent of its time in which it was not idle.
    pub busy_percent: Option<f64>,
    /// The threads that ran there, those with most time first: name, and percent of the CPU.
    pub threads: Vec<(String, f64)>,
}

impl CpuRow {
    /// The threads in one line.
    pub fn threads(&self) -> String {
        let shown = self.threads.iter().map(|(name, time)| format!("{name} {}%", percent(Some(*time))));
        shown.collect::<Vec<_>>().join("  ")
    }
}

/// The rows. A thread that was seen nowhere (there was no look yet) counts for the CPU that it ran on last.
pub fn rows(rates: &Rates, placement: &Placement, filter: &str) -> Vec<CpuRow> {
    let vms = || rates.vms.iter().filter(|vm| vm.name.contains(filter));
    let row = |cpu: u32, busy_percent| {
        let mut threads: Vec<(String, f64)> =
            vms().flat_map(|vm| vm.vcpus.iter().filter_map(move |v| on(vm, v, cpu, placement))).collect();
        threads.sort_by(|a, b| b.1.total_cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        CpuRow { cpu, busy_percent, threads }
    };
    rates.host.cpus.iter().map(|c| row(c.cpu, c.busy_percent)).collect()
}

fn on(vm: &VmRates, vcpu: &VcpuRates, cpu: u32, placement: &Placement) -> Option<(String, f64)> {
    let last = if vcpu.host_cpu == cpu { 1.0 } else { 0.0 };
    let time = vcpu.cpu_percent? * placement.share(vcpu.tid, cpu).unwrap_or(last);
    (time > 0.0).then(|| (format!("{}/vcpu{}", vm.name, vcpu.id), time))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::top::rates::{CpuRates, HostRates};
    use crate::top::testing::{sample, vm};

    #[test]
    fn threads_stand_where_they_ran() {
        let old = sample(vec![vm("a", 10.0, 1.0), vm("b", 10.0, 1.0)]);
        let mut new = sample(vec![vm("a", 11.0, 2.0), vm("b", 11.0, 2.0)]);
        for (vm, more) in new.vms.iter_mut().zip([0.75, 0.25]) {
            // vcpu0 ran last on CPU 0; vcpu1, which is on CPU 1, did nothing.
            vm.stats.as_mut().unwrap().vcpus[0].thread.cpu_seconds += more;
        }
        let mut rates = Rates::between(&old, &new);
        let cpus = [0, 1].map(|cpu| CpuRates { cpu, busy_percent: Some(50.0) }).to_vec();
        rates.host = HostRates { cpus, ..HostRates::default() };
        let rows = rows(&rates, &Placement::default(), "");
        assert_eq!(rows[0].threads, [("a/vcpu0".to_owned(), 75.0), ("b/vcpu0".to_owned(), 25.0)]);
        assert_eq!(rows[0].threads(), "a/vcpu0 75.0%  b/vcpu0 25.0%");
        assert!(rows[1].threads.is_empty());
        assert_eq!(super::rows(&rates, &Placement::default(), "b")[0].threads.len(), 1);
    }
}

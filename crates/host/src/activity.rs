//! What the host does: load averages, and the time of each CPU.

use std::path::Path;

use serde::Serialize;

use crate::read;

/// Load averages over 1, 5 and 15 minutes: tasks that run or want to (proc_loadavg(5)).
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Load(pub [f64; 3]);

impl Load {
    /// Reads `/proc/loadavg` below `root`.
    pub fn read(root: &Path) -> Option<Self> {
        let text = read::text(root, "proc/loadavg")?;
        let mut numbers = text.split_whitespace().map(|n| n.parse::<f64>().ok().filter(|n| n.is_finite()));
        Some(Self([numbers.next()??, numbers.next()??, numbers.next()??]))
    }
}

/// Time of a CPU since the host started, in clock ticks (proc_stat(5)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct CpuTimes {
    /// Its number.
    pub cpu: u32,
    /// Time in which it was neither idle nor waited for storage.
    pub busy: u64,
    /// All of its time.
    pub total: u64,
}

impl CpuTimes {
    /// Reads `/proc/stat` below `root`: the CPUs that are online.
    pub fn read(root: &Path) -> Vec<Self> {
        let text = read::text(root, "proc/stat").unwrap_or_default();
        text.lines().filter_map(Self::parse).collect()
    }

    /// A line such as `cpu1 user nice system idle iowait irq softirq steal guest guest_nice`. The last two are counted
    /// in the first two as well.
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.strip_prefix("cpu")?.split(' ');
        let cpu = words.next()?.parse().ok()?;
        let times: Vec<u64> = words.take(8).map_while(|w| w.parse().ok()).collect();
        let total: u64 = times.iter().fold(0, |sum, t| sum.saturating_add(*t));
        let idle = times.get(3)?.saturating_add(times.get(4).copied().unwrap_or(0));
        Some(Self { cpu, busy: total.saturating_sub(idle), total })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpus_time_is_read_and_the_sum_of_all_left_out() {
        assert_eq!(
            CpuTimes::parse("cpu3 10 1 5 100 20 1 2 3 10 0"),
            Some(CpuTimes { cpu: 3, busy: 22, total: 142 })
        );
        assert_eq!(CpuTimes::parse("cpu  10 1 5 100 20 1 2 3 10 0"), None);
        assert_eq!(CpuTimes::parse("cpu1 10"), None);
        assert_eq!(CpuTimes::parse("intr 1 2 3"), None);
    }

    #[test]
    fn this_host_says_what_it_does() {
        let root = Path::new("/");
        assert!(Load::read(root).is_some());
        assert!(CpuTimes::read(root).iter().all(|c| c.busy <= c.total && c.total > 0));
        assert_eq!(Load::read(Path::new("/nonexistent")), None);
    }
}

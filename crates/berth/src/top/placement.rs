//! Where vCPU threads run: looked at many times between two samples.

use std::collections::BTreeMap;
use std::fs;

use super::sample::Sample;

/// Field `processor` of `stat` (proc(5)), counted from the state.
const PROCESSOR: usize = 36;
/// Fields with CPU time in ticks.
const TIMES: [usize; 2] = [11, 12];

/// How often each thread was seen on which host CPU, since it was last asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// By thread and host CPU.
    seen: BTreeMap<(u32, u32), u32>,
    /// CPU time of each thread when it was last looked at, in ticks.
    ticks: BTreeMap<u32, u64>,
}

impl Placement {
    /// Looks at the vCPU threads of `sample`.
    pub fn look(&mut self, sample: &Sample) {
        for vm in &sample.vms {
            let Some(pid) = vm.pid else { continue };
            for vcpu in vm.stats.iter().flat_map(|s| &s.vcpus) {
                let tid = vcpu.thread.tid;
                let stat = fs::read_to_string(format!("/proc/{pid}/task/{tid}/stat"));
                // A thread that is gone runs nowhere.
                if let Some(now) = stat.ok().as_deref().and_then(parse) {
                    self.note(tid, now);
                }
            }
        }
    }

    /// A thread that did nothing since the last look is on no CPU, whatever the kernel remembers.
    fn note(&mut self, tid: u32, now: Now) {
        let before = self.ticks.insert(tid, now.ticks);
        if now.runnable || before.is_some_and(|before| before != now.ticks) {
            *self.seen.entry((tid, now.cpu)).or_default() += 1;
        }
    }

    /// What was seen since the last time.
    pub fn take(&mut self) -> Self {
        let seen = std::mem::take(&mut self.seen);
        Self { seen, ticks: BTreeMap::new() }
    }

    /// On which part of the looks at which it ran `tid` was on `cpu`, 0 to 1; `None` if it was never seen to run.
    pub fn share(&self, tid: u32, cpu: u32) -> Option<f64> {
        let of_it = self.seen.range((tid, 0)..=(tid, u32::MAX));
        let all: u32 = of_it.map(|(_, count)| count).sum();
        let here = self.seen.get(&(tid, cpu)).copied().unwrap_or(0);
        (all > 0).then(|| f64::from(here) / f64::from(all))
    }
}

/// A thread at one look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Now {
    runnable: bool,
    cpu: u32,
    ticks: u64,
}

fn parse(stat: &str) -> Option<Now> {
    // The name may contain anything, parentheses too.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = TIMES.iter().map(|&at| fields.get(at)?.parse::<u64>().ok());
    Some(Now {
        runnable: *fields.first()? == "R",
        cpu: fields.get(PROCESSOR)?.parse().ok()?,
        ticks: ticks.sum::<Option<u64>>()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_line_is_read() {
        // Fields 3 to 52, of which 14 and 15 are times and 39 is the CPU.
        let mut fields = vec!["0"; 50];
        (fields[0], fields[11], fields[12], fields[36]) = ("S", "250", "50", "3");
        let stat = format!("7 (a/vcpu0) x) {}", fields.join(" "));
        assert_eq!(parse(&stat), Some(Now { runnable: false, cpu: 3, ticks: 300 }));
        assert_eq!(parse(""), None);
        let own = fs::read_to_string("/proc/thread-self/stat").unwrap();
        assert!(parse(&own).unwrap().runnable);
    }

    #[test]
    fn only_looks_at_which_it_ran_count() {
        let mut placement = Placement::default();
        let at = |runnable, cpu, ticks| Now { runnable, cpu, ticks };
        for now in [
            at(false, 0, 5),
            at(false, 0, 5),
            at(true, 0, 5),
            at(false, 1, 6),
            at(false, 1, 7),
            at(true, 1, 7),
        ] {
            placement.note(9, now);
        }
        placement.note(8, at(false, 1, 1));
        let seen = placement.take();
        assert_eq!(
            (seen.share(9, 0), seen.share(9, 1), seen.share(9, 2)),
            (Some(0.25), Some(0.75), Some(0.0))
        );
        assert_eq!(seen.share(8, 1), None);
        assert_eq!(placement.take().share(9, 0), None);
    }
}

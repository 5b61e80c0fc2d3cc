//! The threads of this process, as the host's scheduler sees them (proc(5)).

use std::fs;

use berth_api::types::{MemoryStats, ThreadStats};

/// Fields of `stat` behind the name of the thread, counted from the state (proc(5) counts from 3).
const STATE: usize = 0;
const USER_TICKS: usize = 11;
const SYSTEM_TICKS: usize = 12;
const PROCESSOR: usize = 36;
const NANOS: f64 = 1e9;

/// Thread `tid` of this process; `None` if it is gone.
pub fn thread(tid: u32) -> Option<ThreadStats> {
    let directory = format!("/proc/self/task/{tid}");
    let stat = fs::read_to_string(format!("{directory}/stat")).ok()?;
    let schedstat = fs::read_to_string(format!("{directory}/schedstat")).unwrap_or_default();
    parse(tid, &stat, &schedstat)
}

fn parse(tid: u32, stat: &str, schedstat: &str) -> Option<ThreadStats> {
    // The name may contain anything, parentheses too.
    let (name, rest) = stat.split_once('(')?.1.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|f| f.parse::<u64>().ok()).unwrap_or(0);
    let mut counts = schedstat.split_whitespace().map(|f| f.parse::<u64>().unwrap_or(0) as f64 / NANOS);
    let in_ticks =
        (ticks(USER_TICKS) + ticks(SYSTEM_TICKS)) as f64 / rustix::param::clock_ticks_per_second() as f64;
    Some(ThreadStats {
        tid,
        name: name.to_owned(),
        state: (*fields.get(STATE)?).to_owned(),
        host_cpu: ticks(PROCESSOR) as u32,
        cpu_seconds: counts.next().unwrap_or(in_ticks),
        run_queue_wait_seconds: counts.next().unwrap_or(0.0),
    })
}

/// Memory of this process; the size of the guest's is for the caller to fill in.
pub fn memory() -> MemoryStats {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let bytes = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key));
        let kib = line.and_then(|l| l.split_whitespace().next()).and_then(|n| n.parse::<u64>().ok());
        kib.unwrap_or(0) << 10
    };
    MemoryStats { resident_bytes: bytes("VmRSS:"), swapped_bytes: bytes("VmSwap:"), ..MemoryStats::default() }
}

/// CPU time of this process, in seconds.
pub fn process_cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / NANOS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_parentheses_are_no_obstacle() {
        let stat =
            "7 (a) S (b)) R 1 2 3 4 5 6 7 8 9 10 250 50 0 0 20 0 1 0 9 1 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 3 0";
        let thread = parse(7, stat, "").unwrap();
        assert_eq!((thread.name.as_str(), thread.state.as_str()), ("a) S (b)", "R"));
        assert!((thread.cpu_seconds - 3.0).abs() < 1e-9, "{thread:?}");
        let thread = parse(7, stat, "1500000000 250000000 9\n").unwrap();
        assert_eq!((thread.cpu_seconds, thread.run_queue_wait_seconds), (1.5, 0.25));
        assert!(parse(7, "nonsense", "").is_none());
    }

    #[test]
    fn this_thread_is_there() {
        let tid = rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned();
        let mine = thread(tid).unwrap();
        assert_eq!((mine.tid, mine.state.as_str()), (tid, "R"));
        assert!(memory().resident_bytes > 0 && process_cpu_seconds() > 0.0);
    }
}

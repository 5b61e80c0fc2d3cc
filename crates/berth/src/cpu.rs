//! The host CPUs that a VM may use.

use std::io;

use berth_machine::options::CpuList;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Lets this thread, and those that it starts, run on the host CPUs of `list` only (sched_setaffinity(2)).
///
/// # Errors
/// When one of them is not there, or this process may not use it.
pub fn pin(list: &CpuList) -> io::Result<()> {
    let may = sched_getaffinity(None)?;
    let mut set = CpuSet::new();
    for &cpu in list.cpus() {
        let cpu = cpu as usize;
        if cpu >= CpuSet::MAX_CPU || !may.is_set(cpu) {
            return Err(io::Error::other(format!("this host has no CPU {cpu}, or it may not be used here")));
        }
        set.set(cpu);
    }
    Ok(sched_setaffinity(None, &set)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_run_where_they_are_pinned() {
        let first = (0..CpuSet::MAX_CPU).find(|&cpu| sched_getaffinity(None).unwrap().is_set(cpu)).unwrap();
        let pinned = std::thread::spawn(move || {
            pin(&first.to_string().parse().unwrap()).unwrap();
            std::thread::spawn(|| sched_getaffinity(None).unwrap().count()).join().unwrap()
        });
        assert_eq!(pinned.join().unwrap(), 1);
        let error = pin(&"4095".parse().unwrap()).unwrap_err().to_string();
        assert!(error.contains("CPU 4095"), "{error}");
    }
}

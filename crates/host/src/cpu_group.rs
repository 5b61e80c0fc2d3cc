//! A control group for one VM's CPU time (cgroups(7); the kernel's Documentation/admin-guide/cgroup-v2.rst, "CPU", and
//! Documentation/scheduler/sched-bwc.rst).
//!
//! The group is made below the one that this process is in, and the process moves into it with all its threads, so
//! that what its devices use counts too. A group outlives a process that was killed; [`CpuGroup::enter`] removes such
//! empty ones.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::cgroup::{self, Cgroup, CgroupVersion};

/// What the name of a VM's group begins with.
const PREFIX: &str = "berth-";
/// Usual weight.
pub const DEFAULT_WEIGHT: u32 = 100;
/// `cpu.shares` of version 1 that means the usual weight.
const USUAL_SHARES: u64 = 1024;
/// Period of a limit in microseconds: short, so that a guest does not stand still for long.
const PERIOD: u64 = 20_000;
/// The longest period, for limits so small that their part of [`PERIOD`] would be too short.
const LONG_PERIOD: u64 = 100_000;
/// The shortest time in a period that the kernel takes, in microseconds.
const LEAST_QUOTA: u64 = 1_000;
/// So often another VM's clean-up may come between making a group and moving in.
const ATTEMPTS: usize = 5;

/// Why there is no group, or it does not take a value. One line for people.
#[derive(Debug, thiserror::Error)]
pub enum CpuGroupError {
    /// No hierarchy with the CPU controller.
    #[error("this host has no control groups for CPU time that this user may make groups in")]
    None,
    /// The controller cannot be switched on here.
    #[error("the control group {path} has other processes, so that CPU time cannot be divided below it")]
    Shared {
        /// The group.
        path: PathBuf,
    },
    /// The host refuses.
    #[error("cannot write {path}: {source}", path = path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// A group that this process is in. When it is dropped the process goes back, and the group is removed.
#[derive(Debug)]
pub struct CpuGroup {
    directory: PathBuf,
    parent: PathBuf,
    version: CgroupVersion,
}

impl CpuGroup {
    /// Makes a group for the VM `name` and moves this process into it.
    ///
    /// # Errors
    /// [`CpuGroupError`]; then the process is where it was.
    pub fn enter(name: &str) -> Result<Self, CpuGroupError> {
        let hierarchies = cgroup::read(Path::new("/"));
        let of = |version| hierarchies.iter().find(|c| c.version == version && usable(c));
        let hierarchy = of(CgroupVersion::V1).or_else(|| of(CgroupVersion::V2)).ok_or(CpuGroupError::None)?;
        let parent = PathBuf::from(&hierarchy.path);
        remove_empty(&parent);
        let directory = parent.join(format!("{PREFIX}{name}-{}", std::process::id()));
        let group = Self { directory, parent, version: hierarchy.version };
        group.move_in()?;
        if group.version == CgroupVersion::V2 {
            // Only now: a group with processes of its own may not divide among groups below it.
            group.enable_controller()?;
        }
        Ok(group)
    }

    /// Where the group is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    fn move_in(&self) -> Result<(), CpuGroupError> {
        let mut result = Ok(());
        for _ in 0..ATTEMPTS {
            let made = fs::create_dir(&self.directory);
            if let Err(source) = made
                && source.kind() != io::ErrorKind::AlreadyExists
            {
                return Err(CpuGroupError::Write { path: self.directory.clone(), source });
            }
            result = write(&self.directory.join("cgroup.procs"), "0");
            match &result {
                Err(CpuGroupError::Write { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                _ => break,
            }
        }
        result
    }

    fn enable_controller(&self) -> Result<(), CpuGroupError> {
        if self.directory.join("cpu.weight").exists() {
            return Ok(());
        }
        match write(&self.parent.join("cgroup.subtree_control"), "+cpu") {
            Err(CpuGroupError::Write { source, .. }) if source.kind() == io::ErrorKind::ResourceBusy => {
                Err(CpuGroupError::Shared { path: self.parent.clone() })
            }
            result => result,
        }
    }

    /// How much CPU time the VM gets compared with its neighbours when all want more than there is; 1 to 10000, and 100
    /// is usual.
    ///
    /// # Errors
    /// [`CpuGroupError::Write`].
    pub fn set_weight(&self, weight: u32) -> Result<(), CpuGroupError> {
        match self.version {
            CgroupVersion::V1 => self.set("cpu.shares", &shares(weight).to_string()),
            CgroupVersion::V2 => self.set("cpu.weight", &weight.to_string()),
        }
    }

    /// How many host CPUs' time the VM gets at most, in all; `None` for as much as there is.
    ///
    /// # Errors
    /// [`CpuGroupError::Write`].
    pub fn set_limit(&self, limit: Option<f64>) -> Result<(), CpuGroupError> {
        let quota = limit.map(quota);
        match self.version {
            CgroupVersion::V1 => {
                // First without a limit: the kernel checks each of the two values alone.
                self.set("cpu.cfs_quota_us", "-1")?;
                let Some((quota, period)) = quota else { return Ok(()) };
                self.set("cpu.cfs_period_us", &period.to_string())?;
                self.set("cpu.cfs_quota_us", &quota.to_string())
            }
            CgroupVersion::V2 => match quota {
                Some((quota, period)) => self.set("cpu.max", &format!("{quota} {period}")),
                None => self.set("cpu.max", "max"),
            },
        }
    }

    fn set(&self, file: &str, value: &str) -> Result<(), CpuGroupError> {
        write(&self.directory.join(file), value)
    }
}

impl Drop for CpuGroup {
    fn drop(&mut self) {
        // If it cannot go back, the next VM removes the group when this process has ended.
        let _ = write(&self.parent.join("cgroup.procs"), "0");
        let _ = fs::remove_dir(&self.directory);
    }
}

/// Whether groups for CPU time can be made in the hierarchy.
fn usable(cgroup: &Cgroup) -> bool {
    cgroup.writable && cgroup.controllers.iter().any(|c| c == "cpu")
}

/// Removes groups of VMs that were killed. A group with a process in it cannot be removed.
fn remove_empty(parent: &Path) {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    for entry in entries.filter(|e| e.file_name().to_string_lossy().starts_with(PREFIX)) {
        let _ = fs::remove_dir(entry.path());
    }
}

fn shares(weight: u32) -> u64 {
    (u64::from(weight) * USUAL_SHARES / u64::from(DEFAULT_WEIGHT)).clamp(2, 262_144)
}

/// Microseconds of CPU time in a period, and the period, for a limit in host CPUs.
fn quota(limit: f64) -> (u64, u64) {
    let of = |period: u64| (limit * period as f64).round() as u64;
    let period = if of(PERIOD) >= LEAST_QUOTA { PERIOD } else { LONG_PERIOD };
    (of(period).max(LEAST_QUOTA), period)
}

fn write(path: &Path, value: &str) -> Result<(), CpuGroupError> {
    fs::write(path, value).map_err(|source| CpuGroupError::Write { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_parts_of_a_period() {
        assert_eq!(quota(1.5), (30_000, 20_000));
        assert_eq!(quota(0.05), (1_000, 20_000));
        assert_eq!(quota(0.04), (4_000, 100_000));
        assert_eq!(quota(0.001), (1_000, 100_000));
    }

    #[test]
    fn the_usual_weight_is_the_usual_number_of_shares() {
        assert_eq!([shares(100), shares(300), shares(1), shares(10_000)], [1024, 3072, 10, 102_400]);
    }

    #[test]
    fn a_process_moves_in_and_out() {
        // Tests share this process, but no other test looks at its group.
        let before = fs::read_to_string("/proc/self/cgroup").unwrap();
        let group = match CpuGroup::enter("test") {
            Ok(group) => group,
            Err(e) => return println!("skipped: {e}"),
        };
        let inside = fs::read_to_string("/proc/self/cgroup").unwrap();
        assert!(inside.contains("/berth-test-"), "{inside}");
        group.set_weight(300).unwrap();
        group.set_limit(Some(1.5)).unwrap();
        group.set_limit(None).unwrap();
        group.set_limit(Some(0.5)).unwrap();
        let directory = group.directory().to_owned();
        let (file, value) = match group.version {
            CgroupVersion::V1 => ("cpu.cfs_quota_us", "10000"),
            CgroupVersion::V2 => ("cpu.max", "10000 20000"),
        };
        assert_eq!(fs::read_to_string(directory.join(file)).unwrap().trim(), value);
        drop(group);
        assert!(!directory.exists());
        assert_eq!(fs::read_to_string("/proc/self/cgroup").unwrap(), before);
    }
}

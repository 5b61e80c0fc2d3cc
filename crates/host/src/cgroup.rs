//! Control groups that this process is in (cgroups(7)).

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde::Serialize;

use crate::read;

/// The version of a hierarchy's interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum CgroupVersion {
    /// One hierarchy for each controller.
    #[serde(rename = "v1")]
    V1,
    /// The unified hierarchy.
    #[serde(rename = "v2")]
    V2,
}

/// One hierarchy and the place of this process in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Cgroup {
    /// Version.
    pub version: CgroupVersion,
    /// Controllers that can be used in it. Of version 1 only those that Berth can use are listed.
    pub controllers: Vec<String>,
    /// Directory of this process's group.
    pub path: String,
    /// Groups can be made below it.
    pub writable: bool,
}

impl Cgroup {
    /// What processes of this group may have of memory at most, in bytes, by its own limit and by those of groups above it.
    pub(crate) fn memory_limit(&self, root: &Path) -> Option<u64> {
        let file = match self.version {
            CgroupVersion::V1 => "memory.limit_in_bytes",
            CgroupVersion::V2 => "memory.max",
        };
        // Above the mount there are no such files.
        let groups = Path::new(self.path.trim_start_matches('/')).ancestors();
        let limits = groups.filter_map(|group| read::number(root, &format!("{}/{file}", group.display())));
        limits.min()
    }
}

/// Controllers of version 1 that limit what a VM uses.
const USEFUL: [&str; 6] = ["cpu", "memory", "cpuset", "io", "blkio", "freezer"];

/// All hierarchies that are mounted and useful.
pub fn read(root: &Path) -> Vec<Cgroup> {
    let mounts = read::text(root, "proc/self/mountinfo").unwrap_or_default();
    let groups = read::text(root, "proc/self/cgroup").unwrap_or_default();
    let mut found = parse(&mounts, &groups);
    for cgroup in &mut found {
        let directory = root.join(cgroup.path.trim_start_matches('/'));
        if cgroup.version == CgroupVersion::V2 {
            let controllers =
                std::fs::read_to_string(directory.join("cgroup.controllers")).unwrap_or_default();
            cgroup.controllers = controllers.split_whitespace().map(str::to_owned).collect();
        }
        cgroup.writable = may_write(&directory);
    }
    found
}

struct Mount<'a> {
    /// What of the file system is mounted.
    root: &'a str,
    /// Where.
    point: &'a str,
    version: CgroupVersion,
    options: &'a str,
}

/// A line of `/proc/PID/mountinfo` (proc_pid_mountinfo(5)) if it is a control group's.
fn parse_mount(line: &str) -> Option<Mount<'_>> {
    let (before, after) = line.split_once(" - ")?;
    let mut before = before.split(' ').skip(3);
    let (root, point) = (before.next()?, before.next()?);
    let mut after = after.split(' ');
    let version = match after.next()? {
        "cgroup" => CgroupVersion::V1,
        "cgroup2" => CgroupVersion::V2,
        _ => return None,
    };
    Some(Mount { root, point, version, options: after.nth(1)? })
}

/// Joins mounts with the lines `ID:CONTROLLERS:PATH` of `/proc/self/cgroup`.
fn parse(mountinfo: &str, groups: &str) -> Vec<Cgroup> {
    let place_of = |mount: &Mount<'_>| {
        groups.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':');
            let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
            let same = match mount.version {
                CgroupVersion::V2 => controllers.is_empty(),
                CgroupVersion::V1 => controllers.split(',').any(|c| mount.options.split(',').any(|o| o == c)),
            };
            same.then_some(path)
        })
    };
    mountinfo
        .lines()
        .filter_map(parse_mount)
        .filter_map(|mount| {
            let controllers: Vec<String> = match mount.version {
                CgroupVersion::V2 => Vec::new(),
                CgroupVersion::V1 => {
                    mount.options.split(',').filter(|o| USEFUL.contains(o)).map(str::to_owned).collect()
                }
            };
            if mount.version == CgroupVersion::V1 && controllers.is_empty() {
                return None;
            }
            // In a container the mount may show only a part, and our place is given from above it.
            let place = place_of(&mount)?;
            let below = place.strip_prefix(mount.root.trim_end_matches('/')).unwrap_or("");
            let path = format!("{}{}", mount.point, below.trim_end_matches('/'));
            Some(Cgroup { version: mount.version, controllers, path, writable: false })
        })
        .collect()
}

/// Whether this process may make files in a directory; on a file system mounted read-only nobody may.
fn may_write(directory: &Path) -> bool {
    let Ok(path) = CString::new(directory.as_os_str().as_bytes()) else { return false };
    // SAFETY: the pointer is to a NUL-terminated string that lives through the call.
    unsafe { libc::faccessat(libc::AT_FDCWD, path.as_ptr(), libc::W_OK, libc::AT_EACCESS) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unified_hierarchy() {
        let found = parse(
            "25 24 0:22 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n\
             26 24 0:23 / /proc rw - proc proc rw\n",
            "0::/user.slice/session-1.scope\n",
        );
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].version, CgroupVersion::V2);
        assert_eq!(found[0].path, "/sys/fs/cgroup/user.slice/session-1.scope");
    }

    #[test]
    fn old_hierarchies_beside_an_empty_new_one() {
        let found = parse(
            "30 1 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
             31 1 0:31 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n\
             32 1 0:32 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n\
             33 1 0:33 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
            "5:memory:/job\n4:cpu,cpuacct:/\n1:name=systemd:/\n0::/\n",
        );
        let short: Vec<_> = found.iter().map(|c| (c.version, c.controllers.join(","), &*c.path)).collect();
        assert_eq!(
            short,
            [
                (CgroupVersion::V1, "memory".to_owned(), "/sys/fs/cgroup/memory/job"),
                (CgroupVersion::V1, "cpu".to_owned(), "/sys/fs/cgroup/cpu"),
                (CgroupVersion::V2, String::new(), "/sys/fs/cgroup/unified"),
            ]
        );
    }

    #[test]
    fn a_container_sees_its_group_as_the_root_of_the_mount() {
        let found = parse(
            "40 1 0:40 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n",
            "5:memory:/docker/abc\n",
        );
        assert_eq!(found[0].path, "/sys/fs/cgroup/memory");
    }

    #[test]
    fn damaged_lines_are_skipped() {
        assert!(parse("1 2 3 - cgroup2\n - cgroup x rw,memory\n", "0\n::\n").is_empty());
    }
}

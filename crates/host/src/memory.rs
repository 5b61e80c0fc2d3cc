//! Memory of the host: RAM, huge pages, same-page merging, swap.

use std::path::Path;

use serde::Serialize;

use crate::{cgroup, read};

/// RAM, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// All that the kernel manages.
    pub total: Option<u64>,
    /// What new programs could get without swapping, as the kernel estimates.
    pub available: Option<u64>,
}

impl Memory {
    /// Reads `/proc/meminfo` below `root`.
    pub fn read(root: &Path) -> Self {
        parse_meminfo(&read::text(root, "proc/meminfo").unwrap_or_default())
    }

    /// What this process may have at most, in bytes: the host's memory, or what its control groups allow.
    pub fn usable(root: &Path) -> u64 {
        let total = Self::read(root).total.unwrap_or(0);
        cgroup::read(root).iter().filter_map(|group| group.memory_limit(root)).fold(total, u64::min)
    }
}

fn parse_meminfo(text: &str) -> Memory {
    let field = |name: &str| {
        let value = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
        value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    };
    Memory { total: field("MemTotal"), available: field("MemAvailable") }
}

/// Huge pages.
#[derive(Clone, Debug, Default, Serialize)]
pub struct HugePages {
    /// When anonymous memory gets them by itself: `always`, `madvise` or `never`.
    pub transparent: Option<String>,
    /// Pages set aside for hugetlbfs.
    pub hugetlb: Vec<HugetlbPool>,
}

/// The reserved huge pages of one size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HugetlbPool {
    /// Size of one page in bytes.
    pub page_size: u64,
    /// Pages in the pool.
    pub total: u64,
    /// Pages that nobody uses.
    pub free: u64,
}

impl HugePages {
    /// Reads the files below `root`.
    pub fn read(root: &Path) -> Self {
        let enabled = read::text(root, "sys/kernel/mm/transparent_hugepage/enabled");
        let pools = "sys/kernel/mm/hugepages";
        let mut hugetlb: Vec<HugetlbPool> = std::fs::read_dir(root.join(pools))
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().to_string_lossy().into_owned();
                let kib: u64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
                let number = |file| read::number(root, &format!("{pools}/{name}/{file}")).unwrap_or(0);
                let (total, free) = (number("nr_hugepages"), number("free_hugepages"));
                Some(HugetlbPool { page_size: kib.checked_mul(1024)?, total, free })
            })
            .collect();
        hugetlb.sort_by_key(|p| p.page_size);
        Self { transparent: enabled.as_deref().and_then(chosen), hugetlb }
    }
}

/// The word in brackets of a list such as `always [madvise] never`.
fn chosen(list: &str) -> Option<String> {
    let (_, rest) = list.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

/// Kernel same-page merging (the kernel's `Documentation/admin-guide/mm/ksm.rst`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Ksm {
    /// It scans.
    pub running: bool,
    /// Pages that are shared.
    pub pages_shared: u64,
    /// Pages that were saved by sharing.
    pub pages_sharing: u64,
}

impl Ksm {
    /// Reads the files below `root`; `None` where the kernel has no KSM.
    pub fn read(root: &Path) -> Option<Self> {
        let number = |file| read::number(root, &format!("sys/kernel/mm/ksm/{file}"));
        Some(Self {
            running: number("run")? == 1,
            pages_shared: number("pages_shared").unwrap_or(0),
            pages_sharing: number("pages_sharing").unwrap_or(0),
        })
    }
}

/// Swap.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Swap {
    /// The areas in use.
    pub areas: Vec<SwapArea>,
    /// Pages are compressed in memory before they go to an area; `None` where the kernel cannot.
    pub zswap: Option<bool>,
}

/// One swap area.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SwapArea {
    /// Device or file.
    pub path: String,
    /// In bytes.
    pub size: u64,
    /// In bytes.
    pub used: u64,
    /// It is compressed memory, not a disk.
    pub zram: bool,
}

impl Swap {
    /// Reads the files below `root`.
    pub fn read(root: &Path) -> Self {
        Self {
            areas: parse_swaps(&read::text(root, "proc/swaps").unwrap_or_default()),
            zswap: read::text(root, "sys/module/zswap/parameters/enabled").map(|t| t == "Y"),
        }
    }
}

/// Lines `PATH TYPE SIZE USED PRIORITY` after a heading; sizes in KiB.
fn parse_swaps(text: &str) -> Vec<SwapArea> {
    text.lines()
        .skip(1)
        .filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let [path, _kind, size, used, ..] = words[..] else { return None };
            let bytes = |kib: &str| kib.parse::<u64>().ok()?.checked_mul(1024);
            let zram = path.starts_with("/dev/zram");
            Some(SwapArea { path: path.to_owned(), size: bytes(size)?, used: bytes(used)?, zram })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_in_kibibytes() {
        let memory =
            parse_meminfo("MemTotal:       24684448 kB\nMemFree: 1 kB\nMemAvailable:   24000000 kB\n");
        assert_eq!(memory.total, Some(24_684_448 * 1024));
        assert_eq!(memory.available, Some(24_000_000 * 1024));
        assert_eq!(parse_meminfo("MemTotal: 99999999999999999999 kB"), Memory::default());
    }

    #[test]
    fn control_groups_limit_what_is_usable() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("proc/meminfo", "MemTotal: 8388608 kB\n");
        assert_eq!(Memory::usable(root.path()), 8 << 30);
        write("proc/self/mountinfo", "30 25 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n");
        write("proc/self/cgroup", "0::/user/vms\n");
        write("sys/fs/cgroup/user/vms/memory.max", "max\n");
        assert_eq!(Memory::usable(root.path()), 8 << 30);
        // A group further up counts too.
        write("sys/fs/cgroup/user/memory.max", "1073741824\n");
        assert_eq!(Memory::usable(root.path()), 1 << 30);
        write("proc/self/mountinfo", "30 25 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n");
        write("proc/self/cgroup", "4:memory:/vms\n");
        write("sys/fs/cgroup/memory/vms/memory.limit_in_bytes", "536870912\n");
        write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
        assert_eq!(Memory::usable(root.path()), 512 << 20);
    }

    #[test]
    fn the_chosen_word_is_in_brackets() {
        assert_eq!(chosen("always [madvise] never").as_deref(), Some("madvise"));
        assert_eq!(chosen("always"), None);
    }

    #[test]
    fn swaps_and_zram() {
        let areas = parse_swaps(
            "Filename Type Size Used Priority\n/dev/sda2 partition 1024 512 -2\n/dev/zram0 partition 2048 0 100\nbad\n",
        );
        let area = |path: &str, size, used, zram| SwapArea { path: path.to_owned(), size, used, zram };
        assert_eq!(areas, [area("/dev/sda2", 1 << 20, 1 << 19, false), area("/dev/zram0", 2 << 20, 0, true)]);
    }
}

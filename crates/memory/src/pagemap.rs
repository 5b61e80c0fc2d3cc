//! What the kernel has behind pages of this process (`Documentation/admin-guide/mm/pagemap.rst`).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use linux_raw_sys::general::{
    PAGE_IS_FILE, PAGE_IS_PFNZERO, PAGE_IS_PRESENT, PAGE_IS_SWAPPED, page_region, pm_scan_arg,
};

use crate::{HostVirtAddr, PAGE_SHIFT, PAGE_SIZE};

/// What is behind a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backing {
    /// Memory of its own.
    Memory,
    /// The kernel's page of zeros, which costs nothing.
    Zero,
    /// A page of a file, until it is written.
    File,
    /// The host's swap.
    Swap,
}

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::Ioctl =
    (3 << 30 | (size_of::<pm_scan_arg>() as u32) << 16 | (b'f' as u32) << 8 | 16) as libc::Ioctl;
/// Runs that one call returns at most.
const RUNS: usize = 512;

/// Calls `found` for each run of pages in `len` bytes from `start` on that have something behind them, in ascending
/// order. Runs are in pages from `start`. The other pages have nothing.
///
/// Before Linux 6.7 pages of zeros cannot be told from others, and count as [`Backing::Memory`].
pub(crate) fn scan(
    start: HostVirtAddr,
    len: u64,
    mut found: impl FnMut(Range<u64>, Backing),
) -> io::Result<()> {
    let pagemap = File::open("/proc/self/pagemap")?;
    match scan_runs(&pagemap, start, len, &mut found) {
        // Nothing was found yet: the first call failed.
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
            scan_entries(&pagemap, start, len, &mut found)
        }
        result => result,
    }
}

/// By PAGEMAP_SCAN (Linux 6.7).
fn scan_runs(
    pagemap: &File,
    start: HostVirtAddr,
    len: u64,
    found: &mut impl FnMut(Range<u64>, Backing),
) -> io::Result<()> {
    let mut runs = [page_region { start: 0, end: 0, categories: 0 }; RUNS];
    let end = start.0 + len;
    let mut at = start.0;
    while at < end {
        let mut argument = pm_scan_arg {
            size: size_of::<pm_scan_arg>() as u64,
            flags: 0,
            start: at,
            end,
            walk_end: 0,
            vec: runs.as_mut_ptr() as u64,
            vec_len: RUNS as u64,
            max_pages: 0,
            category_inverted: 0,
            category_mask: 0,
            category_anyof_mask: (PAGE_IS_PRESENT | PAGE_IS_SWAPPED).into(),
            return_mask: (PAGE_IS_PRESENT | PAGE_IS_SWAPPED | PAGE_IS_PFNZERO | PAGE_IS_FILE).into(),
        };
        // SAFETY: the argument is what the call takes; it writes at most `vec_len` runs to `runs`, and the argument.
        let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &mut argument) };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        for run in runs.iter().take(count) {
            let has = |bit: u32| run.categories & u64::from(bit) != 0;
            let backing = if has(PAGE_IS_SWAPPED) {
                Backing::Swap
            } else if has(PAGE_IS_PFNZERO) {
                Backing::Zero
            } else if has(PAGE_IS_FILE) {
                Backing::File
            } else {
                Backing::Memory
            };
            found((run.start - start.0) >> PAGE_SHIFT..(run.end - start.0) >> PAGE_SHIFT, backing);
        }
        if argument.walk_end <= at {
            return Err(io::Error::other("the kernel's account of pages does not come to an end"));
        }
        at = argument.walk_end;
    }
    Ok(())
}

/// By reading an entry for each page.
fn scan_entries(
    pagemap: &File,
    start: HostVirtAddr,
    len: u64,
    found: &mut impl FnMut(Range<u64>, Backing),
) -> io::Result<()> {
    const ENTRY: u64 = 8;
    let mut entries = [0; 4096];
    let pages = len / PAGE_SIZE;
    let mut page = 0;
    while page < pages {
        let count = (pages - page).min(entries.len() as u64 / ENTRY);
        let bytes = &mut entries[..(count * ENTRY) as usize];
        pagemap.read_exact_at(bytes, (start.page() + page) * ENTRY)?;
        for (entry, page) in bytes.chunks_exact(ENTRY as usize).zip(page..) {
            let entry = entry.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
            let backing = match (entry >> 61) & 7 {
                0b100 => Backing::Memory,
                0b101 => Backing::File,
                0b010 | 0b011 => Backing::Swap,
                _ => continue,
            };
            found(page..page + 1, backing);
        }
        page += count;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{GuestMemory, GuestPhysAddr};

    fn pages(
        scan: impl FnOnce(&mut dyn FnMut(Range<u64>, Backing)) -> io::Result<()>,
    ) -> Vec<(u64, Backing)> {
        let mut pages = Vec::new();
        scan(&mut |run, backing| pages.extend(run.map(|page| (page, backing)))).unwrap();
        pages
    }

    #[test]
    fn both_ways_find_the_pages_that_were_touched() {
        let m = GuestMemory::new(16 << 20).unwrap();
        let region = m.regions()[0];
        for page in [1, 2, 700, 4095] {
            m.write(GuestPhysAddr(page * PAGE_SIZE), &[1]).unwrap();
        }
        m.read(GuestPhysAddr(9 * PAGE_SIZE), &mut [0]).unwrap();
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let entries = pages(|mut found| scan_entries(&pagemap, region.host, region.len, &mut found));
        let numbers: Vec<u64> = entries.iter().map(|(page, _)| *page).collect();
        assert_eq!(numbers, [1, 2, 9, 700, 4095]);
        let runs = pages(|found| scan(region.host, region.len, found));
        for page in [1, 2, 700, 4095] {
            assert!(runs.contains(&(page, Backing::Memory)), "{page}: {runs:?}");
        }
        assert_eq!(runs.len(), 5);
    }
}

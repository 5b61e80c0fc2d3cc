//! The host's side of a page: what `/proc/PID/pagemap` says, and `/proc/kpagecount` and `/proc/kpageflags` where the
//! caller may read them (the kernel's Documentation/admin-guide/mm/pagemap.rst).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use berth_memory::{HostVirtAddr, PAGE_SIZE};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::hex::Hex;
use crate::words;

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FILE_OR_SHARED: u64 = 1 << 61;
const EXCLUSIVE: u64 = 1 << 56;
const SOFT_DIRTY: u64 = 1 << 55;
const FRAME: u64 = (1 << 55) - 1;

/// One entry of a pagemap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PagemapEntry(pub u64);

impl PagemapEntry {
    /// The page is in memory.
    pub fn present(self) -> bool {
        self.0 & PRESENT != 0
    }
    /// The page is in the host's swap, or is being moved.
    pub fn swapped(self) -> bool {
        self.0 & SWAPPED != 0 && !self.present()
    }
    /// The page is a file's or shared memory.
    pub fn file_or_shared(self) -> bool {
        self.0 & FILE_OR_SHARED != 0
    }
    /// Only one address space maps the page, and only once.
    pub fn exclusive(self) -> bool {
        self.0 & EXCLUSIVE != 0
    }
    /// The page was written since soft-dirty bits were cleared last.
    pub fn soft_dirty(self) -> bool {
        self.0 & SOFT_DIRTY != 0
    }
    /// Number of the machine frame; `None` when the page is not present, or the caller may not know.
    pub fn frame(self) -> Option<u64> {
        Some(self.0 & FRAME).filter(|&frame| self.present() && frame != 0)
    }
    /// Whether others have the same frame: a file's, another process's, or one that KSM merged.
    pub fn shared(self) -> bool {
        self.present() && (self.file_or_shared() || !self.exclusive())
    }
}

/// The pagemap of a process.
pub struct Pagemap(File);

impl Pagemap {
    /// Of process `pid`.
    ///
    /// # Errors
    /// When there is no such process, or the caller may not look at it.
    pub fn of(pid: u32) -> io::Result<Self> {
        File::open(format!("/proc/{pid}/pagemap")).map(Self)
    }

    /// The entry of the page that holds `address`.
    ///
    /// # Errors
    /// What the host says.
    pub fn entry(&self, address: HostVirtAddr) -> io::Result<PagemapEntry> {
        let mut bytes = [0; 8];
        self.0.read_exact_at(&mut bytes, address.page() * 8)?;
        Ok(PagemapEntry(u64::from_le_bytes(bytes)))
    }

    /// The entries of `pages` pages from the one that holds `address` on, given to `each` in order.
    ///
    /// # Errors
    /// What the host says.
    pub fn entries(
        &self,
        address: HostVirtAddr,
        pages: u64,
        mut each: impl FnMut(PagemapEntry),
    ) -> io::Result<()> {
        /// Pages a read.
        const PART: u64 = 32 << 10;
        let mut bytes = vec![0; (PART.min(pages) * 8) as usize];
        let mut done = 0;
        while done < pages {
            let part = PART.min(pages - done);
            let bytes = &mut bytes[..(part * 8) as usize];
            self.0.read_exact_at(bytes, (address.page() + done) * 8)?;
            let (entries, _) = bytes.as_chunks::<8>();
            entries.iter().for_each(|e| each(PagemapEntry(u64::from_le_bytes(*e))));
            done += part;
        }
        Ok(())
    }
}

/// A page of the VM's process as the host sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostPage {
    /// The page is in memory.
    pub present: bool,
    /// The page is in the host's swap.
    pub swapped: bool,
    /// The page was written since soft-dirty bits were cleared last.
    pub soft_dirty: bool,
    /// The page is a file's or shared memory (bit 61).
    pub file_or_shared: bool,
    /// Only one address space maps the page (bit 56).
    pub exclusive: bool,
    /// Whether others have the same frame.
    pub shared: bool,
    /// Number of the machine frame, where the caller may know it (`CAP_SYS_ADMIN`).
    pub frame: Option<Hex>,
    /// How often the frame is mapped, from `/proc/kpagecount`, for root.
    pub mapped: Option<u64>,
    /// What the kernel says of the frame, from `/proc/kpageflags`, for root.
    pub frame_flags: Vec<String>,
}

impl HostPage {
    /// The page at `address` of process `pid`, as far as this process may know.
    ///
    /// # Errors
    /// When the pagemap of the process cannot be read.
    pub fn read(pid: u32, address: HostVirtAddr) -> io::Result<Self> {
        let entry = Pagemap::of(pid)?.entry(address)?;
        let of_frame = |path: &str| {
            let mut bytes = [0; 8];
            File::open(path).ok()?.read_exact_at(&mut bytes, entry.frame()? * 8).ok()?;
            Some(u64::from_le_bytes(bytes))
        };
        Ok(Self {
            present: entry.present(),
            swapped: entry.swapped(),
            soft_dirty: entry.soft_dirty(),
            file_or_shared: entry.file_or_shared(),
            exclusive: entry.exclusive(),
            shared: entry.shared(),
            frame: entry.frame().map(Hex),
            mapped: of_frame("/proc/kpagecount"),
            frame_flags: of_frame("/proc/kpageflags").map(words::frame_words).unwrap_or_default(),
        })
    }

    /// The machine address of the byte `offset` into the page.
    pub fn machine_address(&self, offset: u64) -> Option<Hex> {
        self.frame.map(|frame| Hex(frame.0 * PAGE_SIZE + offset % PAGE_SIZE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_memory::{GuestMemory, GuestPhysAddr};

    #[test]
    fn pages_of_this_process() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        let host = |at: u64| memory.host_address(GuestPhysAddr(at), 1).unwrap();
        memory.write(GuestPhysAddr(0x5000), b"touched").unwrap();
        let touched = HostPage::read(std::process::id(), host(0x5678)).unwrap();
        assert!(touched.present && touched.exclusive && !touched.shared && !touched.swapped, "{touched:?}");
        assert_eq!(touched.machine_address(0x678).map(|a| a.0 & 0xfff), touched.frame.map(|_| 0x678));
        let untouched = HostPage::read(std::process::id(), host(0x9_0000)).unwrap();
        assert!(!untouched.present && untouched.frame.is_none(), "{untouched:?}");

        let mut present = Vec::new();
        let pagemap = Pagemap::of(std::process::id()).unwrap();
        pagemap.entries(host(0), 256, |e| present.push(e.present())).unwrap();
        assert_eq!(present.len(), 256);
        assert!(present[5] && !present[0x90]);
    }
}

//! Anonymous memory of our own.

use std::io;
use std::ptr::NonNull;

use super::contents::Page;
use crate::HostVirtAddr;

/// A mapping of anonymous memory, which reads as zero and is not resident before it is written.
pub(super) struct AnonMap {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: plain memory, which belongs to this value alone.
unsafe impl Send for AnonMap {}
// SAFETY: shared references only read it.
unsafe impl Sync for AnonMap {}

impl AnonMap {
    pub(super) fn new(len: usize) -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at a place that the kernel chooses.
        let p = unsafe {
            libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        match NonNull::new(p.cast()) {
            Some(start) if p != libc::MAP_FAILED => Ok(Self { start, len }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The page with number `page`, which nobody writes as long as the reference lives.
    pub(super) fn page(&self, page: usize) -> Option<&Page> {
        let offset = page.checked_mul(size_of::<Page>()).filter(|offset| *offset < self.len)?;
        // SAFETY: mapped and readable as long as `self`; no reference covers other pages of it. That nobody writes is
        // the caller's promise, made for the staging area in the head of the store.
        Some(unsafe { &*self.start.as_ptr().add(offset).cast::<Page>() })
    }

    pub(super) fn start(&self) -> HostVirtAddr {
        HostVirtAddr(self.start.as_ptr() as u64)
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: mapped and readable as long as `self`, and written only through `bytes_mut`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: mapped and writable as long as `self`, which is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for AnonMap {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length, and nobody has references any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

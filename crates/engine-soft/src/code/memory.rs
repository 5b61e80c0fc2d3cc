//! The memory of the code cache: shared anonymous memory mapped twice, once writable and once executable, never both.
//! Profilers take it for code without a file, whose names they look up (`perf_map.rs`).

use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

/// Executable memory of a fixed size, written through a second mapping.
pub(crate) struct CodeMemory {
    write: *mut u8,
    exec: u64,
    size: usize,
    /// Bytes written since the writable mapping was last emptied.
    written: AtomicUsize,
}

/// After so many bytes of new code the writable mapping is emptied.
const RELEASE_AFTER: usize = 1 << 20;

// SAFETY: the pointers are to mappings that live as long as the value. Writes are made under the cache's lock,
// or are single aligned stores (links), which other threads may execute at the same time.
unsafe impl Send for CodeMemory {}
// SAFETY: as above.
unsafe impl Sync for CodeMemory {}

impl CodeMemory {
    /// Maps `size` bytes (a multiple of 4096). Nothing is resident before it is written.
    pub(crate) fn new(size: usize) -> io::Result<Self> {
        let check = |p: *mut libc::c_void| {
            if p == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(p) }
        };
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address that the kernel chooses; the result is checked.
        let write = check(unsafe {
            libc::mmap(std::ptr::null_mut(), size, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        })?;
        let unmap = |p, error| {
            // SAFETY: the mapping was just made and nothing refers to it.
            unsafe { libc::munmap(p, size) };
            error
        };
        // SAFETY: an old size of 0 makes a second mapping of the same shared pages (mremap(2)); checked.
        let exec = check(unsafe { libc::mremap(write, 0, size, libc::MREMAP_MAYMOVE) })
            .map_err(|error| unmap(write, error))?;
        // SAFETY: the whole of our own new mapping, which nothing has used yet.
        if unsafe { libc::mprotect(exec, size, libc::PROT_READ | libc::PROT_EXEC) } != 0 {
            let error = io::Error::last_os_error();
            return Err(unmap(write, unmap(exec, error)));
        }
        let (write, exec) = (write.cast(), exec as u64);
        Ok(Self { write, exec, size, written: AtomicUsize::new(0) })
    }

    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// Host address of `offset` as it is executed.
    pub(crate) fn address(&self, offset: u32) -> u64 {
        self.exec + u64::from(offset)
    }

    /// The offset of an executable address, if it is in this memory.
    pub(crate) fn offset_of(&self, address: u64) -> Option<u32> {
        let offset = address.checked_sub(self.exec)?;
        (offset < self.size as u64).then_some(offset as u32)
    }

    /// Copies new code to `offset`. Nothing executes there yet: the caller has just allocated it.
    pub(crate) fn write(&self, offset: u32, code: &[u8]) {
        assert!(offset as usize + code.len() <= self.size, "code is written inside the cache");
        // SAFETY: in bounds by the assertion; the source cannot overlap, it is not in the mapping.
        unsafe { self.write.add(offset as usize).copy_from_nonoverlapping(code.as_ptr(), code.len()) };
        if self.written.fetch_add(code.len(), Ordering::Relaxed) + code.len() > RELEASE_AFTER {
            self.written.store(0, Ordering::Relaxed);
            // The pages stay in the shared memory and in the executable mapping; only this mapping's view of them goes,
            // so that they do not count twice as resident.
            // SAFETY: advice on our own shared mapping, whose contents it does not change; writers on other
            // threads fault their page in again.
            unsafe { libc::madvise(self.write.cast(), self.size, libc::MADV_DONTNEED) };
        }
    }

    /// Replaces the rel32 field at `offset` (4-byte aligned) in one store, while others may execute it.
    pub(crate) fn patch_rel32(&self, offset: u32, target: u32) {
        assert!(
            offset.is_multiple_of(4) && offset as usize + 4 <= self.size,
            "links are aligned and inside the cache"
        );
        let rel = target.wrapping_sub(offset + 4);
        // SAFETY: in bounds and aligned by the assertion.
        let field = unsafe { AtomicU32::from_ptr(self.write.add(offset as usize).cast()) };
        field.store(rel, Ordering::Release);
    }

    /// Replaces the 8 bytes at `offset` (8-byte aligned) in one store, while others may execute them.
    pub(crate) fn patch_head(&self, offset: u32, bytes: u64) {
        assert!(
            offset.is_multiple_of(8) && offset as usize + 8 <= self.size,
            "heads are aligned and inside the cache"
        );
        // SAFETY: in bounds and aligned by the assertion.
        let field = unsafe { AtomicU64::from_ptr(self.write.add(offset as usize).cast()) };
        field.store(bytes, Ordering::Release);
    }

    /// Gives the memory behind everything from `offset` on back to the host.
    pub(crate) fn discard_from(&self, offset: u32) {
        let start = (offset as usize).next_multiple_of(4096);
        if start < self.size {
            // SAFETY: inside our own mapping of shared memory; its pages read as zero afterwards. MADV_REMOVE failing
            // is harmless: the memory stays resident.
            unsafe { libc::madvise(self.write.add(start).cast(), self.size - start, libc::MADV_REMOVE) };
        }
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        // SAFETY: both mappings were made by `new` with this size; no vCPU runs any more, because each holds a
        // reference to the VM that owns this.
        unsafe {
            libc::munmap(self.write.cast(), self.size);
            libc::munmap(self.exec as *mut libc::c_void, self.size);
        }
    }
}

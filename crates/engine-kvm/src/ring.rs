//! The ring of one vCPU, in which KVM puts the pages that it wrote (api.rst 8.29).

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn};
use kvm_ioctls::VcpuFd;

/// Entries of a ring: a power of two.
pub const ENTRIES: usize = 4096;
/// Bytes of an entry.
pub const ENTRY_SIZE: usize = size_of::<kvm_dirty_gfn>();

/// Flags of an entry: KVM filled it; we are done with it.
const DIRTY: u32 = 1;
const RESET: u32 = 2;

/// A mapped ring.
pub struct Ring {
    entries: *mut kvm_dirty_gfn,
    /// Counts entries that were taken.
    taken: usize,
}

// SAFETY: the mapping belongs to this value alone, and the kernel does not care which thread reads it.
unsafe impl Send for Ring {}

impl Ring {
    /// Maps the ring of `vcpu`. The mapping stays valid when the descriptor is closed.
    pub fn map(vcpu: &VcpuFd) -> io::Result<Self> {
        let offset = i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * berth_memory::PAGE_SIZE as i64;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                ENTRIES * ENTRY_SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                offset,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { entries: at.cast(), taken: 0 })
    }

    /// Calls `each` with slot and page number of every entry that KVM filled, and marks them as done.
    pub fn drain(&mut self, mut each: impl FnMut(u32, u64)) {
        // KVM stops before it comes round to an entry that is not taken back.
        for _ in 0..ENTRIES {
            // SAFETY: the index is below the number of entries that are mapped.
            let entry = unsafe { self.entries.add(self.taken % ENTRIES) };
            // SAFETY: the field is aligned and mapped; the kernel changes it at any time, hence the atomic.
            let flags = unsafe { AtomicU32::from_ptr(&raw mut (*entry).flags) };
            if flags.load(Ordering::Acquire) & DIRTY == 0 {
                break;
            }
            // SAFETY: the kernel does not touch an entry that is marked as filled.
            let (slot, page) =
                unsafe { ((&raw const (*entry).slot).read(), (&raw const (*entry).offset).read()) };
            // The upper half of the slot is the address space: 0, there is no SMM.
            each(slot & 0xffff, page);
            flags.store(RESET, Ordering::Release);
            self.taken = self.taken.wrapping_add(1);
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `map` with this size, and nothing refers to it any more.
        unsafe { libc::munmap(self.entries.cast(), ENTRIES * ENTRY_SIZE) };
    }
}

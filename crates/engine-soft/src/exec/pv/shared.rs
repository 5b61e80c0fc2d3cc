//! Atomic access to structures that guest and host share in guest memory. The guest chose their addresses, so
//! each access finds its memory anew; what is not RAM or not aligned is not there.

use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use berth_memory::{GuestMemory, GuestPhysAddr};

fn host_address(memory: &GuestMemory, addr: u64, size: u64) -> Option<u64> {
    let aligned = addr.is_multiple_of(size);
    memory.host_address(GuestPhysAddr(addr), size).filter(|_| aligned).map(|host| host.0)
}

/// The byte at guest physical `addr`.
pub(super) fn byte(memory: &GuestMemory, addr: u64) -> Option<&AtomicU8> {
    let host = host_address(memory, addr, 1)?;
    // SAFETY: `host` is in guest RAM, which stays mapped as long as `memory`; guest RAM is only accessed through
    // raw pointers and atomics.
    Some(unsafe { AtomicU8::from_ptr(host as *mut u8) })
}

/// The 32-bit word at guest physical `addr`, if that is a multiple of 4.
pub(super) fn word(memory: &GuestMemory, addr: u64) -> Option<&AtomicU32> {
    let host = host_address(memory, addr, 4)?;
    // SAFETY: as in `byte`; regions start at page boundaries on both sides, so the host address is aligned too.
    Some(unsafe { AtomicU32::from_ptr(host as *mut u32) })
}

/// The 64-bit word at guest physical `addr`, if that is a multiple of 8.
pub(super) fn quad(memory: &GuestMemory, addr: u64) -> Option<&AtomicU64> {
    let host = host_address(memory, addr, 8)?;
    // SAFETY: as in `word`.
    Some(unsafe { AtomicU64::from_ptr(host as *mut u64) })
}

/// Changes a structure under its version: odd while `change` runs, so that readers try again.
pub(super) fn versioned(version: &AtomicU32, change: impl FnOnce()) {
    let before = version.load(Ordering::Relaxed);
    let during = before.wrapping_add(1) | 1;
    version.store(during, Ordering::SeqCst);
    change();
    version.store(during.wrapping_add(1), Ordering::SeqCst);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_outside_ram_or_misaligned_are_not_there() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        assert!(byte(&memory, (1 << 20) - 1).is_some());
        assert!(byte(&memory, 1 << 20).is_none());
        assert!(word(&memory, 2).is_none());
        assert!(quad(&memory, (1 << 20) - 4).is_none());
        assert!(quad(&memory, u64::MAX - 7).is_none());
    }

    #[test]
    fn versions_are_odd_during_a_change_and_even_after() {
        for start in [0, 1, 6, u32::MAX] {
            let version = AtomicU32::new(start);
            versioned(&version, || assert_eq!(version.load(Ordering::SeqCst) % 2, 1));
            assert_eq!(version.load(Ordering::SeqCst) % 2, 0);
            assert_ne!(version.load(Ordering::SeqCst), start);
        }
    }
}

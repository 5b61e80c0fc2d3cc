//! System calls, signals and page faults of one process.

use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

use crate::{Outcome, Stop, Task, expect};

const PAGE: usize = 4096;
/// First writes of one unit of [`page_faults`].
const FAULTS: usize = 1024;
/// Of the mappings of [`map_and_unmap`].
const MAPPED_PAGES: usize = 16;

/// A private anonymous mapping that can be read and written.
pub struct Mapping {
    start: *mut u8,
    len: usize,
}

impl Mapping {
    /// Maps so many pages, which stay small pages, with `more` than reading and writing allowed.
    pub fn new(pages: usize, more: libc::c_int) -> std::io::Result<Self> {
        let len = pages * PAGE;
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE | more, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping, anywhere.
        let start = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        Ok(Self { start: start.cast(), len })
    }

    /// Its first byte; it is readable and writable.
    pub fn start(&self) -> *mut u8 {
        self.start
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Writes a byte to each page.
    pub fn touch(&self, byte: u8) {
        for offset in (0..self.len).step_by(PAGE) {
            // SAFETY: inside the mapping, which is writable.
            unsafe { self.start.add(offset).write_volatile(byte) };
        }
    }

    /// Allows no writes any more.
    fn protect(&self) -> std::io::Result<()> {
        // SAFETY: nobody has a reference to the mapping's memory.
        let result = unsafe { libc::mprotect(self.start.cast(), self.len, libc::PROT_READ) };
        if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nobody uses it any more.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}

pub fn calls(task: &Task) -> Outcome {
    let parent = std::os::unix::process::parent_id();
    for _ in 0..u64::from(task.count) * 1000 {
        // SAFETY: a system call without arguments. The C library keeps nothing that would save the call.
        let answer = unsafe { libc::getppid() };
        if answer as u32 != parent {
            return Err(Stop::Failed(format!("getppid gave {answer} and should give {parent}")));
        }
    }
    Ok(())
}

/// What the signal handlers have counted.
static HANDLED: AtomicU32 = AtomicU32::new(0);

extern "C" fn count_signal(_signal: libc::c_int) {
    HANDLED.fetch_add(1, Ordering::Relaxed);
}

/// Has `handler` called for `signal`.
fn handle(signal: libc::c_int, handler: extern "C" fn(libc::c_int)) -> std::io::Result<()> {
    // SAFETY: all zeroes are a valid value: no flags, no other signal blocked.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as usize;
    // SAFETY: the handlers here only use atomics and make system calls; `action` outlives the call.
    let result = unsafe { libc::sigaction(signal, &action, ptr::null_mut()) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

pub fn signals(task: &Task) -> Outcome {
    handle(libc::SIGUSR1, count_signal)?;
    let wanted = task.count.saturating_mul(1000);
    for _ in 0..wanted {
        // SAFETY: a signal to this process, which has a handler for it. It comes before the call returns.
        unsafe { libc::kill(libc::getpid(), libc::SIGUSR1) };
    }
    expect("the number of handled signals", HANDLED.load(Ordering::Relaxed), wanted)
}

pub fn page_faults(task: &Task) -> Outcome {
    let mapping = Mapping::new(FAULTS, 0)?;
    // SAFETY: advice that changes no content.
    unsafe { libc::madvise(mapping.start().cast(), mapping.len(), libc::MADV_NOHUGEPAGE) };
    for round in 0..task.count {
        // SAFETY: reads a byte of the mapping.
        expect("a byte of a new page", unsafe { mapping.start().read_volatile() }, 0)?;
        mapping.touch(round as u8 | 1);
        // SAFETY: the pages are given back; nobody has references to them, and they read as 0 again.
        if unsafe { libc::madvise(mapping.start().cast(), mapping.len(), libc::MADV_DONTNEED) } != 0 {
            return Err(std::io::Error::last_os_error().into());
        }
    }
    Ok(())
}

/// The page that [`unprotect`] is to make writable.
static PROTECTED: AtomicPtr<u8> = AtomicPtr::new(ptr::null_mut());

extern "C" fn unprotect(_signal: libc::c_int) {
    HANDLED.fetch_add(1, Ordering::Relaxed);
    // SAFETY: the page of a mapping that lives until no more faults are expected. A fault anywhere else comes again
    // and again; but nothing else here faults.
    unsafe {
        libc::mprotect(PROTECTED.load(Ordering::Relaxed).cast(), PAGE, libc::PROT_READ | libc::PROT_WRITE)
    };
}

pub fn write_faults(task: &Task) -> Outcome {
    let page = Mapping::new(1, 0)?;
    PROTECTED.store(page.start(), Ordering::Relaxed);
    handle(libc::SIGSEGV, unprotect)?;
    let wanted = task.count.saturating_mul(1000);
    for round in 0..wanted {
        page.protect()?;
        page.touch(round as u8);
    }
    expect("the number of handled faults", HANDLED.load(Ordering::Relaxed), wanted)
}

pub fn map_and_unmap(task: &Task) -> Outcome {
    map_and_unmap_times(u64::from(task.count) * 1000)
}

/// Maps, writes and unmaps [`MAPPED_PAGES`] pages so often.
pub fn map_and_unmap_times(times: u64) -> Outcome {
    for round in 0..times {
        Mapping::new(MAPPED_PAGES, 0)?.touch(round as u8);
    }
    Ok(())
}

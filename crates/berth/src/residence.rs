//! Giving back what only the start needed.
//!
//! A started VM executes little of the program: options, files and tables are read once. The pages of code and constants
//! that this took stay mapped in the process, and count as its memory, although it never looks at them again.

use std::ffi::{c_int, c_void};

/// Unmaps the pages of code and constants of the program and its libraries from this process. Those that are used again
/// come back by themselves, mostly from the host's page cache.
pub fn release_code() {
    // SAFETY: the callback has the signature that the function wants, and needs no data.
    unsafe { libc::dl_iterate_phdr(Some(release_object), std::ptr::null_mut()) };
}

unsafe extern "C" fn release_object(
    info: *mut libc::dl_phdr_info,
    _size: usize,
    _data: *mut c_void,
) -> c_int {
    // SAFETY: the C library gives a valid structure for the duration of the call.
    let info = unsafe { &*info };
    if info.dlpi_phdr.is_null() {
        return 0;
    }
    // SAFETY: that many program headers are there.
    let headers = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()) };
    for header in headers.iter().filter(|h| h.p_type == libc::PT_LOAD && h.p_flags & libc::PF_W == 0) {
        const PAGE: u64 = 4096;
        let start = (info.dlpi_addr + header.p_vaddr).next_multiple_of(PAGE);
        let end = (info.dlpi_addr + header.p_vaddr + header.p_memsz) / PAGE * PAGE;
        if start < end {
            // SAFETY: a segment that is not writable is a private mapping of its file without changes, so whoever touches
            // it next finds the same bytes. An error leaves things as they are.
            unsafe { libc::madvise(start as *mut c_void, (end - start) as usize, libc::MADV_DONTNEED) };
        }
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    static CONSTANTS: [u64; 2048] = [0x5a; 2048];

    /// Resident pages of files in KiB.
    fn resident_files() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|l| l.starts_with("RssFile:")).unwrap();
        line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
    }

    #[test]
    fn code_and_constants_are_as_before() {
        let before = resident_files();
        let sum = || std::hint::black_box(&CONSTANTS).iter().sum::<u64>();
        assert_eq!(sum(), 0x5a * 2048);
        release_code();
        let after = resident_files();
        assert_eq!(sum(), 0x5a * 2048);
        assert!(after < before, "{after} of {before} KiB are left");
    }
}

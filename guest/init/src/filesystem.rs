//! Mounts, the host name, and the line that greets.

use std::ffi::{CStr, CString};
use std::fs;
use std::mem::MaybeUninit;

use crate::complain;

struct Mount {
    kind: &'static CStr,
    target: &'static CStr,
    flags: libc::c_ulong,
    options: &'static CStr,
}

const QUIET: libc::c_ulong = libc::MS_NOSUID | libc::MS_NOEXEC | libc::MS_NODEV;

/// In this order: later ones lie on earlier ones.
const MOUNTS: [Mount; 7] = [
    Mount { kind: c"proc", target: c"/proc", flags: QUIET, options: c"" },
    Mount { kind: c"sysfs", target: c"/sys", flags: QUIET, options: c"" },
    Mount { kind: c"devtmpfs", target: c"/dev", flags: libc::MS_NOSUID, options: c"mode=0755" },
    Mount { kind: c"devpts", target: c"/dev/pts", flags: QUIET, options: c"mode=0620,ptmxmode=0666" },
    Mount {
        kind: c"tmpfs",
        target: c"/dev/shm",
        flags: libc::MS_NOSUID | libc::MS_NODEV,
        options: c"mode=1777",
    },
    Mount { kind: c"tmpfs", target: c"/run", flags: libc::MS_NOSUID | libc::MS_NODEV, options: c"mode=0755" },
    Mount { kind: c"tmpfs", target: c"/tmp", flags: libc::MS_NOSUID | libc::MS_NODEV, options: c"mode=1777" },
];

/// Mounts what every program expects. A mount that fails is reported and left out.
pub fn mount_all() {
    for m in &MOUNTS {
        let path = m.target.to_str().unwrap_or("/");
        // A directory that exists is fine; any other trouble shows in the mount.
        let _ = fs::create_dir_all(path);
        // SAFETY: all pointers are to NUL-terminated constants.
        let result = unsafe {
            libc::mount(
                m.kind.as_ptr(),
                m.target.as_ptr(),
                m.kind.as_ptr(),
                m.flags,
                m.options.as_ptr().cast(),
            )
        };
        if result != 0 {
            complain(&format!("cannot mount {path}: {}", std::io::Error::last_os_error()));
        }
    }
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "fd/0"),
        ("/dev/stdout", "fd/1"),
        ("/dev/stderr", "fd/2"),
    ] {
        // devtmpfs does not make these; a kernel that does is fine too.
        let _ = std::os::unix::fs::symlink(target, link);
    }
}

/// Sets the host name; one that the kernel refuses is reported.
pub fn set_host_name(name: &str) {
    // SAFETY: pointer and length are those of one live string.
    if unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) } != 0 {
        complain(&format!("cannot set the host name {name}: {}", std::io::Error::last_os_error()));
    }
    // Programs look their own name up.
    let _ = fs::write("/etc/hosts", format!("127.0.0.1 localhost {name}\n::1 localhost\n"));
}

/// The kernel's release, such as `6.1.0-56-cloud-amd64`.
pub fn kernel_release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").map_or_else(|_| "?".to_owned(), |s| s.trim().to_owned())
}

/// One line about the guest: kernel, CPUs, memory.
pub fn summary() -> String {
    // SAFETY: sysconf takes any number.
    let cpus = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
    let mut info = MaybeUninit::<libc::sysinfo>::zeroed();
    // SAFETY: the pointer is to a sysinfo, for which all-zero bytes are a value too, should the call fail.
    let info = unsafe {
        libc::sysinfo(info.as_mut_ptr());
        info.assume_init()
    };
    let mib = info.totalram.saturating_mul(u64::from(info.mem_unit)) >> 20;
    let s = if cpus == 1 { "" } else { "s" };
    format!("Berth guest: Linux {}, {cpus} CPU{s}, {mib} MiB", kernel_release())
}

/// `text` for a system call, or `None` if it holds a NUL.
pub fn c_string(text: &str) -> Option<CString> {
    CString::new(text).ok()
}

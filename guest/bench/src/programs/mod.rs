//! Programs as people use them, from Debian's packages: a compiler, interpreters, a database.
//!
//! They are in a Debian root file system: a directory on the host, in a guest a disk. Each runs there with mounts of its
//! own, so that nothing stays mounted, and with `/tmp` in memory.

mod source;

use std::ffi::CString;
use std::fs;
use std::io::Write;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::{Outcome, Stop, Task, expect};

/// Where the root file system is mounted if it is on a disk.
const MOUNT_POINT: &str = "/debian";

pub fn gcc(task: &Task) -> Outcome {
    in_debian(task, || {
        fs::write("work.c", source::generate())?;
        let arguments = ["-O2", "-Wall", "-o", "work", "work.c"];
        expect("what gcc says", run("/usr/bin/gcc", &arguments, "")?.as_str(), "")?;
        expect("what its program prints", run("/tmp/work", &[], "")?.as_str(), source::PRINTS)
    })
}

pub fn python(task: &Task) -> Outcome {
    in_debian(task, || {
        let printed = run("/usr/bin/python3", &["-I", "-c", include_str!("work.py")], "")?;
        expect("what python3 prints", printed.as_str(), "84318750 420611 13002391 929 1709600813\n")
    })
}

const SQLITE_PRINTS: &str = "39600|195150206\nowner 45|200|1066401\nowner 89|200|1066201\n38928021\n";

pub fn sqlite(task: &Task) -> Outcome {
    in_debian(task, || {
        let printed = run("/usr/bin/sqlite3", &[":memory:"], include_str!("work.sql"))?;
        expect("what sqlite3 prints", printed.as_str(), SQLITE_PRINTS)
    })
}

pub fn lua(task: &Task) -> Outcome {
    in_debian(task, || {
        let printed = run("/usr/bin/lua5.4", &["-"], include_str!("work.lua"))?;
        expect("what lua prints", printed.as_str(), "92\t1349993400008\t379984\t1074260835\n")
    })
}

/// Does `work` as often as the task says. The Debian file system is this process's root from then on.
fn in_debian(task: &Task, work: impl Fn() -> Outcome) -> Outcome {
    let Some(debian) = task.debian else {
        return Err(Stop::Skipped("there is no Debian root file system".to_owned()));
    };
    enter(Path::new(debian)).map_err(|e| Stop::Failed(format!("{debian}: {e}")))?;
    (0..task.count).try_for_each(|_| work())
}

/// Makes the file system that is in, or at, `debian` this process's root.
fn enter(debian: &Path) -> std::io::Result<()> {
    own_mounts()?;
    let root = if fs::metadata(debian)?.file_type().is_block_device() {
        fs::create_dir_all(MOUNT_POINT)?;
        mount(debian.to_str(), MOUNT_POINT, Some("ext4"), libc::MS_RDONLY)?;
        MOUNT_POINT.to_owned()
    } else {
        debian.display().to_string()
    };
    mount(Some("/dev"), &format!("{root}/dev"), None, libc::MS_BIND | libc::MS_REC)?;
    mount(Some("tmpfs"), &format!("{root}/tmp"), Some("tmpfs"), 0)?;
    std::os::unix::fs::chroot(&root)?;
    std::env::set_current_dir("/tmp")
}

/// A mount name space of this process's own; for users other than root a user name space too.
fn own_mounts() -> std::io::Result<()> {
    // SAFETY: calls without pointers.
    let (user, group) = unsafe { (libc::geteuid(), libc::getegid()) };
    let flags = if user == 0 { libc::CLONE_NEWNS } else { libc::CLONE_NEWNS | libc::CLONE_NEWUSER };
    // SAFETY: a call without pointers; this process has one thread.
    if unsafe { libc::unshare(flags) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    if user != 0 {
        fs::write("/proc/self/setgroups", "deny")?;
        fs::write("/proc/self/uid_map", format!("0 {user} 1"))?;
        fs::write("/proc/self/gid_map", format!("0 {group} 1"))?;
    }
    // Nothing of it reaches the name space that we come from. An initramfs has no such propagation.
    mount(None, "/", None, libc::MS_REC | libc::MS_PRIVATE)
}

/// mount(2).
fn mount(from: Option<&str>, to: &str, kind: Option<&str>, flags: libc::c_ulong) -> std::io::Result<()> {
    let text = |s: &str| CString::new(s).map_err(std::io::Error::other);
    let (from, to) = (from.map(text).transpose()?, text(to)?);
    let kind = kind.map(text).transpose()?;
    let pointer = |s: &Option<CString>| s.as_ref().map_or(std::ptr::null(), |s| s.as_ptr());
    // SAFETY: all strings outlive the call; the last argument may be null.
    let result = unsafe { libc::mount(pointer(&from), to.as_ptr(), pointer(&kind), flags, std::ptr::null()) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Runs a program to its end; what it printed on both outputs.
fn run(program: &str, arguments: &[&str], input: &str) -> Result<String, Stop> {
    let failed = |e: std::io::Error| Stop::Failed(format!("{program}: {e}"));
    let mut child = Command::new(program)
        .args(arguments)
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    // The inputs are smaller than what a pipe holds, so that this does not wait for the program.
    child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(input.as_bytes())).map_err(failed)?;
    let output = child.wait_with_output().map_err(failed)?;
    let printed = [output.stdout, output.stderr].concat();
    let printed = String::from_utf8_lossy(&printed).into_owned();
    if output.status.success() {
        Ok(printed)
    } else {
        Err(Stop::Failed(format!("{program}: {}: {printed}", output.status)))
    }
}

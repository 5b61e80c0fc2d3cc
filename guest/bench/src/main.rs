//! What `cargo xtask bench` runs in guests and on the host: short pieces of work, one after the other.
//!
//! It prints `bench begin NAME` before each and `bench end NAME SECONDS` after it, with the CPU time of the work.
//! That time is for the host only: a guest's own clock cannot be trusted to run at the right speed under every
//! emulator, so whoever reads a guest's lines takes the time.
//!
//! Arguments: the path of busybox, then the names of the work to do, `coremark` with its iterations
//! (`coremark=10000`). `ready` does nothing: its lines tell that a user program runs.

use std::io::{Read, Write};
use std::process::{Command, ExitCode, Stdio};

/// CoreMark's checksums of list, matrix and state work in its 2K performance run (EEMBC's core_main.c). They do
/// not depend on the number of iterations.
const COREMARK_CRCS: (u16, u16, u16) = (0xe714, 0x1fd7, 0x8e3a);
/// Round trips of one byte between two processes.
const PING_PONGS: u32 = 20_000;
/// How often a mapping of [`MAPPING_PAGES`] pages is made, written and removed.
const MAPPINGS: u32 = 4_000;
const MAPPING_PAGES: usize = 16;
const PAGE: usize = 4096;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let Some((busybox, names)) = arguments.get(1..).and_then(<[_]>::split_first) else {
        eprintln!("usage: berth-guest-bench BUSYBOX NAME[=COUNT]...");
        return ExitCode::from(2);
    };
    for argument in names {
        let (name, count) = match argument.split_once('=') {
            Some((name, count)) => (name, count.parse().unwrap_or(0)),
            None => (argument.as_str(), 1),
        };
        let before = cpu_time();
        say("begin", name);
        if let Err(reason) = run(name, count, busybox) {
            say("failed", &format!("{name}: {reason}"));
            return ExitCode::FAILURE;
        }
        say("end", &format!("{name} {:.6}", cpu_time() - before));
    }
    ExitCode::SUCCESS
}

fn run(name: &str, count: u32, busybox: &str) -> Result<(), String> {
    match name {
        "ready" => Ok(()),
        "coremark" => coremark(count),
        "syscalls" => {
            program(busybox, &["dd", "if=/dev/zero", "of=/dev/null", "bs=1", "count=300000"]).map(|_| ())
        }
        "fork-exec" => {
            let script = format!("i=0; while [ $i -lt 300 ]; do {busybox} true || exit 1; i=$((i+1)); done");
            program(busybox, &["sh", "-c", &script]).map(|_| ())
        }
        "sha256" => {
            let script = format!("{busybox} dd if=/dev/zero bs=1M count=20 | {busybox} sha256sum");
            // `head -c 20971520 /dev/zero | sha256sum`
            expect(
                &program(busybox, &["sh", "-c", &script])?,
                "cd52d81e25f372e6fa4db2c0dfceb59862c1969cab17096da352b34950c973cc",
            )
        }
        "awk" => {
            let script = "BEGIN { for (i = 0; i < 1000000; i++) x += i * 0.5; printf \"%.0f\", x }";
            expect(&program(busybox, &["awk", script])?, "249999750000")
        }
        "ping-pong" => ping_pong().map_err(|e| e.to_string()),
        "mmap" => map_and_unmap(),
        _ => Err("there is no such work".to_owned()),
    }
}

/// Prints a line, and waits until it has left the console.
fn say(what: &str, text: &str) {
    let mut out = std::io::stdout();
    // There is nobody to complain to.
    let _ = writeln!(out, "bench {what} {text}").and_then(|()| out.flush());
    // SAFETY: a call without pointers; it fails harmlessly if standard output is no terminal.
    unsafe { libc::tcdrain(1) };
}

/// CPU time of this process and of its children that have ended, in seconds.
fn cpu_time() -> f64 {
    let of = |who| {
        // SAFETY: all zeroes is a valid value of this structure of integers.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: it fills the structure that the pointer is for, and cannot fail for these two.
        unsafe { libc::getrusage(who, &mut usage) };
        let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
        seconds(usage.ru_utime) + seconds(usage.ru_stime)
    };
    of(libc::RUSAGE_SELF) + of(libc::RUSAGE_CHILDREN)
}

fn coremark(iterations: u32) -> Result<(), String> {
    if iterations == 0 {
        return Err("how many iterations?".to_owned());
    }
    let results = coremark::run(&coremark::Config { iterations, ..coremark::Config::default() });
    if (results.crclist, results.crcmatrix, results.crcstate) == COREMARK_CRCS {
        Ok(())
    } else {
        Err("its checksums are wrong".to_owned())
    }
}

/// Runs a program and returns what it printed.
fn program(path: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(path)
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .map_err(|e| format!("{path}: {e}"))?;
    if !output.status.success() {
        return Err(format!("{path} {}: {}", arguments.join(" "), output.status));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn expect(text: &str, begin: &str) -> Result<(), String> {
    if text.starts_with(begin) { Ok(()) } else { Err(format!("its result is {text:?}")) }
}

/// Sends one byte to and fro between this process and a child.
fn ping_pong() -> std::io::Result<()> {
    let (mut my_read, mut child_write) = std::io::pipe()?;
    let (mut child_read, mut my_write) = std::io::pipe()?;
    // SAFETY: there is one thread, so the child may go on as it likes; it leaves by _exit.
    let child = unsafe { libc::fork() };
    match child {
        -1 => Err(std::io::Error::last_os_error()),
        0 => {
            let mut byte = [0];
            let mut echo = || child_read.read_exact(&mut byte).and_then(|()| child_write.write_all(&byte));
            let all = (0..PING_PONGS).try_for_each(|_| echo());
            // SAFETY: ends this process at once, without what the parent would do at its end.
            unsafe { libc::_exit(i32::from(all.is_err())) }
        }
        child => {
            let mut byte = [7];
            for _ in 0..PING_PONGS {
                my_write.write_all(&byte)?;
                my_read.read_exact(&mut byte)?;
            }
            // SAFETY: waits for the child of above; no status is wanted.
            unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
            Ok(())
        }
    }
}

fn map_and_unmap() -> Result<(), String> {
    let len = MAPPING_PAGES * PAGE;
    for i in 0..MAPPINGS {
        // SAFETY: a new private mapping anywhere.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error().to_string());
        }
        for page in 0..MAPPING_PAGES {
            // SAFETY: inside the mapping, which is writable.
            unsafe { start.cast::<u8>().add(page * PAGE).write_volatile(i as u8) };
        }
        // SAFETY: the mapping of above, which nobody uses any more.
        unsafe { libc::munmap(start, len) };
    }
    Ok(())
}

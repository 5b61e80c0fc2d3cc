//! What `cargo xtask bench` runs in guests and on the host: short pieces of work, one after the other.
//!
//! ```text
//!   bench begin NAME
//!     (a child process does the work and checks its result)
//!   bench end NAME SECONDS | bench skipped NAME: REASON | bench failed NAME: REASON
//! ```
//!
//! `SECONDS` is the CPU time of the work, for the host only: a guest's own clock cannot be trusted to run at the
//! right speed under every emulator, so whoever reads a guest's lines takes the time. Each piece of work has a
//! process of its own. So one that crashes does not end the others, and each begins with a fresh heap.
//!
//! Arguments: the path of busybox, then the work to do as `NAME=COUNT`; [`WORK`] says what the counts are.
//! `ready` does nothing: its lines tell that a user program runs. `--one-cpu` before them keeps everything on one
//! CPU, as a guest with one vCPU is; `--debian=WHERE` names the directory or disk with a Debian root file system for the
//! work that needs one. `--list` prints the names.

mod calls;
mod compute;
mod crypto;
mod float;
mod generated;
mod many;
mod memory;
mod processes;
mod programs;
mod system;
mod text;
mod threads;

use std::fmt;
use std::io::Write;
use std::process::ExitCode;

/// Why a piece of work has no time.
enum Stop {
    /// This machine cannot do it, and need not.
    Skipped(String),
    /// It did not work, or its result is wrong.
    Failed(String),
}

impl From<std::io::Error> for Stop {
    fn from(error: std::io::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

type Outcome = Result<(), Stop>;

/// What a piece of work is told.
struct Task<'a> {
    /// How often it is done.
    count: u32,
    /// Path of a busybox.
    busybox: &'a str,
    /// Directory, or block device, with a Debian root file system.
    debian: Option<&'a str>,
}

/// Name, what one of its count is, and who does it.
type Work = (&'static str, &'static str, fn(&Task) -> Outcome);

const WORK: &[Work] = &[
    ("ready", "nothing", |_| Ok(())),
    ("coremark", "iteration of CoreMark", compute::coremark),
    ("sieve", "sieve of the primes below 1 000 000", compute::sieve),
    ("sort", "sort of 100 000 numbers", compute::sort),
    ("hash-table", "table of 100 000 entries: fill, look up, empty", compute::hash_table),
    ("pointer-chase", "walk through a ring of 262 144 nodes in 16 MiB", compute::pointer_chase),
    ("n-body", "1 000 steps of five bodies", float::n_body),
    ("matrix-scalar", "product of 128 x 128 matrices, number by number", float::matrix_scalar),
    ("matrix-avx2", "product of 128 x 128 matrices with AVX2 and FMA", float::matrix_avx2),
    ("x87", "series of 100 000 terms in the x87 unit", float::x87),
    ("memcpy", "copies of 1 MiB in pieces of 16 bytes to 64 KiB", memory::copy),
    ("strings", "search and comparison of 1 MiB by strlen, memchr, strcmp, strstr", memory::strings),
    ("sha256-plain", "SHA-256 of 1 000 000 bytes without instructions for it", crypto::sha256_plain),
    ("sha256-ni", "SHA-256 of 1 000 000 bytes with SHA extensions", crypto::sha256_instructions),
    ("aes-plain", "AES-128 of 256 KiB to and fro without instructions for it", crypto::aes_plain),
    ("aes-ni", "AES-128 of 256 KiB to and fro with AES instructions", crypto::aes_instructions),
    ("interpreter", "100 000 Collatz steps by interpreted bytecode", calls::interpreter),
    ("recursion", "Fibonacci number 25 by recursive calls", calls::recursion),
    ("virtual-calls", "1 000 000 virtual calls", calls::virtual_calls),
    ("printf", "1 000 numbers printed by snprintf and read by strtod", text::printf),
    ("awk", "1 000 floating-point loops of busybox awk", text::awk),
    ("syscalls", "1 000 system calls (getppid)", system::calls),
    ("dd", "1 000 blocks of one byte copied by busybox dd", processes::dd),
    ("signals", "1 000 signals to this process", system::signals),
    ("page-faults", "first writes to 1 024 pages", system::page_faults),
    ("write-faults", "1 000 writes to protected pages, with SIGSEGV handled", system::write_faults),
    ("mmap", "1 000 times mmap, touch, munmap of 64 KiB", system::map_and_unmap),
    ("ping-pong", "1 000 round trips of a byte between two processes", processes::ping_pong),
    ("switches", "1 000 switches among 16 processes", processes::switches),
    (
        "sqlite",
        "tables of 40 000 rows filled, changed and searched by sqlite3 (needs --debian)",
        programs::sqlite,
    ),
    ("lua", "objects, tables, strings and sorting in lua5.4 (needs --debian)", programs::lua),
    ("gcc", "a C program of 2 900 lines compiled by gcc -O2, and run (needs --debian)", programs::gcc),
    ("python", "objects, tables, JSON, regular expressions in python3 (needs --debian)", programs::python),
    ("fork-exec", "100 times fork and exec of busybox by its shell", processes::fork_exec),
    (
        "jit-generate",
        "1 000 functions of 40 operations generated, each called ten times",
        generated::generate,
    ),
    ("jit-rewrite", "1 000 changes of a function's constant, each with ten calls", generated::rewrite),
    (
        "mmap-threads",
        "1 000 times mmap, touch, munmap of 64 KiB in each of two threads",
        threads::map_and_unmap,
    ),
    ("mutex", "100 000 locks of a mutex in each of two threads", threads::mutex),
    ("atomics", "100 000 atomic additions and exchanges in each of two threads", threads::atomics),
    ("futex", "1 000 times waking another thread and waiting for it", threads::futex),
    ("compute-1", "sieve of the primes below 1 000 000 in one thread", threads::compute_one),
    ("compute-2", "sieve of the primes below 1 000 000 in each of two threads", threads::compute_two),
    ("all-compute", "sieve of the primes below 100 000, shared by a thread for each CPU", many::compute),
    ("all-pipes", "100 round trips of a byte, shared by a pair of threads for two CPUs", many::pipes),
    ("all-mmap", "10 times mmap, touch, munmap of 64 KiB, shared by a thread for each CPU", many::mappings),
    ("all-mutex", "1 000 locks of a mutex, shared by a thread for each CPU", many::mutex),
    ("all-spin", "1 000 locks of a spinlock, shared by a thread for each CPU", many::spinlock),
];

const USAGE: &str = "usage: berth-guest-bench [--one-cpu] [--debian=WHERE] BUSYBOX NAME=COUNT... | --list";
/// Exit status of a child that could not do its work and has said so.
const SAID_ALREADY: i32 = 77;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut arguments = &arguments[..];
    match arguments.first().map(String::as_str) {
        Some("--list") => {
            for (name, what, _) in WORK {
                println!("{name:16} {what}");
            }
            return ExitCode::SUCCESS;
        }
        Some("--one-cpu") => {
            if let Err(e) = stay_on_one_cpu() {
                eprintln!("berth-guest-bench: this process cannot be kept on one CPU: {e}");
                return ExitCode::FAILURE;
            }
            arguments = &arguments[1..];
        }
        _ => {}
    }
    let debian = arguments.first().and_then(|first| first.strip_prefix("--debian="));
    if debian.is_some() {
        arguments = &arguments[1..];
    }
    let Some((busybox, wanted)) = arguments.split_first() else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    for argument in wanted {
        let work = argument.split_once('=').and_then(|(name, count)| {
            Some((WORK.iter().find(|(known, ..)| *known == name)?, count.parse().ok().filter(|n| *n > 0)?))
        });
        let Some((work, count)) = work else {
            eprintln!(
                "berth-guest-bench: {argument:?} is no work with a count; --list prints all work\n{USAGE}"
            );
            return ExitCode::from(2);
        };
        measure(work, &Task { count, busybox, debian });
    }
    ExitCode::SUCCESS
}

/// Does a piece of work in a child and prints how it went.
fn measure((name, _, work): &Work, task: &Task) {
    say("begin", name);
    let before = children_cpu_time();
    match start_child(|| done(name, work(task))).and_then(wait_for) {
        Ok(0) => say("end", format_args!("{name} {:.6}", children_cpu_time() - before)),
        Ok(status) if libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == SAID_ALREADY => {}
        Ok(status) if libc::WIFSIGNALED(status) => {
            say("failed", format_args!("{name}: killed by signal {}", libc::WTERMSIG(status)));
        }
        Ok(status) => say("failed", format_args!("{name}: exit status {}", libc::WEXITSTATUS(status))),
        Err(e) => say("failed", format_args!("{name}: no process for it: {e}")),
    }
}

/// In the child: says what went wrong and gives its exit status.
fn done(name: &str, outcome: Outcome) -> i32 {
    match outcome {
        Ok(()) => return 0,
        Err(Stop::Skipped(reason)) => say("skipped", format_args!("{name}: {reason}")),
        Err(Stop::Failed(reason)) => say("failed", format_args!("{name}: {reason}")),
    }
    SAID_ALREADY
}

/// Starts a child process that does `work` and ends with what that returns.
fn start_child(work: impl FnOnce() -> i32) -> std::io::Result<libc::pid_t> {
    // SAFETY: callers have no second thread, so the child may go on as it likes.
    match unsafe { libc::fork() } {
        -1 => Err(std::io::Error::last_os_error()),
        0 => {
            let status = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or(101);
            // SAFETY: ends this process at once, without what the parent does at its end.
            unsafe { libc::_exit(status) }
        }
        child => Ok(child),
    }
}

/// Waits for the end of a child: its wait status.
fn wait_for(child: libc::pid_t) -> std::io::Result<i32> {
    let mut status = 0;
    // SAFETY: `status` outlives the call.
    while unsafe { libc::waitpid(child, &mut status, 0) } != child {
        let error = std::io::Error::last_os_error();
        if error.kind() != std::io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    Ok(status)
}

/// An error unless the result of a piece of work is right.
fn expect<T: PartialEq + fmt::Debug>(what: &str, found: T, right: T) -> Outcome {
    if found == right {
        Ok(())
    } else {
        Err(Stop::Failed(format!("{what} is {found:?} and should be {right:?}")))
    }
}

/// Prints a line, and waits until it has left the console.
fn say(what: &str, text: impl fmt::Display) {
    let mut out = std::io::stdout();
    // There is nobody to complain to.
    let _ = writeln!(out, "bench {what} {text}").and_then(|()| out.flush());
    // SAFETY: a call without pointers; it fails harmlessly if standard output is no terminal.
    unsafe { libc::tcdrain(1) };
}

/// CPU time of this process's children that have ended, and of theirs, in seconds.
fn children_cpu_time() -> f64 {
    // SAFETY: all zeroes is a valid value of this structure of integers.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: it fills the structure that the pointer is for, and cannot fail with this argument.
    unsafe { libc::getrusage(libc::RUSAGE_CHILDREN, &mut usage) };
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// Keeps this process and its children on the CPU where it is.
fn stay_on_one_cpu() -> std::io::Result<()> {
    // SAFETY: a call without arguments.
    let cpu = unsafe { libc::sched_getcpu() };
    let cpu = usize::try_from(cpu).map_err(|_| std::io::Error::last_os_error())?;
    // SAFETY: all zeroes is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: it changes the set only, and checks that it has such a CPU.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: the set outlives the call and is as large as told.
    if unsafe { libc::sched_setaffinity(0, size_of_val(&set), &set) } == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

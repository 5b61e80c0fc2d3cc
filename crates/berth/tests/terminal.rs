//! The console of a running VM: the terminal's modes, Berth's keys, signals and exit codes. The guests are a
//! few instructions each, in multiboot kernels made here.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use common::{ECHOES, EXITS, SLEEPS, berth};

mod common;

/// Interrupts with an IDT of length 0: push 0; push 0; lidt [esp]; int3
const TRIPLE_FAULTS: &[u8] =
    &[0x6a, 0x00, 0x6a, 0x00, 0xbc, 0x00, 0x00, 0x20, 0x00, 0x0f, 0x01, 0x1c, 0x24, 0xcc];
const LIMIT: Duration = Duration::from_secs(20);

/// The exit code, or `None` if a signal ended it; panics if it does not end.
fn wait(child: &mut Child) -> Option<i32> {
    let end = Instant::now() + LIMIT;
    while Instant::now() < end {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    child.kill().unwrap();
    panic!("berth does not end");
}

fn signal(child: &Child, signal: libc::c_int) {
    // SAFETY: it takes numbers; the child has not been waited for, so the number is still its own.
    assert_eq!(unsafe { libc::kill(child.id() as libc::pid_t, signal) }, 0);
}

/// A VM on a terminal of its own.
struct OnTerminal {
    child: Child,
    /// The side of the person who types.
    user: File,
    /// The side of the program, kept open for its settings.
    program: OwnedFd,
    before: String,
    seen: Vec<u8>,
    _directory: tempfile::TempDir,
}

impl OnTerminal {
    fn start(code: &[u8]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (mut user, mut program) = (0, 0);
        let null = std::ptr::null_mut();
        // SAFETY: openpty writes two descriptors, which are new; null pointers mean defaults.
        let (user, program) = unsafe {
            assert_eq!(libc::openpty(&raw mut user, &raw mut program, null, null.cast(), null.cast()), 0);
            libc::fcntl(user, libc::F_SETFL, libc::O_NONBLOCK);
            (File::from_raw_fd(user), OwnedFd::from_raw_fd(program))
        };
        let side = || Stdio::from(program.try_clone().unwrap());
        let before = settings(&program);
        let child = berth(code, &directory).stdin(side()).stdout(side()).stderr(side()).spawn().unwrap();
        let mut this = Self { child, user, program, before, seen: Vec::new(), _directory: directory };
        this.expect("Ctrl-A h");
        let end = Instant::now() + LIMIT;
        while settings(&this.program) == this.before {
            assert!(Instant::now() < end, "the terminal does not become raw");
        }
        this
    }

    fn type_keys(&mut self, keys: &[u8]) {
        self.user.write_all(keys).unwrap();
    }

    /// Waits until the terminal shows `text`, and forgets what came before it.
    fn expect(&mut self, text: &str) {
        let end = Instant::now() + LIMIT;
        loop {
            let found = self.seen.windows(text.len()).position(|w| w == text.as_bytes());
            if let Some(at) = found {
                self.seen.drain(..at + text.len());
                return;
            }
            assert!(Instant::now() < end, "no {text:?} in {:?}", String::from_utf8_lossy(&self.seen));
            let mut buffer = [0; 1024];
            match self.user.read(&mut buffer) {
                Ok(n) => self.seen.extend(&buffer[..n]),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// Waits for the end; the terminal must be as it was.
    fn end(&mut self) -> Option<i32> {
        let code = wait(&mut self.child);
        assert_eq!(settings(&self.program), self.before, "the terminal is not restored");
        code
    }
}

/// All modes of a terminal, comparable.
fn settings(terminal: &OwnedFd) -> String {
    let mut settings = std::mem::MaybeUninit::<libc::termios>::zeroed();
    // SAFETY: tcgetattr fills the settings when it returns 0, which is checked.
    let settings = unsafe {
        assert_eq!(libc::tcgetattr(terminal.as_raw_fd(), settings.as_mut_ptr()), 0);
        settings.assume_init()
    };
    format!("{:x} {:x} {:x} {:x}", settings.c_iflag, settings.c_oflag, settings.c_cflag, settings.c_lflag)
}

#[test]
fn keys_reach_the_guest_and_its_output_the_terminal() {
    let mut vm = OnTerminal::start(ECHOES);
    vm.type_keys(b"a\x03b");
    vm.expect("a\x03b");
    vm.type_keys(b"Q");
    assert_eq!(vm.end(), Some(1));
}

#[test]
fn ctrl_a_x_ends_a_guest_that_never_reads() {
    let mut vm = OnTerminal::start(SLEEPS);
    vm.type_keys(&[b'z'; 2000]);
    vm.type_keys(b"\x01h");
    vm.expect("Ctrl-A x");
    vm.type_keys(b"\x01");
    vm.type_keys(b"x");
    vm.expect("the VM was ended");
    assert_eq!(vm.end(), Some(0));
}

#[test]
fn a_second_signal_ends_the_vm_at_once() {
    let mut vm = OnTerminal::start(SLEEPS);
    let start = Instant::now();
    signal(&vm.child, libc::SIGTERM);
    std::thread::sleep(Duration::from_millis(200));
    signal(&vm.child, libc::SIGTERM);
    assert_eq!(vm.end(), Some(1));
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_guest_without_acpi_is_ended_after_its_time() {
    let mut vm = OnTerminal::start(SLEEPS);
    let start = Instant::now();
    signal(&vm.child, libc::SIGTERM);
    vm.expect("did not power off within 10 s");
    assert_eq!(vm.end(), Some(1));
    assert!(start.elapsed() >= Duration::from_secs(9));
}

#[test]
fn the_terminal_is_restored_when_berth_aborts() {
    let mut vm = OnTerminal::start(SLEEPS);
    signal(&vm.child, libc::SIGABRT);
    assert_eq!(vm.end(), None);
}

#[test]
fn a_triple_fault_is_told_with_the_state_of_the_cpu() {
    let directory = tempfile::tempdir().unwrap();
    let output = berth(TRIPLE_FAULTS, &directory).stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.to_lowercase().contains("triple fault") && said.to_lowercase().contains("rip"), "{said}");
}

#[test]
fn the_debug_exit_port_sets_the_exit_code() {
    let directory = tempfile::tempdir().unwrap();
    let mut vm = berth(EXITS, &directory).stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    assert_eq!(wait(&mut vm), Some(0x21));
}

#[test]
fn pipes_carry_every_byte_in_both_directions() {
    let directory = tempfile::tempdir().unwrap();
    let input: Vec<u8> = (0..50_000u32).map(|i| (i * 7) as u8).filter(|b| *b != b'Q').chain([b'Q']).collect();
    let mut vm = berth(ECHOES, &directory).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut stdin, mut stdout) = (vm.stdin.take().unwrap(), vm.stdout.take().unwrap());
    let sent = input.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&sent).unwrap());
    let mut output = Vec::new();
    stdout.read_to_end(&mut output).unwrap();
    writer.join().unwrap();
    assert_eq!(wait(&mut vm), Some(1));
    assert!(output == input, "{} bytes came back of {}", output.len(), input.len());
}

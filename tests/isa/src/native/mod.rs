//! The native side: cases on the CPU itself, in a child process.

mod child;

use std::ffi::CString;
use std::io;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::Ordering;
use std::time::Duration;

use berth_cpu::XsaveArea;

use crate::case::{Case, CodeMode, NoOutcome, Outcome};
use crate::layout::{self, Image, selector};
use child::{Exchange, MAILBOX_LEN, Mailbox, SHARED_LEN, problem};

/// Who may use the mailbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum FutexWord {
    /// The parent.
    Done = 0,
    /// The child: there is a case.
    Ready = 1,
    /// The child has not started yet.
    Starting = 2,
}

/// Time that a case may take, unless [`Native::timeout`] is changed.
pub const TIMEOUT: Duration = Duration::from_secs(3);

/// The host cannot execute cases natively.
#[derive(Debug, thiserror::Error)]
pub enum NativeError {
    /// The kernel refused something.
    #[error("the host refused {what} for the native process: {source}")]
    Host {
        /// What.
        what: &'static str,
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// The child could not start.
    #[error("the native process could not start: {0}")]
    Start(String),
}

/// The CPU of the host, as unprivileged programs have it.
pub struct Native {
    mailbox: NonNull<Mailbox>,
    fd: i32,
    child: Option<libc::pid_t>,
    /// Time that a case may take.
    pub timeout: Duration,
}

// SAFETY: the mapping is used through `&mut self` alone, and by the child in turns that the futex word orders.
unsafe impl Send for Native {}

impl Native {
    /// Starts the child process.
    ///
    /// # Errors
    /// [`NativeError`] when the host lacks something.
    pub fn new() -> Result<Self, NativeError> {
        let host = |what| NativeError::Host { what, source: io::Error::last_os_error() };
        let name = CString::from(c"berth-isa");
        // SAFETY: plain system calls; results are checked.
        let (fd, map) = unsafe {
            let fd = libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 || libc::ftruncate(fd, SHARED_LEN as i64) != 0 {
                return Err(host("shared memory"));
            }
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let map = libc::mmap(null_mut(), SHARED_LEN, protection, libc::MAP_SHARED, fd, 0);
            (fd, map)
        };
        if map == libc::MAP_FAILED {
            return Err(host("a mapping of shared memory"));
        }
        let mailbox =
            NonNull::new(map.cast::<Mailbox>()).ok_or_else(|| host("a mapping of shared memory"))?;
        const { assert!(size_of::<Mailbox>() <= MAILBOX_LEN) };
        let mut native = Self { mailbox, fd, child: None, timeout: TIMEOUT };
        native.start()?;
        Ok(native)
    }

    fn start(&mut self) -> Result<(), NativeError> {
        // SAFETY: there is no child that uses the mailbox. After fork the child calls nothing that needs the locks
        // of other threads: `child::main` makes system calls and copies memory.
        let pid = unsafe {
            let mailbox = self.mailbox.as_ptr();
            (*mailbox).word.store(FutexWord::Starting as u32, Ordering::SeqCst);
            (*mailbox).parent = libc::getpid();
            match libc::fork() {
                0 => child::main(mailbox, self.fd),
                pid => pid,
            }
        };
        if pid < 0 {
            return Err(NativeError::Host { what: "a process", source: io::Error::last_os_error() });
        }
        self.child = Some(pid);
        self.wait(FutexWord::Starting).map_err(|e| NativeError::Start(e.to_string()))?;
        let io = self.exchange();
        let text = match io.problem {
            problem::NO_XSAVE_FRAME => "signal frames have no XSAVE area".to_owned(),
            problem::MAP => "the addresses of the areas are not free".to_owned(),
            _ if io.trap != u64::from(berth_cpu::bits::vector::BP) => format!("INT3 gives trap {}", io.trap),
            _ if io.cs as u16 != selector::CODE64 || io.cs >> 48 != u64::from(selector::DATA) => {
                format!("CS and SS are {:#x} and {:#x}", io.cs & 0xffff, io.cs >> 48)
            }
            _ => return Ok(()),
        };
        Err(NativeError::Start(text))
    }

    /// Waits until the child is done. `busy`: what the word is until then.
    fn wait(&mut self, busy: FutexWord) -> Result<(), NoOutcome> {
        let start = std::time::Instant::now();
        loop {
            // SAFETY: the word is in our mapping; the system call only waits.
            let now = unsafe {
                let word = &(*self.mailbox.as_ptr()).word;
                if word.load(Ordering::SeqCst) == busy as u32 {
                    let short = libc::timespec { tv_sec: 0, tv_nsec: 100_000_000 };
                    libc::syscall(
                        libc::SYS_futex,
                        word.as_ptr(),
                        libc::FUTEX_WAIT,
                        busy as u32,
                        &raw const short,
                    );
                }
                word.load(Ordering::SeqCst)
            };
            if now != busy as u32 {
                return Ok(());
            }
            if let Some(pid) = self.child {
                let mut status = 0;
                // SAFETY: the child is ours and has not been waited for.
                if unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) } == pid {
                    self.child = None;
                    return Err(NoOutcome::Child(format!("wait status {status:#x}")));
                }
            }
            if start.elapsed() > self.timeout {
                self.kill();
                return Err(NoOutcome::Timeout(self.timeout.as_millis() as u64));
            }
        }
    }

    fn kill(&mut self) {
        if let Some(pid) = self.child.take() {
            // SAFETY: the child is ours and has not been waited for, so the number is still its.
            unsafe {
                libc::kill(pid, libc::SIGKILL);
                libc::waitpid(pid, null_mut(), 0);
            }
        }
    }

    fn exchange(&mut self) -> Exchange {
        // SAFETY: the child has handed the mailbox over.
        unsafe { (*self.mailbox.as_ptr()).io.clone() }
    }

    fn areas(&mut self) -> *mut u8 {
        // SAFETY: the mapping has SHARED_LEN bytes.
        unsafe { self.mailbox.as_ptr().cast::<u8>().add(MAILBOX_LEN) }
    }

    /// Executes a case. `image` is what the areas hold before.
    ///
    /// # Errors
    /// [`NoOutcome`]; the next case gets a new process.
    pub fn run(&mut self, case: &Case, image: &Image) -> Result<Outcome, NoOutcome> {
        if self.child.is_none() {
            self.start().map_err(|e| NoOutcome::Child(e.to_string()))?;
        }
        let areas = self.areas();
        // SAFETY: the areas are behind the mailbox in the same mapping; the child is waiting.
        unsafe {
            image.0.as_ptr().copy_to_nonoverlapping(areas, layout::IMAGE_LEN);
            let io = &mut (*self.mailbox.as_ptr()).io;
            io.fpu = case.fpu.0;
            io.gpr = case.gpr;
            io.rip = case.start();
            io.rflags = case.rflags;
            io.cs = u64::from(match case.mode {
                CodeMode::Bits64 => selector::CODE64,
                CodeMode::Bits32 => selector::CODE32,
            });
            (io.fs_base, io.gs_base) = (layout::FS_BASE, layout::GS_BASE);
            let word = &(*self.mailbox.as_ptr()).word;
            word.store(FutexWord::Ready as u32, Ordering::SeqCst);
            libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, 1);
        }
        self.wait(FutexWord::Ready)?;
        let io = self.exchange();
        let mut image = Image(vec![0; layout::IMAGE_LEN].into());
        // SAFETY: as above.
        unsafe { areas.copy_to_nonoverlapping(image.0.as_mut_ptr(), layout::IMAGE_LEN) };
        Ok(Outcome {
            vector: io.trap as u8,
            error: io.error as u32,
            cr2: io.cr2,
            rip: io.rip,
            gpr: io.gpr,
            rflags: io.rflags,
            fs_base: io.fs_base,
            gs_base: io.gs_base,
            fpu: standard_form(io.fpu),
            image,
        })
    }
}

/// Components that XSTATE_BV calls initial get their initial values.
fn standard_form(bytes: [u8; berth_cpu::XSAVE_AREA_SIZE]) -> XsaveArea {
    let present = bytes[512];
    let initial = XsaveArea::default();
    let mut area = XsaveArea(bytes);
    for (bit, ranges) in [(0, [0..24, 32..160]), (1, [160..416, 0..0]), (2, [576..832, 0..0])] {
        if present >> bit & 1 == 0 {
            for range in ranges {
                area.0[range.clone()].copy_from_slice(&initial.0[range]);
            }
        }
    }
    area
}

impl Drop for Native {
    fn drop(&mut self) {
        self.kill();
        // SAFETY: mapping and file are ours, and nothing uses them any more.
        unsafe {
            libc::munmap(self.mailbox.as_ptr().cast(), SHARED_LEN);
            libc::close(self.fd);
        }
    }
}

//! The terminal: raw while a VM has it, and as it was before on every way out.
//!
//! The ways out: [`RawTerminal`] is dropped; [`restore`] before the process exits; a panic; a deadly signal from
//! a fault (one sent by `kill -9` cannot be caught).

use std::io;
use std::mem::MaybeUninit;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// Signals that a fault in this process raises.
const FAULTS: [libc::c_int; 5] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGABRT];

/// Settings of the terminal before it became raw, with the raw ones.
static SETTINGS: OnceLock<(libc::termios, libc::termios)> = OnceLock::new();
static RAW: AtomicBool = AtomicBool::new(false);
/// What was done at each signal of [`FAULTS`] before.
static OLD_ACTIONS: OnceLock<[libc::sigaction; FAULTS.len()]> = OnceLock::new();

/// Whether standard input is a terminal.
pub fn is_terminal() -> bool {
    io::IsTerminal::is_terminal(&io::stdin())
}

/// Whether the terminal is raw now.
pub fn is_raw() -> bool {
    RAW.load(Ordering::Acquire)
}

/// Columns and rows of the terminal on standard output, if it has a size.
pub fn size() -> Option<(u16, u16)> {
    let mut size = MaybeUninit::<libc::winsize>::zeroed();
    // SAFETY: TIOCGWINSZ writes a winsize; all-zero bytes are a value too, should it fail.
    let (result, size) = unsafe {
        let result = libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, size.as_mut_ptr());
        (result, size.assume_init())
    };
    (result == 0 && size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

/// Makes the terminal on standard input raw for as long as it lives.
pub struct RawTerminal(());

impl RawTerminal {
    /// Passes every key on as it is. Only one at a time can live.
    ///
    /// # Errors
    /// What the host says when standard input is no terminal.
    pub fn enter() -> io::Result<Self> {
        let mut settings = MaybeUninit::<libc::termios>::uninit();
        // SAFETY: tcgetattr fills the settings when it returns 0; cfmakeraw changes settings that are filled.
        let (before, raw) = unsafe {
            if libc::tcgetattr(libc::STDIN_FILENO, settings.as_mut_ptr()) != 0 {
                return Err(io::Error::last_os_error());
            }
            let before = settings.assume_init();
            let mut raw = before;
            libc::cfmakeraw(&raw mut raw);
            (before, raw)
        };
        SETTINGS.get_or_init(|| (before, raw));
        restore_at_faults();
        make_raw();
        Ok(Self(()))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Makes the terminal raw again, after something outside changed it, such as a shell that stopped us.
pub fn make_raw() {
    if let Some((_, raw)) = SETTINGS.get() {
        RAW.store(true, Ordering::Release);
        set(raw);
    }
}

/// Gives the terminal its settings back. May be called at any time, from signal handlers too.
pub fn restore() {
    if RAW.swap(false, Ordering::AcqRel)
        && let Some((before, _)) = SETTINGS.get()
    {
        set(before);
    }
}

fn set(settings: &libc::termios) {
    // SAFETY: the pointer is to settings that tcgetattr filled. A terminal that went away needs nothing.
    unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, settings) };
}

/// From now on a panic on any thread restores the terminal, says what happened and ends the process.
pub fn end_at_panics() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        before(info);
        // A monitor that lost one of its threads cannot be trusted with a guest.
        crate::log::message("this is a fault in Berth, not in the guest; the VM is ended");
        std::process::exit(1);
    }));
}

fn restore_at_faults() {
    OLD_ACTIONS.get_or_init(|| {
        FAULTS.map(|signal| {
            let mut old = MaybeUninit::<libc::sigaction>::zeroed();
            let mut new = MaybeUninit::<libc::sigaction>::zeroed();
            // SAFETY: all-zero bytes are a sigaction; the handler has the type that SA_SIGINFO asks for and
            // does only what is safe in a handler. It runs on the thread's alternate stack if there is one.
            unsafe {
                let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = at_fault;
                let new = new.assume_init_mut();
                new.sa_sigaction = handler as usize;
                new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                libc::sigaction(signal, new, old.as_mut_ptr());
                old.assume_init()
            }
        })
    });
}

/// Restores the terminal and lets happen what would have happened without us: the faulting instruction runs
/// again after the return, and a signal that was sent is sent again.
extern "C" fn at_fault(signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    restore();
    let old = FAULTS.iter().position(|s| *s == signal).and_then(|i| OLD_ACTIONS.get()?.get(i));
    // SAFETY: the kernel passes a valid `info`; `old` is what sigaction returned, or default if it has not yet
    // been noted; raise and sigaction are safe in a handler.
    unsafe {
        match old {
            Some(old) => libc::sigaction(signal, old, std::ptr::null_mut()),
            None => libc::signal(signal, libc::SIG_DFL) as libc::c_int,
        };
        if (*info).si_code <= 0 {
            libc::raise(signal);
        }
    }
}

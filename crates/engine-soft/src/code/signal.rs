//! Host signals inside translated code.
//!
//! - SIGSEGV at a poll: the vCPU was asked to leave.
//! - SIGSEGV elsewhere: a copied instruction met what hardware answers with #GP (an unaligned vector operand,
//!   reserved MXCSR bits).
//! - SIGFPE: #DE, or an unmasked floating-point exception.
//! - SIGILL: #UD.
//!
//! The handler does not decide anything: it notes what happened in the state block and makes the thread go on
//! at the exit stub. Everything else happens in the run loop, outside of signal context.

use std::cell::Cell;
use std::io;
use std::mem::MaybeUninit;
use std::ptr::null_mut;
use std::sync::Once;

use crate::state::State;

/// What the handler needs to know about the vCPU that runs on this thread.
#[derive(Clone, Copy)]
struct Current {
    code_start: u64,
    code_end: u64,
    exit: u64,
    state: *mut State,
}

thread_local! {
    static CURRENT: Cell<Option<Current>> = const { Cell::new(None) };
}

static INSTALL: Once = Once::new();
static mut PREVIOUS: [MaybeUninit<libc::sigaction>; SIGNALS.len()] =
    [const { MaybeUninit::zeroed() }; SIGNALS.len()];
const SIGNALS: [libc::c_int; 4] = [libc::SIGSEGV, libc::SIGFPE, libc::SIGILL, libc::SIGBUS];

/// Lets signals on this thread become exits while the value lives.
pub(crate) struct Guard {
    stack: *mut libc::c_void,
}

const STACK_SIZE: usize = 64 << 10;

impl Guard {
    /// `code`: address range of the code cache; `exit`: where to go on; `state`: of the vCPU of this thread.
    pub(crate) fn new(code: (u64, u64), exit: u64, state: *mut State) -> io::Result<Self> {
        INSTALL.call_once(install);
        // The guest's stack pointer is not in rsp, so the thread's own stack would do; but Rust's runtime also
        // handles SIGSEGV and wants an alternate stack for overflows, which this thread may not have.
        // SAFETY: an anonymous mapping at an address that the kernel chooses; the result is checked.
        let stack = unsafe {
            libc::mmap(
                null_mut(),
                STACK_SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if stack == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let description = libc::stack_t { ss_sp: stack, ss_flags: 0, ss_size: STACK_SIZE };
        // SAFETY: the description is of a mapping that lives until `drop` disables it.
        if unsafe { libc::sigaltstack(&description, null_mut()) } != 0 {
            let error = io::Error::last_os_error();
            // SAFETY: the mapping was just made and is not used.
            unsafe { libc::munmap(stack, STACK_SIZE) };
            return Err(error);
        }
        CURRENT.set(Some(Current { code_start: code.0, code_end: code.1, exit, state }));
        Ok(Self { stack })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        CURRENT.set(None);
        let off = libc::stack_t { ss_sp: null_mut(), ss_flags: libc::SS_DISABLE, ss_size: 0 };
        // SAFETY: disables the alternate stack before it is unmapped; no signal runs on it now, because this is
        // ordinary code of the same thread.
        unsafe {
            libc::sigaltstack(&off, null_mut());
            libc::munmap(self.stack, STACK_SIZE);
        }
    }
}

fn install() {
    for (i, signal) in SIGNALS.into_iter().enumerate() {
        // SAFETY: `sigaction` is filled completely; the handler is async-signal-safe (see there). PREVIOUS is
        // only written here, once, before any handler of ours can read it.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
            libc::sigemptyset(&mut action.sa_mask);
            let previous = &raw mut PREVIOUS;
            libc::sigaction(signal, &action, (*previous)[i].as_mut_ptr());
        }
    }
}

/// Async-signal-safe: reads a constant-initialised thread-local, writes plain memory, calls nothing else.
extern "C" fn handler(signal: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid pointer for a handler with SA_SIGINFO.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    let regs = &mut context.uc_mcontext.gregs;
    let pc = regs[libc::REG_RIP as usize] as u64;
    if let Some(current) = CURRENT.get()
        && (current.code_start..current.code_end).contains(&pc)
    {
        // SAFETY: the state belongs to the vCPU that executes on this very thread, inside translated code, so no
        // Rust code is using it.
        let state = unsafe { &mut *current.state };
        state.exit_value = pc;
        let trap = regs[libc::REG_TRAPNO as usize] as u32;
        state.scratch[2] = u64::from(signal as u32) | u64::from(trap) << 32;
        state.scratch[3] = regs[libc::REG_EFL as usize] as u64;
        regs[libc::REG_RIP as usize] = current.exit as i64;
        return;
    }
    // Not ours: whoever handled it before gets it, by raising it again under the old action.
    if let Some(i) = SIGNALS.iter().position(|&s| s == signal) {
        // SAFETY: PREVIOUS[i] was filled by `install`; the faulting instruction runs again and raises again.
        unsafe {
            let previous = &raw const PREVIOUS;
            libc::sigaction(signal, (*previous)[i].as_ptr(), null_mut());
        }
    }
}

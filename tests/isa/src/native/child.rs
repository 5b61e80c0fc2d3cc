//! The process that executes cases on the CPU itself.
//!
//! It lives in a signal handler: a case is started by returning from the signal, with the case's registers in
//! the frame that the kernel restores, and ends with the next signal, whose frame has the outcome. So no
//! instruction of ours runs between.
//!
//! The handler runs with the FS base of the case. It uses no thread-local storage and nothing of the C library
//! but memory copies; system calls are made by hand.

use std::arch::{asm, naked_asm};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

use super::FutexWord;
use crate::layout::{AREAS, IMAGE_LEN, selector};

/// x87, SSE and AVX state in XSAVE's standard form.
pub(super) const FPU_LEN: usize = berth_cpu::XSAVE_AREA_SIZE;

/// What parent and child tell each other, at the start of the shared memory.
#[repr(C, align(64))]
pub(super) struct Mailbox {
    pub word: AtomicU32,
    pub parent: i32,
    pub io: Exchange,
}

/// Input of a case, then its output.
#[repr(C, align(64))]
#[derive(Clone)]
pub(super) struct Exchange {
    pub fpu: [u8; FPU_LEN],
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub cs: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub trap: u64,
    pub error: u64,
    pub cr2: u64,
    /// Not 0: something is not as the child needs it; the text is in `super::describe`.
    pub problem: u64,
}

/// Values of [`Exchange::problem`].
pub(super) mod problem {
    pub const NO_XSAVE_FRAME: u64 = 1;
    pub const MAP: u64 = 2;
}

/// The shared memory: mailbox, then the areas.
pub(super) const MAILBOX_LEN: usize = 2 * 4096;
pub(super) const SHARED_LEN: usize = MAILBOX_LEN + IMAGE_LEN;

static MAILBOX: AtomicPtr<Mailbox> = AtomicPtr::new(null_mut());

const ARCH_SET_GS: u64 = 0x1001;
const ARCH_SET_FS: u64 = 0x1002;
const ARCH_GET_FS: u64 = 0x1003;
const ARCH_GET_GS: u64 = 0x1004;
const SIGNALS: [libc::c_int; 6] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP, libc::SIGSYS];

/// A system call without errno.
///
/// # Safety
/// As the system call.
unsafe fn syscall(number: libc::c_long, a: u64, b: u64, c: u64, d: u64) -> i64 {
    let result: i64;
    // SAFETY: the registers that SYSCALL destroys are declared; the rest is the caller's promise.
    unsafe {
        asm!("syscall", inlateout("rax") number => result, in("rdi") a, in("rsi") b, in("rdx") c,
             in("r10") d, out("rcx") _, out("r11") _, options(nostack));
    }
    result
}

/// The child's main function, called right after fork.
///
/// # Safety
/// Only in a child process without other threads. `mailbox` is shared memory of [`SHARED_LEN`] bytes, of which
/// `fd` is the file.
pub(super) unsafe fn main(mailbox: *mut Mailbox, fd: i32) -> ! {
    MAILBOX.store(mailbox, Ordering::SeqCst);
    // SAFETY: plain system calls on memory of our own. The areas' addresses are free in an ordinary process;
    // MAP_FIXED_NOREPLACE makes sure. The alternate stack is a fresh mapping. No data segment register matters to
    // 64-bit code; 0x2b is the selector that Linux has for it.
    unsafe {
        let mut offset = MAILBOX_LEN as i64;
        for area in AREAS {
            let protection = libc::PROT_READ
                | if area.write { libc::PROT_WRITE } else { 0 }
                | if area.execute { libc::PROT_EXEC } else { 0 };
            let flags = libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE | libc::MAP_POPULATE;
            let at = area.start as *mut libc::c_void;
            if libc::mmap(at, area.len as usize, protection, flags, fd, offset) != at {
                finish(mailbox, problem::MAP);
            }
            offset += area.len as i64;
        }
        const STACK_LEN: usize = 128 << 10;
        let stack = libc::mmap(
            null_mut(),
            STACK_LEN,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        let alternate = libc::stack_t { ss_sp: stack, ss_flags: 0, ss_size: STACK_LEN };
        if stack == libc::MAP_FAILED || libc::sigaltstack(&alternate, null_mut()) != 0 {
            finish(mailbox, problem::MAP);
        }
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = entry as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigfillset(&mut action.sa_mask);
        for signal in SIGNALS {
            libc::sigaction(signal, &action, null_mut());
        }
        asm!("mov ds, {0:x}", "mov es, {0:x}", in(reg) u32::from(selector::DATA), options(nostack));
        (*mailbox).io.trap = u64::MAX;
        asm!("int3");
    }
    finish(mailbox, 0)
}

fn finish(mailbox: *mut Mailbox, problem: u64) -> ! {
    // SAFETY: the mailbox is mapped as long as the process lives, and the parent does not access it before DONE.
    unsafe {
        (*mailbox).io.problem = problem;
        post(mailbox, FutexWord::Done);
        libc::_exit(1)
    }
}

/// Hands the mailbox to the parent.
///
/// # Safety
/// `mailbox` is mapped.
unsafe fn post(mailbox: *mut Mailbox, word: FutexWord) {
    // SAFETY: the futex word is in mapped memory, and the call has no other effect.
    unsafe {
        (*mailbox).word.store(word as u32, Ordering::SeqCst);
        let address = &raw const (*mailbox).word as u64;
        syscall(libc::SYS_futex, address, libc::FUTEX_WAKE as u64, 1, 0);
    }
}

/// Waits until the parent has put a case into the mailbox; ends the process when there is no parent.
///
/// # Safety
/// `mailbox` is mapped.
unsafe fn wait(mailbox: *mut Mailbox) {
    let second = libc::timespec { tv_sec: 1, tv_nsec: 0 };
    // SAFETY: the futex word and the timeout are mapped.
    unsafe {
        let word = &(*mailbox).word;
        while word.load(Ordering::SeqCst) == FutexWord::Done as u32 {
            let address = word.as_ptr() as u64;
            let done = FutexWord::Done as u64;
            syscall(libc::SYS_futex, address, libc::FUTEX_WAIT as u64, done, &raw const second as u64);
            if syscall(libc::SYS_getppid, 0, 0, 0, 0) != i64::from((*mailbox).parent) {
                syscall(libc::SYS_exit_group, 0, 0, 0, 0);
            }
        }
    }
}

/// Registers of a signal frame in encoding order.
const GPR: [libc::c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// First word of what Linux puts into bytes 464 to 511 of the frame's FXSAVE image if an XSAVE area follows.
const FP_XSTATE_MAGIC1: u32 = 0x4650_5853;

/// The kernel starts a handler with the case's RFLAGS.AC, with which compiled code does not run.
#[unsafe(naked)]
extern "C" fn entry(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    naked_asm!("push 0x202", "popfq", "jmp {}", sym handler)
}

extern "C" fn handler(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let mailbox = MAILBOX.load(Ordering::Relaxed);
    // SAFETY: the kernel passes a valid frame, which only this handler uses. The frame's FPU area is as long as an
    // XSAVE area with AVX, which the magic number says. The mailbox is ours between `wait` and `post`. The registers
    // that the frame gets back are the case's: it can execute nothing but the areas' code, and everything else of
    // this process is at addresses that a case does not aim at; should it hit, this process alone is harmed.
    unsafe {
        let context = &mut *context.cast::<libc::ucontext_t>();
        let regs = &mut context.uc_mcontext.gregs;
        let fpu = context.uc_mcontext.fpregs.cast::<u8>();
        if fpu.add(464).cast::<u32>().read_unaligned() != FP_XSTATE_MAGIC1 {
            finish(mailbox, problem::NO_XSAVE_FRAME);
        }
        let io = &mut (*mailbox).io;
        for (to, from) in io.gpr.iter_mut().zip(GPR) {
            *to = regs[from as usize] as u64;
        }
        io.rip = regs[libc::REG_RIP as usize] as u64;
        io.rflags = regs[libc::REG_EFL as usize] as u64;
        io.cs = regs[libc::REG_CSGSFS as usize] as u64;
        io.trap = regs[libc::REG_TRAPNO as usize] as u64;
        io.error = regs[libc::REG_ERR as usize] as u64;
        io.cr2 = regs[libc::REG_CR2 as usize] as u64;
        fpu.copy_to_nonoverlapping(io.fpu.as_mut_ptr(), FPU_LEN);
        syscall(libc::SYS_arch_prctl, ARCH_GET_FS, &raw mut io.fs_base as u64, 0, 0);
        syscall(libc::SYS_arch_prctl, ARCH_GET_GS, &raw mut io.gs_base as u64, 0, 0);
        io.problem = 0;
        post(mailbox, FutexWord::Done);

        wait(mailbox);
        let io = &(*mailbox).io;
        for (from, to) in io.gpr.iter().zip(GPR) {
            regs[to as usize] = *from as i64;
        }
        regs[libc::REG_RIP as usize] = io.rip as i64;
        regs[libc::REG_EFL as usize] = io.rflags as i64;
        regs[libc::REG_CSGSFS as usize] = (io.cs & 0xffff | u64::from(selector::DATA) << 48) as i64;
        // The legacy region without the bytes that Linux keeps for itself, XSTATE_BV, and AVX.
        io.fpu.as_ptr().copy_to_nonoverlapping(fpu, 416);
        fpu.add(512).cast::<u64>().write_unaligned(7);
        io.fpu.as_ptr().add(576).copy_to_nonoverlapping(fpu.add(576), FPU_LEN - 576);
        syscall(libc::SYS_arch_prctl, ARCH_SET_FS, io.fs_base, 0, 0);
        syscall(libc::SYS_arch_prctl, ARCH_SET_GS, io.gs_base, 0, 0);
        // What the return from a signal does not restore: segments that 32-bit code which went astray may have loaded,
        // and flags such as ID and NT.
        asm!("mov ds, {0:x}", "mov es, {0:x}", in(reg) u32::from(selector::DATA), options(nostack));
        asm!("push 0x202", "popfq");
    }
}

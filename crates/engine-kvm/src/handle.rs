//! Stopping a vCPU from other threads: `kvm_run.immediate_exit` and a signal (api.rst 5, "immediate_exit").
//!
//! The field makes the next KVM_RUN return at once; the signal ends one that is under way. Whoever stops sets the
//! wish first, then the field, then sends the signal; the vCPU clears the field first and then looks for the wish.
//! So the wish is seen whatever comes in between.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use berth_engine::VcpuHandle;
use kvm_ioctls::VcpuFd;
use parking_lot::Mutex;

/// The thread that is inside `run`.
struct Running {
    thread: libc::pthread_t,
    /// `kvm_run.immediate_exit` of the vCPU that it runs.
    immediate_exit: *const AtomicU8,
}

// SAFETY: the pointer is used only under the lock of `KvmHandle::running`, and that holds it only while the vCPU's
// descriptor, which owns the mapping, is borrowed by `run`.
unsafe impl Send for Running {}

/// A vCPU as other threads see it.
#[derive(Default)]
pub struct KvmHandle {
    stop: AtomicBool,
    running: Mutex<Option<Running>>,
}

impl KvmHandle {
    /// Whether a stop was asked for since the last call.
    pub fn take_stop(&self) -> bool {
        self.stop.swap(false, Ordering::SeqCst)
    }

    /// From now on this thread runs `vcpu`; until the guard is dropped, which comes before the vCPU goes.
    ///
    /// # Errors
    /// When the signal cannot be set up.
    pub fn enter(&self, vcpu: &mut VcpuFd) -> io::Result<Entered<'_>> {
        prepare_signal()?;
        let immediate_exit: *mut u8 = &mut vcpu.get_kvm_run().immediate_exit;
        // SAFETY: takes no argument and cannot fail.
        let thread = unsafe { libc::pthread_self() };
        let mut running = self.running.lock();
        *running = Some(Running { thread, immediate_exit: immediate_exit.cast() });
        if self.stop.load(Ordering::SeqCst) {
            // It was asked for before there was a field to set.
            vcpu.set_kvm_immediate_exit(1);
        }
        drop(running);
        Ok(Entered(self))
    }

    fn interrupt(&self) {
        let running = self.running.lock();
        let Some(target) = &*running else { return };
        // SAFETY: the mapping is there while `running` is set (see `enter`), and this byte of it is written by
        // vCPU and stoppers only, the kernel reads it.
        unsafe { &*target.immediate_exit }.store(1, Ordering::SeqCst);
        // SAFETY: takes no argument and cannot fail.
        let me = unsafe { libc::pthread_self() };
        if target.thread != me {
            // SAFETY: the thread is inside `run`, so it exists; the handler of the signal does nothing.
            unsafe { libc::pthread_kill(target.thread, signal()) };
        }
    }
}

impl VcpuHandle for KvmHandle {
    /// What an APIC has the kernel sees itself; this is for the PIC of devices, which `vcpu` looks at before it enters
    /// the guest.
    fn kick(&self) {
        self.interrupt();
    }

    fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.interrupt();
    }
}

/// While this lives, stops reach the vCPU's thread.
pub struct Entered<'a>(&'a KvmHandle);

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        *self.0.running.lock() = None;
    }
}

/// The signal that ends KVM_RUN.
fn signal() -> libc::c_int {
    libc::SIGRTMIN() + 1
}

extern "C" fn ignore(_: libc::c_int) {}

/// Installs the handler, once a process, and lets this thread have the signal.
fn prepare_signal() -> io::Result<()> {
    static HANDLER: OnceLock<Result<(), i32>> = OnceLock::new();
    let installed = HANDLER.get_or_init(|| {
        // SAFETY: all zeros is a valid value of the plain C structure.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = ignore as *const () as usize;
        // Other system calls of the thread go on; KVM_RUN returns anyway.
        action.sa_flags = libc::SA_RESTART;
        // SAFETY: the handler does nothing, so it is safe at any time; the signal is used for nothing else.
        let result = unsafe { libc::sigaction(signal(), &action, std::ptr::null_mut()) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error().raw_os_error().unwrap_or(0)) }
    });
    installed.map_err(io::Error::from_raw_os_error)?;
    vmm_sys_util::signal::unblock_signal(signal()).map_err(|e| io::Error::other(e.to_string()))
}

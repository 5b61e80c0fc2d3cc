//! The side of a vCPU that other threads reach: requests, waking, and the memory of its state block.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::UnsafeCell;
use std::ops::{Deref, DerefMut};
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, Ordering};
use std::time::Instant;

use berth_engine::VcpuHandle;
use parking_lot::{Condvar, Mutex};

use crate::counters::Counters;
use crate::seat::{CpuClock, Seat};
use crate::state::State;

/// What GS:0 points at while a vCPU thread runs.
#[repr(C, align(64))]
pub struct StateBlock {
    /// Points at a readable byte, or is null when the vCPU must leave translated code at the next poll: the
    /// poll loads through it, and the resulting signal becomes an exit. It costs two loads and no flags.
    pub poll: AtomicPtr<u8>,
    pub(crate) state: UnsafeCell<State>,
}

/// Bits of [`VcpuShared::requests`].
pub(crate) mod request {
    /// Look at the local APIC.
    pub const INTERRUPT: u32 = 1 << 0;
    /// Return from `run`.
    pub const STOP: u32 = 1 << 1;
    /// Drop TLB entries for stores to the pages in `sweep`.
    pub const SWEEP: u32 = 1 << 2;
    /// Let go of the execution lock for a moment: another vCPU wants to be alone.
    pub const PAUSE: u32 = 1 << 3;
    /// Empty the first level of the TLB.
    pub const FORGET: u32 = 1 << 4;
}

static READABLE: u8 = 0;

/// One vCPU as other threads see it.
pub struct VcpuShared {
    block: NonNull<StateBlock>,
    requests: AtomicU32,
    parked: AtomicBool,
    lock: Mutex<()>,
    wake: Condvar,
    /// Guest physical addresses of pages that were found to hold code.
    pub(crate) sweep: Mutex<Vec<u64>>,
    /// It has done next to nothing for a while.
    pub(crate) idle: AtomicBool,
    /// The thread that runs the vCPU.
    pub(crate) seat: Seat,
    /// What it has done so far.
    pub(crate) counters: Counters,
}

// SAFETY: other threads only touch `block.poll`, which is atomic, and the fields made for sharing; the state
// inside the block is only reached through the one `StateRef`.
unsafe impl Send for VcpuShared {}
// SAFETY: as above.
unsafe impl Sync for VcpuShared {}

impl VcpuShared {
    /// A vCPU with a zeroed state block, and the only reference to that state.
    pub(crate) fn new() -> (Arc<Self>, StateRef) {
        let layout = Layout::new::<StateBlock>();
        // SAFETY: the layout is not empty. All-zero bytes are valid for every field of the block: integers, null
        // pointers, plain structs.
        let Some(block) = NonNull::new(unsafe { alloc_zeroed(layout) }.cast::<StateBlock>()) else {
            handle_alloc_error(layout)
        };
        let shared = Arc::new(Self {
            block,
            requests: AtomicU32::new(0),
            parked: AtomicBool::new(false),
            lock: Mutex::new(()),
            wake: Condvar::new(),
            sweep: Mutex::new(Vec::new()),
            idle: AtomicBool::new(false),
            seat: Seat::default(),
            counters: Counters::default(),
        });
        shared.poll().store((&raw const READABLE).cast_mut(), Ordering::SeqCst);
        let state = StateRef { block, _owner: Arc::clone(&shared) };
        (shared, state)
    }

    fn poll(&self) -> &AtomicPtr<u8> {
        // SAFETY: the block lives as long as `self`; the reference covers only the atomic field.
        unsafe { &(*self.block.as_ptr()).poll }
    }

    /// Address of the state block, for the GS base.
    pub(crate) fn block_address(&self) -> u64 {
        self.block.as_ptr() as u64
    }

    /// Asks the vCPU for something; it leaves translated code soon, or wakes up.
    pub(crate) fn request(&self, bits: u32) {
        self.requests.fetch_or(bits, Ordering::SeqCst);
        self.poll().store(null_mut(), Ordering::SeqCst);
        if self.parked.load(Ordering::SeqCst) {
            drop(self.lock.lock());
            self.wake.notify_all();
        }
    }

    /// As [`Self::request`], but a vCPU that waits may do it when it goes on.
    pub(crate) fn request_later(&self, bits: u32) {
        self.requests.fetch_or(bits, Ordering::SeqCst);
        self.poll().store(null_mut(), Ordering::SeqCst);
    }

    /// Takes all requests but STOP, and makes polls pass again.
    pub(crate) fn take_requests(&self) -> u32 {
        self.poll().store((&raw const READABLE).cast_mut(), Ordering::SeqCst);
        self.requests.fetch_and(request::STOP, Ordering::SeqCst)
    }

    /// Whether the vCPU must [take requests](Self::take_requests): there are some, or polls do not pass. Without a
    /// request they fail when one was taken between the two stores of [`Self::request`], whose thread may have been
    /// off its CPU for long just there. Every poll would leave translated code until the next request.
    pub(crate) fn is_called(&self) -> bool {
        self.has_requests() || self.poll().load(Ordering::Relaxed).is_null()
    }

    /// Whether anything was requested.
    pub(crate) fn has_requests(&self) -> bool {
        self.requests.load(Ordering::SeqCst) != 0
    }

    /// Whether STOP was requested; forgets it.
    pub(crate) fn take_stop(&self) -> bool {
        self.requests.fetch_and(!request::STOP, Ordering::SeqCst) & request::STOP != 0
    }

    /// The clock of its thread, while that wants to run.
    pub(crate) fn wants_a_cpu(&self) -> Option<CpuClock> {
        if self.parked.load(Ordering::Relaxed) { None } else { self.seat.clock() }
    }

    /// Waits until something is requested, or until `deadline`.
    pub(crate) fn park(&self, deadline: Option<Instant>) {
        let mut guard = self.lock.lock();
        self.parked.store(true, Ordering::SeqCst);
        while self.requests.load(Ordering::SeqCst) == 0 {
            match deadline {
                None => self.wake.wait(&mut guard),
                Some(deadline) => {
                    if self.wake.wait_until(&mut guard, deadline).timed_out() {
                        break;
                    }
                }
            }
        }
        self.parked.store(false, Ordering::SeqCst);
    }
}

impl VcpuHandle for VcpuShared {
    fn kick(&self) {
        self.request(request::INTERRUPT);
    }

    fn stop(&self) {
        self.request(request::STOP);
    }
}

impl Drop for VcpuShared {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout; the `StateRef` holds a reference to `self`, so it is gone.
        unsafe { dealloc(self.block.as_ptr().cast(), Layout::new::<StateBlock>()) };
    }
}

/// The one owner of a vCPU's state.
pub struct StateRef {
    block: NonNull<StateBlock>,
    _owner: Arc<VcpuShared>,
}

// SAFETY: it is the only way to the state, so moving it moves the state.
unsafe impl Send for StateRef {}

impl Deref for StateRef {
    type Target = State;
    fn deref(&self) -> &State {
        // SAFETY: the block lives as long as `_owner`; only this value reaches the state.
        unsafe { &*(*self.block.as_ptr()).state.get() }
    }
}

impl DerefMut for StateRef {
    fn deref_mut(&mut self) -> &mut State {
        // SAFETY: as in `deref`, and `self` is borrowed mutably.
        unsafe { &mut *(*self.block.as_ptr()).state.get() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn polls_pass_again_after_a_request_that_was_taken_before_it_was_whole() {
        let (shared, _state) = VcpuShared::new();
        assert!(!shared.is_called());
        // What a thread does that loses its CPU in the middle of `request`.
        shared.requests.fetch_or(request::INTERRUPT, Ordering::SeqCst);
        assert_eq!(shared.take_requests(), request::INTERRUPT);
        shared.poll().store(null_mut(), Ordering::SeqCst);
        assert!(shared.is_called());
        assert_eq!(shared.take_requests(), 0);
        assert!(!shared.is_called());
    }
}

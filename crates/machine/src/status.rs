//! What others may know of a machine while it runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use berth_cpu::VcpuId;
use parking_lot::Mutex;

use crate::notice::{Notice, Notices};

/// Where in its life a machine is, for its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineState {
    /// It was made, and no vCPU has run.
    Made,
    /// Its vCPUs run, or start again after a reset.
    Running,
    /// vCPUs, devices and the guest's clock stand still.
    Paused,
    /// As [`Self::Paused`], but because its memory was wanted and not because its owner wished it: it goes on when somebody
    /// needs it.
    Frozen,
    /// It has ended.
    Ended,
}

/// Shared by the supervisor, the vCPUs' threads and the machine's controls.
#[derive(Debug)]
pub struct Status {
    state: Mutex<MachineState>,
    /// The threads of the vCPUs on the host; 0 before they run.
    threads: Vec<AtomicU32>,
    notices: Notices,
}

impl Status {
    /// Of a machine that was just made.
    pub fn new(vcpus: u8) -> Arc<Self> {
        let threads = (0..vcpus).map(|_| AtomicU32::new(0)).collect();
        Arc::new(Self { state: Mutex::new(MachineState::Made), threads, notices: Notices::default() })
    }

    /// Where in its life it is.
    pub fn state(&self) -> MachineState {
        *self.state.lock()
    }

    /// Says where in its life it is from now on.
    pub fn enter(&self, state: MachineState) {
        let before = std::mem::replace(&mut *self.state.lock(), state);
        if before != state {
            self.notices.add(Notice::State(state));
        }
    }

    /// What happens.
    pub fn notices(&self) -> &Notices {
        &self.notices
    }

    /// Notes that the calling thread is that of vCPU `id`.
    pub fn this_thread_is(&self, id: VcpuId) {
        // SAFETY: gettid(2) takes nothing and cannot fail.
        let tid = unsafe { libc::gettid() };
        if let Some(thread) = self.threads.get(usize::from(id.0)) {
            thread.store(tid.cast_unsigned(), Ordering::Release);
        }
    }

    /// The threads of the vCPUs on the host, by vCPU; `None` for one that has not come to say so.
    pub fn threads(&self) -> Vec<Option<u32>> {
        self.threads.iter().map(|t| Some(t.load(Ordering::Acquire)).filter(|&tid| tid != 0)).collect()
    }
}

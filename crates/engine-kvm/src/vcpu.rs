//! One vCPU: the loop around KVM_RUN (api.rst 4.10 and 5).
//!
//! An I/O exit is complete only once KVM_RUN was called again, so a stop is taken there and nowhere else: it makes
//! that call return at once (`handle`).

use std::sync::Arc;

use berth_cpu::{CpuState, VcpuId};
use berth_engine::{Bus, EngineError, Exit, PinController, StoodStill, Vcpu, VcpuHandle};
use berth_memory::{GuestMemory, GuestPhysAddr};
use kvm_bindings::{KVM_EXIT_DIRTY_RING_FULL, KVM_EXIT_IO_IN, kvm_run};
use kvm_ioctls::{VcpuExit, VcpuFd};
use tracing::{error, trace, warn};

use crate::dirty::DirtyLog;
use crate::failure;
use crate::handle::KvmHandle;
use crate::split::{ExternalInterrupt, SplitChips};
use crate::state::{self, KnownMsrs};

/// A vCPU of the kernel.
pub struct KvmVcpu {
    id: VcpuId,
    fd: VcpuFd,
    /// Size of the mapping that begins with `kvm_run`, in bytes.
    run_size: usize,
    handle: Arc<KvmHandle>,
    known_msrs: Option<KnownMsrs>,
    /// Where PIC and IOAPIC are devices.
    split: Option<Arc<SplitChips>>,
    external: ExternalInterrupt,
    dirty: Arc<DirtyLog>,
    sync_regs: bool,
    /// The kernel reaches it by its address in this process as long as there are vCPUs.
    _memory: GuestMemory,
}

/// What a vCPU has from its VM.
pub(crate) struct VcpuParts {
    /// See [`KvmVcpu`].
    pub run_size: usize,
    pub split: Option<Arc<SplitChips>>,
    pub memory: GuestMemory,
    pub dirty: Arc<DirtyLog>,
    pub sync_regs: bool,
}

/// What KVM_RUN came back with, where it is not done with at once.
enum Returned {
    Port,
    Interrupted,
    Nothing,
    End(Exit),
}

impl KvmVcpu {
    pub(crate) fn new(id: VcpuId, fd: VcpuFd, parts: VcpuParts) -> Self {
        let VcpuParts { run_size, split, memory, dirty, sync_regs } = parts;
        Self {
            id,
            fd,
            run_size,
            handle: Arc::default(),
            known_msrs: None,
            split,
            external: ExternalInterrupt::default(),
            dirty,
            sync_regs,
            _memory: memory,
        }
    }

    fn try_state(&mut self) -> Result<CpuState, EngineError> {
        let known = match self.known_msrs.take() {
            Some(known) => known,
            None => KnownMsrs::probe(&self.fd)?,
        };
        let state = state::read(&mut self.fd, &known, self.sync_regs);
        self.known_msrs = Some(known);
        state
    }

    fn enter(&mut self, bus: &dyn Bus, pins: Option<&dyn PinController>) -> Returned {
        // The PIC's output is wired to the bootstrap processor.
        if let Some(pic) = pins.filter(|_| self.id.0 == 0) {
            self.external.offer(&mut self.fd, pic);
        }
        let failed = |detail: String| Returned::End(Exit::Failed { detail });
        match self.fd.run() {
            Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => Returned::Port,
            Ok(VcpuExit::MmioRead(addr, data)) => {
                for (addr, part) in parts(addr, data) {
                    bus.mmio_read(addr, part);
                }
                Returned::Nothing
            }
            Ok(VcpuExit::MmioWrite(addr, data)) => {
                // The slice is the kernel's page: what is written there is not looked at again.
                let mut data = data.to_vec();
                for (addr, part) in parts(addr, &mut data) {
                    bus.mmio_write(addr, part);
                }
                Returned::Nothing
            }
            Ok(VcpuExit::Intr) => Returned::Interrupted,
            Ok(VcpuExit::Hlt | VcpuExit::IrqWindowOpen) => Returned::Nothing,
            Ok(VcpuExit::IoapicEoi(vector)) => {
                pins.into_iter().for_each(|pins| pins.end_of_interrupt(vector));
                Returned::Nothing
            }
            Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => {
                self.dirty.harvest();
                Returned::Nothing
            }
            Ok(VcpuExit::Shutdown) => {
                let detail = "KVM reports a shutdown of the CPU, without the exceptions before it".to_owned();
                Returned::End(Exit::TripleFault { detail })
            }
            Ok(VcpuExit::FailEntry(reason, cpu)) => failed(failure::failed_entry(reason, cpu)),
            Ok(VcpuExit::InternalError) => failed(failure::internal_error(self.fd.get_kvm_run())),
            Ok(VcpuExit::MemoryFault { gpa, size, .. }) => failed(format!(
                "the guest accesses {size:#x} bytes at guest physical {gpa:#x}, which KVM cannot resolve"
            )),
            Ok(other) => failed(format!("KVM left the guest for a reason that nobody asked for: {other:?}")),
            Err(e) if e.errno() == libc::EINTR => Returned::Interrupted,
            // A vCPU that was waiting for its start-up IPI has got it.
            Err(e) if e.errno() == libc::EAGAIN => Returned::Nothing,
            Err(e) => failed(format!("KVM_RUN fails: {e}")),
        }
    }

    /// KVM_EXIT_IO: `count` accesses to the same port, one after the other in the page (string instructions).
    fn port_io(&mut self, bus: &dyn Bus) -> Result<(), String> {
        let run_size = self.run_size;
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit reason says that this is the variant; its fields are integers, valid whatever they are.
        let io = unsafe { run.__bindgen_anon_1.io };
        let (size, count) = (usize::from(io.size), io.count as usize);
        let start = io.data_offset as usize;
        let len = size * count;
        if size == 0 || start.checked_add(len).is_none_or(|end| end > run_size) {
            return Err(format!(
                "KVM describes port I/O outside of its page: {size} bytes {count} times at {start:#x}"
            ));
        }
        let base: *mut kvm_run = run;
        // SAFETY: the mapping has `run_size` bytes (KVM_GET_VCPU_MMAP_SIZE), and the range was checked to lie in
        // it. It is borrowed through `self.fd`, and the kernel touches it only inside KVM_RUN.
        let data = unsafe { std::slice::from_raw_parts_mut(base.cast::<u8>().add(start), len) };
        for access in data.chunks_exact_mut(size) {
            if u32::from(io.direction) == KVM_EXIT_IO_IN {
                bus.port_read(io.port, access);
            } else {
                bus.port_write(io.port, access);
            }
        }
        Ok(())
    }
}

/// Cuts an access into what the bus takes: 1, 2, 4 or 8 bytes. KVM makes others of accesses that cross pages.
fn parts(addr: u64, data: &mut [u8]) -> impl Iterator<Item = (GuestPhysAddr, &mut [u8])> {
    let mut rest = data;
    let mut at = addr;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let len = 1 << rest.len().min(8).ilog2();
        let (part, after) = std::mem::take(&mut rest).split_at_mut(len);
        rest = after;
        let addr = GuestPhysAddr(at);
        at = at.wrapping_add(len as u64);
        Some((addr, part))
    })
}

impl Vcpu for KvmVcpu {
    fn handle(&self) -> Arc<dyn VcpuHandle> {
        self.handle.clone()
    }

    fn run(&mut self, bus: &dyn Bus) -> Exit {
        let handle = self.handle.clone();
        let entered = match handle.enter(&mut self.fd) {
            Ok(entered) => entered,
            Err(e) => return Exit::Failed { detail: format!("the host refuses a signal for stopping: {e}") },
        };
        let pins = self.split.as_ref().and_then(|split| split.controllers());
        let exit = loop {
            match self.enter(bus, pins.as_deref()) {
                Returned::Nothing => {}
                Returned::Port => {
                    if let Err(detail) = self.port_io(bus) {
                        break Exit::Failed { detail };
                    }
                }
                Returned::Interrupted => {
                    self.fd.set_kvm_immediate_exit(0);
                    if handle.take_stop() {
                        break Exit::Stopped;
                    }
                }
                Returned::End(exit) => break exit,
            }
        };
        drop(entered);
        trace!("vCPU {} left KVM: {exit:?}", self.id);
        exit
    }

    fn state(&mut self) -> CpuState {
        self.try_state().unwrap_or_else(|e| {
            error!("the state of vCPU {} cannot be read: {e}", self.id);
            CpuState::default()
        })
    }

    /// Sets the counter back. KVM gives vCPUs that were in step one offset again, and tells the guest's watchdogs that
    /// it stood still (api.rst 4.77, KVM_KVMCLOCK_CTRL), which fails for a guest without its clock.
    fn skip_time(&mut self, time: StoodStill) {
        if let Err(error) = state::move_tsc(&self.fd, time.ticks.wrapping_neg()) {
            warn!("the TSC of vCPU {} jumps: {error}", self.id);
        }
        let _ = self.fd.kvmclock_ctrl();
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        // What the PIC gave to the old state is lost with it, as in a reset.
        self.external = ExternalInterrupt::default();
        state::write(&self.fd, state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_accesses_are_cut_into_what_the_bus_takes() {
        let mut data = [1, 2, 3, 4, 5, 6, 7];
        let cut: Vec<_> = parts(0x1ffd, &mut data).map(|(addr, part)| (addr.0, part.to_vec())).collect();
        assert_eq!(cut, [(0x1ffd, vec![1, 2, 3, 4]), (0x2001, vec![5, 6]), (0x2003, vec![7])]);
        assert_eq!(parts(0, &mut [0; 8]).count(), 1);
        assert_eq!(parts(0, &mut []).count(), 0);
    }
}

//! The soft engine's side: cases in a small guest, through the public contract alone.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use berth_cpu::bits::gpr;
use berth_cpu::{CpuState, VcpuId};
use berth_engine::{ApicEvent, Bus, Engine, EngineError, Exit, LocalApic, MsrFault, Vcpu, VcpuHandle};
use berth_engine_soft::{SoftEngine, SoftOptions};
use berth_memory::{GuestMemory, GuestPhysAddr, MemoryError};

use crate::case::{Case, NoOutcome, Outcome};
use crate::guest;
use crate::layout::{self, AREAS, Image};

/// Milliseconds that a case may take: much, because the host may be overloaded.
const TIMEOUT: u64 = 30_000;

/// A local APIC that never has anything.
pub struct NoApic;

impl LocalApic for NoApic {
    fn has_interrupt(&self) -> bool {
        false
    }
    fn acknowledge(&self) -> Option<u8> {
        None
    }
    fn take_event(&self) -> Option<ApicEvent> {
        None
    }
    fn has_event(&self) -> bool {
        false
    }
    fn cr8(&self) -> u8 {
        0
    }
    fn set_cr8(&self, _: u8) {}
    fn read_msr(&self, _: u32) -> Result<u64, MsrFault> {
        Err(MsrFault)
    }
    fn write_msr(&self, _: u32, _: u64) -> Result<(), MsrFault> {
        Err(MsrFault)
    }
    fn mmio_base(&self) -> Option<GuestPhysAddr> {
        None
    }
    fn mmio_read(&self, _: u16, _: &mut [u8]) {}
    fn mmio_write(&self, _: u16, _: &[u8]) {}
    fn send_ipi(&self, _: u64) {}
    fn eoi(&self) {}
    fn needs_explicit_eoi(&self) -> bool {
        true
    }
    fn reset(&self, _: bool) {}
    fn state(&self) -> berth_cpu::ApicState {
        berth_cpu::ApicState::reset(berth_cpu::VcpuId(0))
    }
    fn set_state(&self, _: &berth_cpu::ApicState) {}
}

/// Records the vector that a handler reports, and stops the vCPU.
struct ReportBus {
    handle: Arc<dyn VcpuHandle>,
    vector: AtomicU8,
    reported: AtomicBool,
}

impl Bus for ReportBus {
    fn port_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn port_write(&self, port: u16, _: &[u8]) {
        if !self.reported.swap(true, Ordering::SeqCst) {
            self.vector.store(port as u8, Ordering::SeqCst);
        }
        self.handle.stop();
    }
    fn mmio_read(&self, _: GuestPhysAddr, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: GuestPhysAddr, _: &[u8]) {}
}

/// The guest for cases cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum SoftError {
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// Stops the vCPU when a case takes too long.
struct Watchdog {
    /// Milliseconds since `epoch` at which the running case is stopped; 0: none runs.
    deadline: AtomicU64,
    epoch: Instant,
    end: Mutex<bool>,
    wake: std::sync::Condvar,
}

/// A guest on the soft engine.
pub struct Soft {
    memory: GuestMemory,
    engine: SoftEngine,
    vcpu: Box<dyn Vcpu>,
    bus: ReportBus,
    base: CpuState,
    watchdog: Arc<Watchdog>,
    watchdog_thread: Option<JoinHandle<()>>,
}

impl Soft {
    /// Makes the guest. Debug switches of the engine come from the environment (`BERTH_SOFT`).
    ///
    /// # Errors
    /// [`SoftError`] when the host has no memory for it.
    pub fn new() -> Result<Self, SoftError> {
        let memory = GuestMemory::new(guest::RAM)?;
        guest::build(&memory)?;
        let options = SoftOptions {
            code_cache_bytes: berth_engine_soft::MIN_CODE_CACHE,
            tsc_hz: 1_000_000_000,
            vm_name: "isa".into(),
            vcpus: 1,
        };
        let engine = SoftEngine::new(memory.clone(), options)?;
        let mut vcpu = engine.create_vcpu(VcpuId(0), Some(Arc::new(NoApic)))?;
        let base = vcpu.state();
        let handle = vcpu.handle();
        let watchdog = Arc::new(Watchdog {
            deadline: AtomicU64::new(0),
            epoch: Instant::now(),
            end: Mutex::new(false),
            wake: std::sync::Condvar::new(),
        });
        let watchdog_thread = std::thread::spawn({
            let (watchdog, handle) = (Arc::clone(&watchdog), Arc::clone(&handle));
            move || watchdog.watch(&*handle)
        });
        let bus = ReportBus { handle, vector: AtomicU8::new(0), reported: AtomicBool::new(false) };
        let mut soft =
            Self { memory, engine, vcpu, bus, base, watchdog, watchdog_thread: Some(watchdog_thread) };
        soft.write_areas(&Image::pristine(), true)?;
        Ok(soft)
    }

    fn write_areas(&mut self, image: &Image, with_code: bool) -> Result<(), MemoryError> {
        let mut at = guest::AREAS_PHYS;
        for area in AREAS {
            if with_code || !area.execute {
                self.memory.write(GuestPhysAddr(at), image.area(&area))?;
            }
            at += area.len;
        }
        Ok(())
    }

    fn write_code(&mut self, start: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let at = GuestPhysAddr(guest::AREAS_PHYS + (start - layout::CODE));
        self.memory.write(at, bytes)?;
        self.engine.memory_written(at, bytes.len() as u64);
        Ok(())
    }

    /// Executes a case. `image` is what the areas hold before.
    ///
    /// # Errors
    /// [`NoOutcome`]; the guest can be used again after a timeout.
    pub fn run(&mut self, case: &Case, image: &Image) -> Result<Outcome, NoOutcome> {
        let broken = |e: MemoryError| NoOutcome::Engine(e.to_string());
        self.write_areas(image, false).map_err(broken)?;
        self.write_code(case.start(), &case.code.bytes).map_err(broken)?;
        let outcome = self.execute(case);
        self.write_code(case.start(), &vec![0xcc; case.code.bytes.len()]).map_err(broken)?;
        outcome
    }

    fn execute(&mut self, case: &Case) -> Result<Outcome, NoOutcome> {
        let state = guest::initial_state(case, &self.base);
        self.vcpu.set_state(&state).map_err(|e| NoOutcome::Engine(e.to_string()))?;
        self.bus.reported.store(false, Ordering::SeqCst);
        self.watchdog.arm();
        let exit = self.vcpu.run(&self.bus);
        self.watchdog.deadline.store(0, Ordering::SeqCst);
        match exit {
            Exit::Stopped if self.bus.reported.load(Ordering::SeqCst) => {}
            Exit::Stopped => return Err(NoOutcome::Timeout(TIMEOUT)),
            Exit::TripleFault { detail } | Exit::Failed { detail } => return Err(NoOutcome::Engine(detail)),
        }
        let vector = self.bus.vector.load(Ordering::SeqCst);
        let mut state = self.vcpu.state();
        let frame = guest::frame(&self.memory, vector, state.gpr[gpr::RSP])
            .map_err(|e| NoOutcome::Engine(format!("no exception frame: {e}")))?;
        state.gpr[gpr::RSP] = frame.rsp;
        let mut image = Image(vec![0; layout::IMAGE_LEN].into());
        self.memory
            .read(GuestPhysAddr(guest::AREAS_PHYS), &mut image.0)
            .map_err(|e| NoOutcome::Engine(e.to_string()))?;
        Ok(Outcome {
            vector,
            error: frame.error,
            cr2: state.cr2,
            rip: frame.rip,
            gpr: state.gpr,
            rflags: frame.rflags,
            fs_base: state.fs.base,
            gs_base: state.gs.base,
            fpu: state.fpu,
            image,
        })
    }
}

impl Watchdog {
    fn arm(&self) {
        let now = self.epoch.elapsed().as_millis() as u64;
        self.deadline.store(now + TIMEOUT, Ordering::SeqCst);
    }

    fn watch(&self, handle: &dyn VcpuHandle) {
        let Ok(mut end) = self.end.lock() else { return };
        while !*end {
            let Ok((guard, _)) = self.wake.wait_timeout(end, Duration::from_millis(250)) else { return };
            end = guard;
            let deadline = self.deadline.load(Ordering::SeqCst);
            if deadline != 0 && self.epoch.elapsed().as_millis() as u64 > deadline {
                self.deadline.store(0, Ordering::SeqCst);
                handle.stop();
            }
        }
    }
}

impl Drop for Soft {
    fn drop(&mut self) {
        if let Ok(mut end) = self.watchdog.end.lock() {
            *end = true;
        }
        self.watchdog.wake.notify_all();
        if let Some(thread) = self.watchdog_thread.take() {
            // It only ends; a panic in it would have been printed.
            let _ = thread.join();
        }
    }
}

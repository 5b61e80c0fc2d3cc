//! A machine from its description to its end.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::{self, JoinHandle};

use berth_boot::{BootError, BootSource, Platform};
use berth_cpu::VcpuId;
use berth_devices::power::PowerSink;
use berth_devices::timer::tsc_hz;
use berth_engine::{Engine, EngineError};
use berth_engine_kvm::{KvmEngine, KvmOptions};
use berth_engine_soft::{SoftEngine, SoftOptions};
use berth_memory::{GuestMemory, MemoryError};
use tracing::info;

use crate::Outcome;
use crate::board::{Board, BoardError};
use crate::config::{BadVcpuCount, EngineKind, MachineConfig};
use crate::control::MachineControl;
use crate::cpu_time::{CpuTime, Gate};
use crate::event::Event;
use crate::options::HugePages;
use crate::reclaim::Reclaimer;
use crate::status::Status;
use crate::supervisor::{Parts, Supervisor};
use crate::vcpu_thread::{VcpuContext, VcpuThread};
use berth_devices::thread_name;

/// Why a machine cannot be made or started. One line for people.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// Impossible number of vCPUs.
    #[error(transparent)]
    Vcpus(#[from] BadVcpuCount),
    /// Impossible memory, or the host has none.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel or initrd.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The devices.
    #[error(transparent)]
    Board(#[from] BoardError),
    /// The host refused a thread.
    #[error("the host refused a thread for {what}: {source}")]
    Thread {
        /// For whom.
        what: String,
        /// What the host said.
        source: io::Error,
    },
}

/// One machine. When it is dropped it is stopped.
pub struct Machine {
    name: String,
    control: MachineControl,
    life: Life,
}

/// How far the calls have come: [`Machine::start`] and [`Machine::wait`] in this order.
enum Life {
    Made(Box<Supervisor>),
    Started(JoinHandle<Outcome>),
    Ended(Outcome),
}

impl Machine {
    /// Makes the machine that `config` describes, with its kernel loaded. What the guest writes to its serial
    /// console goes to `console`.
    ///
    /// # Errors
    /// [`MachineError`]: bad description, bad files, or a host that lacks something.
    pub fn new(config: MachineConfig, console: Box<dyn Write + Send>) -> Result<Self, MachineError> {
        let kind = config.engine;
        Self::with_engine(config, console, |memory, config| match kind {
            EngineKind::Soft => {
                let options = SoftOptions {
                    code_cache_bytes: config.code_cache_bytes,
                    tsc_hz: tsc_hz(),
                    vm_name: config.name.clone(),
                    vcpus: config.vcpus,
                };
                Ok(Box::new(SoftEngine::new(memory, options)?))
            }
            EngineKind::Kvm => {
                let options = KvmOptions { vcpus: config.vcpus, ..KvmOptions::default() }.with_environment();
                Ok(Box::new(KvmEngine::new(memory, options)?))
            }
        })
    }

    /// [`Self::new`] with an engine that `make` makes from guest memory and the description.
    ///
    /// # Errors
    /// As [`Self::new`], and what `make` returns.
    pub fn with_engine(
        config: MachineConfig,
        console: Box<dyn Write + Send>,
        make: impl FnOnce(GuestMemory, &MachineConfig) -> Result<Box<dyn Engine>, MachineError>,
    ) -> Result<Self, MachineError> {
        config.check()?;
        let memory = GuestMemory::new(config.memory.size.0)?;
        if let Some(huge) = config.memory.hugepages {
            memory.use_huge_pages(huge == HugePages::Thp)?;
        }
        let source = BootSource {
            kernel: config.kernel.clone(),
            initrd: config.initrd.clone(),
            cmdline: config.cmdline.clone(),
        };
        let platform = Platform { vcpus: config.vcpus };
        let booted = berth_boot::load(&memory, &source, &platform)?;
        info!("{} is loaded by the {}", source.kernel.display(), booted.protocol);

        let status = Status::new(config.vcpus);
        let (sender, events) = channel();
        let power = sender.clone();
        let power = PowerSink::new(move |event| {
            // After the machine's end nobody listens.
            let _ = power.send(Event::Power(event));
        });
        let engine: Arc<dyn Engine> = make(memory.clone(), &config)?.into();
        let board = Arc::new(Board::new(&config, &memory, engine.interrupt_controllers(), power, console)?);
        board.connect_engine(engine.clone());
        let gate = Arc::new(Gate::default());
        board.report_to(&status);
        let context = VcpuContext {
            vm_name: config.name.clone(),
            gate: gate.clone(),
            board: board.clone(),
            memory: memory.clone(),
            events: sender.clone(),
            status: status.clone(),
        };
        let mut vcpus = Vec::new();
        let mut handles = Vec::new();
        for id in (0..config.vcpus).map(VcpuId) {
            let vcpu = engine.create_vcpu(id, board.local_apic(id))?;
            board.attach(id, vcpu.handle());
            handles.push(vcpu.handle());
            let thread = VcpuThread::spawn(id, vcpu, context.clone())
                .map_err(|source| MachineError::Thread { what: format!("vCPU {id}"), source })?;
            vcpus.push(thread);
        }
        let reclaimer = Reclaimer::new(&config, memory.clone(), engine.clone());
        reclaimer
            .keep_limit()
            .map_err(|source| MachineError::Thread { what: "memory".to_owned(), source })?;
        let supervisor = Supervisor::new(Parts {
            vcpus,
            events,
            board: board.clone(),
            engine: engine.clone(),
            memory: memory.clone(),
            source,
            platform,
            no_reboot: config.no_reboot,
            entry: booted.state,
            status: status.clone(),
        });
        let cpu_time = Arc::new(CpuTime::new(&config.name, gate, handles));
        let vm_name = config.name.as_str().into();
        let control =
            MachineControl { events: sender, board, memory, status, reclaimer, vm_name, engine, cpu_time };
        Ok(Self { name: config.name, control, life: Life::Made(Box::new(supervisor)) })
    }

    /// Starts the vCPUs.
    ///
    /// # Errors
    /// [`MachineError::Thread`] when the host refuses the supervisor's thread; the machine has ended then.
    ///
    /// # Panics
    /// When it was started already.
    pub fn start(&mut self) -> Result<(), MachineError> {
        let Life::Made(supervisor) = std::mem::replace(&mut self.life, Life::Ended(Outcome::Stopped)) else {
            panic!("a machine is started once");
        };
        let thread = thread::Builder::new()
            .name(thread_name(&self.name, "machine"))
            .spawn(move || supervisor.run())
            .map_err(|source| MachineError::Thread { what: "the machine".to_owned(), source })?;
        self.life = Life::Started(thread);
        Ok(())
    }

    /// A handle for other threads.
    pub fn control(&self) -> MachineControl {
        self.control.clone()
    }

    /// Waits for the machine's end. When this returns none of its vCPUs runs any more.
    ///
    /// # Panics
    /// When it was never started.
    pub fn wait(&mut self) -> Outcome {
        let life = std::mem::replace(&mut self.life, Life::Ended(Outcome::Stopped));
        let outcome = match life {
            Life::Made(_) => panic!("a machine is started before it is waited for"),
            Life::Started(thread) => thread.join().unwrap_or_else(|_| {
                Outcome::Failed(
                    "internal error: the machine's thread panicked (see the message above)".to_owned(),
                )
            }),
            Life::Ended(outcome) => outcome,
        };
        self.control.cpu_time.release();
        self.control.reclaimer.end();
        self.life = Life::Ended(outcome.clone());
        outcome
    }
}

impl Drop for Machine {
    /// Stops the machine if it runs, and waits for its threads.
    fn drop(&mut self) {
        self.control.reclaimer.end();
        if let Life::Started(_) = self.life {
            self.control.stop();
            self.wait();
        }
    }
}

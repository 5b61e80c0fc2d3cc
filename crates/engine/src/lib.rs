//! The contract between the machine and an engine: who executes guest instructions.
//!
//! ```text
//!   machine ──creates──► Engine ──creates──► Vcpu ──run()──► Exit
//!      │                                      │
//!      └── Bus (port and memory-mapped I/O) ◄─┤
//!      └── LocalApic (one a vCPU) ◄───────────┘      VcpuHandle: kick from any thread
//! ```
//!
//! Order of calls: [`Engine::create_vcpu`] for every vCPU; [`Vcpu::set_state`]; then, on a thread of its own,
//! [`Vcpu::run`] until it returns an [`Exit`]. To stop a running vCPU from another thread, call
//! [`VcpuHandle::stop`]; `run` then returns [`Exit::Stopped`] at an instruction boundary, and can be called
//! again. [`Vcpu::state`] is exact whenever `run` is not executing.
//!
//! No type of one particular engine appears here, and no device, boot or machine code asks which engine runs.

mod dirty;

use std::sync::{Arc, Weak};
use std::time::Duration;

pub use berth_cpu::{ApicState, CpuState, VcpuId};
use berth_memory::{Faults, GuestPhysAddr};
pub use dirty::{DirtyMap, DirtyPages};
pub use vmm_sys_util::eventfd::EventFd;

/// Port and memory-mapped I/O as the vCPUs see it. Called from vCPU threads, several at once.
///
/// Accesses are 1, 2, 4 or 8 bytes long. A read that no device answers fills `data` with 0xff; a write that no
/// device takes is dropped.
pub trait Bus: Send + Sync {
    /// IN: fills `data` (1, 2 or 4 bytes) from `port`.
    fn port_read(&self, port: u16, data: &mut [u8]);
    /// OUT: `data` (1, 2 or 4 bytes) goes to `port`.
    fn port_write(&self, port: u16, data: &[u8]);
    /// A load from guest physical `addr` that is not RAM.
    fn mmio_read(&self, addr: GuestPhysAddr, data: &mut [u8]);
    /// A store to guest physical `addr` that is not RAM.
    fn mmio_write(&self, addr: GuestPhysAddr, data: &[u8]);
}

/// Something that a local APIC asks of its vCPU besides ordinary interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApicEvent {
    /// Non-maskable interrupt.
    Nmi,
    /// INIT: back to the reset state, then wait for a start-up IPI.
    Init,
    /// Start-up IPI: begin in real mode at page `vector`. Only taken while waiting for it.
    Startup {
        /// Number of the page to start at.
        vector: u8,
    },
}

/// An access to an MSR of the local APIC that hardware answers with #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrFault;

/// One vCPU's local APIC, for engines that do not bring interrupt controllers of their own
/// ([`Engine::interrupt_controllers`]). All methods may be called from any thread, and none blocks for long.
///
/// Whenever an interrupt or event becomes deliverable the implementation calls [`VcpuHandle::kick`] of the vCPU
/// that it belongs to.
pub trait LocalApic: Send + Sync {
    /// The vector of the interrupt that can be delivered now, if IF allows: the highest of IRR above PPR, or
    /// an ExtINT of the 8259 PIC. Does not acknowledge it. Cheap: called at every interrupt window.
    fn has_interrupt(&self) -> bool;
    /// Acknowledges the interrupt that [`Self::has_interrupt`] announced (IRR to ISR, or the PIC's INTA cycle)
    /// and returns its vector; `None` if there is none any more.
    fn acknowledge(&self) -> Option<u8>;
    /// Takes the next event: INIT before NMI before start-up.
    fn take_event(&self) -> Option<ApicEvent>;
    /// Whether [`Self::take_event`] would return something.
    fn has_event(&self) -> bool;
    /// Task priority as CR8 shows it, 0 to 15.
    fn cr8(&self) -> u8;
    /// Sets the task priority through CR8, 0 to 15.
    fn set_cr8(&self, value: u8);
    /// RDMSR of IA32_APIC_BASE, IA32_TSC_DEADLINE or 0x800 to 0x8ff (SDM volume 3, 11.12).
    ///
    /// # Errors
    /// [`MsrFault`] where hardware raises #GP(0).
    fn read_msr(&self, msr: u32) -> Result<u64, MsrFault>;
    /// WRMSR of the same registers.
    ///
    /// # Errors
    /// [`MsrFault`] where hardware raises #GP(0).
    fn write_msr(&self, msr: u32, value: u64) -> Result<(), MsrFault>;
    /// Guest physical base of the xAPIC register page, or `None` in x2APIC mode or when disabled.
    fn mmio_base(&self) -> Option<GuestPhysAddr>;
    /// A load from the register page, `offset` 0 to 0xfff.
    fn mmio_read(&self, offset: u16, data: &mut [u8]);
    /// A store to the register page.
    fn mmio_write(&self, offset: u16, data: &[u8]);
    /// Sends an IPI as a write of `icr` to the x2APIC's ICR does (SDM volume 3, 11.12.9); used by the
    /// paravirtual IPI hypercall.
    fn send_ipi(&self, icr: u64);
    /// End of interrupt: as a write of 0 to the EOI register; used by paravirtual EOI.
    fn eoi(&self);
    /// Whether the interrupt in service needs the guest to write EOI (level-triggered, or another one waits):
    /// if so paravirtual EOI must not be offered for it.
    fn needs_explicit_eoi(&self) -> bool;
    /// Back to the state after RESET (`init` false) or INIT (`init` true: the APIC ID and base stay).
    fn reset(&self, init: bool);
    /// All registers. The TSC deadline is in ticks of the host's TSC.
    fn state(&self) -> ApicState;
    /// Replaces all registers. The deadline is in ticks of the host's TSC; the vCPU must not be running.
    fn set_state(&self, state: &ApicState);
}

/// Local APICs of an engine, as those who send messages see them. Called from any thread; never blocks for long.
pub trait MessageInterrupts: Send + Sync {
    /// Delivers a message signalled interrupt: a write of `data` to `address` by a device (SDM volume 3, 11.11).
    /// Returns whether a local APIC took it.
    fn signal_msi(&self, address: u64, data: u32) -> bool;
    /// A message that is sent by a write to an eventfd, for a device that sends the same one often; `None` where the
    /// engine has no such thing (or no more of them), and [`Self::signal_msi`] is the way.
    fn message_event(&self) -> Option<Box<dyn MessageEvent>>;
}

/// What devices' interrupts go to when the engine has interrupt controllers of its own. Called from any thread;
/// never blocks for long.
pub trait InterruptSink: MessageInterrupts {
    /// Drives the line of interrupt `irq`: 0 to 15 are the ISA interrupts, at the PIC's inputs and at the IOAPIC's
    /// pins of the same number (0: pin 2); 16 to 23 are the IOAPIC's other pins. 2 is no line of a device.
    fn set_line(&self, irq: u8, level: bool);
    /// PIC, IOAPIC and PIT back to the state after RESET; local APICs are part of [`CpuState`]. Lines stay as
    /// devices drive them. No vCPU may be running.
    fn reset(&self);
}

/// A message signalled interrupt that an engine delivers whenever an eventfd is written to. Dropping it ends that.
pub trait MessageEvent: Send + Sync {
    /// From now on a write to [`Self::event`] is a write of `data` to `address` (SDM volume 3, 11.11). Returns whether
    /// it is; if not the engine does not take this message.
    fn set(&self, address: u64, data: u32) -> bool;
    /// What to write to. Whoever has it needs no lock, and may hand it to the kernel.
    fn event(&self) -> &EventFd;
}

/// The local APICs of an engine that leaves PIC, IOAPIC and PIT to devices. Called from any thread; never blocks for
/// long.
pub trait LocalApics: MessageInterrupts {
    /// Says which level-triggered message the IOAPIC's `pin` (0 to 23) sends, in the form of an MSI: the ends of these
    /// interrupts come to [`PinController::end_of_interrupt`].
    fn set_pin(&self, pin: u8, address: u64, data: u32);
    /// Connects the controllers, once, before the first vCPU runs; later calls change nothing.
    fn connect(&self, controllers: Weak<dyn PinController>);
}

/// PIC and IOAPIC of devices, as an engine with local APICs of its own sees them. When the PIC's output rises the
/// bootstrap processor's [`VcpuHandle::kick`] is called.
pub trait PinController: Send + Sync {
    /// Whether the PIC asserts its output, which is wired to LINT0 of the bootstrap processor. Cheap: called whenever
    /// that enters the guest.
    fn has_interrupt(&self) -> bool;
    /// The PIC's INTA cycle: the vector, or `None` if it asserts its output no more.
    fn acknowledge(&self) -> Option<u8>;
    /// A local APIC's EOI of `vector`.
    fn end_of_interrupt(&self, vector: u8);
}

/// Who emulates LAPIC, IOAPIC, PIC and PIT.
#[derive(Clone)]
pub enum InterruptControllers {
    /// The machine's own devices; the engine is given a [`LocalApic`] for each vCPU.
    Devices,
    /// The engine has the local APICs, devices are PIC, IOAPIC and PIT.
    LocalApics(Arc<dyn LocalApics>),
    /// The engine itself; devices interrupt through this.
    Engine(Arc<dyn InterruptSink>),
}

/// Why an engine cannot do what was asked. The text is complete and for people.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The host lacks something that the engine needs.
    #[error("this host cannot run the {engine} engine: {reason}")]
    Unavailable {
        /// Name of the engine.
        engine: &'static str,
        /// What is missing and what to do.
        reason: String,
    },
    /// A state that no CPU can be in.
    #[error("the CPU state is not possible: {0}")]
    BadState(String),
    /// The host refused a resource.
    #[error("the host refused {what}: {source}")]
    Host {
        /// What was asked of the host.
        what: &'static str,
        /// What it said.
        #[source]
        source: std::io::Error,
    },
}

/// Why [`Vcpu::run`] returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// [`VcpuHandle::stop`] was called. The vCPU is at an instruction boundary and can run on.
    Stopped,
    /// A triple fault: an exception while a double fault was delivered (SDM volume 3, 6.15). On a PC it resets
    /// the machine. The text says which exceptions in which order.
    TripleFault {
        /// For people.
        detail: String,
    },
    /// The engine met something that it cannot execute. The VM cannot go on.
    Failed {
        /// For people: what and where.
        detail: String,
    },
}

/// How long a VM stood still, on two clocks of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoodStill {
    /// Ticks of the host's time-stamp counter.
    pub ticks: u64,
    /// Time.
    pub time: Duration,
}

/// An engine, made for one VM and its memory.
pub trait Engine: Send + Sync {
    /// The name that `--engine` takes.
    fn name(&self) -> &'static str;
    /// Bits of guest physical addresses, as CPUID shows them (leaf 0x80000008, MAXPHYADDR).
    fn physical_bits(&self) -> u8;
    /// Who emulates the interrupt controllers.
    fn interrupt_controllers(&self) -> InterruptControllers;
    /// Makes a vCPU. `apic` is given exactly if the interrupt controllers are devices. The vCPU is in the reset
    /// state until [`Vcpu::set_state`].
    ///
    /// # Errors
    /// [`EngineError::Host`] when the host has no resources for it.
    fn create_vcpu(&self, id: VcpuId, apic: Option<Arc<dyn LocalApic>>)
    -> Result<Box<dyn Vcpu>, EngineError>;
    /// What the engine counted since it was made, for those who look for where its time goes: names in lower case, a dot
    /// between group and member, in an order for people. Which there are depends on the engine; none is possible.
    fn counters(&self) -> Vec<(String, u64)>;
    /// The VM stood still for `time`: its paravirtual clock goes on as if that time had not been. No vCPU is running;
    /// each of them is told too ([`Vcpu::skip_time`]).
    fn skip_time(&self, time: StoodStill);
    /// Must be called after a device or the host wrote guest memory (DMA), so that no vCPU executes what was
    /// there before.
    fn memory_written(&self, start: GuestPhysAddr, len: u64);
    /// Lets the guest's stores to `addr`, whatever their size and value, write 1 to `event` instead of going to the
    /// [`Bus`], until [`Self::remove_doorbell`]. Returns whether it does: an engine need not, and then the stores go on
    /// coming to the bus.
    fn add_doorbell(&self, addr: GuestPhysAddr, event: &EventFd) -> bool;
    /// Ends what [`Self::add_doorbell`] of the same address and event began; when this returns the stores go to the
    /// bus.
    fn remove_doorbell(&self, addr: GuestPhysAddr, event: &EventFd);
    /// Begins a period: from now on each vCPU's first access to a page of RAM is marked
    /// ([`berth_memory::GuestMemory::mark_accessed`]), although an access before was marked too. Cheap enough for every
    /// second; a vCPU that waits is not woken. False: this engine marks nothing.
    fn begin_access_period(&self) -> bool;
    /// Which page faults on guest memory a cold store under this engine must handle.
    fn page_faults(&self) -> Faults;

    /// Begins to log which pages of guest memory are written, with an empty log: by vCPUs, by the engine itself, and by
    /// those who call [`Self::memory_written`]. The three methods of the log are called by one thread at a time, and
    /// never from a [`Bus`].
    ///
    /// # Errors
    /// [`EngineError::Host`].
    fn start_dirty_log(&self) -> Result<(), EngineError>;
    /// The pages of region `region` of RAM (its index in [`berth_memory::GuestMemory::regions`]) that were written since
    /// the last call, or since the start, and forgets them. Whoever copies these pages afterwards and comes again has
    /// them all: what is written while this runs is in this log or in the next. It is complete when no vCPU runs.
    ///
    /// # Errors
    /// [`EngineError::Host`]; the log is lost then, and must be started anew.
    fn take_dirty(&self, region: usize) -> Result<DirtyPages, EngineError>;
    /// Ends the log.
    ///
    /// # Errors
    /// [`EngineError::Host`].
    fn stop_dirty_log(&self) -> Result<(), EngineError>;

    /// The time of the paravirtual clock (kvmclock) in nanoseconds. It begins at 0 when the engine is made.
    ///
    /// # Errors
    /// [`EngineError::Host`].
    fn clock(&self) -> Result<u64, EngineError>;
    /// Lets the paravirtual clock go on from `nanos`. No vCPU may be running; each is given its state afterwards.
    ///
    /// # Errors
    /// [`EngineError::Host`].
    fn set_clock(&self, nanos: u64) -> Result<(), EngineError>;
}

/// One virtual CPU, driven by the thread that owns it.
pub trait Vcpu: Send {
    /// What other threads use to reach this vCPU.
    fn handle(&self) -> Arc<dyn VcpuHandle>;
    /// Executes guest instructions until an [`Exit`]. Waits, without using the host CPU, while the guest is
    /// halted or waits for a start-up IPI.
    fn run(&mut self, bus: &dyn Bus) -> Exit;
    /// The architectural state at the current instruction boundary.
    fn state(&mut self) -> CpuState;
    /// The VM stood still for `time`: the time-stamp counter goes on as if that time had not been. If the local APIC
    /// is a device, who pauses the VM has moved its TSC deadline. Must not be called while [`Self::run`] executes.
    fn skip_time(&mut self, time: StoodStill);
    /// Replaces the architectural state.
    ///
    /// # Errors
    /// [`EngineError::BadState`] for a combination that no CPU can be in.
    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError>;
}

/// A vCPU as other threads see it.
pub trait VcpuHandle: Send + Sync {
    /// Makes the vCPU look at its local APIC soon: called when an interrupt or event was posted. Cheap, never
    /// blocks, wakes a halted vCPU.
    fn kick(&self);
    /// Makes [`Vcpu::run`] return [`Exit::Stopped`] soon. It stays asked for until `run` has returned once.
    fn stop(&self);
}

//! The board: all devices of the machine, wired up.
//!
//! Adding a device: make it here, register it on the bus, and reset it in [`Board::reset`]. Virtio devices: see
//! [`crate::virtio`].

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use berth_cpu::VcpuId;
use berth_cpu::msr::IA32_TSC_DEADLINE;
use berth_devices::acpi_pm::AcpiPm;
use berth_devices::bus::{BusError, MachineBus, MmioRange};
use berth_devices::cmos::Cmos;
use berth_devices::debug_exit::DebugExit;
use berth_devices::i8042::I8042;
use berth_devices::irq::{EngineInterrupts, Interrupts, IrqError};
use berth_devices::irqchip::{ChipsError, InterruptChips};
use berth_devices::pci::PciRoot;
use berth_devices::pit::Pit;
use berth_devices::power::PowerSink;
use berth_devices::pvpanic::Pvpanic;
use berth_devices::serial::Serial;
use berth_devices::timer::{TimerError, Timers, TscClock, read_tsc, tsc_hz};
use berth_devices::virtio::block::BlockError;
use berth_devices::virtio::console::Output;
use berth_engine::{Bus, Engine, InterruptControllers, LocalApic, StoodStill, VcpuHandle};
use berth_memory::layout::{HIGH_RAM_START, ports};
use berth_memory::{GuestMemory, GuestPhysAddr};
use parking_lot::Mutex;
use tracing::warn;

use crate::config::MachineConfig;
use crate::notice::Notice;
use crate::status::Status;
use crate::virtio::{VirtioDevices, VirtioError};

/// ISA interrupt of the PIT.
const PIT_IRQ: u8 = 0;
/// ISA interrupt of the keyboard controller.
const KEYBOARD_IRQ: u8 = 1;

/// Why the board cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BoardError {
    /// The timer thread.
    #[error(transparent)]
    Timer(#[from] TimerError),
    /// The interrupt controllers.
    #[error(transparent)]
    Chips(#[from] ChipsError),
    /// Two devices want the same address.
    #[error("internal error: {0}")]
    Bus(#[from] BusError),
    /// Disks, network and the like.
    #[error(transparent)]
    Virtio(#[from] VirtioError),
    /// A device wants an interrupt that there is not.
    #[error("internal error: {0}")]
    Irq(#[from] IrqError),
}

/// The devices, and the bus that they are on.
pub struct Board {
    bus: MachineBus,
    interrupts: Interrupts,
    /// Where the engine has no interrupt controllers and PIT of its own.
    chips: Option<(Arc<InterruptChips>, Arc<Pit>)>,
    serial: Arc<Serial>,
    cmos: Arc<Cmos>,
    i8042: Arc<I8042>,
    acpi_pm: Arc<AcpiPm>,
    pci: Arc<PciRoot>,
    virtio: VirtioDevices,
    // Last, so that the timers' thread ends after the devices that use it.
    timers: Timers,
}

/// When the machine began to stand still.
pub struct Pause {
    ticks: u64,
    at: Instant,
}

impl Board {
    /// All devices of the machine that `config` describes, in the state after power-up; of interrupt controllers
    /// and PIT those that the engine leaves to them. Requests that end or restart the VM go to `power`, what serial port and virtio console print to `console`.
    ///
    /// # Errors
    /// [`BoardError`].
    pub fn new(
        config: &MachineConfig,
        memory: &GuestMemory,
        controllers: InterruptControllers,
        power: PowerSink,
        console: Box<dyn Write + Send>,
    ) -> Result<Self, BoardError> {
        let timers = Timers::start(&config.name)?;
        let mut bus = MachineBus::new();

        let chips = match controllers {
            InterruptControllers::Engine(sink) => Err(sink),
            InterruptControllers::LocalApics(apics) => Ok(InterruptChips::with_engine_apics(apics)),
            InterruptControllers::Devices => {
                let tsc = TscClock::new(tsc_hz(), timers.clock().clone());
                Ok(InterruptChips::new(config.vcpus, &timers, &tsc)?)
            }
        };
        let (interrupts, chips) = match chips {
            Err(sink) => (Interrupts::new(EngineInterrupts::new(sink)), None),
            Ok(chips) => {
                chips.register(&mut bus)?;
                let pit = Pit::new(chips.line(PIT_IRQ)?, &timers);
                pit.register(&mut bus)?;
                (Interrupts::new(chips.clone()), Some((chips, pit)))
            }
        };
        let output: Output = Arc::new(Mutex::new(console));
        let serial = Serial::new(interrupts.line(ports::SERIAL_IRQ)?, Box::new(SharedOutput(output.clone())));
        serial.register(ports::SERIAL, &mut bus)?;
        let (low, high) = ram_sizes(memory);
        let cmos = Cmos::new(interrupts.line(ports::CMOS_IRQ)?, &timers, low, high);
        cmos.register(ports::CMOS, &mut bus)?;
        let i8042 = I8042::new(interrupts.line(KEYBOARD_IRQ)?, power.clone());
        i8042.register(&mut bus)?;
        let acpi_pm = AcpiPm::new(interrupts.line(ports::SCI_GSI)?, power.clone(), &timers);
        acpi_pm.register(&mut bus)?;
        let pci = PciRoot::new(power.clone());
        pci.register(&mut bus)?;
        bus.register_ports(ports::PANIC, 1, "panic", Arc::new(Pvpanic::new(power.clone())))?;
        let virtio = VirtioDevices::new(config, memory, &interrupts, &pci, &output)?;
        if config.debug_exit {
            bus.register_ports(ports::DEBUG_EXIT, 1, "debug exit", Arc::new(DebugExit::new(power)))?;
        }
        Ok(Self { bus, interrupts, chips, serial, cmos, i8042, acpi_pm, pci, virtio, timers })
    }

    /// The bus, for the vCPUs.
    pub fn bus(&self) -> &dyn Bus {
        &self.bus
    }

    /// The device that answers at `at`; local APICs are in front of it.
    pub fn mmio_at(&self, at: GuestPhysAddr) -> Option<MmioRange> {
        self.bus.mmio_at(at)
    }

    /// The local APIC of vCPU `id`, unless the engine has it.
    pub fn local_apic(&self, id: VcpuId) -> Option<Arc<dyn LocalApic>> {
        let (chips, _) = self.chips.as_ref()?;
        chips.local_apic(id).map(|apic| apic.clone() as Arc<dyn LocalApic>)
    }

    /// Connects vCPU `id` to its interrupts.
    pub fn attach(&self, id: VcpuId, handle: Arc<dyn VcpuHandle>) {
        if let Some((chips, _)) = &self.chips {
            chips.attach(id, handle);
        }
    }

    /// Tells `engine` of all writes of devices to guest memory from now on.
    pub fn connect_engine(&self, engine: Arc<dyn Engine>) {
        self.virtio.connect_engine(engine);
    }

    /// Disks, network and the like.
    pub fn virtio(&self) -> &VirtioDevices {
        &self.virtio
    }

    /// Records in `status` what happens to devices.
    pub fn report_to(&self, status: &Arc<Status>) {
        let (to, failed) = (status.clone(), AtomicU64::new(0));
        self.virtio.on_disk_error(move |id, error| {
            let (message, n) = (describe(&error), failed.fetch_add(1, Ordering::Relaxed) + 1);
            // A full disk fails many requests, and the log need not name each: every one is an event.
            if n.is_power_of_two() {
                warn!("{id}: {message}; {n} failed so far");
            }
            to.notices().add(Notice::IoError { device: id.to_owned(), message });
        });
        if let Some(balloon) = self.virtio.balloon() {
            let to = status.clone();
            balloon.on_change(move |target, actual| to.notices().add(Notice::Balloon { target, actual }));
        }
    }

    /// Stops the devices that have threads of their own: what was begun is done, and what was written is kept.
    pub fn stop_devices(&self) {
        self.virtio.pause();
    }

    /// Lets the devices' clock stand still, and stops those that have threads of their own. No vCPU may be running.
    pub fn pause(&self) -> Pause {
        self.timers.stop();
        let pause = Pause { ticks: read_tsc(), at: Instant::now() };
        self.virtio.pause();
        pause
    }

    /// Goes on after [`Self::pause`]; returns how long it was.
    pub fn resume(&self, pause: &Pause) -> StoodStill {
        self.virtio.resume();
        let ticks = read_tsc().wrapping_sub(pause.ticks);
        let time = pause.at.elapsed();
        for apic in self.chips.iter().flat_map(|(chips, _)| chips.local_apics()) {
            // The local APIC counts as the host does.
            if let Ok(deadline @ 1..) = apic.read_msr(IA32_TSC_DEADLINE) {
                // It has just been read: it can be written.
                let _ = apic.write_msr(IA32_TSC_DEADLINE, deadline.wrapping_add(ticks));
            }
        }
        self.timers.go_on();
        StoodStill { ticks, time }
    }

    /// All devices back to the state after power-up. No vCPU may be running.
    pub fn reset(&self) {
        if let Some((_, pit)) = &self.chips {
            pit.reset();
        }
        self.serial.reset();
        self.cmos.reset();
        self.i8042.reset();
        self.acpi_pm.reset();
        self.virtio.reset();
        self.pci.reset();
        // Last: the devices have released their lines.
        self.interrupts.reset();
    }

    /// Input for the console, virtio or serial; returns how many bytes it took.
    pub fn console_input(&self, bytes: &[u8]) -> usize {
        match self.virtio.console() {
            Some(console) => console.push_input(bytes),
            None => self.serial.push_input(bytes),
        }
    }

    /// Presses the ACPI power button.
    pub fn power_button(&self) {
        self.acpi_pm.press_power_button();
    }

    /// Whether the guest has enabled the ACPI power button.
    pub fn hears_power_button(&self) -> bool {
        self.acpi_pm.hears_power_button()
    }

    /// Waits until the console takes input, at most `timeout`; returns whether it does.
    pub fn wait_for_console_room(&self, timeout: Duration) -> bool {
        match self.virtio.console() {
            Some(console) => console.wait_for_room(timeout),
            None => self.serial.wait_for_room(timeout),
        }
    }
}

/// An error of a disk, for people.
fn describe(error: &BlockError) -> String {
    let BlockError { operation, offset, len, reason } = error;
    let what = format!("{operation:?}").to_lowercase();
    format!("{what} of {len} bytes at {offset} failed: {reason}")
}

/// What serial port and virtio console print to.
struct SharedOutput(Output);

impl Write for SharedOutput {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.lock().write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.lock().flush()
    }
}

/// Bytes of RAM below and above 4 GiB.
fn ram_sizes(memory: &GuestMemory) -> (u64, u64) {
    let (low, high): (Vec<_>, Vec<_>) = memory.regions().iter().partition(|r| r.start < HIGH_RAM_START);
    let sum = |regions: Vec<&berth_memory::RamRegion>| regions.iter().map(|r| r.len).sum();
    (sum(low), sum(high))
}

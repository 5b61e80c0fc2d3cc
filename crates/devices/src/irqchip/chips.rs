//! All interrupt controllers of a VM together, and the routes between them.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use berth_cpu::MAX_VCPUS;
use berth_engine::{LocalApic, LocalApics, MessageEvent, PinController, VcpuHandle, VcpuId};
use berth_memory::layout::IOAPIC_BASE;
use parking_lot::Mutex;
use tracing::trace;

use super::ioapic::{self, IoApic, PINS, Sent};
use super::lapic::Lapic;
use super::message::{DeliveryMode, Message};
use super::pic::{Pic, PicPort, PicSelect};
use crate::bus::{BusError, MachineBus, MmioDevice, PortDevice};
use crate::irq::{InterruptController, Interrupts, IrqError, IrqLine, Wires};
use crate::timer::{Timers, TscClock};

/// Interrupts that the PIC has inputs for.
const PIC_IRQS: u8 = 16;
/// The I/O APIC's pin of ISA interrupt 0, as the MADT's override says.
const IRQ0_PIN: u8 = 2;

/// Why the interrupt controllers cannot be made.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ChipsError {
    /// No VM has that many vCPUs.
    #[error("a VM has 1 to {MAX_VCPUS} vCPUs, not {0}")]
    VcpuCount(u8),
}

struct PicState {
    pic: Pic,
    /// INTR as the local APICs were told last.
    intr: bool,
}

/// Sets of vCPUs, a bit each.
type VcpuSet = u64;

/// PIC, IOAPIC and all local APICs of one VM, unless the engine has the local APICs.
pub struct InterruptChips {
    lapics: Vec<Arc<Lapic>>,
    /// In their place.
    engine: Option<EngineApics>,
    lines: Mutex<Wires>,
    pic: Mutex<PicState>,
    /// [`PicState::intr`], to be read without the lock.
    pic_output: AtomicBool,
    ioapic: Mutex<IoApic>,
    /// Where the search for the lowest priority begins, so that equals take turns.
    turn: AtomicUsize,
}

/// Local APICs of the engine.
struct EngineApics {
    apics: Arc<dyn LocalApics>,
    /// Who gets the PIC's interrupts.
    bootstrap: OnceLock<Arc<dyn VcpuHandle>>,
    /// What the engine knows of each pin. Locked before the IOAPIC.
    pins: Mutex<[Option<(u64, u32)>; PINS as usize]>,
}

impl EngineApics {
    /// Tells the engine which level-triggered messages the IOAPIC sends. One that is masked is not forgotten, because
    /// its last interrupt may be in service.
    fn follow(&self, ioapic: &Mutex<IoApic>) {
        let mut pins = self.pins.lock();
        for (pin, known) in (0..).zip(pins.iter_mut()) {
            let message = ioapic.lock().message(pin).filter(|message| message.level);
            let msi = message.and_then(|message| message.to_msi());
            if let Some((address, data)) = msi.filter(|_| msi != *known) {
                self.apics.set_pin(pin, address, data);
                *known = msi;
            }
        }
    }
}

impl InterruptChips {
    /// The controllers of a VM with `vcpus` vCPUs, in the state after reset.
    ///
    /// # Errors
    /// [`ChipsError::VcpuCount`] unless `vcpus` is 1 to [`MAX_VCPUS`].
    pub fn new(vcpus: u8, timers: &Timers, tsc: &TscClock) -> Result<Arc<Self>, ChipsError> {
        if !(1..=MAX_VCPUS).contains(&vcpus) {
            return Err(ChipsError::VcpuCount(vcpus));
        }
        Ok(Arc::new_cyclic(|chips| Self {
            engine: None,
            lapics: (0..vcpus).map(|id| Lapic::new(VcpuId(id), chips.clone(), timers, tsc.clone())).collect(),
            lines: Mutex::default(),
            pic: Mutex::new(PicState { pic: Pic::default(), intr: false }),
            pic_output: AtomicBool::new(false),
            ioapic: Mutex::default(),
            turn: AtomicUsize::new(0),
        }))
    }

    /// PIC and IOAPIC of a VM whose engine has the local APICs, in the state after reset.
    pub fn with_engine_apics(apics: Arc<dyn LocalApics>) -> Arc<Self> {
        Arc::new_cyclic(|chips: &Weak<Self>| {
            apics.connect(chips.clone());
            Self {
                engine: Some(EngineApics { apics, bootstrap: OnceLock::new(), pins: Mutex::default() }),
                lapics: Vec::new(),
                lines: Mutex::default(),
                pic: Mutex::new(PicState { pic: Pic::default(), intr: false }),
                pic_output: AtomicBool::new(false),
                ioapic: Mutex::default(),
                turn: AtomicUsize::new(0),
            }
        })
    }

    /// Connects vCPU `id` to its interrupts.
    pub fn attach(&self, id: VcpuId, handle: Arc<dyn VcpuHandle>) {
        match &self.engine {
            // The first one counts, as with a local APIC.
            Some(engine) if id.0 == 0 => drop(engine.bootstrap.set(handle)),
            Some(_) => (),
            None => {
                if let Some(lapic) = self.local_apic(id) {
                    lapic.set_handle(handle);
                }
            }
        }
    }

    /// The local APIC of vCPU `id`, if there is one.
    pub fn local_apic(&self, id: VcpuId) -> Option<&Arc<Lapic>> {
        self.lapics.get(usize::from(id.0))
    }

    /// All local APICs, by vCPU.
    pub fn local_apics(&self) -> &[Arc<Lapic>] {
        &self.lapics
    }

    /// [`Interrupts::line`] of these controllers.
    ///
    /// # Errors
    /// As there.
    pub fn line(self: &Arc<Self>, irq: u8) -> Result<IrqLine, IrqError> {
        Interrupts::new(self.clone()).line(irq)
    }

    /// Puts PIC and IOAPIC on the bus.
    ///
    /// # Errors
    /// [`BusError`] when their addresses are taken.
    pub fn register(self: &Arc<Self>, bus: &mut MachineBus) -> Result<(), BusError> {
        let ports = |select| Arc::new(PicPorts { chips: self.clone(), select, elcr: false });
        bus.register_ports(0x20, 2, "PIC", ports(PicSelect::Master))?;
        bus.register_ports(0xa0, 2, "PIC", ports(PicSelect::Slave))?;
        let elcr = PicPorts { chips: self.clone(), select: PicSelect::Master, elcr: true };
        bus.register_ports(0x4d0, 2, "PIC edge/level control", Arc::new(elcr))?;
        bus.register_mmio(IOAPIC_BASE, ioapic::MMIO_SIZE, "IOAPIC", Arc::new(IoApicPage(self.clone())))
    }

    /// Sends an NMI to pin LINT1 of every local APIC, as a PC's NMI button does.
    pub fn raise_nmi(&self) {
        self.lapics.iter().for_each(|lapic| lapic.raise_lint1());
    }

    /// Whether any line asserts `irq`.
    pub fn is_asserted(&self, irq: u8) -> bool {
        self.lines.lock().is_asserted(irq)
    }

    /// Delivers `message` to its destinations. Returns whether a local APIC took it.
    pub fn deliver(&self, message: &Message) -> bool {
        if let Some(engine) = &self.engine {
            return message.to_msi().is_some_and(|(address, data)| engine.apics.signal_msi(address, data));
        }
        if message.mode == DeliveryMode::LowestPriority {
            return self.lowest_priority(message).is_some_and(|lapic| lapic.accept(message));
        }
        if !message.logical && !message.is_broadcast() {
            return usize::try_from(message.destination)
                .ok()
                .and_then(|id| self.lapics.get(id))
                .is_some_and(|lapic| lapic.accept(message));
        }
        let mut taken = false;
        for lapic in &self.lapics {
            taken |= lapic.route().matches(lapic.id().0, message) && lapic.accept(message);
        }
        taken
    }

    /// Delivers to all local APICs, without the one of `except`.
    pub(super) fn deliver_all(&self, message: &Message, except: Option<VcpuId>) {
        for lapic in self.lapics.iter().filter(|lapic| Some(lapic.id()) != except) {
            lapic.accept(message);
        }
    }

    fn lowest_priority(&self, message: &Message) -> Option<&Arc<Lapic>> {
        let count = self.lapics.len();
        let first = self.turn.fetch_add(1, Ordering::Relaxed) % count;
        (first..first + count)
            .map(|i| &self.lapics[i % count])
            .filter(|lapic| {
                let route = lapic.route();
                route.enabled && route.software_enabled && route.matches(lapic.id().0, message)
            })
            .min_by_key(|lapic| lapic.priority())
    }

    /// A local APIC's EOI of a level-triggered interrupt.
    pub(super) fn end_of_interrupt(&self, vector: u8) {
        let sent = self.ioapic.lock().end_of_interrupt(vector);
        self.send(sent);
    }

    /// The PIC's acknowledge cycle.
    pub(crate) fn acknowledge_pic(&self) -> Option<u8> {
        let (vector, kicks) = self.change_pic(Pic::acknowledge);
        self.kick(kicks);
        vector
    }

    /// `lapic` lets the PIC's interrupts through, or not any more.
    pub(super) fn refresh_extint(&self, lapic: &Lapic) {
        let state = self.pic.lock();
        let kick = lapic.follow_pic(state.intr);
        drop(state);
        if kick {
            lapic.kick();
        }
    }

    /// Changes the PIC, and lets the local APICs follow its output. Gives the vCPUs to be kicked once no lock is
    /// held.
    fn change_pic<R>(&self, change: impl FnOnce(&mut Pic) -> R) -> (R, VcpuSet) {
        let mut state = self.pic.lock();
        let result = change(&mut state.pic);
        let intr = state.pic.intr();
        let mut kicks = 0;
        if intr != state.intr {
            state.intr = intr;
            self.pic_output.store(intr, Ordering::SeqCst);
            for lapic in &self.lapics {
                kicks |= VcpuSet::from(lapic.follow_pic(intr)) << lapic.id().0;
            }
            kicks |= VcpuSet::from(intr && self.engine.is_some());
        }
        (result, kicks)
    }

    fn kick(&self, vcpus: VcpuSet) {
        if vcpus != 0 {
            self.lapics.iter().filter(|l| vcpus >> l.id().0 & 1 != 0).for_each(|l| l.kick());
            let bootstrap = self.engine.as_ref().and_then(|engine| engine.bootstrap.get());
            bootstrap.into_iter().for_each(|handle| handle.kick());
        }
    }

    /// Delivers what the IOAPIC sends; no lock is held.
    fn send(&self, sent: impl IntoIterator<Item = Sent>) {
        for (pin, message) in sent {
            if !self.deliver(&message) {
                trace!("no local APIC took {message:?} of IOAPIC pin {pin}");
                self.ioapic.lock().undelivered(pin);
            }
        }
    }
}

impl InterruptController for InterruptChips {
    fn change_line(&self, irq: u8, asserted: bool) {
        let mut lines = self.lines.lock();
        if !lines.change(irq, asserted) {
            return;
        }
        let kicks = if irq < PIC_IRQS { self.change_pic(|pic| pic.set_line(irq, asserted)).1 } else { 0 };
        let sent = self.ioapic.lock().set_line(pin(irq), asserted);
        drop(lines);
        self.kick(kicks);
        self.send(sent);
    }

    fn deliver_msi(&self, address: u64, data: u32) -> bool {
        let Some(message) = Message::from_msi(address, data) else {
            trace!("MSI of {data:#x} to {address:#x} is outside of the APICs' window");
            return false;
        };
        self.deliver(&message)
    }

    fn message_event(&self) -> Option<Box<dyn MessageEvent>> {
        self.engine.as_ref()?.apics.message_event()
    }

    fn reset(&self) {
        let lines = self.lines.lock();
        let asserted = (0..PINS).filter(|&irq| lines.is_asserted(irq));
        let mut ioapic = IoApic::default();
        let mut pic = Pic::default();
        for irq in asserted {
            pic.set_line(irq, true);
            // Every pin is masked.
            ioapic.set_line(pin(irq), true);
        }
        *self.ioapic.lock() = ioapic;
        let ((), kicks) = self.change_pic(|p| *p = pic);
        drop(lines);
        self.kick(kicks);
        self.lapics.iter().for_each(|lapic| lapic.reset(false));
    }
}

impl PinController for InterruptChips {
    fn has_interrupt(&self) -> bool {
        self.pic_output.load(Ordering::SeqCst)
    }

    fn acknowledge(&self) -> Option<u8> {
        self.acknowledge_pic()
    }

    fn end_of_interrupt(&self, vector: u8) {
        InterruptChips::end_of_interrupt(self, vector);
    }
}

fn pin(irq: u8) -> u8 {
    if irq == 0 { IRQ0_PIN } else { irq }
}

struct PicPorts {
    chips: Arc<InterruptChips>,
    select: PicSelect,
    /// Edge/level control: the master's register at the first port, the slave's at the second.
    elcr: bool,
}

impl PicPorts {
    fn decode(&self, offset: usize) -> (PicSelect, PicPort) {
        match (self.elcr, offset) {
            (false, 0) => (self.select, PicPort::Command),
            (false, _) => (self.select, PicPort::Data),
            (true, 0) => (PicSelect::Master, PicPort::Elcr),
            (true, _) => (PicSelect::Slave, PicPort::Elcr),
        }
    }
}

impl PortDevice for PicPorts {
    fn read(&self, offset: u16, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            let (select, port) = self.decode(usize::from(offset) + i);
            let (value, kicks) = self.chips.change_pic(|pic| pic.read(select, port));
            *byte = value;
            self.chips.kick(kicks);
        }
    }
    fn write(&self, offset: u16, data: &[u8]) {
        for (i, &byte) in data.iter().enumerate() {
            let (select, port) = self.decode(usize::from(offset) + i);
            let ((), kicks) = self.chips.change_pic(|pic| pic.write(select, port, byte));
            self.chips.kick(kicks);
        }
    }
}

struct IoApicPage(Arc<InterruptChips>);

impl MmioDevice for IoApicPage {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.ioapic.lock().read(offset, data);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        let sent = self.0.ioapic.lock().write(offset, data);
        if let Some(engine) = &self.0.engine {
            engine.follow(&self.0.ioapic);
        }
        self.0.send(sent);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_engine::{Bus, MessageInterrupts};
    use berth_memory::GuestPhysAddr;

    fn machine() -> (Arc<InterruptChips>, MachineBus) {
        let timers = Timers::manual();
        let tsc = TscClock::new(1_000_000_000, timers.clock().clone());
        let chips = InterruptChips::new(2, &timers, &tsc).unwrap();
        let mut bus = MachineBus::new();
        chips.register(&mut bus).unwrap();
        (chips, bus)
    }
    fn software_enable(lapic: &Lapic) {
        lapic.mmio_write(0xf0, &0x1ff_u32.to_le_bytes());
    }
    fn redirect(bus: &MachineBus, pin: u32, low: u32, destination: u32) {
        for (register, value) in [(0x11 + 2 * pin, destination << 24), (0x10 + 2 * pin, low)] {
            bus.mmio_write(IOAPIC_BASE, &register.to_le_bytes());
            bus.mmio_write(GuestPhysAddr(IOAPIC_BASE.0 + 0x10), &value.to_le_bytes());
        }
    }
    fn init_pic(bus: &MachineBus) {
        for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 1), (0x21, 0)] {
            bus.port_write(port, &[value]);
        }
    }

    #[test]
    fn the_pic_interrupts_the_bootstrap_processor_without_any_set_up_of_apics() {
        let (chips, bus) = machine();
        init_pic(&bus);
        let timer = chips.line(0).unwrap();
        timer.pulse();
        let (bsp, ap) = (&chips.lapics[0], &chips.lapics[1]);
        assert!(bsp.has_interrupt() && !ap.has_interrupt());
        assert_eq!(bsp.acknowledge(), Some(0x30));
        assert!(!bsp.has_interrupt());
        // LINT0 masked: nothing passes until it is unmasked again.
        bus.port_write(0x20, &[0x20]);
        software_enable(bsp);
        bsp.mmio_write(0x350, &0x1_0700_u32.to_le_bytes());
        timer.pulse();
        assert!(!bsp.has_interrupt());
        bsp.mmio_write(0x350, &0x700_u32.to_le_bytes());
        assert_eq!(bsp.acknowledge(), Some(0x30));
    }

    #[test]
    fn isa_interrupt_0_is_ioapic_pin_2() {
        let (chips, bus) = machine();
        software_enable(&chips.lapics[1]);
        redirect(&bus, 2, 0x44, 1);
        chips.line(0).unwrap().pulse();
        assert_eq!(chips.lapics[1].acknowledge(), Some(0x44));
        assert!(chips.line(2).is_err() && chips.line(24).is_err());
    }

    #[test]
    fn a_level_interrupt_repeats_after_eoi_while_any_line_asserts_it() {
        let (chips, bus) = machine();
        let lapic = &chips.lapics[0];
        software_enable(lapic);
        redirect(&bus, 16, 0x8050, 0);
        let (a, b) = (chips.line(16).unwrap(), chips.line(16).unwrap());
        a.set(true);
        b.set(true);
        assert_eq!(lapic.acknowledge(), Some(0x50));
        assert!(lapic.needs_explicit_eoi());
        a.set(false);
        lapic.eoi();
        assert_eq!(lapic.acknowledge(), Some(0x50));
        drop(b);
        lapic.eoi();
        assert_eq!(lapic.acknowledge(), None);
        assert!(!chips.is_asserted(16));
    }

    #[test]
    fn a_level_interrupt_that_nobody_takes_can_come_later() {
        let (chips, bus) = machine();
        redirect(&bus, 16, 0x8050, 0);
        let line = chips.line(16).unwrap();
        line.set(true);
        software_enable(&chips.lapics[0]);
        assert_eq!(chips.lapics[0].acknowledge(), None);
        redirect(&bus, 16, 0x8050, 0);
        assert_eq!(chips.lapics[0].acknowledge(), Some(0x50));
    }

    #[test]
    fn messages_find_their_destination() {
        let (chips, _bus) = machine();
        chips.lapics.iter().for_each(|l| software_enable(l));
        assert!(chips.deliver_msi(0xfee0_1000, 0x61));
        assert_eq!(chips.lapics[1].acknowledge(), Some(0x61));
        assert!(!chips.deliver_msi(0xfee0_2000, 0x61));
        assert!(chips.deliver_msi(0xfeef_f000, 0x72));
        assert!(chips.lapics.iter().all(|l| l.acknowledge() == Some(0x72)));
        // vCPU 1 serves class 7, vCPU 0 refuses all below 10.
        chips.lapics[0].eoi();
        chips.lapics[0].set_cr8(9);
        assert!(chips.deliver_msi(0xfeef_f000, 0x181));
        assert_eq!(chips.lapics[1].acknowledge(), Some(0x81));
    }

    #[test]
    fn reset_forgets_all_but_the_lines() {
        let (chips, bus) = machine();
        software_enable(&chips.lapics[0]);
        redirect(&bus, 16, 0x8050, 0);
        let line = chips.line(16).unwrap();
        line.set(true);
        chips.reset();
        assert!(!chips.lapics[0].has_interrupt());
        software_enable(&chips.lapics[0]);
        redirect(&bus, 16, 0x8051, 0);
        assert_eq!(chips.lapics[0].acknowledge(), Some(0x51));
    }

    /// An engine's local APICs: what they are told.
    #[derive(Default)]
    struct Apics {
        sent: Mutex<Vec<(u64, u32)>>,
        pins: Mutex<Vec<(u8, u64, u32)>>,
        chips: OnceLock<Weak<dyn PinController>>,
    }
    impl MessageInterrupts for Apics {
        fn signal_msi(&self, address: u64, data: u32) -> bool {
            self.sent.lock().push((address, data));
            true
        }
        fn message_event(&self) -> Option<Box<dyn MessageEvent>> {
            None
        }
    }
    impl LocalApics for Apics {
        fn set_pin(&self, pin: u8, address: u64, data: u32) {
            self.pins.lock().push((pin, address, data));
        }
        fn connect(&self, controllers: Weak<dyn PinController>) {
            let _ = self.chips.set(controllers);
        }
    }
    struct Kicks(AtomicUsize);
    impl VcpuHandle for Kicks {
        fn kick(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
        fn stop(&self) {}
    }

    #[test]
    fn an_engine_with_local_apics_gets_messages_and_tells_their_ends() {
        let apics = Arc::new(Apics::default());
        let chips = InterruptChips::with_engine_apics(apics.clone());
        let mut bus = MachineBus::new();
        chips.register(&mut bus).unwrap();
        redirect(&bus, 5, 0x45, 0);
        redirect(&bus, 16, 0x8050, 1);
        // Masked, and the same again: nothing new for the engine.
        redirect(&bus, 16, 0x1_8050, 1);
        redirect(&bus, 16, 0x8050, 1);
        assert_eq!(apics.pins.lock().last(), Some(&(16, 0xfee0_1000, 0xc050)));
        assert!(apics.pins.lock().iter().all(|&(pin, ..)| pin == 16));
        chips.line(5).unwrap().pulse();
        let line = chips.line(16).unwrap();
        line.set(true);
        let controller = apics.chips.get().unwrap().upgrade().unwrap();
        controller.end_of_interrupt(0x50);
        line.set(false);
        controller.end_of_interrupt(0x50);
        assert_eq!(*apics.sent.lock(), [(0xfee0_0000, 0x4045), (0xfee0_1000, 0xc050), (0xfee0_1000, 0xc050)]);
    }

    #[test]
    fn the_pic_kicks_the_bootstrap_processor_of_an_engine() {
        let apics = Arc::new(Apics::default());
        let chips = InterruptChips::with_engine_apics(apics.clone());
        let kicks = Arc::new(Kicks(AtomicUsize::new(0)));
        chips.attach(VcpuId(0), kicks.clone());
        let mut bus = MachineBus::new();
        chips.register(&mut bus).unwrap();
        init_pic(&bus);
        assert!(!PinController::has_interrupt(&*chips));
        chips.line(4).unwrap().pulse();
        assert!(PinController::has_interrupt(&*chips));
        assert_eq!(kicks.0.load(Ordering::SeqCst), 1);
        assert_eq!(PinController::acknowledge(&*chips), Some(0x34));
        assert!(!PinController::has_interrupt(&*chips));
        assert_eq!(PinController::acknowledge(&*chips), None);
    }

    #[test]
    fn impossible_vcpu_counts_are_refused() {
        let timers = Timers::manual();
        let tsc = TscClock::new(1, timers.clock().clone());
        for count in [0, 65, 255] {
            assert_eq!(InterruptChips::new(count, &timers, &tsc).err(), Some(ChipsError::VcpuCount(count)));
        }
    }
}

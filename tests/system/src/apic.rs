//! A local APIC for scripts: it holds what was posted, in order of priority, and takes IPIs through the x2APIC's
//! ICR. It has no in-service register. With an engine that has local APICs of its own it only posts to them.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use berth_cpu::{ApicState, VcpuId, apic, msr};
use berth_engine::{ApicEvent, InterruptControllers, LocalApic, MessageInterrupts, MsrFault, VcpuHandle};
use berth_memory::GuestPhysAddr;
use parking_lot::Mutex;

/// IA32_X2APIC_APICID.
const X2APIC_ID: u32 = 0x802;
/// IA32_X2APIC_EOI.
const X2APIC_EOI: u32 = 0x80b;
/// IA32_X2APIC_ICR.
const X2APIC_ICR: u32 = 0x830;

/// The APICs of one guest, by vCPU.
pub type Apics = OnceLock<Vec<Arc<TestApic>>>;

#[derive(Default)]
struct Posted {
    vectors: BTreeSet<u8>,
    events: Vec<ApicEvent>,
}

/// One vCPU's local APIC.
pub struct TestApic {
    id: u8,
    all: Weak<Apics>,
    handle: OnceLock<Arc<dyn VcpuHandle>>,
    posted: Mutex<Posted>,
    cr8: AtomicU8,
    acknowledged: AtomicU32,
    /// The engine's controllers, where it has them.
    sink: Option<Arc<dyn MessageInterrupts>>,
}

impl TestApic {
    /// The APIC of vCPU `id`; IPIs go to those in `all`.
    pub fn new(id: u8, all: &Arc<Apics>, controllers: InterruptControllers) -> Self {
        Self {
            id,
            all: Arc::downgrade(all),
            handle: OnceLock::new(),
            posted: Mutex::default(),
            cr8: AtomicU8::new(0),
            acknowledged: AtomicU32::new(0),
            sink: match controllers {
                InterruptControllers::Devices => None,
                InterruptControllers::LocalApics(apics) => Some(apics),
                InterruptControllers::Engine(sink) => Some(sink),
            },
        }
    }

    /// Whom to kick.
    pub fn connect(&self, handle: Arc<dyn VcpuHandle>) {
        let _ = self.handle.set(handle);
    }

    /// Posts an interrupt.
    pub fn post(&self, vector: u8) {
        if let Some(sink) = &self.sink {
            // A local APIC refuses vectors below 16, which is what such a case is about.
            sink.signal_msi(self.msi_address(), vector.into());
            return;
        }
        self.posted.lock().vectors.insert(vector);
        self.kick();
    }

    /// Posts an NMI, INIT or start-up IPI.
    pub fn event(&self, event: ApicEvent) {
        if let Some(sink) = &self.sink {
            let (mode, vector) = match event {
                ApicEvent::Nmi => (4, 0),
                ApicEvent::Init => (5, 0),
                ApicEvent::Startup { vector } => (6, vector),
            };
            assert!(sink.signal_msi(self.msi_address(), mode << 8 | u32::from(vector)), "{event:?} is lost");
            return;
        }
        self.posted.lock().events.push(event);
        self.kick();
    }

    /// How many interrupts the vCPU has taken; an engine does not tell.
    pub fn acknowledged(&self) -> Option<u32> {
        self.sink.is_none().then(|| self.acknowledged.load(Ordering::SeqCst))
    }

    /// Address of messages to this APIC (SDM volume 3, 11.11.1).
    fn msi_address(&self) -> u64 {
        0xfee0_0000 | u64::from(self.id) << 12
    }

    /// The state that an engine's local APIC starts in, so that it takes what cases post: x2APIC mode, enabled.
    pub fn start_state(&self) -> Option<Box<ApicState>> {
        self.sink.as_ref()?;
        let mut state = ApicState::reset(VcpuId(self.id));
        state.base |= apic::base::X2APIC;
        state.set(apic::offset::SVR, 0x1ff);
        state.set(apic::offset::LVT_LINT0, apic::LVT_MASKED);
        Some(Box::new(state))
    }

    fn kick(&self) {
        if let Some(handle) = self.handle.get() {
            handle.kick();
        }
    }
}

impl LocalApic for TestApic {
    fn has_interrupt(&self) -> bool {
        let priority = self.cr8();
        self.posted.lock().vectors.last().is_some_and(|v| v >> 4 > priority)
    }

    fn acknowledge(&self) -> Option<u8> {
        let priority = self.cr8();
        let mut posted = self.posted.lock();
        let vector = posted.vectors.last().copied().filter(|v| v >> 4 > priority)?;
        posted.vectors.remove(&vector);
        self.acknowledged.fetch_add(1, Ordering::SeqCst);
        Some(vector)
    }

    fn take_event(&self) -> Option<ApicEvent> {
        let events = &mut self.posted.lock().events;
        if events.is_empty() { None } else { Some(events.remove(0)) }
    }

    fn has_event(&self) -> bool {
        !self.posted.lock().events.is_empty()
    }

    fn cr8(&self) -> u8 {
        self.cr8.load(Ordering::SeqCst)
    }

    fn set_cr8(&self, value: u8) {
        self.cr8.store(value, Ordering::SeqCst);
    }

    fn read_msr(&self, number: u32) -> Result<u64, MsrFault> {
        match number {
            msr::IA32_APIC_BASE => Ok(0xfee0_0c00),
            msr::IA32_TSC_DEADLINE => Ok(0),
            X2APIC_ID => Ok(u64::from(self.id)),
            _ => Err(MsrFault),
        }
    }

    fn write_msr(&self, number: u32, value: u64) -> Result<(), MsrFault> {
        match number {
            msr::IA32_TSC_DEADLINE | msr::IA32_APIC_BASE | X2APIC_EOI => Ok(()),
            X2APIC_ICR => {
                self.send_ipi(value);
                Ok(())
            }
            _ => Err(MsrFault),
        }
    }

    fn mmio_base(&self) -> Option<GuestPhysAddr> {
        None
    }
    fn mmio_read(&self, _: u16, _: &mut [u8]) {}
    fn mmio_write(&self, _: u16, _: &[u8]) {}

    /// Destination in bits 63 to 32, delivery mode in 10 to 8, vector in 7 to 0.
    fn send_ipi(&self, icr: u64) {
        let Some(all) = self.all.upgrade() else { return };
        let Some(target) = all.get().and_then(|list| list.get((icr >> 32) as usize)) else { return };
        match icr >> 8 & 7 {
            0 => target.post(icr as u8),
            4 => target.event(ApicEvent::Nmi),
            5 => target.event(ApicEvent::Init),
            6 => target.event(ApicEvent::Startup { vector: icr as u8 }),
            _ => {}
        }
    }

    fn eoi(&self) {}

    fn needs_explicit_eoi(&self) -> bool {
        true
    }

    /// Events stay: a start-up IPI may have come between INIT and the reset that it causes.
    fn reset(&self, _: bool) {
        self.posted.lock().vectors.clear();
        self.set_cr8(0);
    }

    /// Of the registers it has the task priority and the requests.
    fn state(&self) -> ApicState {
        let mut state = ApicState::reset(VcpuId(self.id));
        state.base |= apic::base::X2APIC;
        state.set(apic::offset::SVR, 0x1ff);
        state.set(apic::offset::TPR, u32::from(self.cr8()) << 4);
        for &vector in &self.posted.lock().vectors {
            let at = apic::offset::IRR + u16::from(vector >> 5) * 16;
            state.set(at, state.get(at) | 1 << (vector & 31));
        }
        state
    }

    fn set_state(&self, state: &ApicState) {
        self.set_cr8((state.get(apic::offset::TPR) >> 4) as u8 & 0xf);
        let asked = |v: &u8| state.get(apic::offset::IRR + u16::from(v >> 5) * 16) >> (v & 31) & 1 != 0;
        self.posted.lock().vectors = (0..=u8::MAX).filter(asked).collect();
        self.kick();
    }
}

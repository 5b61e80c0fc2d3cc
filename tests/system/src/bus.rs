//! The ports and the device page of a guest.

use std::sync::Arc;

use berth_engine::{ApicEvent, Bus, VcpuHandle};
use berth_memory::GuestPhysAddr;
use parking_lot::Mutex;

use crate::apic::Apics;
use crate::end::Why;
use crate::layout::{MMIO, STUBS_COUNT, port};

/// One access to the device page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MmioAccess {
    /// Offset and size of a load.
    Read(u64, usize),
    /// Offset, size and value of a store.
    Write(u64, usize, u64),
}

/// Called with each value written to [`port::HOOK`].
pub type Hook = Box<dyn Fn(u32) + Send + Sync>;

/// What all vCPUs of a guest see.
pub struct Devices {
    apics: Arc<Apics>,
    scratch: Mutex<[u8; 4]>,
    page: Mutex<Vec<u8>>,
    /// Values written to [`port::LOG`].
    pub log: Mutex<Vec<u32>>,
    /// Accesses to the device page.
    pub mmio: Mutex<Vec<MmioAccess>>,
    /// What [`port::HOOK`] does.
    pub hook: Mutex<Option<Hook>>,
}

impl Devices {
    /// Devices that post interrupts to `apics`.
    pub fn new(apics: Arc<Apics>) -> Self {
        Self {
            apics,
            scratch: Mutex::default(),
            page: Mutex::new(vec![0; 4096]),
            log: Mutex::default(),
            mmio: Mutex::default(),
            hook: Mutex::default(),
        }
    }
}

/// The bus as one vCPU sees it: it knows which one ends.
pub struct TestBus {
    devices: Arc<Devices>,
    handle: Arc<dyn VcpuHandle>,
    why: Mutex<Option<Why>>,
}

impl TestBus {
    /// The bus of the vCPU behind `handle`.
    pub fn new(devices: Arc<Devices>, handle: Arc<dyn VcpuHandle>) -> Self {
        Self { devices, handle, why: Mutex::new(None) }
    }

    /// Why the vCPU asked to be stopped, if it did.
    pub fn take_why(&self) -> Option<Why> {
        self.why.lock().take()
    }

    fn end(&self, why: Why) {
        self.why.lock().get_or_insert(why);
        self.handle.stop();
    }
}

fn value(data: &[u8]) -> u64 {
    data.iter().rev().fold(0, |v, &b| v << 8 | u64::from(b))
}

impl Bus for TestBus {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if (port::SCRATCH..port::SCRATCH + 4).contains(&port) {
            let scratch = self.devices.scratch.lock();
            for (to, from) in data.iter_mut().zip(&scratch[usize::from(port - port::SCRATCH)..]) {
                *to = *from;
            }
        }
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        const VECTOR_END: u16 = port::VECTOR + STUBS_COUNT as u16;
        const SCRATCH_END: u16 = port::SCRATCH + 4;
        let first_apic = || self.devices.apics.get().and_then(|list| list.first().cloned());
        match port {
            port::VECTOR..VECTOR_END => self.end(Why::Vector((port - port::VECTOR) as u8)),
            port::DONE => self.end(Why::Done),
            port::LOG => self.devices.log.lock().push(value(data) as u32),
            port::INTERRUPT => first_apic().into_iter().for_each(|apic| apic.post(data[0])),
            port::NMI => first_apic().into_iter().for_each(|apic| apic.event(ApicEvent::Nmi)),
            port::HOOK => {
                if let Some(hook) = &*self.devices.hook.lock() {
                    hook(value(data) as u32);
                }
            }
            port::SCRATCH..SCRATCH_END => {
                let mut scratch = self.devices.scratch.lock();
                for (to, from) in scratch[usize::from(port - port::SCRATCH)..].iter_mut().zip(data) {
                    *to = *from;
                }
            }
            _ => {}
        }
    }

    fn mmio_read(&self, addr: GuestPhysAddr, data: &mut [u8]) {
        data.fill(0xff);
        if addr.page_base().0 == MMIO {
            let offset = addr.page_offset() as usize;
            let end = (offset + data.len()).min(4096);
            data[..end - offset].copy_from_slice(&self.devices.page.lock()[offset..end]);
            self.devices.mmio.lock().push(MmioAccess::Read(offset as u64, data.len()));
        }
    }

    fn mmio_write(&self, addr: GuestPhysAddr, data: &[u8]) {
        if addr.page_base().0 == MMIO {
            let offset = addr.page_offset() as usize;
            let end = (offset + data.len()).min(4096);
            self.devices.page.lock()[offset..end].copy_from_slice(&data[..end - offset]);
            self.devices.mmio.lock().push(MmioAccess::Write(offset as u64, data.len(), value(data)));
        }
    }
}

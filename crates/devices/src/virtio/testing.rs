//! A driver for tests and fuzzing: it does through the BAR what a guest's driver does, or any nonsense.

use std::sync::Arc;
use std::time::{Duration, Instant};

use berth_memory::{GuestMemory, GuestPhysAddr};
use parking_lot::Mutex;

use super::{Dma, PciWiring, VirtioDevice, VirtioPci, VirtioPciState};
use crate::irq::MsiSink;
use crate::irqchip::InterruptChips;
use crate::pci::PciFunction;
use crate::timer::{Timers, TscClock};

/// Memory of the machine.
pub const MEMORY: u64 = 4 << 20;
/// Where the rings of queue `n` are: at this times `n + 1`.
const RINGS: u64 = 0x1_0000;
const AVAIL: u64 = 0x4000;
const USED: u64 = 0x8000;
/// Where buffers for requests begin.
pub const DATA: u64 = 0x20_0000;
/// How long a device may take: generous, the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(20);

/// Flags of descriptors.
pub const NEXT: u16 = 1;
/// The device writes it.
pub const WRITE: u16 = 2;
/// It names a table of descriptors.
pub const INDIRECT: u16 = 4;

/// Messages that a device sent.
#[derive(Default)]
pub struct Messages(Mutex<Vec<(u64, u32)>>);

impl MsiSink for Messages {
    fn send_msi(&self, address: u64, data: u32) {
        let mut messages = self.0.lock();
        // A fuzzer's device may send any number.
        if messages.len() < 1000 {
            messages.push((address, data));
        }
    }
}

/// A device with its driver.
pub struct Driver {
    /// The device.
    pub pci: VirtioPci,
    /// Guest memory.
    pub dma: Dma,
    /// What the device sent.
    pub messages: Arc<Messages>,
    next: Vec<u16>,
    seen: Vec<u16>,
}

/// A driver whose device was saved, as if its machine had been.
pub struct Saved {
    memory: Vec<u8>,
    device: VirtioPciState,
    next: Vec<u16>,
    seen: Vec<u16>,
}

/// A descriptor: address, length, flags, next.
pub type Descriptor = (u64, u32, u16, u16);

impl Driver {
    /// Pauses the device and saves it with its memory; what `meanwhile` does comes between the two.
    pub fn save(mut self, meanwhile: impl FnOnce(&mut Self)) -> Saved {
        self.pci.pause();
        meanwhile(&mut self);
        let memory = self.get(0, MEMORY as usize);
        Saved { memory, device: self.pci.state(), next: self.next.clone(), seen: self.seen.clone() }
    }

    /// Puts `device` on PCI as what was saved, and goes on.
    pub fn restore(device: Arc<dyn VirtioDevice>, saved: &Saved) -> Self {
        let this = Self { next: saved.next.clone(), seen: saved.seen.clone(), ..Self::new(device) };
        this.put(0, &saved.memory);
        this.pci.restore(&saved.device).expect("the state of such a device");
        this.pci.resume();
        this
    }

    /// Puts `device` on PCI. Nothing is set up yet.
    pub fn new(device: Arc<dyn VirtioDevice>) -> Self {
        let timers = Timers::start("test").expect("a timer thread");
        let tsc = TscClock::new(1_000_000_000, timers.clock().clone());
        let chips = InterruptChips::new(1, &timers, &tsc).expect("interrupt controllers");
        let dma = Dma::new(GuestMemory::new(MEMORY).expect("4 MiB"));
        let messages = Arc::new(Messages::default());
        let line = chips.line(17).expect("a line");
        let queues = device.queue_sizes().len();
        let wiring = PciWiring { dma: dma.clone(), msi: messages.clone(), line };
        let pci = VirtioPci::new(device, "test", wiring).expect("a device");
        Self { pci, dma, messages, next: vec![0; queues], seen: vec![0; queues] }
    }

    /// A load of `N` bytes from the BAR.
    pub fn read<const N: usize>(&self, offset: u64) -> u64 {
        let mut data = [0; N];
        self.pci.bar_read(0, offset, &mut data);
        crate::bytes::value(&data)
    }

    /// A store of `N` bytes to the BAR.
    pub fn write<const N: usize>(&self, offset: u64, value: u64) {
        self.pci.bar_write(0, offset, &value.to_le_bytes()[..N]);
    }

    /// The device status.
    pub fn status(&self) -> u8 {
        self.read::<1>(0x14) as u8
    }

    /// Features that the device offers.
    pub fn offered(&self) -> u64 {
        self.write::<4>(0, 0);
        let low = self.read::<4>(4);
        self.write::<4>(0, 1);
        low | self.read::<4>(4) << 32
    }

    /// Accepts `features`; whether the device agrees.
    pub fn accept(&self, features: u64) -> bool {
        self.write::<1>(0x14, 3);
        for (select, value) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            self.write::<4>(8, select);
            self.write::<4>(0xc, value);
        }
        self.write::<1>(0x14, 3 | 8);
        self.status() & 8 != 0
    }

    /// Sets up queue `index` with `size` descriptors and MSI-X vector `index`.
    pub fn enable_queue(&self, index: u16, size: u16) {
        let rings = RINGS * (u64::from(index) + 1);
        self.write::<2>(0x16, index.into());
        self.write::<2>(0x18, size.into());
        self.write::<2>(0x1a, index.into());
        for (field, address) in [(0x20, rings), (0x28, rings + AVAIL), (0x30, rings + USED)] {
            self.write::<4>(field, address);
            self.write::<4>(field + 4, 0);
        }
        self.write::<2>(0x1c, 1);
    }

    /// Everything from reset to DRIVER_OK with all features but `without`, bus mastering and MSI-X on.
    pub fn start(&mut self, without: u64) {
        self.pci.config_write(4, &[6, 0]);
        let mut capability = [0];
        self.pci.config_read(0x34, &mut capability);
        self.pci.config_write(u16::from(capability[0]) + 2, &0x8000_u16.to_le_bytes());
        for vector in 0..=self.next.len() as u64 {
            self.write::<8>(0x4000 + 16 * vector, 0xfee0_0000);
            self.write::<4>(0x4008 + 16 * vector, 0x40 + vector);
            self.write::<4>(0x400c + 16 * vector, 0);
        }
        self.write::<2>(0x10, self.next.len() as u64);
        assert!(self.accept(self.offered() & !without), "the device does not agree on features");
        for index in 0..self.next.len() as u16 {
            self.enable_queue(index, 16);
        }
        self.write::<1>(0x14, 3 | 8 | 4);
        self.next.fill(0);
        self.seen.fill(0);
    }

    /// Writes a descriptor of a queue.
    pub fn descriptor(&self, queue: u16, index: u16, descriptor: Descriptor) {
        let at = RINGS * (u64::from(queue) + 1) + 16 * u64::from(index);
        self.put_descriptor(at, descriptor);
    }

    /// Writes a descriptor to `at`.
    pub fn put_descriptor(&self, at: u64, (address, len, flags, next): Descriptor) {
        let bytes =
            [&address.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()]
                .concat();
        self.put(at, &bytes);
    }

    /// Writes to memory; outside of it nothing happens.
    pub fn put(&self, at: u64, bytes: &[u8]) {
        let _ = self.dma.memory().write(GuestPhysAddr(at), bytes);
    }

    /// Reads from memory.
    pub fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let _ = self.dma.read(GuestPhysAddr(at), &mut bytes);
        bytes
    }

    /// Makes the chain at `head` available and notifies.
    pub fn offer(&mut self, queue: u16, head: u16) {
        let avail = RINGS * (u64::from(queue) + 1) + AVAIL;
        let Some(next) = self.next.get_mut(usize::from(queue)) else { return };
        let slot = avail + 4 + 2 * u64::from(*next % 16);
        *next = next.wrapping_add(1);
        let index = *next;
        self.put(slot, &head.to_le_bytes());
        self.put(avail + 2, &index.to_le_bytes());
        self.write::<2>(0x3000 + 4 * u64::from(queue), queue.into());
    }

    /// Offers a chain of buffers: what the device reads, then what it writes. Descriptors begin at `first`.
    pub fn request(&mut self, queue: u16, first: u16, readable: &[(u64, u32)], writable: &[(u64, u32)]) {
        let all: Vec<_> =
            readable.iter().map(|b| (*b, 0)).chain(writable.iter().map(|b| (*b, WRITE))).collect();
        for (i, &((address, len), flag)) in all.iter().enumerate() {
            let more = if i + 1 < all.len() { NEXT } else { 0 };
            let index = first + i as u16;
            self.descriptor(queue, index, (address, len, flag | more, index + 1));
        }
        self.offer(queue, first);
    }

    /// Waits for the next used chain: its head and how many bytes were written.
    pub fn used(&mut self, queue: u16) -> (u16, u32) {
        let used = RINGS * (u64::from(queue) + 1) + USED;
        let seen = &mut self.seen[usize::from(queue)];
        let slot = used + 4 + 8 * u64::from(*seen % 16);
        *seen = seen.wrapping_add(1);
        let wanted = *seen;
        self.wait("a used buffer", |d| {
            let index = crate::bytes::value(&d.get(used + 2, 2)) as u16;
            index.wrapping_sub(wanted) < 0x8000
        });
        // The event index: interrupt again for the next one.
        let avail = RINGS * (u64::from(queue) + 1) + AVAIL;
        self.put(avail + 4 + 2 * 16, &wanted.to_le_bytes());
        let bytes = self.get(slot, 8);
        (crate::bytes::value(&bytes[..4]) as u16, crate::bytes::value(&bytes[4..]) as u32)
    }

    /// Waits until the device says that it needs a reset.
    pub fn wait_for_failure(&self) {
        self.wait("DEVICE_NEEDS_RESET", |d| d.status() & 0x40 != 0);
    }

    /// Waits until an MSI with the vector of queue or entry `entry` came.
    pub fn wait_for_message(&self, entry: u32) {
        self.wait("an interrupt", |d| d.messages.0.lock().contains(&(0xfee0_0000, 0x40 + entry)));
    }

    /// Waits for something.
    pub fn wait(&self, what: &str, done: impl Fn(&Self) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !done(self) {
            assert!(Instant::now() < end, "no {what}; status {:#x}", self.status());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

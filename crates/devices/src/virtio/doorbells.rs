//! The notification registers of a function's queues: where a store is only a signal to the device's thread.
//!
//! While the BAR is mapped they are with the engine, if it takes them: the store then becomes a write to the queue's
//! eventfd without an exit to the vCPU's thread. If it does not, the store comes through the BAR and [`Doorbells::ring`]
//! does the same.

use std::sync::Arc;

use berth_memory::GuestPhysAddr;
use parking_lot::Mutex;
use vmm_sys_util::eventfd::EventFd;

use super::Dma;

/// The doorbells of one function.
pub struct Doorbells {
    events: Vec<Arc<EventFd>>,
    /// The way to the engine.
    dma: Dma,
    /// Bytes between the registers of two queues.
    step: u64,
    placed: Mutex<Placed>,
}

/// What the engine has.
#[derive(Default)]
struct Placed {
    /// Where the register of queue 0 is, while the BAR is mapped.
    start: Option<GuestPhysAddr>,
    /// Those that the engine took: address and number of the queue.
    taken: Vec<(GuestPhysAddr, usize)>,
}

impl Doorbells {
    /// For queues with these eventfds, by number.
    pub fn new(events: Vec<Arc<EventFd>>, dma: Dma, step: u64) -> Self {
        Self { events, dma, step, placed: Mutex::default() }
    }

    /// The register of queue 0 is at `start` now; `None`: the BAR is not mapped. Cheap when nothing changed.
    pub fn place(&self, start: Option<GuestPhysAddr>) {
        let mut placed = self.placed.lock();
        let Some(engine) = self.dma.engine() else { return };
        if placed.start == start {
            return;
        }
        for (addr, queue) in placed.taken.drain(..) {
            engine.remove_doorbell(addr, &self.events[queue]);
        }
        placed.start = start;
        let Some(start) = start else { return };
        for (queue, event) in self.events.iter().enumerate() {
            let addr = start + queue as u64 * self.step;
            if engine.add_doorbell(addr, event) {
                placed.taken.push((addr, queue));
            }
        }
    }

    /// A store to the registers, `offset` bytes from the first.
    pub fn ring(&self, offset: u64) {
        let queue = usize::try_from(offset / self.step).ok();
        if let Some(event) = queue.and_then(|queue| self.events.get(queue)) {
            // It cannot fail but for a full counter, and then the thread is told already.
            let _ = event.write(1);
        }
    }
}

impl Drop for Doorbells {
    fn drop(&mut self) {
        self.place(None);
    }
}

//! A running virtqueue: what a device's thread works on.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use parking_lot::Mutex;
use tracing::warn;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::msix::Interrupts;
use super::status::{DRIVER_OK, NEEDS_RESET, Status};
use super::{Chain, Dma};

/// What the transport and the device's threads share.
pub struct Link {
    /// Name of the device, for messages.
    pub name: String,
    /// The device status field.
    pub status: Status,
    /// How it interrupts.
    pub interrupts: Interrupts,
}

impl Link {
    /// The driver did what no driver may do: it must reset the device (virtio 1.2, 2.1.2).
    pub fn fail(&self, why: &dyn std::fmt::Display) {
        if self.status.add(NEEDS_RESET) & NEEDS_RESET == 0 {
            warn!("{}: the guest's driver is at fault, the device waits for a reset: {why}", self.name);
            if self.status.has(DRIVER_OK) {
                self.interrupts.signal_config();
            }
        }
    }
}

/// One virtqueue of a device that runs. All methods do nothing once the driver was found at fault.
pub struct Virtqueue {
    index: u16,
    queue: Arc<Mutex<Queue>>,
    doorbell: Arc<EventFd>,
    dma: Dma,
    link: Arc<Link>,
}

impl Virtqueue {
    pub(super) fn new(
        index: u16,
        queue: Arc<Mutex<Queue>>,
        doorbell: Arc<EventFd>,
        dma: Dma,
        link: Arc<Link>,
    ) -> Self {
        Self { index, queue, doorbell, dma, link }
    }

    /// The queue's number.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// How many descriptors it has.
    pub fn size(&self) -> u16 {
        self.queue.lock().size()
    }

    /// Guest memory.
    pub fn dma(&self) -> &Dma {
        &self.dma
    }

    /// Becomes readable when the driver notifies; [`Self::clear_doorbell`] then.
    pub fn doorbell(&self) -> RawFd {
        self.doorbell.as_raw_fd()
    }

    /// Takes the notification.
    pub fn clear_doorbell(&self) {
        // Not set: somebody else took it, or it was never there.
        let _ = self.doorbell.read();
    }

    /// The next request of the driver.
    pub fn pop(&self) -> Option<Chain> {
        if self.is_broken() {
            return None;
        }
        let mut queue = self.queue.lock();
        let size = queue.size();
        let result = match queue.iter(self.dma.memory().map()) {
            Ok(mut chains) => chains.next().map(|chain| Chain::read(chain, size, &self.dma)),
            Err(e) => {
                drop(queue);
                self.fail(&e);
                return None;
            }
        };
        drop(queue);
        match result? {
            Ok(chain) => Some(chain),
            Err(e) => {
                self.fail(&e);
                None
            }
        }
    }

    /// Puts the last request back, to be popped again.
    pub fn unpop(&self) {
        self.queue.lock().go_to_previous_position();
    }

    /// Gives request `head` back, with `written` bytes in its writable buffers.
    pub fn push(&self, head: u16, written: u32) {
        if self.is_broken() {
            return;
        }
        let result = self.queue.lock().add_used(self.dma.memory().map(), head, written);
        if let Err(e) = result {
            self.fail(&e);
        }
    }

    /// Interrupts the driver if it waits for what was pushed.
    pub fn signal(&self) {
        if self.is_broken() {
            return;
        }
        let needed = self.queue.lock().needs_notification(self.dma.memory().map());
        match needed {
            Ok(true) => self.link.interrupts.signal_queue(self.index),
            Ok(false) => {}
            Err(e) => self.fail(&e),
        }
    }

    /// Asks the driver for notifications; `true` if requests came meanwhile, which it may not notify of.
    pub fn enable_notification(&self) -> bool {
        if self.is_broken() {
            return false;
        }
        let result = self.queue.lock().enable_notification(self.dma.memory().map());
        result.unwrap_or_else(|e| {
            self.fail(&e);
            false
        })
    }

    /// Tells the driver that notifications are not needed for now.
    pub fn disable_notification(&self) {
        if self.is_broken() {
            return;
        }
        let result = self.queue.lock().disable_notification(self.dma.memory().map());
        if let Err(e) = result {
            self.fail(&e);
        }
    }

    /// Handles all requests, those too that come meanwhile, and interrupts the driver at the end. A driver that
    /// never stops cannot keep the thread from its other events: after a queue's worth the rest waits for the
    /// doorbell, which this rings.
    pub fn serve(&self, mut handle: impl FnMut(Chain)) {
        let mut budget = self.size();
        self.disable_notification();
        loop {
            if budget == 0 {
                self.ring();
                break;
            }
            match self.pop() {
                Some(chain) => {
                    budget -= 1;
                    handle(chain);
                }
                None if self.enable_notification() => self.disable_notification(),
                None => break,
            }
        }
        self.signal();
    }

    /// Makes the thread look at the queue again.
    pub fn ring(&self) {
        // It cannot fail but for a full counter, and then the thread is told already.
        let _ = self.doorbell.write(1);
    }

    /// The driver did what no driver may do; see [`super`].
    pub fn fail(&self, why: &dyn std::fmt::Display) {
        self.link.fail(&format_args!("queue {}: {why}", self.index));
    }

    /// Whether the driver was found at fault.
    pub fn is_broken(&self) -> bool {
        self.link.status.has(NEEDS_RESET)
    }
}

//! The thread of one queue of a disk.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use berth_disk::Image;
use tracing::debug;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::account::Account;
use super::pool::Pool;
use super::request::{Action, Range, Request, Status};
use super::ring::{Ring, Transfer};
use crate::virtio::events::Poll;
use crate::virtio::{Buffer, Virtqueue};

const DOORBELL: u64 = 0;
const RING: u64 = 1;
const POOL: u64 = 2;

/// A request of the pool with its result.
type Done = (Request, io::Result<()>);

/// What all queues of a disk have in common.
pub struct Disk {
    pub image: Arc<dyn Image>,
    pub pool: Arc<Pool>,
    /// As the driver gets it.
    pub serial: Vec<u8>,
    /// Whether io_uring is not used even where the host has it.
    pub no_ring: bool,
    pub account: Arc<Account>,
}

/// One queue and the requests that were taken from it.
pub struct QueueWorker {
    queue: Arc<Virtqueue>,
    disk: Arc<Disk>,
    /// Whether a write completes only when it is durable.
    durable_writes: bool,
    ring: Option<Ring<Request>>,
    done: (Sender<Done>, Receiver<Done>),
    done_event: Arc<EventFd>,
    /// Requests that are with the pool.
    pooled: usize,
    /// Requests that were answered since the last interrupt.
    answered: usize,
}

impl QueueWorker {
    pub fn new(queue: Virtqueue, disk: Arc<Disk>, durable_writes: bool) -> io::Result<Self> {
        let ring = match disk.image.as_raw().filter(|_| !disk.no_ring) {
            Some(raw) => match Ring::new(raw.file().try_clone()?, queue.size()) {
                Ok(ring) => Some(ring),
                Err(e) => {
                    debug!("the host has no io_uring for us ({e}): threads do its work");
                    None
                }
            },
            None => None,
        };
        Ok(Self {
            queue: Arc::new(queue),
            disk,
            durable_writes,
            ring,
            done: channel(),
            done_event: Arc::new(EventFd::new(EFD_NONBLOCK)?),
            pooled: 0,
            answered: 0,
        })
    }

    /// Works until the end, and until every request that was begun is done.
    pub fn run(mut self, poll: Poll) -> io::Result<()> {
        poll.add(self.queue.doorbell(), DOORBELL)?;
        poll.add(self.done_event.as_raw_fd(), POOL)?;
        if let Some(ring) = &self.ring {
            poll.add(ring.fd(), RING)?;
        }
        while let Some(events) = poll.wait(None)? {
            let mut look = false;
            for (token, _) in events {
                match token {
                    DOORBELL => {
                        self.queue.clear_doorbell();
                        look = true;
                    }
                    POOL => {
                        let _ = self.done_event.read();
                    }
                    _ => {}
                }
            }
            // Requests that found no room are looked for when others are done.
            look |= self.answer_done();
            if look {
                self.take_requests()?;
            }
            self.signal();
        }
        self.finish()
    }

    /// Takes requests while there are some and room for them.
    fn take_requests(&mut self) -> io::Result<()> {
        let queue = self.queue.clone();
        let mut budget = queue.size();
        let mut full = false;
        queue.disable_notification();
        loop {
            if budget == 0 {
                queue.ring();
                break;
            }
            if self.in_flight() >= usize::from(queue.size()) {
                // A driver has no more descriptors than that: some are in flight twice, or it was fast. What is done
                // makes room.
                full = true;
                break;
            }
            match queue.pop() {
                Some(chain) => {
                    budget -= 1;
                    match Request::read(
                        chain,
                        queue.dma(),
                        self.disk.image.size(),
                        self.disk.image.is_read_only(),
                    ) {
                        Some(request) => self.begin(request),
                        None => queue.fail(&"a request of a disk without a place for its status"),
                    }
                }
                None if queue.enable_notification() => queue.disable_notification(),
                None => break,
            }
        }
        if let Some(ring) = &mut self.ring {
            ring.submit()?;
            if ring.is_behind() {
                queue.ring();
            }
        }
        // What was in the page cache is done already.
        if self.answer_done() && full {
            queue.ring();
        }
        Ok(())
    }

    fn in_flight(&self) -> usize {
        let in_ring = self.ring.as_ref().map_or(0, Ring::in_flight);
        self.pooled + in_ring
    }

    fn begin(&mut self, request: Request) {
        match &request.action {
            Action::Refuse(status) => {
                let status = *status;
                self.answer(request, status);
            }
            Action::Identify(buffers) => {
                buffers.clone().write(self.queue.dma(), &self.disk.serial);
                self.answer(request, Status::Ok);
            }
            Action::Read(buffers, _) | Action::Write(buffers, _) if buffers.is_empty() => {
                self.answer(request, Status::Ok);
            }
            Action::Read(..) | Action::Write(..) | Action::Flush => self.begin_transfer(request),
            Action::Discard(_) | Action::WriteZeroes(_) => self.begin_in_pool(request),
        }
    }

    /// Through the ring, if there is one that can do it.
    fn begin_transfer(&mut self, request: Request) {
        let durable = self.durable_writes;
        let (kind, buffers, offset): (_, &[Buffer], _) = match &request.action {
            Action::Read(buffers, offset) => (Transfer::Read, buffers.as_slice(), *offset),
            Action::Write(buffers, offset) => (Transfer::Write { durable }, buffers.as_slice(), *offset),
            _ => (Transfer::Flush, &[], 0),
        };
        let iovecs = self.queue.dma().iovecs(buffers);
        let (Some(ring), Some(raw)) = (&mut self.ring, self.disk.image.as_raw()) else {
            return self.begin_in_pool(request);
        };
        if !raw.is_aligned(iovecs.iter().map(|v| (v.iov_base as usize, v.iov_len)), offset) {
            return self.begin_in_pool(request);
        }
        // SAFETY: the queue's `Dma` keeps guest memory mapped; `finish` and the ring's drop wait for all requests
        // before `self.queue` goes. Guest memory is never behind a reference.
        if let Err(request) = unsafe { ring.add(kind, iovecs, offset, request) } {
            self.begin_in_pool(request);
        }
    }

    fn begin_in_pool(&mut self, request: Request) {
        self.pooled += 1;
        let (queue, image) = (self.queue.clone(), self.disk.image.clone());
        let (done, event) = (self.done.0.clone(), self.done_event.clone());
        let durable = self.durable_writes;
        self.disk.pool.run(Box::new(move || {
            let result = execute(&request, image.as_ref(), &queue, durable);
            // Who waits for the result may close the image next, and open it again.
            drop((queue, image));
            // The receiver waits for it; the event can only be set already.
            let _ = done.send((request, result));
            let _ = event.write(1);
        }));
    }

    /// Answers what is done; returns whether something was.
    fn answer_done(&mut self) -> bool {
        let mut any = false;
        while let Some((request, result)) = self.ring.as_mut().and_then(Ring::next_done) {
            any = true;
            match result {
                // Short, or not possible this way: the slow way says what is wrong, or does it.
                Err(_) if !matches!(request.action, Action::Flush) => self.begin_in_pool(request),
                result => self.complete(request, &result),
            }
        }
        while let Ok((request, result)) = self.done.1.try_recv() {
            any = true;
            self.pooled -= 1;
            self.complete(request, &result);
        }
        any
    }

    fn complete(&mut self, request: Request, result: &io::Result<()>) {
        if let Action::Read(buffers, _) = &request.action {
            // Even a read that failed may have written something.
            for buffer in buffers.as_slice() {
                self.queue.dma().written(buffer.start, buffer.len.into());
            }
        }
        self.disk.account.count(&request.action, result);
        let status = if result.is_ok() { Status::Ok } else { Status::Error };
        self.answer(request, status);
    }

    fn answer(&mut self, mut request: Request, status: Status) {
        let written = request.finish(self.queue.dma(), status);
        self.queue.push(request.head, written);
        self.answered += 1;
    }

    fn signal(&mut self) {
        if std::mem::take(&mut self.answered) > 0 {
            self.queue.signal();
        }
    }

    /// Waits for all that was begun.
    fn finish(mut self) -> io::Result<()> {
        loop {
            self.answer_done();
            if self.pooled > 0 {
                if let Ok((request, result)) = self.done.1.recv() {
                    self.pooled -= 1;
                    self.complete(request, &result);
                }
            } else if let Some(ring) = self.ring.as_mut().filter(|ring| !ring.is_idle()) {
                ring.wait()?;
            } else {
                self.signal();
                return Ok(());
            }
        }
    }
}

/// Does a request, waiting for the host.
fn execute(request: &Request, image: &dyn Image, queue: &Virtqueue, durable: bool) -> io::Result<()> {
    let dma = queue.dma();
    match &request.action {
        Action::Read(buffers, offset) => image.read(&dma.slices(buffers.as_slice()), *offset),
        Action::Write(buffers, offset) => {
            image.write(&dma.slices(buffers.as_slice()), *offset)?;
            if durable { image.flush() } else { Ok(()) }
        }
        Action::Flush => image.flush(),
        Action::Discard(ranges) => {
            ranges.iter().try_for_each(|&Range { offset, len, .. }| image.discard(offset, len))
        }
        Action::WriteZeroes(ranges) => {
            ranges.iter().try_for_each(|r| image.write_zeroes(r.offset, r.len, r.unmap))?;
            if durable { image.flush() } else { Ok(()) }
        }
        // Answered without the image.
        Action::Identify(_) | Action::Refuse(_) => Ok(()),
    }
}

//! Random numbers (virtio 1.2, 5.4), from the host's getrandom(2).

use std::io;

use parking_lot::Mutex;

use super::events::Worker;
use super::{Chain, DeviceKind, Session, VirtioDevice, Virtqueue};

const QUEUE_SIZE: u16 = 64;
/// Most bytes that one request gets: a driver that wants more asks again.
const MAX_BYTES: usize = 4096;

/// A source of random numbers.
pub struct Rng {
    thread_name: String,
    worker: Mutex<Option<Worker>>,
}

impl Rng {
    /// A source whose thread has the name `thread_name`.
    pub fn new(thread_name: String) -> Self {
        Self { thread_name, worker: Mutex::new(None) }
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Rng
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn start(&self, mut session: Session) -> io::Result<()> {
        let Some(queue) = session.take_queue(0) else { return Ok(()) };
        let worker = Worker::spawn(self.thread_name.clone(), move |poll| {
            poll.add(queue.doorbell(), 0)?;
            while poll.wait(None)?.is_some() {
                queue.clear_doorbell();
                queue.serve(|chain| fill(&queue, chain));
            }
            Ok(())
        })?;
        *self.worker.lock() = Some(worker);
        Ok(())
    }

    fn stop(&self) {
        *self.worker.lock() = None;
    }
}

fn fill(queue: &Virtqueue, mut chain: Chain) {
    let mut bytes = [0; MAX_BYTES];
    let len = chain.writable.len().min(MAX_BYTES as u64) as usize;
    // SAFETY: pointer and length are those of one live buffer.
    let n = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), len, 0) };
    let got = usize::try_from(n).unwrap_or(0);
    let written = chain.writable.write(queue.dma(), &bytes[..got]);
    queue.push(chain.head, written as u32);
}

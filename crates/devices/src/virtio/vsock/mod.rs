//! Sockets between host and guest (virtio 1.2, 5.10), streams only.
//!
//! ```text
//!   host program ──► PATH, says "CONNECT PORT", hears "OK HOSTPORT" ──► guest listens at PORT
//!   guest connects to port P of the host (CID 2) ──► host program listens at PATH_P
//! ```
//! The host's side is that of Firecracker: Unix sockets, and nothing of the host's kernel.

mod connection;
mod muxer;
mod packet;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::device::read_config_bytes;
use super::events::{Poll, Worker};
use super::{Chain, DeviceKind, DeviceState, Session, VirtioDevice, Virtqueue};
use muxer::{LISTENER, MAX_DATA, Muxer, listen};
use packet::{HEADER, Header};

const QUEUE_SIZE: u16 = 256;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENTS: usize = 2;
/// Tokens above those of connections.
const RECEIVE_TOKEN: u64 = LISTENER + 1;
const TRANSMIT_TOKEN: u64 = LISTENER + 2;
const EVENTS_TOKEN: u64 = LISTENER + 3;
/// The event that all connections are gone (virtio 1.2, 5.10.6.7).
const TRANSPORT_RESET: u32 = 0;
/// Most packets to the guest before other events have their turn.
const BATCH: usize = 64;

/// The guest's sockets.
pub struct Vsock {
    cid: u32,
    path: PathBuf,
    /// The connections live on while the device pauses.
    muxer: Arc<Mutex<Muxer>>,
    /// The guest was restored and must hear that its connections are gone.
    is_reset: Arc<AtomicBool>,
    thread_name: String,
    worker: Mutex<Option<Worker>>,
}

impl Vsock {
    /// For a guest with context identifier `cid`; host programs connect to the Unix socket `path`, which is made here
    /// and deleted at the end.
    ///
    /// # Errors
    /// What the host says; `AddrInUse` when another process listens there.
    pub fn new(cid: u32, path: &Path, thread_name: String) -> io::Result<Self> {
        let muxer = Arc::new(Mutex::new(Muxer::new(cid.into(), path, listen(path)?)));
        let (path, is_reset) = (path.to_owned(), Arc::default());
        Ok(Self { cid, path, muxer, is_reset, thread_name, worker: Mutex::new(None) })
    }
}

impl Vsock {
    /// Descriptors that become readable when host programs want something of the guest; none while the device runs, which
    /// has them then.
    ///
    /// # Errors
    /// What the host says.
    pub fn host_sockets(&self) -> io::Result<Vec<OwnedFd>> {
        self.muxer.try_lock().map_or(Ok(Vec::new()), |muxer| muxer.host_sockets())
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        // Deleted already: somebody tidied up.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Vsock
    }

    fn queue_sizes(&self) -> Vec<u16> {
        // Receive, transmit, events.
        vec![QUEUE_SIZE; 3]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&u64::from(self.cid).to_le_bytes(), offset, data);
    }

    fn start(&self, mut session: Session) -> io::Result<()> {
        let (Some(receive), Some(transmit)) = (session.take_queue(RECEIVE), session.take_queue(TRANSMIT))
        else {
            return Ok(());
        };
        let (muxer, events, is_reset) =
            (self.muxer.clone(), session.take_queue(EVENTS), self.is_reset.clone());
        let worker = Worker::spawn(self.thread_name.clone(), move |poll| {
            let events = events.as_ref().map(|queue| (queue, &*is_reset));
            serve(&poll, &mut muxer.lock(), &receive, &transmit, events)
        })?;
        *self.worker.lock() = Some(worker);
        Ok(())
    }

    fn stop(&self) {
        *self.worker.lock() = None;
    }

    fn reset(&self) {
        self.muxer.lock().clear();
        self.is_reset.store(false, Ordering::Release);
    }

    /// Connections do not survive: their host programs are gone, or were never here.
    fn restore(&self, state: &DeviceState) -> Result<(), String> {
        let DeviceState::Stateless = state else { return Err(DeviceState::other_kind()) };
        self.muxer.lock().clear();
        self.is_reset.store(true, Ordering::Release);
        Ok(())
    }
}

fn serve(
    poll: &Poll,
    muxer: &mut Muxer,
    receive: &Virtqueue,
    transmit: &Virtqueue,
    events: Option<(&Virtqueue, &AtomicBool)>,
) -> io::Result<()> {
    poll.add(receive.doorbell(), RECEIVE_TOKEN)?;
    poll.add(transmit.doorbell(), TRANSMIT_TOKEN)?;
    poll.add(muxer.listener_fd(), LISTENER)?;
    if let Some((queue, _)) = events {
        // Readable at the start, too.
        poll.add(queue.doorbell(), EVENTS_TOKEN)?;
    }
    muxer.attach(poll);
    let mut data = vec![0; MAX_DATA];
    while let Some(ready) = poll.wait(None)? {
        for (token, ready) in ready {
            match token {
                LISTENER => muxer.accept(poll),
                RECEIVE_TOKEN => receive.clear_doorbell(),
                TRANSMIT_TOKEN => {
                    transmit.clear_doorbell();
                    transmit.serve(|chain| {
                        let head = chain.head;
                        if let Some((header, data)) = read_packet(transmit, chain) {
                            muxer.packet(&header, &data, poll);
                        }
                        transmit.push(head, 0);
                    });
                }
                EVENTS_TOKEN => {
                    if let Some((queue, is_reset)) = events {
                        queue.clear_doorbell();
                        tell_of_reset(queue, is_reset);
                    }
                }
                connection => muxer.ready(connection, ready),
            }
        }
        deliver(muxer, receive, &mut data);
    }
    Ok(())
}

/// Tells the guest that its connections are gone, if they are and it has a buffer for that.
fn tell_of_reset(queue: &Virtqueue, is_reset: &AtomicBool) {
    if !is_reset.load(Ordering::Acquire) {
        return;
    }
    if let Some(mut chain) = queue.pop() {
        let written = chain.writable.write(queue.dma(), &TRANSPORT_RESET.to_le_bytes());
        queue.push(chain.head, written as u32);
        queue.signal();
        is_reset.store(false, Ordering::Release);
    }
}

/// Gives the guest packets as long as it has buffers, up to a batch.
fn deliver(muxer: &mut Muxer, receive: &Virtqueue, data: &mut [u8]) {
    let mut delivered = 0;
    while muxer.has_packets() {
        if delivered == BATCH {
            // Others have their turn; then it goes on.
            receive.ring();
            break;
        }
        let Some(mut chain) = receive.pop() else {
            if receive.enable_notification() {
                continue;
            }
            break;
        };
        let Some(room) = chain.writable.len().checked_sub(HEADER as u64) else {
            receive.fail(&"a buffer for packets that holds no header");
            return;
        };
        let room = usize::try_from(room).unwrap_or(usize::MAX);
        let Some(header) = muxer.next_packet(room, data) else {
            receive.unpop();
            break;
        };
        let len = header.len as usize;
        let mut written = chain.writable.write(receive.dma(), &header.to_bytes());
        written += chain.writable.write(receive.dma(), &data[..len]);
        receive.push(chain.head, written as u32);
        delivered += 1;
    }
    if delivered > 0 {
        receive.signal();
    }
}

/// A packet with its data. One that is not as long as it says makes the queue stand still.
fn read_packet(queue: &Virtqueue, mut chain: Chain) -> Option<(Header, Vec<u8>)> {
    let mut bytes = [0; HEADER];
    if chain.readable.read(queue.dma(), &mut bytes) != HEADER {
        queue.fail(&"a packet without a header");
        return None;
    }
    let header = Header::from_bytes(&bytes);
    if u64::from(header.len) > chain.readable.len() || header.len > connection::BUFFER {
        queue.fail(&"a packet that is shorter than it says, or larger than any buffer");
        return None;
    }
    let mut data = vec![0; header.len as usize];
    chain.readable.read(queue.dma(), &mut data);
    Some((header, data))
}

//! The thread of one pair of queues.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use tracing::warn;
use vmm_sys_util::epoll::EventSet;

use super::counters::Traffic;
use super::port::{HEADER, MAX_PACKET, Port, Received};
use crate::virtio::events::Poll;
use crate::virtio::{Buffers, Chain, Virtqueue};

const RECEIVE: u64 = 0;
const TRANSMIT: u64 = 1;
const PORT: u64 = 2;
/// Most packets of one direction before the other has its turn.
const BATCH: usize = 64;
/// Offset of the number of buffers in the header.
const NUM_BUFFERS: u64 = 10;

/// One pair of queues with its end of the cable.
pub struct Pair {
    pub receive: Virtqueue,
    pub transmit: Virtqueue,
    pub port: Box<dyn Port>,
    /// Whether a packet may lie in several requests.
    pub mergeable: bool,
    /// Least room that a packet needs with its header.
    pub least: u64,
    pub traffic: Arc<Traffic>,
}

impl Pair {
    /// Works until the end, or until the other end of the cable is gone.
    pub fn run(mut self, poll: &Poll) -> io::Result<()> {
        poll.add(self.receive.doorbell(), RECEIVE)?;
        poll.add(self.transmit.doorbell(), TRANSMIT)?;
        poll.add_for(self.port.fd(), PORT, EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED)?;
        // Requests that were taken for packets to come.
        let mut pool: VecDeque<Chain> = VecDeque::new();
        let mut may_have_packets = true;
        while let Some(events) = poll.wait(None)? {
            for (token, _) in events {
                match token {
                    RECEIVE => self.receive.clear_doorbell(),
                    TRANSMIT => self.transmit.clear_doorbell(),
                    _ => may_have_packets = true,
                }
            }
            let result = self.send_all().and_then(|()| {
                if may_have_packets {
                    may_have_packets = self.receive_some(&mut pool)?;
                }
                Ok(())
            });
            if let Err(e) = result {
                warn!("a network interface's other end is gone: {e}");
                return Ok(());
            }
        }
        // Requests in the pool belong to the driver: as if they had never been taken.
        for _ in pool {
            self.receive.unpop();
        }
        Ok(())
    }

    /// Sends what the driver has, until the port takes no more.
    fn send_all(&mut self) -> io::Result<()> {
        self.port.flush()?;
        let mut sent = 0;
        self.transmit.disable_notification();
        // When the port is full its descriptor becomes writable, and this is called again.
        while self.port.can_send() {
            if sent == BATCH {
                self.transmit.ring();
                break;
            }
            match self.transmit.pop() {
                Some(mut chain) => {
                    if chain.readable.len() < HEADER as u64 || chain.readable.len() > MAX_PACKET {
                        self.transmit.fail(&"a packet without a header, or longer than any");
                        break;
                    }
                    let bytes = chain.readable.len() - HEADER as u64;
                    if self.port.send(self.transmit.dma(), &mut chain.readable)? {
                        self.traffic.sent.count(bytes);
                    } else {
                        self.traffic.sent.drop_one();
                    }
                    self.transmit.push(chain.head, 0);
                    sent += 1;
                }
                None if self.transmit.enable_notification() => self.transmit.disable_notification(),
                None => break,
            }
        }
        if sent > 0 {
            self.transmit.signal();
        }
        Ok(())
    }

    /// Receives packets; returns whether there may be more, for which the driver has no room now or others come first.
    fn receive_some(&mut self, pool: &mut VecDeque<Chain>) -> io::Result<bool> {
        let mut received = 0;
        let more = loop {
            if received == BATCH {
                self.receive.ring();
                break true;
            }
            if !self.has_room(pool) {
                break true;
            }
            let room: Buffers = pool
                .iter()
                .take(if self.mergeable { usize::MAX } else { 1 })
                .flat_map(|chain| chain.writable.as_slice().iter().copied())
                .collect();
            match self.port.receive(self.receive.dma(), &room)? {
                Some(Received::Packet(len)) => {
                    self.traffic.received.count(len.saturating_sub(HEADER as u64));
                    self.give(pool, len);
                    received += 1;
                }
                Some(Received::Dropped) => {
                    self.traffic.received.drop_one();
                    received += 1;
                }
                None => break false,
            }
        };
        if received > 0 {
            self.receive.signal();
        }
        Ok(more)
    }

    /// Takes requests until the largest packet fits. `false` if the driver has too few: it notifies of new ones.
    fn has_room(&self, pool: &mut VecDeque<Chain>) -> bool {
        let wanted = if self.mergeable { self.least } else { 1 };
        let mut room: u64 = pool.iter().map(|chain| chain.writable.len()).sum();
        while room < wanted {
            match self.receive.pop() {
                Some(chain) => {
                    let len = chain.writable.len();
                    let enough = if self.mergeable { HEADER as u64 } else { self.least };
                    if len < enough {
                        self.receive.fail(&format_args!("{len} bytes for packets of {enough} and more"));
                        return false;
                    }
                    room += len;
                    pool.push_back(chain);
                }
                None if self.receive.enable_notification() => {}
                None => return false,
            }
        }
        true
    }

    /// Gives the driver a packet of `len` bytes that lies in the first requests of the pool.
    fn give(&self, pool: &mut VecDeque<Chain>, len: u64) {
        let mut used = Vec::new();
        let mut left = len;
        while left > 0 || used.is_empty() {
            let Some(chain) = pool.pop_front() else { break };
            let part = left.min(chain.writable.len());
            left -= part;
            used.push((chain, part as u32));
        }
        let count = used.len() as u16;
        if let Some((first, _)) = used.first() {
            let mut header = first.writable.clone();
            header.take(NUM_BUFFERS);
            header.write(self.receive.dma(), &count.to_le_bytes());
        }
        for (chain, part) in used {
            self.receive.push(chain.head, part);
        }
    }
}

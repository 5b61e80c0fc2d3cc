//! The memory balloon (virtio 1.2, 5.5): memory that the guest gives back.
//!
//! Four ways, of which the guest takes those that it knows: pages that the host asks for (inflate, deflate), pages
//! that it reports as free by itself, and pages that it names as free when it is asked (hinting), which it keeps
//! until it is told that the host is done. All of them are given back to the host at once, and read as zero when the
//! guest uses them again.

use std::io;
use std::sync::{Arc, OnceLock};

use berth_memory::{GuestPhysAddr, PAGE_SIZE};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::device::{ConfigSignal, DeviceState, read_config_bytes};
use super::events::Worker;
use super::{Buffers, Chain, DeviceKind, Dma, Session, VirtioDevice, Virtqueue};

/// Numbers of the specification (virtio 1.2, 5.5.3 to 5.5.6).
mod ids {
    pub const F_STATS_VQ: u32 = 1;
    pub const F_DEFLATE_ON_OOM: u32 = 2;
    pub const F_FREE_PAGE_HINT: u32 = 3;
    pub const F_REPORTING: u32 = 5;
    pub const CMD_ID_STOP: u32 = 0;
    pub const CMD_ID_DONE: u32 = 1;
    pub const S_SWAP_IN: u32 = 0;
    pub const S_SWAP_OUT: u32 = 1;
    pub const S_MAJFLT: u32 = 2;
    pub const S_MINFLT: u32 = 3;
    pub const S_MEMFREE: u32 = 4;
    pub const S_MEMTOT: u32 = 5;
    pub const S_AVAIL: u32 = 6;
    pub const S_CACHES: u32 = 7;
}

const QUEUE_SIZE: u16 = 128;
/// Most page numbers in one request: 4 GiB of memory. Linux sends 256.
const MAX_PAGES: u64 = 1 << 20;
/// Bytes of a page number, and of a statistic.
const NUMBER: usize = 4;
const STATISTIC: usize = 10;
/// Most statistics that are kept: the specification has 10, Linux 16.
const MAX_STATISTICS: u64 = 64;
/// Configuration: what the host wants and what is in the balloon, in pages; the command of hinting.
const CONFIG_SIZE: usize = 16;
const ACTUAL: u64 = 4;

/// How a balloon is offered to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalloonFeatures {
    /// The guest may take memory back when it has none left.
    pub deflate_on_oom: bool,
    /// The guest reports free pages by itself.
    pub reporting: bool,
    /// The guest can be asked for its free pages.
    pub hinting: bool,
}

/// The guest's own account of its memory, in bytes where it is memory (virtio 1.2, 5.5.6.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statistics {
    /// Swapped in since the start.
    pub swap_in: Option<u64>,
    /// Swapped out since the start.
    pub swap_out: Option<u64>,
    /// Page faults that had to wait for a disk.
    pub major_faults: Option<u64>,
    /// Other page faults.
    pub minor_faults: Option<u64>,
    /// Not used for anything.
    pub free: Option<u64>,
    /// All that the guest has.
    pub total: Option<u64>,
    /// What could be used without swapping.
    pub available: Option<u64>,
    /// Caches that can be dropped.
    pub caches: Option<u64>,
}

/// The balloon as the host sees it. Sizes in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonStatus {
    /// What the host wants to have.
    pub target: u64,
    /// What is in the balloon.
    pub actual: u64,
    /// Given back by reports since the start.
    pub reported: u64,
    /// Given back by the last hinting.
    pub hinted: u64,
    /// Whether hinting goes on.
    pub hinting: bool,
    /// What the guest said last of its memory, if it has.
    pub statistics: Option<Statistics>,
}

/// A balloon.
pub struct Balloon {
    shared: Arc<Shared>,
    features: BalloonFeatures,
    thread_name: String,
    running: Mutex<Option<Running>>,
}

struct Running {
    _worker: Worker,
    config: ConfigSignal,
    statistics: Option<Arc<Virtqueue>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<BalloonState>,
    /// Who is told of changes.
    listener: OnceLock<Listener>,
}

/// Gets target and size in bytes.
type Listener = Box<dyn Fn(u64, u64) + Send + Sync>;

impl Shared {
    /// Tells of what is so now, without holding the lock.
    fn tell(&self) {
        let Some(listener) = self.listener.get() else { return };
        let state = self.state.lock();
        let bytes = [state.target_pages, state.actual_pages].map(|pages| u64::from(pages) * PAGE_SIZE);
        drop(state);
        listener(bytes[0], bytes[1]);
    }
}

/// What a balloon keeps.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    target_pages: u32,
    actual_pages: u32,
    generation: u8,
    /// The command that the driver is to follow: an identifier of a hinting, stop or done.
    command: u32,
    /// The hinting that the driver works on.
    current: Option<u32>,
    /// The buffer that the driver gets back when it is to fill it again.
    statistics_head: Option<u16>,
    statistics: Option<Statistics>,
    reported: u64,
    hinted: u64,
}

/// Which queue is what. Those of features that were not accepted do not exist, and the numbers move up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Hinting,
    Reporting,
}

impl Balloon {
    /// A balloon that wants `target` bytes, with a thread called `thread_name`.
    pub fn new(target: u64, features: BalloonFeatures, thread_name: String) -> Self {
        let state = BalloonState {
            target_pages: pages(target),
            command: ids::CMD_ID_STOP,
            ..BalloonState::default()
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), listener: OnceLock::new() });
        Self { shared, features, thread_name, running: Mutex::new(None) }
    }

    /// Asks the guest to have `target` bytes in the balloon, rounded down to pages.
    pub fn set_target(&self, target: u64) {
        self.change(|state| state.target_pages = pages(target));
        self.shared.tell();
    }

    /// Calls `listener` with target and size in bytes whenever one of them has changed. It is called on the threads that
    /// change them, vCPUs among them, and must return soon. Only the first call counts.
    pub fn on_change(&self, listener: impl Fn(u64, u64) + Send + Sync + 'static) {
        // A second one has no effect.
        let _ = self.shared.listener.set(Box::new(listener));
    }

    /// How it stands.
    pub fn status(&self) -> BalloonStatus {
        let state = self.shared.state.lock();
        BalloonStatus {
            target: u64::from(state.target_pages) * PAGE_SIZE,
            actual: u64::from(state.actual_pages) * PAGE_SIZE,
            reported: state.reported,
            hinted: state.hinted,
            hinting: state.command > ids::CMD_ID_DONE,
            statistics: state.statistics,
        }
    }

    /// Asks the guest for fresh statistics, which [`Self::status`] has soon. Returns whether it was possible: the driver
    /// may not be there, or still at the last request.
    pub fn request_statistics(&self) -> bool {
        let running = self.running.lock();
        let Some(queue) = running.as_ref().and_then(|r| r.statistics.as_ref()) else { return false };
        let Some(head) = self.shared.state.lock().statistics_head.take() else { return false };
        queue.push(head, 0);
        queue.signal();
        true
    }

    /// Asks the guest for its free pages. Returns whether it was possible: the driver may not be there.
    pub fn start_hinting(&self) -> bool {
        if !self.features.hinting || self.running.lock().is_none() {
            return false;
        }
        self.change(|state| {
            state.hinted = 0;
            state.command = state.command.wrapping_add(1).max(ids::CMD_ID_DONE + 1);
        });
        true
    }

    /// Changes the configuration and tells the driver.
    fn change(&self, change: impl FnOnce(&mut BalloonState)) {
        {
            let mut state = self.shared.state.lock();
            change(&mut state);
            state.generation = state.generation.wrapping_add(1);
        }
        if let Some(running) = &*self.running.lock() {
            running.config.send();
        }
    }

    fn roles(&self, has: impl Fn(u32) -> bool) -> Vec<Role> {
        let mut roles = vec![Role::Inflate, Role::Deflate];
        for (feature, role) in [
            (ids::F_STATS_VQ, Role::Statistics),
            (ids::F_FREE_PAGE_HINT, Role::Hinting),
            (ids::F_REPORTING, Role::Reporting),
        ] {
            if has(feature) {
                roles.push(role);
            }
        }
        roles
    }
}

/// As the configuration has it: 32 bits of pages.
fn pages(bytes: u64) -> u32 {
    u32::try_from(bytes / PAGE_SIZE).unwrap_or(u32::MAX)
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Balloon
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let features = self.features();
        vec![QUEUE_SIZE; self.roles(|bit| features >> bit & 1 != 0).len()]
    }

    fn features(&self) -> u64 {
        let mut features = 1 << ids::F_STATS_VQ;
        for (wanted, bit) in [
            (self.features.deflate_on_oom, ids::F_DEFLATE_ON_OOM),
            (self.features.reporting, ids::F_REPORTING),
            (self.features.hinting, ids::F_FREE_PAGE_HINT),
        ] {
            features |= u64::from(wanted) << bit;
        }
        features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let state = self.shared.state.lock();
        let mut config = [0; CONFIG_SIZE];
        config[..4].copy_from_slice(&state.target_pages.to_le_bytes());
        config[4..8].copy_from_slice(&state.actual_pages.to_le_bytes());
        config[8..12].copy_from_slice(&state.command.to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        // The driver says what is in the balloon; the rest is the device's, or not offered.
        if offset == ACTUAL && data.len() == NUMBER {
            let actual = crate::bytes::value(data) as u32;
            let before = std::mem::replace(&mut self.shared.state.lock().actual_pages, actual);
            if before != actual {
                self.shared.tell();
            }
        }
    }

    fn config_generation(&self) -> u8 {
        self.shared.state.lock().generation
    }

    fn start(&self, mut session: Session) -> io::Result<()> {
        let mut queues: Vec<(Role, Arc<Virtqueue>)> = Vec::new();
        for (index, role) in self.roles(|bit| session.has_feature(bit)).into_iter().enumerate() {
            if let Some(queue) = session.take_queue(index) {
                queues.push((role, Arc::new(queue)));
            }
        }
        let statistics = queues.iter().find(|(role, _)| *role == Role::Statistics).map(|(_, q)| q.clone());
        let config = session.config_signal();
        let (shared, signal) = (self.shared.clone(), config.clone());
        let worker = Worker::spawn(self.thread_name.clone(), move |poll| {
            for ((_, queue), token) in queues.iter().zip(0..) {
                poll.add(queue.doorbell(), token)?;
            }
            while let Some(events) = poll.wait(None)? {
                for (token, _) in events {
                    let Some((role, queue)) = usize::try_from(token).ok().and_then(|t| queues.get(t)) else {
                        continue;
                    };
                    queue.clear_doorbell();
                    queue.serve(|chain| shared.handle(*role, queue, chain, &signal));
                }
            }
            Ok(())
        })?;
        *self.running.lock() = Some(Running { _worker: worker, config, statistics });
        Ok(())
    }

    fn stop(&self) {
        *self.running.lock() = None;
    }

    fn reset(&self) {
        let mut state = self.shared.state.lock();
        state.actual_pages = 0;
        state.command = ids::CMD_ID_STOP;
        state.current = None;
        state.statistics_head = None;
    }

    fn state(&self) -> DeviceState {
        DeviceState::Balloon(self.shared.state.lock().clone())
    }

    fn restore(&self, state: &DeviceState) -> Result<(), String> {
        let DeviceState::Balloon(saved) = state else { return Err(DeviceState::other_kind()) };
        *self.shared.state.lock() = saved.clone();
        Ok(())
    }
}

impl Shared {
    fn handle(&self, role: Role, queue: &Virtqueue, mut chain: Chain, config: &ConfigSignal) {
        let dma = queue.dma();
        let head = chain.head;
        match role {
            Role::Inflate => {
                if chain.readable.len() > MAX_PAGES * NUMBER as u64 {
                    queue.fail(&"a balloon request of more than 4 GiB");
                    return;
                }
                inflate(dma, &mut chain.readable);
            }
            // The pages are the guest's again; the host makes them at the first access.
            Role::Deflate => {}
            Role::Statistics => {
                let statistics = read_statistics(dma, &mut chain.readable);
                let mut state = self.state.lock();
                state.statistics = Some(statistics);
                if let Some(old) = state.statistics_head.replace(head) {
                    drop(state);
                    queue.push(old, 0);
                }
                // Kept until the next request.
                return;
            }
            Role::Reporting => {
                let freed = discard_all(dma, &chain.writable);
                self.state.lock().reported += freed;
            }
            Role::Hinting => self.hint(queue, &mut chain, config),
        }
        queue.push(head, 0);
    }

    /// One message of a hinting: an identifier, or free pages.
    fn hint(&self, queue: &Virtqueue, chain: &mut Chain, config: &ConfigSignal) {
        let mut command = [0; NUMBER];
        if chain.readable.read(queue.dma(), &mut command) == NUMBER {
            let command = u32::from_le_bytes(command);
            let mut state = self.state.lock();
            if command == ids::CMD_ID_STOP {
                // The guest has named all. It keeps them until it is told that the host is done.
                if state.current.take() == Some(state.command) {
                    state.command = ids::CMD_ID_DONE;
                    state.generation = state.generation.wrapping_add(1);
                    drop(state);
                    config.send();
                }
            } else {
                state.current = Some(command);
            }
        }
        let mut state = self.state.lock();
        // Pages of a hinting that is over may be in use again.
        if !chain.writable.is_empty() && state.current == Some(state.command) {
            // Under the lock, so that the hinting does not end meanwhile.
            state.hinted += discard_all(queue.dma(), &chain.writable);
        }
    }
}

/// Gives pages back that the driver names by number. Numbers outside of RAM are dropped.
fn inflate(dma: &Dma, numbers: &mut Buffers) {
    let mut run: Option<(u64, u64)> = None;
    let mut bytes = [0; NUMBER];
    loop {
        let got = numbers.read(dma, &mut bytes) == NUMBER;
        let page = u64::from(u32::from_le_bytes(bytes));
        // Linux takes pages one after the other, upwards or downwards.
        run = match run {
            Some((first, count)) if got && page == first + count => Some((first, count + 1)),
            Some((first, count)) if got && page + 1 == first => Some((page, count + 1)),
            old => {
                if let Some((first, count)) = old {
                    // A page that is not RAM, or that the host keeps, stays as it is.
                    let _ = dma.discard(GuestPhysAddr(first * PAGE_SIZE), count * PAGE_SIZE);
                }
                got.then_some((page, 1))
            }
        };
        if !got {
            return;
        }
    }
}

/// Gives whole pages in the buffers back; returns how many bytes.
fn discard_all(dma: &Dma, buffers: &Buffers) -> u64 {
    let mut freed = 0;
    for buffer in buffers.as_slice() {
        let (start, end) =
            (buffer.start.0.next_multiple_of(PAGE_SIZE), buffer.start.0 + u64::from(buffer.len));
        let len = (end & !(PAGE_SIZE - 1)).saturating_sub(start);
        if len > 0 && dma.discard(GuestPhysAddr(start), len).is_ok() {
            freed += len;
        }
    }
    freed
}

fn read_statistics(dma: &Dma, data: &mut Buffers) -> Statistics {
    let mut statistics = Statistics::default();
    let mut bytes = [0; STATISTIC];
    for _ in 0..MAX_STATISTICS {
        if data.read(dma, &mut bytes) != STATISTIC {
            break;
        }
        let (tag, value) = bytes.split_at(2);
        let value = Some(crate::bytes::value(value));
        match crate::bytes::value(tag) as u32 {
            ids::S_SWAP_IN => statistics.swap_in = value,
            ids::S_SWAP_OUT => statistics.swap_out = value,
            ids::S_MAJFLT => statistics.major_faults = value,
            ids::S_MINFLT => statistics.minor_faults = value,
            ids::S_MEMFREE => statistics.free = value,
            ids::S_MEMTOT => statistics.total = value,
            ids::S_AVAIL => statistics.available = value,
            ids::S_CACHES => statistics.caches = value,
            _ => {}
        }
    }
    statistics
}

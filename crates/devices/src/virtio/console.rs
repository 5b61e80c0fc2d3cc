//! A terminal, `hvc0` in Linux (virtio 1.2, 5.3): one port.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use serde::{Deserialize, Serialize};
use tracing::warn;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{ConfigSignal, DeviceState, read_config_bytes};
use super::events::Worker;
use super::{Chain, DeviceKind, Session, VirtioDevice, Virtqueue};

/// Feature: the configuration has the terminal's size (virtio 1.2, 5.3.3).
const FEATURE_SIZE: u32 = 0;

const QUEUE_SIZE: u16 = 64;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Bytes of input that wait for the guest.
const MAX_INPUT: usize = 64 << 10;
/// Most bytes that one request prints. No driver sends more than a page.
const MAX_OUTPUT: u64 = 1 << 20;
const CHUNK: usize = 4096;

/// Who takes what the guest prints.
pub type Output = Arc<Mutex<Box<dyn Write + Send>>>;

/// A terminal.
pub struct Console {
    shared: Arc<Shared>,
    thread_name: String,
    running: Mutex<Option<(Worker, ConfigSignal)>>,
}

struct Shared {
    state: Mutex<State>,
    /// There is room for input again. With `state`.
    room: Condvar,
    /// There is input.
    event: EventFd,
    output: Output,
}

#[derive(Default)]
struct State {
    input: VecDeque<u8>,
    columns: u16,
    rows: u16,
    generation: u8,
    /// Writing failed, and it was said.
    failed: bool,
}

/// What a console keeps.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    /// Input that the guest has not taken.
    input: Vec<u8>,
}

impl Console {
    /// A terminal that prints to `output`, with a thread called `thread_name`.
    ///
    /// # Errors
    /// What the host says when it refuses an eventfd.
    pub fn new(output: Output, thread_name: String) -> io::Result<Self> {
        let shared = Shared {
            state: Mutex::default(),
            room: Condvar::new(),
            event: EventFd::new(EFD_NONBLOCK)?,
            output,
        };
        Ok(Self { shared: Arc::new(shared), thread_name, running: Mutex::new(None) })
    }

    /// Queues input for the guest; takes as much as there is room for (64 KiB) and gives how many bytes it took.
    pub fn push_input(&self, bytes: &[u8]) -> usize {
        let mut state = self.shared.state.lock();
        let taken = bytes.len().min(MAX_INPUT.saturating_sub(state.input.len()));
        state.input.extend(&bytes[..taken]);
        drop(state);
        // It cannot fail but for a full counter, and then the thread is told already.
        let _ = self.shared.event.write(1);
        taken
    }

    /// Waits until there is room for input, at most `timeout`; returns whether there is.
    pub fn wait_for_room(&self, timeout: Duration) -> bool {
        let mut state = self.shared.state.lock();
        self.shared.room.wait_while_for(&mut state, |s| s.input.len() >= MAX_INPUT, timeout);
        state.input.len() < MAX_INPUT
    }

    /// Says how large the user's terminal is.
    pub fn set_size(&self, columns: u16, rows: u16) {
        let mut state = self.shared.state.lock();
        (state.columns, state.rows) = (columns, rows);
        state.generation = state.generation.wrapping_add(1);
        drop(state);
        if let Some((_, config)) = &*self.running.lock() {
            config.send();
        }
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Console
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn features(&self) -> u64 {
        1 << FEATURE_SIZE
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let state = self.shared.state.lock();
        let [c0, c1] = state.columns.to_le_bytes();
        let [r0, r1] = state.rows.to_le_bytes();
        read_config_bytes(&[c0, c1, r0, r1], offset, data);
    }

    fn config_generation(&self) -> u8 {
        self.shared.state.lock().generation
    }

    fn start(&self, mut session: Session) -> io::Result<()> {
        let (receive, transmit) = (session.take_queue(RECEIVE), session.take_queue(TRANSMIT));
        let shared = self.shared.clone();
        let config = session.config_signal();
        let worker = Worker::spawn(self.thread_name.clone(), move |poll| {
            for (queue, token) in [(&receive, RECEIVE), (&transmit, TRANSMIT)] {
                if let Some(queue) = queue {
                    poll.add(queue.doorbell(), token as u64)?;
                }
            }
            poll.add(shared.event.as_raw_fd(), 2)?;
            while poll.wait(None)?.is_some() {
                // Cleared before the look, so that nothing is missed.
                let _ = shared.event.read();
                if let Some(queue) = &transmit {
                    queue.clear_doorbell();
                    queue.serve(|chain| shared.print(queue, chain));
                }
                if let Some(queue) = &receive {
                    queue.clear_doorbell();
                    shared.deliver(queue);
                }
            }
            Ok(())
        })?;
        *self.running.lock() = Some((worker, config));
        Ok(())
    }

    fn stop(&self) {
        *self.running.lock() = None;
    }

    fn state(&self) -> DeviceState {
        let input = self.shared.state.lock().input.iter().copied().collect();
        DeviceState::Console(ConsoleState { input })
    }

    fn restore(&self, state: &DeviceState) -> Result<(), String> {
        let DeviceState::Console(saved) = state else { return Err(DeviceState::other_kind()) };
        self.shared.state.lock().input = saved.input.iter().copied().take(MAX_INPUT).collect();
        // It cannot fail but for a full counter.
        let _ = self.shared.event.write(1);
        Ok(())
    }
}

impl Shared {
    /// Prints what the guest sends.
    fn print(&self, queue: &Virtqueue, mut chain: Chain) {
        if chain.readable.len() > MAX_OUTPUT {
            queue.fail(&"a console's output of more than 1 MiB at a time");
            return;
        }
        let mut output = self.output.lock();
        let mut bytes = [0; CHUNK];
        loop {
            let n = chain.readable.read(queue.dma(), &mut bytes);
            if n == 0 {
                break;
            }
            let result = output.write_all(&bytes[..n]).and_then(|()| output.flush());
            let mut state = self.state.lock();
            if let Err(e) = &result
                && !state.failed
            {
                warn!("the console's output is lost: {e}");
            }
            state.failed = result.is_err();
        }
        queue.push(chain.head, 0);
    }

    /// Gives the guest input, as long as it has buffers.
    fn deliver(&self, queue: &Virtqueue) {
        let mut delivered = false;
        loop {
            let mut state = self.state.lock();
            if state.input.is_empty() {
                break;
            }
            drop(state);
            let Some(mut chain) = queue.pop() else {
                // The driver notifies of new buffers; of some it may have done so already.
                if queue.enable_notification() {
                    continue;
                }
                break;
            };
            state = self.state.lock();
            let room = chain.writable.len().min(CHUNK as u64) as usize;
            let n = room.min(state.input.len());
            let bytes: Vec<u8> = state.input.drain(..n).collect();
            drop(state);
            self.room.notify_all();
            let written = chain.writable.write(queue.dma(), &bytes);
            queue.push(chain.head, written as u32);
            delivered = true;
        }
        if delivered {
            queue.signal();
        }
    }
}

//! What other threads may do with a running machine.

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use berth_devices::virtio::balloon::{Balloon, BalloonStatus};
use berth_devices::virtio::block::{BlockCounters, BlockError};
use berth_devices::virtio::net::NetCounters;
use berth_engine::Engine;
use berth_memory::{Evicted, GuestMemory};

use crate::board::Board;
use crate::cpu_time::{CpuTime, CpuTimeError};
use crate::event::{Done, Event};
use crate::freeze::{self, FreezeError, Frozen};
use crate::notice::Notices;
use crate::options::{CpuLimit, OptionError};
use crate::reclaim::{MemoryShare, ReclaimError, Reclaimer};
use crate::status::{MachineState, Status};
use crate::virtio::DiskResizeError;

/// A handle to a machine. Cheap to clone; after the machine's end it does nothing.
#[derive(Clone)]
pub struct MachineControl {
    pub(crate) events: Sender<Event>,
    pub(crate) board: Arc<Board>,
    pub(crate) memory: GuestMemory,
    pub(crate) status: Arc<Status>,
    pub(crate) reclaimer: Arc<Reclaimer>,
    pub(crate) vm_name: Arc<str>,
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) cpu_time: Arc<CpuTime>,
}

impl MachineControl {
    /// The guest's memory: what is in it, and in which state each page is.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    pub(crate) fn board(&self) -> &Board {
        &self.board
    }

    /// Bits of guest physical addresses.
    pub fn physical_bits(&self) -> u8 {
        self.engine.physical_bits()
    }

    /// What the engine counted since the machine was made; [`Engine::counters`] says how they are named.
    pub fn engine_counters(&self) -> Vec<(String, u64)> {
        self.engine.counters()
    }

    /// Changes how much CPU time the VM gets: its weight (1 to 10000, 100 is usual), its limit (`Some(None)`: none any
    /// more), or both. With a limit or another weight than usual the process moves into a control group of its own,
    /// where it may make one. May take some tenths of a second.
    ///
    /// # Errors
    /// [`CpuTimeError`].
    pub fn set_cpu_time(
        &self,
        weight: Option<u32>,
        limit: Option<Option<CpuLimit>>,
    ) -> Result<(), CpuTimeError> {
        self.cpu_time.set(weight, limit)
    }

    /// Where in its life the machine is.
    pub fn state(&self) -> MachineState {
        self.status.state()
    }

    /// What happens to the machine.
    pub fn notices(&self) -> &Notices {
        self.status.notices()
    }

    /// The threads of the vCPUs on the host, by vCPU; `None` for one that has not come to say so.
    pub fn vcpu_threads(&self) -> Vec<Option<u32>> {
        self.status.threads()
    }

    /// Takes up to `bytes` of guest memory that was not used for `idle` to the cold store, the coldest first; waits that
    /// long. With an idle time of 0 it does not matter how cold pages are. They come back when they are touched.
    ///
    /// # Errors
    /// `ReclaimError` when the host or the engine lacks what it needs; then nothing was taken.
    pub fn reclaim(&self, bytes: u64, idle: Duration) -> Result<Evicted, ReclaimError> {
        self.reclaimer.reclaim(bytes, idle)
    }

    /// What the VM may have of the host's memory.
    pub fn memory_share(&self) -> MemoryShare {
        self.reclaimer.share()
    }

    /// Changes what the VM may have of the host's memory.
    ///
    /// # Errors
    /// [`OptionError`] when that is not possible; then it is as it was.
    pub fn set_memory_share(&self, share: MemoryShare) -> Result<(), OptionError> {
        self.reclaimer.set_share(share)
    }

    /// Moves what the cold store has in memory to its file, the oldest first: at least `bytes` if there are as many.
    /// Returns how many; 0 if the VM has no directory for such a file.
    ///
    /// # Errors
    /// What the host says: no room, or the disk fails. Nothing is lost then.
    pub fn move_store_to_file(&self, bytes: u64) -> Result<u64, ReclaimError> {
        self.reclaimer.move_to_file(bytes, || true)
    }

    /// Lets the machine stand still as [`Self::pause`] does, and moves its memory above the reserve to the cold store, and
    /// that to its file if there is one. It goes on by itself when a program of the host wants something of the guest
    /// through vsock or user networking.
    ///
    /// # Errors
    /// [`FreezeError`]; the machine is as before then.
    pub fn freeze(&self) -> Result<Frozen, FreezeError> {
        freeze::freeze(self)
    }

    /// What was resident in bytes when it was frozen last.
    pub fn resident_before_freeze(&self) -> Option<u64> {
        (self.state() == MachineState::Frozen).then(|| self.reclaimer.resident_before_freeze())
    }

    /// Gives input to the serial console; returns how many bytes it took. It takes less than all when the guest
    /// does not read fast enough: [`Self::wait_for_console_room`] before the rest. A frozen machine is thawed.
    pub fn console_input(&self, bytes: &[u8]) -> usize {
        if !bytes.is_empty() && self.state() == MachineState::Frozen {
            self.request_thaw(|| ());
        }
        self.board.console_input(bytes)
    }

    /// Waits until the serial console takes input, at most `timeout`; returns whether it does.
    pub fn wait_for_console_room(&self, timeout: Duration) -> bool {
        self.board.wait_for_console_room(timeout)
    }

    /// Presses the ACPI power button: asks the guest to power off.
    pub fn power_button(&self) {
        self.board.power_button();
    }

    /// Whether the guest has enabled the power button: otherwise it is not worth while to wait for it.
    pub fn hears_power_button(&self) -> bool {
        self.board.hears_power_button()
    }

    /// Makes the disk `id` larger while the guest runs, and tells the guest. A disk without an id is named by its place:
    /// `disk0` is the first.
    ///
    /// # Errors
    /// [`DiskResizeError`].
    pub fn resize_disk(&self, id: &str, size: u64) -> Result<(), DiskResizeError> {
        self.board.virtio().resize_disk(id, size)
    }

    /// Each disk's id and what it has done since the machine was made.
    pub fn disk_counters(&self) -> Vec<(String, BlockCounters)> {
        self.board.virtio().disk_counters()
    }

    /// Each disk's id and size in bytes.
    pub fn disk_sizes(&self) -> Vec<(String, u64)> {
        self.board.virtio().disk_sizes()
    }

    /// Each network interface's id (`net0` is the first without one) and what it has carried.
    pub fn net_counters(&self) -> Vec<(String, NetCounters)> {
        self.board.virtio().net_counters()
    }

    /// Calls `sink` with a disk's id on each request that the host cannot do: the guest gets an I/O error then. It is
    /// called on threads of the disk, and holds the disk up while it works. Only the first call counts.
    pub fn on_disk_error(&self, sink: impl Fn(&str, BlockError) + Send + Sync + 'static) {
        self.board.virtio().on_disk_error(sink);
    }

    /// How large the user's terminal is, for a virtio console; a serial port cannot tell its guest.
    pub fn set_console_size(&self, columns: u16, rows: u16) {
        if let Some(console) = self.board.virtio().console() {
            console.set_size(columns, rows);
        }
    }

    /// The memory balloon, if the VM has one.
    pub fn balloon(&self) -> Option<BalloonControl<'_>> {
        self.board.virtio().balloon().map(BalloonControl)
    }

    /// Ends the machine at once; [`crate::Machine::wait`] returns [`crate::Outcome::Stopped`].
    pub fn stop(&self) {
        self.send(Event::Stop);
    }

    /// Presses the reset button: starts the kernel again, whatever the guest does.
    pub fn reset(&self) {
        self.send(Event::Reset);
    }

    /// Lets the machine stand still: vCPUs, devices and the guest's clock. Calls `done` when it does; drops it when the
    /// machine ends before. A machine that stands still stays so.
    pub fn request_pause(&self, done: impl FnOnce() + Send + 'static) {
        self.send(Event::Pause(Box::new(done)));
    }

    /// Lets a machine that stands still go on: its guest does not see that time has passed. As [`Self::request_pause`].
    pub fn request_resume(&self, done: impl FnOnce() + Send + 'static) {
        self.read_ahead();
        self.send(Event::Resume(Box::new(done)));
    }

    /// Lets a machine that is frozen go on; does nothing to one that is not. As [`Self::request_resume`].
    pub fn request_thaw(&self, done: impl FnOnce() + Send + 'static) {
        self.read_ahead();
        self.send(Event::Thaw(Box::new(done)));
    }

    /// [`Self::request_thaw`], and waits for it.
    pub fn thaw(&self) -> bool {
        self.wait_for(|done| self.request_thaw(done))
    }

    /// Lets it stand still as frozen.
    pub(crate) fn stand_frozen(&self) -> bool {
        self.wait_for(|done| self.send(Event::Freeze(done)))
    }

    /// A machine that was frozen needs what is in the store's file.
    fn read_ahead(&self) {
        if self.state() != MachineState::Frozen {
            return;
        }
        let memory = self.memory.clone();
        // Without a thread it is read when it is needed.
        let name = berth_devices::thread_name(&self.vm_name, "ahead");
        let _ = std::thread::Builder::new().name(name).spawn(move || memory.store_file_will_be_read());
    }

    /// [`Self::request_pause`], and waits for it; returns whether the machine stands still.
    pub fn pause(&self) -> bool {
        self.wait_for(|done| self.request_pause(done))
    }

    /// [`Self::request_resume`], and waits for it; returns whether the machine goes on.
    pub fn resume(&self) -> bool {
        self.wait_for(|done| self.request_resume(done))
    }

    fn wait_for(&self, request: impl FnOnce(Done)) -> bool {
        let (sender, done) = channel();
        request(Box::new(move || {
            // Who asked waits for it.
            let _ = sender.send(());
        }));
        done.recv().is_ok()
    }

    pub(crate) fn send(&self, event: Event) {
        // The receiver is gone when the machine has ended: then there is nothing to do.
        let _ = self.events.send(event);
    }
}

/// What can be done with a VM's memory balloon.
#[derive(Clone, Copy)]
pub struct BalloonControl<'a>(&'a Balloon);

impl BalloonControl<'_> {
    /// Asks the guest to give `bytes` back in all, rounded down to pages. It may give less.
    pub fn set_target(&self, bytes: u64) {
        self.0.set_target(bytes);
    }

    /// How the balloon stands.
    pub fn status(&self) -> BalloonStatus {
        self.0.status()
    }

    /// Asks the guest for statistics, which [`Self::status`] has soon; returns whether that was possible.
    pub fn request_statistics(&self) -> bool {
        self.0.request_statistics()
    }

    /// Asks the guest for its free pages, which go back to the host; returns whether that was possible.
    pub fn start_hinting(&self) -> bool {
        self.0.start_hinting()
    }
}

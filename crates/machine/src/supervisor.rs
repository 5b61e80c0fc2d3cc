//! The thread that leads a machine through its life.
//!
//! ```text
//!                 start()                power-off, debug exit, stop, failure
//!   Loaded ────────────────► Running ────────────────► Halted ────────► end
//!      ▲              resume ▲  │ pause                  ▲ │
//!      │                     Paused ─────────────────────┘ │ reset
//!      └──────── devices reset, kernel loaded again ───────┘
//! ```
//! The order is:
//! 1. *Loaded*: kernel and tables are in memory, devices are as after power-up, no vCPU runs.
//! 2. *Running*: vCPU 0 was started at the kernel's entry, the others wait for their start-up IPI.
//! 3. *Paused*: every vCPU is parked, no device has a request under way, and the clock of devices stands still; time
//!    that passes is none of the guest's. First the vCPUs stop, then the clock, then the devices; they go on in the
//!    opposite order.
//!    A machine that is frozen is *Paused* too; who asked for it is all that differs.
//! 4. *Halted*: every vCPU has reported that it is parked. Only now devices are reset and memory is loaded again,
//!    because a running vCPU would see half of it.
//!
//! The first event that ends *Running* decides; what other vCPUs cause until they are parked is dropped,
//! except a wish of the owner to stop. What happens while the vCPUs stop for a pause is dealt with when it is reached.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use berth_boot::{BootSource, Platform};
use berth_cpu::{ApicState, CpuState, MpState, VcpuId};
use berth_devices::power::PowerEvent;
use berth_engine::Engine;
use berth_memory::GuestMemory;
use tracing::{debug, info, warn};

use crate::Outcome;
use crate::board::{Board, Pause};
use crate::event::{Event, Parked};
use crate::notice::Notice;
use crate::status::{MachineState, Status};
use crate::vcpu_thread::VcpuThread;

/// Where in its life the machine is; see the module's description.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Loaded,
    Running,
    Paused,
    Halted,
}

/// What ended *Running*.
enum Verdict {
    Restart,
    End(Outcome),
}

/// All that is needed to run the machine.
pub struct Supervisor {
    phase: Phase,
    vcpus: Vec<VcpuThread>,
    events: Receiver<Event>,
    /// What came while something else was waited for.
    deferred: VecDeque<Event>,
    /// While *Paused*.
    pause: Option<Pause>,
    board: Arc<Board>,
    engine: Arc<dyn Engine>,
    memory: GuestMemory,
    source: BootSource,
    platform: Platform,
    no_reboot: bool,
    entry: CpuState,
    status: Arc<Status>,
}

/// What a supervisor is made from: a machine that is *Loaded*.
pub struct Parts {
    /// One thread a vCPU, none running.
    pub vcpus: Vec<VcpuThread>,
    /// Where events arrive.
    pub events: Receiver<Event>,
    /// The devices.
    pub board: Arc<Board>,
    /// The engine that made the vCPUs.
    pub engine: Arc<dyn Engine>,
    /// Guest memory with the kernel loaded.
    pub memory: GuestMemory,
    /// What to load after a reset.
    pub source: BootSource,
    /// What the tables say.
    pub platform: Platform,
    /// Whether a reset ends the VM.
    pub no_reboot: bool,
    /// The state of vCPU 0 at the kernel's entry.
    pub entry: CpuState,
    /// Where others see how it stands.
    pub status: Arc<Status>,
}

impl Supervisor {
    /// A machine that is *Loaded*.
    pub fn new(parts: Parts) -> Self {
        let Parts { vcpus, events, board, engine, memory, source, platform, no_reboot, entry, status } =
            parts;
        Self {
            phase: Phase::Loaded,
            vcpus,
            events,
            deferred: VecDeque::new(),
            pause: None,
            board,
            engine,
            memory,
            source,
            platform,
            no_reboot,
            entry,
            status,
        }
    }

    /// Runs the machine to its end.
    pub fn run(mut self) -> Outcome {
        let outcome = self.lead();
        // What the guest wrote to its disks is to be there, whether it asked for that or not.
        self.board.stop_devices();
        self.status.enter(MachineState::Ended);
        outcome
    }

    fn lead(&mut self) -> Outcome {
        loop {
            self.power_on();
            let verdict = self.serve();
            let halted = self.halt();
            match (verdict, halted) {
                (Verdict::Restart, Verdict::End(outcome)) | (Verdict::End(outcome), _) => {
                    info!("the VM ends: {outcome:?}");
                    return outcome;
                }
                (Verdict::Restart, Verdict::Restart) => {
                    info!("the VM is reset");
                    if let Err(error) = self.reload() {
                        return Outcome::Failed(format!(
                            "the kernel cannot be loaded again after a reset: {error}"
                        ));
                    }
                }
            }
        }
    }

    /// *Loaded* to *Running*.
    fn power_on(&mut self) {
        self.enter(Phase::Loaded, Phase::Running);
        self.status.enter(MachineState::Running);
        let waiting = CpuState { mp_state: MpState::WaitForSipi, ..CpuState::reset() };
        // Vcpu 0 last, so that the others are there when it sends the first IPI.
        for (index, vcpu) in self.vcpus.iter_mut().enumerate().rev() {
            // There are at most 64.
            let id = VcpuId(index as u8);
            let state = if id.0 == 0 { &self.entry } else { &waiting };
            vcpu.start(CpuState { apic: Some(Box::new(ApicState::reset(id))), ..state.clone() });
        }
    }

    /// Handles events until one of them ends *Running*.
    fn serve(&mut self) -> Verdict {
        loop {
            // Senders live in the board, which this has: there is always one.
            let Some(event) = self.next_event() else { return Verdict::End(Outcome::Stopped) };
            match event {
                Event::Power(PowerEvent::PowerOff) => return Verdict::End(Outcome::PoweredOff),
                Event::Power(PowerEvent::Reset) if self.no_reboot => return Verdict::End(Outcome::Reset),
                Event::Power(PowerEvent::Reset) => return self.restart(true),
                Event::Reset => return self.restart(false),
                Event::Power(PowerEvent::DebugExit(code)) => {
                    return Verdict::End(Outcome::DebugExit(i32::from(code)));
                }
                Event::Power(PowerEvent::GuestPanic { crash_loaded }) => {
                    warn!("the guest's kernel has panicked");
                    self.status.notices().add(Notice::GuestPanic { crash_loaded });
                }
                Event::Stop => return Verdict::End(Outcome::Stopped),
                Event::Pause(done) => {
                    self.pause(MachineState::Paused);
                    done();
                }
                Event::Freeze(done) => {
                    self.pause(MachineState::Frozen);
                    done();
                }
                Event::Thaw(done) => {
                    if self.status.state() == MachineState::Frozen {
                        self.resume();
                    }
                    done();
                }
                Event::Resume(done) => {
                    self.resume();
                    done();
                }
                Event::Look { vcpu, reply } => {
                    if let Some(vcpu) = self.vcpus.get_mut(usize::from(vcpu.0)) {
                        vcpu.look(reply);
                    }
                }
                Event::VcpuParked { id, parked } => {
                    let Some(vcpu) = self.vcpus.get_mut(usize::from(id.0)) else { continue };
                    vcpu.parked();
                    match parked {
                        // Somebody looked at its state; or a stop was left over from before the last reset.
                        Parked::Stopped => vcpu.resume(),
                        Parked::Failed(account) => {
                            return Verdict::End(Outcome::Failed(format!("vCPU {id}: {account}")));
                        }
                        Parked::Panicked => return Verdict::End(panicked(id)),
                    }
                }
            }
        }
    }

    fn next_event(&mut self) -> Option<Event> {
        self.deferred.pop_front().or_else(|| self.events.recv().ok())
    }

    fn restart(&self, by_guest: bool) -> Verdict {
        self.status.notices().add(Notice::Reset { by_guest });
        Verdict::Restart
    }

    /// *Running* to *Paused*, if it is *Running*; to be called `state`. What was frozen and is to be paused is called so.
    fn pause(&mut self, state: MachineState) {
        if self.phase != Phase::Running {
            if state == MachineState::Paused {
                self.status.enter(state);
            }
            return;
        }
        for vcpu in &self.vcpus {
            vcpu.request_stop();
        }
        while self.vcpus.iter().any(VcpuThread::is_running) {
            let Ok(event) = self.events.recv() else { break };
            if let Event::VcpuParked { id, .. } = &event
                && let Some(vcpu) = self.vcpus.get_mut(usize::from(id.0))
            {
                vcpu.parked();
            }
            if !matches!(event, Event::VcpuParked { parked: Parked::Stopped, .. }) {
                self.deferred.push_back(event);
            }
        }
        self.pause = Some(self.board.pause());
        self.enter(Phase::Running, Phase::Paused);
        self.status.enter(state);
        info!("the VM stands still: {state:?}");
    }

    /// *Paused* to *Running*, if it is *Paused*.
    fn resume(&mut self) {
        let Some(pause) = self.pause.take() else { return };
        self.enter(Phase::Paused, Phase::Running);
        let stood_still = self.board.resume(&pause);
        self.engine.skip_time(stood_still);
        for vcpu in &mut self.vcpus {
            vcpu.resume_after(stood_still);
        }
        self.status.enter(MachineState::Running);
        info!("the VM goes on after {:?}", stood_still.time);
    }

    /// *Running* or *Paused* to *Halted*: returns when no vCPU runs any more. The verdict is [`Verdict::End`] if something
    /// happened meanwhile that forbids a restart.
    fn halt(&mut self) -> Verdict {
        if let Some(pause) = self.pause.take() {
            self.enter(Phase::Paused, Phase::Running);
            self.board.resume(&pause);
        }
        self.enter(Phase::Running, Phase::Halted);
        for vcpu in &self.vcpus {
            vcpu.request_stop();
        }
        let mut verdict = Verdict::Restart;
        while self.vcpus.iter().any(VcpuThread::is_running) {
            match self.events.recv() {
                Ok(Event::VcpuParked { id, parked }) => {
                    if let Parked::Panicked = parked {
                        verdict = Verdict::End(panicked(id));
                    }
                    if let Some(vcpu) = self.vcpus.get_mut(usize::from(id.0)) {
                        vcpu.parked();
                    }
                }
                Ok(Event::Stop) => verdict = Verdict::End(Outcome::Stopped),
                Ok(Event::Power(event)) => debug!("{event:?} came while the VM halted"),
                Ok(Event::Reset | Event::Look { .. }) => {}
                Ok(event @ (Event::Pause(_) | Event::Resume(_) | Event::Freeze(_) | Event::Thaw(_))) => {
                    self.deferred.push_back(event);
                }
                Err(_) => break,
            }
        }
        verdict
    }

    /// *Halted* to *Loaded*.
    fn reload(&mut self) -> Result<(), berth_boot::BootError> {
        self.enter(Phase::Halted, Phase::Loaded);
        self.board.reset();
        self.entry = berth_boot::load(&self.memory, &self.source, &self.platform)?.state;
        for region in self.memory.regions() {
            self.engine.memory_written(region.start, region.len);
        }
        Ok(())
    }

    fn enter(&mut self, from: Phase, to: Phase) {
        assert_eq!(self.phase, from, "the machine goes through its phases in order");
        self.phase = to;
    }
}

fn panicked(id: VcpuId) -> Outcome {
    Outcome::Failed(format!("vCPU {id}: internal error: its thread panicked (see the message above)"))
}

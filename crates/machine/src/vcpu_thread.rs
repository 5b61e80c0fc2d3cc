//! One host thread a vCPU.
//!
//! ```text
//!   supervisor ──Command──────────► thread: run until an exit, report it, wait for the next command;
//!              ◄──Event::VcpuParked──┘      when the sender is gone the thread ends
//! ```

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

use berth_cpu::{CpuState, VcpuId};
use berth_engine::{Exit, StoodStill, Vcpu, VcpuHandle};
use berth_memory::GuestMemory;
use tracing::{Level, debug, enabled};

use crate::account::account;
use crate::board::Board;
use crate::cpu_time::Gate;
use crate::event::{Event, Parked};
use crate::status::Status;
use berth_devices::thread_name;

/// What a parked vCPU is told.
enum Command {
    /// Run from this state on.
    Start(Box<CpuState>),
    /// Run on.
    Resume,
    /// Run on after the machine stood still for a time that the guest shall not see.
    Skip(StoodStill),
    /// Say what the state is, and stay parked.
    Look(Look),
}

/// Where the state of a vCPU goes that somebody wants to know.
type Look = Sender<Box<CpuState>>;

/// The supervisor's side of a vCPU's thread.
pub struct VcpuThread {
    commands: Option<Sender<Command>>,
    handle: Arc<dyn VcpuHandle>,
    thread: Option<JoinHandle<()>>,
    /// Whether the vCPU was started and has not reported [`Event::VcpuParked`] since.
    running: bool,
    /// Who wants to know the vCPU's state, as soon as it is parked.
    looks: Vec<Look>,
    wanted: Arc<Wanted>,
}

/// Whether a stop of the vCPU is the supervisor's: otherwise it has only used its CPU time.
struct Wanted {
    by_supervisor: AtomicBool,
    gate: Arc<Gate>,
}

impl Wanted {
    /// The supervisor wants the vCPU to park. Comes before the stop.
    fn set(&self) {
        self.by_supervisor.store(true, Ordering::SeqCst);
        self.gate.nudge();
    }
}

/// What a vCPU's thread needs besides the vCPU.
#[derive(Clone)]
pub struct VcpuContext {
    /// Name of the VM.
    pub vm_name: String,
    /// Where the thread waits while the VM has used its CPU time.
    pub gate: Arc<Gate>,
    /// The devices.
    pub board: Arc<Board>,
    /// Guest memory, to show code in accounts.
    pub memory: GuestMemory,
    /// Where the thread reports.
    pub events: Sender<Event>,
    /// Where the thread says which one it is.
    pub status: Arc<Status>,
}

impl VcpuThread {
    /// Starts the thread; the vCPU does not run yet.
    ///
    /// # Errors
    /// What the host says when it refuses a thread.
    pub fn spawn(id: VcpuId, vcpu: Box<dyn Vcpu>, context: VcpuContext) -> io::Result<Self> {
        let handle = vcpu.handle();
        let wanted = Arc::new(Wanted { by_supervisor: AtomicBool::new(false), gate: context.gate.clone() });
        let of_thread = wanted.clone();
        let (commands, received) = channel();
        let thread = thread::Builder::new()
            .name(thread_name(&context.vm_name, &format!("vcpu{id}")))
            .spawn(move || serve(id, vcpu, &received, (&context, &of_thread)))?;
        Ok(Self {
            commands: Some(commands),
            handle,
            thread: Some(thread),
            running: false,
            looks: Vec::new(),
            wanted,
        })
    }

    /// Runs the vCPU from `state` on. It must not be running.
    pub fn start(&mut self, state: CpuState) {
        self.command(Command::Start(Box::new(state)));
    }

    /// Runs the vCPU from where it stopped on. It must not be running.
    pub fn resume(&mut self) {
        self.command(Command::Resume);
    }

    /// Runs the vCPU from where it stopped on, after a time that the guest shall not see. It must not be running.
    pub fn resume_after(&mut self, time: StoodStill) {
        self.command(Command::Skip(time));
    }

    fn command(&mut self, command: Command) {
        assert!(!self.running, "a vCPU is started once at a time");
        // If the thread is gone it has reported why.
        self.running = self.commands.as_ref().is_some_and(|c| c.send(command).is_ok());
    }

    /// Asks the vCPU to stop, if it runs. It reports [`Event::VcpuParked`].
    pub fn request_stop(&self) {
        if self.running {
            self.wanted.set();
            self.handle.stop();
        }
    }

    /// Notes that the vCPU has reported [`Event::VcpuParked`].
    pub fn parked(&mut self) {
        self.running = false;
        for reply in std::mem::take(&mut self.looks) {
            self.look(reply);
        }
    }

    /// Sends the vCPU's state to `reply`: at once if it is parked, else it is stopped and reports
    /// [`Event::VcpuParked`]. A vCPU that is gone drops `reply`.
    pub fn look(&mut self, reply: Look) {
        if self.running {
            self.looks.push(reply);
            self.wanted.set();
            self.handle.stop();
        } else if let Some(commands) = &self.commands {
            // If the thread is gone it has reported why.
            let _ = commands.send(Command::Look(reply));
        }
    }

    /// Whether a report is still to come.
    pub fn is_running(&self) -> bool {
        self.running
    }
}

impl Drop for VcpuThread {
    /// Ends the thread and waits for it.
    fn drop(&mut self) {
        self.request_stop();
        self.commands = None;
        if let Some(thread) = self.thread.take() {
            // A panic was reported by the thread itself.
            let _ = thread.join();
        }
    }
}

/// The thread.
fn serve(
    id: VcpuId,
    mut vcpu: Box<dyn Vcpu>,
    commands: &Receiver<Command>,
    (context, wanted): (&VcpuContext, &Wanted),
) {
    context.status.this_thread_is(id);
    while let Ok(command) = commands.recv() {
        let mut report = Report { id, events: &context.events, parked: Parked::Panicked };
        let ready = match command {
            Command::Start(state) => vcpu.set_state(&state),
            Command::Resume => Ok(()),
            Command::Skip(time) => {
                vcpu.skip_time(time);
                Ok(())
            }
            Command::Look(reply) => {
                // Who asked may not wait any more.
                let _ = reply.send(Box::new(vcpu.state()));
                // Nothing is reported: the vCPU did not run.
                std::mem::forget(report);
                continue;
            }
        };
        report.parked = match ready {
            Ok(()) => run(vcpu.as_mut(), context, wanted),
            Err(error) => Parked::Failed(format!("it cannot start: {error}")),
        };
    }
}

/// Runs until the vCPU cannot or should not go on. A stop that was asked for while the last run ended by itself is
/// still pending at the start of this one: the supervisor resumes the vCPU then.
fn run(vcpu: &mut dyn Vcpu, context: &VcpuContext, wanted: &Wanted) -> Parked {
    let exit = loop {
        context.gate.wait(|| wanted.by_supervisor.load(Ordering::SeqCst));
        match vcpu.run(context.board.bus()) {
            Exit::Stopped if !wanted.by_supervisor.swap(false, Ordering::SeqCst) => {}
            exit => break exit,
        }
    };
    let (what, detail) = match exit {
        Exit::Stopped => {
            if enabled!(Level::DEBUG) {
                debug!("stopped at\n{}", account(&vcpu.state(), &context.memory));
            }
            return Parked::Stopped;
        }
        Exit::TripleFault { detail } => ("triple fault", detail),
        Exit::Failed { detail } => ("the engine cannot go on", detail),
    };
    let state = account(&vcpu.state(), &context.memory);
    Parked::Failed(format!("{what}: {detail}\n{state}"))
}

/// Reports when it is dropped, so that a panic of the engine is reported too.
struct Report<'a> {
    id: VcpuId,
    events: &'a Sender<Event>,
    parked: Parked,
}

impl Drop for Report<'_> {
    fn drop(&mut self) {
        let parked = std::mem::replace(&mut self.parked, Parked::Panicked);
        // Without a supervisor nobody needs to know.
        let _ = self.events.send(Event::VcpuParked { id: self.id, parked });
    }
}

//! The thread that serves the API, from the VM's start to its end.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use berth_api::types::{Ending, VmDescription, VmInfo, VmState};
use berth_devices::thread_name;
use berth_machine::{MachineControl, MachineState};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixListener;
use tokio::sync::{Notify, watch};
use tracing::warn;

use crate::console::Console;
use crate::peer::Peer;
use crate::routes;

/// How long readers have to take the last events and output when the VM has ended.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Who ends the VM's process, on whichever way it is asked.
pub trait Owner: Send + Sync {
    /// Asks the guest to power off, and ends the VM when it has not within `timeout`. Returns at once.
    fn stop(&self, timeout: Duration);
    /// Ends the VM at once.
    fn kill(&self);
}

/// What the API is about.
pub struct Vm {
    /// What the VM was made as.
    pub description: VmDescription,
    /// The machine.
    pub control: MachineControl,
    /// Whether its cold store may have a file.
    pub has_store_dir: bool,
    /// What its guest prints.
    pub console: Arc<Console>,
    /// Who ends it.
    pub owner: Box<dyn Owner>,
}

/// What all handlers share.
pub(crate) struct Shared {
    pub vm: Vm,
    pub started: Instant,
    /// Told at each event of the machine.
    pub happened: Arc<Notify>,
    /// How the VM ended, once it has.
    pub ending: watch::Receiver<Option<Ending>>,
    /// Connections that are no HTTP any more.
    pub attached: AtomicUsize,
}

impl Shared {
    /// Where in its life the VM is.
    pub fn state(&self) -> VmState {
        state_of(self.vm.control.state())
    }

    /// What the VM is, and how it is doing.
    pub fn info(&self) -> VmInfo {
        VmInfo {
            state: self.state(),
            ending: self.ending.borrow().clone(),
            description: self.vm.description.clone(),
        }
    }
}

/// The API's word for a machine's state.
pub(crate) fn state_of(state: MachineState) -> VmState {
    match state {
        MachineState::Made => VmState::Starting,
        MachineState::Running => VmState::Running,
        MachineState::Paused => VmState::Paused,
        MachineState::Frozen => VmState::Frozen,
        MachineState::Ended => VmState::Ended,
    }
}

/// Seconds since 1970.
pub(crate) fn unix_seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// The running server.
pub struct Server {
    ending: watch::Sender<Option<Ending>>,
    console: Arc<Console>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves `vm` at `listener` on a thread of its own.
    ///
    /// # Errors
    /// What the host says when it refuses the thread or what it needs.
    pub fn start(vm: Vm, listener: std::os::unix::net::UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let (ending, has_ended) = watch::channel(None);
        let console = vm.console.clone();
        let happened = Arc::new(Notify::new());
        let tell = happened.clone();
        vm.control.notices().on_each(move || tell.notify_waiters());
        let name = thread_name(&vm.description.name, "api");
        let shared = Arc::new(Shared {
            vm,
            started: Instant::now(),
            happened,
            ending: has_ended,
            attached: AtomicUsize::new(0),
        });
        let thread = thread::Builder::new().name(name).spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let served = runtime.and_then(|runtime| runtime.block_on(serve(shared, listener)));
            if let Err(e) = served {
                warn!("the control API is gone: {e}");
            }
        })?;
        Ok(Self { ending, console, thread: Some(thread) })
    }

    /// Tells all who listen that the VM has ended, and stops.
    pub fn end(mut self, ending: Ending) {
        self.console.close();
        // Somebody receives as long as the thread lives; if it does not there is nobody to tell.
        let _ = self.ending.send(Some(ending));
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the thread of the control API panicked");
        }
    }
}

async fn serve(shared: Arc<Shared>, listener: std::os::unix::net::UnixListener) -> io::Result<()> {
    let Some(listener) = first_client(listener, shared.ending.clone()).await? else { return Ok(()) };
    let listener = UnixListener::from_std(listener)?;
    let app = routes::app(shared.clone()).into_make_service_with_connect_info::<Peer>();
    let mut ending = shared.ending.clone();
    let ended = async move {
        // A sender that is gone is an end too.
        let _ = ending.wait_for(Option::is_some).await;
    };
    let mut late = shared.ending.clone();
    let last_words = async {
        let _ = late.wait_for(Option::is_some).await;
        tokio::time::sleep(LAST_WORDS).await;
    };
    let all = async {
        axum::serve(listener, app).with_graceful_shutdown(ended).await?;
        while shared.attached.load(Ordering::Acquire) > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    };
    tokio::select! {
        result = all => result,
        () = last_words => Ok(()),
    }
}

/// Waits until a client wants to connect; `None`: the VM has ended before. The routes are made only then, because they
/// and their code would be a third of the memory that a small VM takes besides its guest's.
async fn first_client(
    listener: std::os::unix::net::UnixListener,
    mut ending: watch::Receiver<Option<Ending>>,
) -> io::Result<Option<std::os::unix::net::UnixListener>> {
    // SAFETY: a UnixListener owns one descriptor, which stays open and the same until `into_inner` or the drop.
    let listener = unsafe { AsyncFd::register_with_interest(listener, Interest::READABLE) }?;
    tokio::select! {
        biased;
        ready = listener.readable() => drop(ready?),
        _ = ending.wait_for(Option::is_some) => return Ok(None),
    }
    Ok(Some(listener.into_inner()))
}

//! Carrying out decisions: each on a thread of its own, because a VM takes its time.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use berth_api::{Client, ClientError};
use berth_keeper::{Action, Decision};

/// What came of a decision: what the VM gave in bytes, or why it did not.
pub type Outcome = Result<u64, String>;

/// What is under way.
pub struct Hands {
    awaited: HashMap<String, u64>,
    sender: Sender<(Decision, Outcome)>,
    done: Receiver<(Decision, Outcome)>,
}

impl Hands {
    pub fn new() -> Self {
        let (sender, done) = channel();
        Self { awaited: HashMap::new(), sender, done }
    }

    /// What a VM is expected to give, if it was asked and has not answered.
    pub fn awaited(&self, vm: &str) -> Option<u64> {
        self.awaited.get(vm).copied()
    }

    /// Carries it out.
    pub fn start(&mut self, socket: PathBuf, decision: Decision) {
        self.awaited.insert(decision.vm.clone(), decision.gain);
        let sender = self.sender.clone();
        let failed = decision.clone();
        let work = move || {
            let outcome = act(socket, &decision).map_err(|e| e.to_string());
            // The keeper may have ended.
            let _ = sender.send((decision, outcome));
        };
        if let Err(e) = thread::Builder::new().name("keeper/act".to_owned()).spawn(work) {
            let _ = self.sender.send((failed, Err(format!("the host refuses a thread: {e}"))));
        }
    }

    /// What was done since the last time.
    pub fn finished(&mut self) -> Vec<(Decision, Outcome)> {
        let done: Vec<_> = self.done.try_iter().collect();
        for (decision, _) in &done {
            self.awaited.remove(&decision.vm);
        }
        done
    }
}

fn act(socket: PathBuf, decision: &Decision) -> Result<u64, ClientError> {
    let client = Client::new(socket)?;
    match decision.action {
        Action::Reclaim { bytes, idle } => Ok(client.reclaim(bytes, idle)?.bytes),
        Action::ToFile { bytes } => Ok(client.move_store_to_file(bytes)?.bytes),
        // What comes of it shows later.
        Action::Balloon { target } => client.set_balloon(target).map(|()| decision.gain),
        Action::Freeze => Ok(client.freeze()?.bytes),
        Action::Thaw => client.thaw().map(|()| 0),
        Action::None => Ok(0),
    }
}

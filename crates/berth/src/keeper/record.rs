//! What the keeper has seen and decided, in a file: for people, and for the keeper that follows.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, DirBuilder, File, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use berth_api::Vms;
use berth_keeper::{Action, Decision, Seen, Step, Vm, show};
use serde::{Deserialize, Serialize};

use super::KeeperError;
use super::act::Outcome;

/// Who looks whether a keeper runs has its lock for a moment: it is tried again this often.
const TRIES: usize = 25;
const PAUSE: Duration = Duration::from_millis(4);
/// Decisions that are kept.
const KEPT: usize = 200;

/// The keeper's directory: `.keeper` in that of the VMs, which is no name of a VM.
pub struct Home {
    path: PathBuf,
}

impl Home {
    /// Where the keeper of these VMs is, whether one runs or not.
    pub fn of(vms: &Vms) -> Self {
        Self { path: vms.path().join(".keeper") }
    }

    /// Takes it for this process: held until the file is dropped.
    ///
    /// # Errors
    /// [`KeeperError::Runs`], and what the host says.
    pub fn claim(&self) -> Result<File, KeeperError> {
        let host = KeeperError::host;
        match DirBuilder::new().mode(0o700).create(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                return Err(host("make the keeper's directory")(e));
            }
            _ => {}
        }
        let path = self.path.join("lock");
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
        let mut file = file.map_err(host("make the keeper's lock"))?;
        for left in (0..TRIES).rev() {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if left > 0 => std::thread::sleep(PAUSE),
                Err(TryLockError::WouldBlock) => return Err(KeeperError::Runs(self.pid())),
                Err(TryLockError::Error(e)) => return Err(host("lock the keeper's directory")(e)),
            }
        }
        let written = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
        written.map_err(host("write the keeper's lock"))?;
        Ok(file)
    }

    /// What the keeper that runs says; `None` if none does.
    pub fn running(&self) -> Option<Status> {
        let lock = File::open(self.path.join("lock")).ok()?;
        match lock.try_lock_shared() {
            // One that has just begun has not said anything yet.
            Err(TryLockError::WouldBlock) => self.last().filter(|status| Some(status.pid) == self.pid()),
            _ => None,
        }
    }

    fn pid(&self) -> Option<u32> {
        fs::read_to_string(self.path.join("lock")).ok()?.trim().parse().ok()
    }

    /// What the last keeper said.
    pub fn last(&self) -> Option<Status> {
        serde_json::from_slice(&fs::read(self.path.join("status.json")).ok()?).ok()
    }

    /// Says how it stands; who reads sees all of it or what was before.
    ///
    /// # Errors
    /// What the host says.
    pub fn write(&self, status: &Status) -> io::Result<()> {
        let new = self.path.join("status.new");
        fs::write(&new, serde_json::to_vec(status)?)?;
        fs::rename(new, self.path.join("status.json"))
    }
}

/// How it stands.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// The keeper's process.
    pub pid: u32,
    /// When it began, in seconds since 1970.
    pub started_at: f64,
    /// When this was written, likewise.
    pub at: f64,
    /// Whether it does nothing.
    pub dry_run: bool,
    /// What it has seen. Sizes are in bytes.
    pub seen: Seen,
    /// What it has asked balloons for.
    pub balloons: Balloons,
    /// What it has decided, the last last.
    pub decisions: VecDeque<Record>,
}

impl Status {
    /// Of a keeper that begins; goes on with what the one before said.
    pub fn new(dry_run: bool, before: Option<Self>) -> Self {
        let (balloons, decisions) = before.map(|b| (b.balloons, b.decisions)).unwrap_or_default();
        let now = unix_now();
        let seen = Seen::default();
        Self { pid: std::process::id(), started_at: now, at: now, dry_run, seen, balloons, decisions }
    }

    /// Notes what was seen.
    pub fn saw(&mut self, seen: &Seen) {
        self.at = unix_now();
        self.seen = seen.clone();
        self.balloons.0.retain(|name, _| seen.vms.iter().any(|vm| vm.name == *name));
    }

    /// Notes a decision.
    pub fn add(&mut self, record: Record) {
        self.decisions.push_back(record);
        while self.decisions.len() > KEPT {
            self.decisions.pop_front();
        }
    }

    /// Notes what came of a decision.
    pub fn note_result(&mut self, decision: &Decision, outcome: &Outcome) {
        let text = match outcome {
            Ok(got) => match decision.step {
                Step::Cold | Step::Freeze | Step::File => format!("{} taken", show(*got)),
                _ => "done".to_owned(),
            },
            Err(e) => format!("failed: {e}"),
        };
        if outcome.is_err() {
            println!("{} {}: {}: {text}", time_of_day(unix_now()), decision.vm, decision.step);
        }
        let open = |r: &&mut Record| r.vm == decision.vm && r.step == decision.step && r.result.is_none();
        if let Some(record) = self.decisions.iter_mut().rev().find(open) {
            record.result = Some(text);
        }
    }

    /// Notes what a balloon is asked for.
    pub fn balloon(&mut self, decision: &Decision, vm: Option<&Vm>) {
        if let Action::Balloon { target } = decision.action
            && let Some(balloon) = vm.and_then(|vm| vm.balloon)
        {
            let others = balloon.others.unwrap_or(balloon.target);
            self.balloons.0.insert(decision.vm.clone(), Asked { others, target });
        }
    }
}

/// What a keeper asked balloons for, by VM.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Balloons(BTreeMap<String, Asked>);

/// What one balloon was asked for, in bytes.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Asked {
    /// By others, before.
    others: u64,
    /// In all.
    target: u64,
}

impl Balloons {
    /// What of a target others asked for; `None` if all of it is theirs.
    pub fn others(&mut self, vm: &str, target: u64) -> Option<u64> {
        let asked = self.0.get(vm)?;
        if asked.target != target || asked.others >= target {
            // Somebody changed it, or nothing of it is ours any more.
            self.0.remove(vm);
            return None;
        }
        Some(asked.others)
    }
}

/// A decision, for people.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// When, in seconds since 1970.
    pub at: f64,
    /// The VM; empty if it is about all.
    pub vm: String,
    /// What kind of thing it was.
    pub step: Step,
    /// Why.
    pub reason: String,
    /// What came of it, once that is known.
    pub result: Option<String>,
}

impl Record {
    pub fn new(decision: &Decision) -> Self {
        let Decision { vm, step, reason, .. } = decision.clone();
        Self { at: unix_now(), vm, step, reason, result: None }
    }

    /// For the log.
    pub fn line(&self) -> String {
        format!("{} {}: {}: {}", time_of_day(self.at), name(&self.vm), self.step, self.reason)
    }
}

/// How a VM, or all, is called.
pub fn name(vm: &str) -> &str {
    if vm.is_empty() { "all" } else { vm }
}

/// In UTC.
pub fn time_of_day(at: f64) -> String {
    let s = at.max(0.0) as u64;
    format!("{:02}:{:02}:{:02}Z", s / 3600 % 24, s / 60 % 60, s % 60)
}

fn unix_now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_keeper_at_a_time_and_the_next_one_knows_what_the_last_did() {
        let directory = tempfile::tempdir().unwrap();
        let vms = Vms::at(directory.path().join("berth")).unwrap();
        let home = Home::of(&vms);
        assert!(home.running().is_none());
        let lock = home.claim().unwrap();
        assert!(
            matches!(Home::of(&vms).claim(), Err(KeeperError::Runs(Some(pid))) if pid == std::process::id())
        );
        let mut status = Status::new(false, None);
        let balloon = berth_keeper::Balloon { target: 5, actual: 5, available: None, others: None };
        let vm = Vm { name: "a".to_owned(), balloon: Some(balloon), ..Vm::default() };
        let decision = Decision {
            vm: "a".to_owned(),
            step: Step::Balloon,
            action: Action::Balloon { target: 9 },
            gain: 4,
            reason: "because".to_owned(),
        };
        status.add(Record::new(&decision));
        status.balloon(&decision, Some(&vm));
        status.note_result(&decision, &Ok(4));
        home.write(&status).unwrap();
        assert!(home.running().is_some());
        // It is killed.
        drop(lock);
        assert!(home.running().is_none());
        let mut next = Status::new(false, home.last());
        assert_eq!(next.decisions[0].result.as_deref(), Some("done"));
        assert_eq!(next.balloons.others("a", 9), Some(5));
        // The owner changes it: from then on it is theirs.
        assert_eq!(next.balloons.others("a", 7), None);
        assert_eq!(next.balloons.others("a", 9), None);
        assert_eq!(vms.all().len(), 0, "the keeper's directory is no VM");
    }
}

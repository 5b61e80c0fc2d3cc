//! More guest memory than there is for it, and nothing lost.
//!
//! ```text
//!   berth keeper --budget B        killed at random moments, and started again
//!   guest N: "pages": patterns over half of its memory ─► idle ─► all verified, all changed ─► idle ─► …
//!   at the end: an exec in each guest, a frozen one too; what each console says
//! ```
//! A wrong byte, a guest that is gone, or one that does not answer fails.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::Setup;

const MIB: u64 = 1 << 20;
/// How often it is looked at guests and keeper.
const LOOK: Duration = Duration::from_secs(2);
/// So long may a guest take to boot and to fill its memory, for each guest that there is.
const FILL_LIMIT: Duration = Duration::from_secs(90);

/// What is tried.
pub struct Overcommit<'a> {
    /// What a VM needs.
    pub setup: &'a Setup,
    /// For runtime directory, logs and files of stores.
    pub directory: &'a Path,
    /// How many guests.
    pub guests: u32,
    /// Memory of each in MiB.
    pub memory: u64,
    /// What all may cost, in MiB.
    pub budget: u64,
    /// Seconds that a guest idles between two rounds.
    pub idle: u32,
    /// How long guests run after all have filled their memory.
    pub duration: Duration,
    /// Rounds that some guest must have verified by then; it goes on until then.
    pub rounds: u64,
    /// Mean seconds between two kills of the keeper; 0: it is not killed.
    pub kill_every: u32,
    /// Seed of the moments.
    pub seed: u64,
}

/// What was seen.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Rounds that guests verified: all together, and the least of one.
    pub rounds: u64,
    /// See `rounds`.
    pub least_rounds: u64,
    /// Kills of the keeper.
    pub kills: u32,
    /// How often the keeper froze and thawed VMs.
    pub freezes: usize,
    /// See `freezes`.
    pub thaws: usize,
    /// Largest cost of all VMs that a keeper saw after all had filled their memory, in bytes, and the mean.
    pub most_cost: u64,
    /// See `most_cost`.
    pub mean_cost: u64,
    /// What guests had touched at the end, wherever it was, in bytes.
    pub touched: u64,
    /// How long an exec took in a VM that ran at its time, and in a frozen one: the longest.
    pub exec_running: Duration,
    /// See `exec_running`.
    pub exec_frozen: Duration,
    /// How many VMs were frozen when they were asked.
    pub were_frozen: u32,
}

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum OvercommitError {
    /// A process does not start.
    #[error("{what}: {source}")]
    Process {
        /// What.
        what: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// A command fails.
    #[error("{what}: {said}")]
    Command {
        /// What.
        what: String,
        /// What it said.
        said: String,
    },
    /// A guest.
    #[error("guest {name}: {what}; its console ends with:\n{console}")]
    Guest {
        /// Which.
        name: String,
        /// What is wrong.
        what: String,
        /// Its last lines.
        console: String,
    },
}

impl OvercommitError {
    fn process(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Process { what, source }
    }
}

/// The guests and their keeper while the trial runs; all are ended when it is dropped.
struct Trial<'a> {
    plan: &'a Overcommit<'a>,
    keeper: Option<Child>,
    costs: Vec<u64>,
    kills: u32,
    rng: fastrand::Rng,
}

impl Overcommit<'_> {
    /// Tries it. `tell` is told what happens, a line each.
    ///
    /// # Errors
    /// [`OvercommitError`].
    pub fn run(&self, mut tell: impl FnMut(&str)) -> Result<Seen, OvercommitError> {
        let rng = fastrand::Rng::with_seed(self.seed);
        let mut trial = Trial { plan: self, keeper: None, costs: Vec::new(), kills: 0, rng };
        for directory in ["run", "store"] {
            fs::create_dir_all(self.directory.join(directory))
                .map_err(OvercommitError::process("a directory"))?;
        }
        trial.start_keeper()?;
        for guest in 0..self.guests {
            trial.start_guest(guest)?;
        }
        tell(&format!("{} guests of {} MiB were started", self.guests, self.memory));
        let end = Instant::now() + FILL_LIMIT * self.guests;
        while trial.each(|console| console.contains("filled"))? < self.guests {
            trial.look(end)?;
        }
        tell("all have filled their memory");
        trial.costs.clear();
        let (least, most) =
            (Instant::now() + self.duration, Instant::now() + self.duration + FILL_LIMIT * 10);
        let mut next_kill = trial.next_kill();
        let mut last = 0;
        while Instant::now() < least || trial.rounds()?.0 < self.rounds {
            trial.look(most)?;
            if next_kill.is_some_and(|at| Instant::now() >= at) {
                trial.kill_keeper()?;
                next_kill = trial.next_kill();
            }
            let (rounds, _) = trial.rounds()?;
            if rounds >= last + u64::from(self.guests) {
                last = rounds;
                tell(&format!("{rounds} rounds verified, {} frozen", trial.frozen()?));
            }
        }
        let mut seen = Seen { kills: trial.kills, ..Seen::default() };
        trial.ask_all(&mut seen, &mut tell)?;
        (seen.rounds, seen.least_rounds) = trial.rounds()?;
        seen.most_cost = trial.costs.iter().copied().max().unwrap_or(0);
        seen.mean_cost = trial.costs.iter().sum::<u64>() / trial.costs.len().max(1) as u64;
        let log = fs::read_to_string(self.directory.join("keeper.log")).unwrap_or_default();
        seen.freezes = log.matches(": freeze: ").count();
        seen.thaws = log.matches(": thaw: ").count();
        seen.touched = trial.touched()?;
        trial.check_consoles()?;
        Ok(seen)
    }
}

impl Trial<'_> {
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.plan.setup.berth);
        command.args(arguments).env("XDG_RUNTIME_DIR", self.plan.directory.join("run"));
        command.stdin(Stdio::null());
        command
    }

    fn output(&self, arguments: &[&str]) -> Result<Output, OvercommitError> {
        self.command(arguments).output().map_err(OvercommitError::process("berth"))
    }

    fn ok(&self, arguments: &[&str]) -> Result<String, OvercommitError> {
        let output = self.output(arguments)?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(OvercommitError::Command { what: format!("berth {}", arguments.join(" ")), said });
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn start_keeper(&mut self) -> Result<(), OvercommitError> {
        let log = File::options().create(true).append(true).open(self.plan.directory.join("keeper.log"));
        let log = log.map_err(OvercommitError::process("the keeper's log"))?;
        let budget = format!("{}M", self.plan.budget);
        let mut command = self.command(&["keeper", "--budget", &budget]);
        self.keeper = Some(command.stdout(log).spawn().map_err(OvercommitError::process("the keeper"))?);
        Ok(())
    }

    /// kill -9, and another one.
    fn kill_keeper(&mut self) -> Result<(), OvercommitError> {
        if let Some(mut keeper) = self.keeper.take() {
            let killed = keeper.kill().and_then(|()| keeper.wait());
            killed.map_err(OvercommitError::process("the keeper"))?;
            self.kills += 1;
        }
        thread::sleep(Duration::from_millis(self.rng.u64(0..3000)));
        self.start_keeper()
    }

    fn next_kill(&mut self) -> Option<Instant> {
        let mean = f64::from(self.plan.kill_every);
        let seconds = mean * (0.2 + 1.6 * self.rng.f64());
        (mean > 0.0).then(|| Instant::now() + Duration::from_secs_f64(seconds))
    }

    fn socket(&self, guest: u32) -> PathBuf {
        self.plan.directory.join(format!("v{guest}"))
    }

    fn start_guest(&self, guest: u32) -> Result<(), OvercommitError> {
        let plan = self.plan;
        let (name, memory) = (format!("g{guest}"), format!("{}M", plan.memory));
        // Half of its memory, for ever.
        let work = format!("\"berth.run=/tests/pages {} 1000000 {}\"", plan.memory / 2, plan.idle);
        let (store, socket) = (plan.directory.join("store"), self.socket(guest));
        let mut command =
            self.command(&["run", "-d", "--engine", "soft", "--name", &name, "--memory", &memory]);
        command.arg("--initrd").arg(plan.setup.initrd.path()).arg("--append").arg(work);
        command.arg("--store-dir").arg(store).arg("--vsock").arg(socket);
        let output = command.output().map_err(OvercommitError::process("berth"))?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        Err(OvercommitError::Command { what: format!("berth run --name {name}"), said })
    }

    /// All that its console has printed, which is a line a round: from the file, because to ask 24 guests each second by
    /// a command would be a load of its own.
    fn console(&self, guest: u32) -> Result<String, OvercommitError> {
        let log = self.plan.directory.join(format!("run/berth/g{guest}/console.log"));
        let text = fs::read(log).map_err(OvercommitError::process("a console's log"))?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// How many consoles are as `so` says.
    fn each(&self, so: impl Fn(&str) -> bool) -> Result<u32, OvercommitError> {
        let mut count = 0;
        for guest in 0..self.plan.guests {
            count += u32::from(so(&self.console(guest)?));
        }
        Ok(count)
    }

    /// Rounds of all guests together, and the least of one.
    fn rounds(&self) -> Result<(u64, u64), OvercommitError> {
        let (mut all, mut least) = (0, u64::MAX);
        for guest in 0..self.plan.guests {
            let rounds = self.console(guest)?.matches("verified ").count() as u64;
            all += rounds;
            least = least.min(rounds);
        }
        Ok((all, least))
    }

    fn vms(&self) -> Result<Vec<Value>, OvercommitError> {
        let text = self.ok(&["ps", "--json"])?;
        Ok(serde_json::from_str(&text).unwrap_or_default())
    }

    fn frozen(&self) -> Result<usize, OvercommitError> {
        Ok(self.vms()?.iter().filter(|vm| vm["state"] == "frozen").count())
    }

    /// What guests have touched, wherever it is.
    fn touched(&self) -> Result<u64, OvercommitError> {
        let of = |vm: &Value, state: &str| vm["stats"]["memory"]["guest"][state].as_u64().unwrap_or(0);
        let vms = self.vms()?;
        Ok(vms.iter().map(|vm| of(vm, "resident_bytes") + of(vm, "stored_bytes")).sum())
    }

    /// All must live, and none may have seen a wrong byte.
    fn look(&mut self, end: Instant) -> Result<(), OvercommitError> {
        thread::sleep(LOOK);
        self.check_consoles()?;
        if let Ok(text) = self.ok(&["keeper", "status", "--json"])
            && let Ok(status) = serde_json::from_str::<Value>(&text)
        {
            let vms = status["seen"]["vms"].as_array().cloned().unwrap_or_default();
            let of = |vm: &Value, key: &str| vm[key].as_u64().unwrap_or(0);
            self.costs.push(vms.iter().map(|vm| of(vm, "resident") + of(vm, "overhead")).sum());
        }
        let alive = self.vms()?.len();
        if alive < self.plan.guests as usize {
            let said = self.ok(&["ps", "--all"])?;
            return Err(OvercommitError::Command { what: format!("{alive} VMs are left"), said });
        }
        if Instant::now() > end {
            let said = self.ok(&["keeper", "status"]).unwrap_or_default() + &self.ok(&["ps"])?;
            return Err(OvercommitError::Command { what: "it takes too long".to_owned(), said });
        }
        Ok(())
    }

    fn check_consoles(&self) -> Result<(), OvercommitError> {
        for guest in 0..self.plan.guests {
            let console = self.console(guest)?;
            let bad = ["FAIL", "Kernel panic", "Out of memory", "BUG:", "segfault"];
            if let Some(what) = bad.iter().find(|bad| console.contains(**bad)) {
                let lines: Vec<&str> = console.lines().collect();
                let console = lines[lines.len().saturating_sub(12)..].join("\n");
                return Err(OvercommitError::Guest {
                    name: format!("g{guest}"),
                    what: (*what).to_owned(),
                    console,
                });
            }
        }
        Ok(())
    }

    /// An exec in each guest.
    fn ask_all(&self, seen: &mut Seen, tell: &mut impl FnMut(&str)) -> Result<(), OvercommitError> {
        for guest in 0..self.plan.guests {
            let name = format!("g{guest}");
            let vms = self.vms()?;
            let frozen = vms.iter().any(|vm| vm["name"] == name.as_str() && vm["state"] == "frozen");
            let start = Instant::now();
            let said =
                self.ok(&["exec", "--timeout", "120", &name, "--", "cat", "/proc/sys/kernel/hostname"])?;
            let time = start.elapsed();
            if said.trim().is_empty() {
                return Err(OvercommitError::Command { what: format!("exec in {name}"), said });
            }
            let longest = if frozen { &mut seen.exec_frozen } else { &mut seen.exec_running };
            *longest = time.max(*longest);
            seen.were_frozen += u32::from(frozen);
            tell(&format!("{name}, {}, answers in {time:.2?}", if frozen { "frozen" } else { "running" }));
        }
        Ok(())
    }
}

impl Drop for Trial<'_> {
    fn drop(&mut self) {
        if let Some(mut keeper) = self.keeper.take() {
            let _ = keeper.kill();
            let _ = keeper.wait();
        }
        for guest in 0..self.plan.guests {
            let _ = self.output(&["kill", &format!("g{guest}")]);
            let _ = fs::remove_file(self.socket(guest));
        }
    }
}

impl std::fmt::Display for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "rounds verified        {} (least of one guest: {})", self.rounds, self.least_rounds)?;
        writeln!(f, "touched by guests      {} MiB", self.touched / MIB)?;
        writeln!(
            f,
            "cost of all VMs        {} MiB at the most, {} MiB in the mean",
            self.most_cost / MIB,
            self.mean_cost / MIB
        )?;
        writeln!(
            f,
            "keeper                 killed {} times, froze {}, thawed {}",
            self.kills, self.freezes, self.thaws
        )?;
        write!(
            f,
            "longest exec           {:.2?} running, {:.2?} frozen ({} were)",
            self.exec_running, self.exec_frozen, self.were_frozen
        )
    }
}

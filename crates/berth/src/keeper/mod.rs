//! `berth keeper`: moves memory between the VMs of this user.
//!
//! ```text
//!   VMs ──/stats──► look.rs ──Seen──► berth-keeper: Policy ──Decision──► act.rs ──control API──► VMs
//!                      │                                        │
//!                      └──────────► record.rs: .keeper/status.json ◄──┘ ──► berth keeper status
//! ```
//! All that it decides by is in the VMs and on the host, but for what it asked balloons for, which is in the status file:
//! so a keeper that is killed leaves VMs that run on, and a new one continues.

mod act;
mod look;
mod record;
mod show;

use std::collections::HashMap;
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use berth_api::{RuntimeError, Vms};
use berth_keeper::{Decision, Policy, Seen, State, Step, Vm};
use clap::{Args, Subcommand};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::host_config::{Budget, HostConfig, HostConfigError};
use crate::keeper::act::Hands;
use crate::keeper::look::Looker;
use crate::keeper::record::{Home, Record, Status};

/// How often it looks: with plenty of room, and with little.
const CALM: Duration = Duration::from_secs(3);
const BUSY: Duration = Duration::from_secs(1);
/// A decision that cannot be carried out is said again only after so many seconds.
const REPEAT: f64 = 30.0;

/// Arguments of `berth keeper`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
#[command(after_help = "\
It takes memory in this order, from VMs of the lowest priority first, and never below a VM's reserve: pages that \
guests do not use (compressed, equal ones kept once), then the store of these from memory to its file, then what \
guests can do without (balloon), and as the last step it freezes VMs: they stand still until there is room or \
until they are used. What guests report as free goes back by itself.

The host configuration may name the budget too: see docs/overcommit.md.")]
pub struct KeeperArguments {
    #[command(subcommand)]
    command: Option<KeeperCommand>,
    /// What all VMs together may cost: a size such as 8G, or percent of the host's memory [default: 90%]
    #[arg(long, value_name = "SIZE|PERCENT")]
    budget: Option<Budget>,
    /// Say what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(Debug, Subcommand)]
enum KeeperCommand {
    /// Show what the keeper sees, and what it has decided and why
    Status {
        /// As JSON, for programs
        #[arg(long)]
        json: bool,
    },
}

/// Why there is no keeper. One line for people.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// One is enough.
    #[error("a keeper runs already{}", .0.map_or(String::new(), |pid| format!(" (process {pid})")))]
    Runs(Option<u32>),
    /// None runs.
    #[error("no keeper runs: start one with `berth keeper`")]
    None,
    /// The directory of VMs.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The host configuration.
    #[error(transparent)]
    Config(#[from] HostConfigError),
    /// The host.
    #[error("cannot {what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
}

impl KeeperError {
    fn host(what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Host { what, source }
    }
}

/// `berth keeper`.
///
/// # Errors
/// [`KeeperError`].
pub fn keeper(arguments: &KeeperArguments) -> Result<ExitCode, KeeperError> {
    let vms = Vms::open()?;
    if let Some(KeeperCommand::Status { json }) = arguments.command {
        let status = Home::of(&vms).running().ok_or(KeeperError::None)?;
        return Ok(crate::print(&if json { show::json(&status) } else { show::table(&status) }));
    }
    let config = HostConfig::read()?;
    let total = berth_host::Memory::usable(std::path::Path::new("/"));
    let budget = arguments.budget.map_or_else(|| config.budget_bytes(), |budget| budget.bytes(total));
    let home = Home::of(&vms);
    let lock = home.claim()?;
    let end = signals().map_err(KeeperError::host("watch for signals"))?;
    let keeper = Keeper::new(vms, home, budget, arguments.dry_run);
    keeper.run(&end)?;
    drop(lock);
    Ok(ExitCode::SUCCESS)
}

/// The budget of the keeper that runs, if one does.
pub fn running_budget(vms: &Vms) -> Option<u64> {
    Home::of(vms).running().map(|status| status.seen.host.budget)
}

/// Sends when the process is to end.
fn signals() -> std::io::Result<Receiver<()>> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP])?;
    let (sender, end) = channel();
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        // Who listens is gone when it ends anyway.
        signals.forever().take(1).for_each(|_| _ = sender.send(()));
    })?;
    Ok(end)
}

struct Keeper {
    home: Home,
    looker: Looker,
    policy: Policy,
    hands: Hands,
    status: Status,
    /// When a decision that led to nothing was said last.
    said: HashMap<(String, Step), f64>,
}

impl Keeper {
    fn new(vms: Vms, home: Home, budget: u64, dry_run: bool) -> Self {
        let before = home.last();
        let status = Status::new(dry_run, before);
        Self {
            home,
            looker: Looker::new(vms, budget),
            policy: Policy::new(),
            hands: Hands::new(),
            status,
            said: HashMap::new(),
        }
    }

    fn run(mut self, end: &Receiver<()>) -> Result<(), KeeperError> {
        loop {
            let seen = self.round();
            self.home.write(&self.status).map_err(KeeperError::host("write the keeper's status"))?;
            let calm = is_calm(&seen);
            match end.recv_timeout(if calm { CALM } else { BUSY }) {
                Err(RecvTimeoutError::Timeout) => {}
                _ => return Ok(()),
            }
        }
    }

    fn round(&mut self) -> Seen {
        for (decision, result) in self.hands.finished() {
            let got = *result.as_ref().unwrap_or(&0);
            self.policy.done(self.looker.now(), &decision, got);
            self.status.note_result(&decision, &result);
        }
        let seen = self.looker.look(&self.hands, &mut self.status.balloons);
        self.status.saw(&seen);
        for decision in self.policy.decide(&seen) {
            let idle = self.status.dry_run || decision.step == Step::Stuck;
            if idle && !self.is_news(&decision, seen.now) {
                continue;
            }
            let record = Record::new(&decision);
            println!("{}", record.line());
            self.status.add(record);
            if idle {
                continue;
            }
            self.status.balloon(&decision, seen.vms.iter().find(|vm| vm.name == decision.vm));
            if let Some(socket) = self.looker.socket(&decision.vm) {
                self.hands.start(socket, decision);
            }
        }
        seen
    }

    fn is_news(&mut self, decision: &Decision, now: f64) -> bool {
        let key = (decision.vm.clone(), decision.step);
        let news = self.said.get(&key).is_none_or(|at| now > at + REPEAT);
        if news {
            self.said.insert(key, now);
        }
        news
    }
}

/// Whether nothing is likely to be needed soon.
fn is_calm(seen: &Seen) -> bool {
    let used: u64 = seen.vms.iter().map(Vm::cost).sum();
    let short = seen.host.available.is_some_and(|available| available < seen.host.total / 8);
    used < seen.host.budget / 4 * 3 && !short && seen.vms.iter().all(|vm| vm.state != State::Frozen)
}

//! What the keeper sees of host and VMs.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use berth_api::types::{VmState, VmStats};
use berth_api::{VmDirectory, Vms, ask_all};
use berth_host::{Memory, Pressure};
use berth_keeper::{Balloon, Host, Seen, State, Vm};
use tracing::warn;

use super::act::Hands;
use super::record::Balloons;

/// How long a VM has to answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// Looks, and remembers what it saw for the next time.
pub struct Looker {
    vms: Vms,
    budget: u64,
    start: Instant,
    last: HashMap<String, Last>,
}

/// What was seen of a VM the last time.
struct Last {
    pid: Option<u32>,
    socket: PathBuf,
    vm: Vm,
    /// When it was measured, refaults, and CPU time, all by the VM's account.
    at: f64,
    refaults: u64,
    cpu_seconds: f64,
    thawed_at: Option<f64>,
    frozen_at: Option<f64>,
}

impl Looker {
    pub fn new(vms: Vms, budget: u64) -> Self {
        Self { vms, budget, start: Instant::now(), last: HashMap::new() }
    }

    /// Seconds since the keeper began.
    pub fn now(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }

    /// The API of a VM that was seen.
    pub fn socket(&self, name: &str) -> Option<PathBuf> {
        self.last.get(name).map(|last| last.socket.clone())
    }

    pub fn look(&mut self, hands: &Hands, balloons: &mut Balloons) -> Seen {
        let alive: Vec<VmDirectory> = self.vms.all().into_iter().filter(VmDirectory::is_alive).collect();
        let sockets: Vec<PathBuf> = alive.iter().map(VmDirectory::api_socket).collect();
        let answers = ask_all::<VmStats>(&sockets, "/stats", PATIENCE).unwrap_or_else(|e| {
            warn!("VMs cannot be asked: {e}");
            Vec::new()
        });
        let now = self.now();
        let mut last = HashMap::new();
        let mut answers = answers.into_iter();
        for (directory, socket) in alive.iter().zip(sockets) {
            let name = directory.name().to_owned();
            let before = self.last.remove(&name).filter(|before| before.pid == directory.pid());
            let seen = match answers.next() {
                Some(Ok(stats)) => Some(Last::new(directory, socket, &stats, before.as_ref(), now)),
                // One that does not answer costs what it did, and nothing is done with it.
                _ => before.map(|mut before| {
                    before.vm.state = State::Other;
                    before
                }),
            };
            if let Some(mut seen) = seen {
                seen.vm.awaited = hands.awaited(&name);
                if let Some(balloon) = &mut seen.vm.balloon {
                    balloon.others = balloons.others(&name, balloon.target);
                }
                last.insert(name, seen);
            }
        }
        self.last = last;
        let mut vms: Vec<Vm> = self.last.values().map(|last| last.vm.clone()).collect();
        vms.sort_by(|a, b| a.name.cmp(&b.name));
        Seen { now, host: self.host(), vms }
    }

    fn host(&self) -> Host {
        let root = Path::new("/");
        let memory = Memory::read(root);
        let pressure = Pressure::read(root).and_then(|p| p.memory).map(|memory| memory.avg10);
        Host { budget: self.budget, total: memory.total.unwrap_or(0), available: memory.available, pressure }
    }
}

impl Last {
    fn new(
        directory: &VmDirectory,
        socket: PathBuf,
        stats: &VmStats,
        before: Option<&Self>,
        now: f64,
    ) -> Self {
        let memory = &stats.memory;
        let guest = memory.guest.clone().unwrap_or_default();
        let store = memory.store.clone().unwrap_or_default();
        let state = match stats.state {
            VmState::Running => State::Running,
            VmState::Frozen => State::Frozen,
            _ => State::Other,
        };
        let was_frozen = before.is_some_and(|b| b.vm.state == State::Frozen);
        let thawed_at = match state {
            State::Running if was_frozen => Some(now),
            _ => before.and_then(|b| b.thawed_at),
        };
        let frozen_at = match state {
            State::Frozen if was_frozen => before.and_then(|b| b.frozen_at),
            State::Frozen => Some(now),
            _ => None,
        };
        let rate = |then: f64, value: f64| {
            before.map_or(0.0, |b| (value - then).max(0.0) / (stats.at - b.at).max(0.1))
        };
        let vm = Vm {
            name: directory.name().to_owned(),
            state,
            priority: memory.priority,
            size: memory.size_bytes,
            resident: guest.resident_bytes,
            stored: guest.stored_bytes,
            overhead: memory.overhead_bytes,
            reserve: memory.reserve_bytes,
            store_memory: store.memory_bytes,
            has_file: store.can_have_file,
            refaults: rate(before.map_or(0.0, |b| b.refaults as f64), store.refaults as f64),
            refault_time: store.latency_p50_seconds,
            cpus: rate(before.map_or(0.0, |b| b.cpu_seconds), stats.cpu_seconds),
            balloon: stats.balloon.as_ref().map(|balloon| Balloon {
                target: balloon.target_bytes,
                actual: balloon.actual_bytes,
                available: balloon.guest_available_bytes,
                others: None,
            }),
            before_freeze: memory.before_freeze_bytes.unwrap_or(0),
            frozen_for: frozen_at.map(|at| now - at),
            thawed_for: thawed_at.map(|at| now - at),
            awaited: None,
        };
        Self {
            pid: directory.pid(),
            socket,
            vm,
            at: stats.at,
            refaults: store.refaults,
            cpu_seconds: stats.cpu_seconds,
            thawed_at,
            frozen_at,
        }
    }
}

//! Whether a VM may start, or be promised more.
//!
//! Promises are reserves and what VMs cost besides guest memory; their sum must fit into the budget, whatever anybody
//! wants. Ratios (`max-overcommit` of the host configuration) are a policy, which `--force` overrides.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use berth_api::types::{VmDescription, VmStats};
use berth_api::{ClientError, RuntimeError, Vms, ask_all};
use berth_host::Cpu;
use berth_machine::options::size;

use crate::host_config::{HostConfig, HostConfigError};
use crate::keeper;

/// What a VM costs besides guest memory and what is stored of it, when it is not known yet: a little more than an idle VM
/// of the soft engine takes (docs/performance.md).
const OVERHEAD: u64 = 16 << 20;
/// More than a VM is likely to cost besides guest memory: where all fits even so, nobody has to be asked.
const MOST_OVERHEAD: u64 = 128 << 20;
/// How long VMs have to say what they are promised.
const PATIENCE: Duration = Duration::from_secs(2);

/// Why it may not. One line for people.
#[derive(Debug, thiserror::Error)]
pub enum AdmissionError {
    /// The sum of promises.
    #[error(
        "refused: {name} would be promised {} ({} reserve, {} overhead), {others} other VMs have {}: together {}, more than \
         the budget of {}. A promise is kept: --force does not override this; lower a reserve or end a VM",
        size::show(*reserve + *overhead), size::show(*reserve), size::show(*overhead), size::show(*promised),
        size::show(*reserve + *overhead + *promised), size::show(*budget)
    )]
    Promises {
        /// The VM.
        name: String,
        /// In bytes.
        reserve: u64,
        /// In bytes.
        overhead: u64,
        /// How many others there are.
        others: usize,
        /// What these have, in bytes.
        promised: u64,
        /// In bytes.
        budget: u64,
    },
    /// A ratio.
    #[error(
        "refused: with {name} all VMs would have {wanted} for {there}, a ratio of {ratio:.2}, and {} allows {allowed} \
         (max-overcommit); --force overrides this",
        config.display()
    )]
    Ratio {
        /// The VM.
        name: String,
        /// Of what, in words.
        wanted: String,
        /// What there is, in words.
        there: String,
        /// The first for the second.
        ratio: f64,
        /// The largest.
        allowed: f64,
        /// Who says so.
        config: PathBuf,
    },
    /// The host configuration.
    #[error(transparent)]
    Config(#[from] HostConfigError),
    /// The directory of VMs.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The VMs cannot be asked.
    #[error(transparent)]
    Ask(#[from] ClientError),
    /// Somebody else decides at the same time.
    #[error("cannot lock {}: {source}", path.display())]
    Lock {
        /// The directory.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

impl AdmissionError {
    /// Whether the answer is no, and not that it cannot be told.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Promises { .. } | Self::Ratio { .. })
    }
}

/// What a VM has been promised, and may use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Promise {
    /// Its name.
    pub name: String,
    /// Guest memory that stays resident, in bytes.
    pub reserve: u64,
    /// What it costs besides, in bytes.
    pub overhead: u64,
    /// Guest memory, in bytes.
    pub size: u64,
    /// vCPUs.
    pub vcpus: u64,
}

impl Promise {
    /// Of a VM that is about to start.
    pub fn new(name: &str, reserve: u64, size: u64, vcpus: u8) -> Self {
        Self { name: name.to_owned(), reserve, overhead: OVERHEAD, size, vcpus: vcpus.into() }
    }
}

/// What there is to promise from.
#[derive(Clone, Debug, PartialEq)]
struct Host {
    budget: u64,
    cpus: u64,
    config: HostConfig,
}

/// While this lives nobody else is admitted.
#[must_use = "others are let in as soon as this is dropped"]
pub struct Admitted(#[allow(dead_code)] File);

/// Lets a VM in; until the answer is dropped nobody else is, so that the VM can say what it is first.
///
/// # Errors
/// [`AdmissionError`].
pub fn admit(new: &Promise, force: bool) -> Result<Admitted, AdmissionError> {
    let vms = Vms::open()?;
    let locked = lock(vms.path())?;
    let config = HostConfig::read()?;
    let budget = keeper::running_budget(&vms).unwrap_or_else(|| config.budget_bytes());
    let host = Host { budget, cpus: Cpu::read(Path::new("/")).online, config };
    let most = |promise: &Promise| promise.size.max(promise.reserve) + MOST_OVERHEAD;
    let others = others(&vms, &new.name);
    let plenty = others.iter().map(|(_, promise)| most(promise)).sum::<u64>() + most(new) <= host.budget;
    let others = if plenty { others.into_iter().map(|(_, promise)| promise).collect() } else { ask(others)? };
    check(new, &others, &host, force)?;
    Ok(locked)
}

/// Lets a VM that runs be promised another reserve.
///
/// # Errors
/// [`AdmissionError`].
pub fn admit_reserve(name: &str, reserve: u64) -> Result<Admitted, AdmissionError> {
    // Its size and its vCPUs were admitted when it started.
    admit(&Promise { name: name.to_owned(), reserve, overhead: OVERHEAD, ..Promise::default() }, true)
}

fn lock(path: &Path) -> Result<Admitted, AdmissionError> {
    let locked = File::open(path).and_then(|directory| directory.lock().map(|()| Admitted(directory)));
    locked.map_err(|source| AdmissionError::Lock { path: path.to_owned(), source })
}

/// All VMs that live, but `name`: where each is asked, and what it was promised at its start.
fn others(vms: &Vms, name: &str) -> Vec<(PathBuf, Promise)> {
    let alive = vms.all().into_iter().filter(|vm| vm.name() != name && vm.is_alive());
    // One that has not said what it is waits for this lock.
    let promise = |d: VmDescription| {
        let promise = Promise::new(&d.name, d.reserve_bytes, d.memory_bytes, d.vcpus);
        (d.api_socket, promise)
    };
    alive.filter_map(|vm| vm.description()).map(promise).collect()
}

/// What they are promised now, as far as they answer.
fn ask(known: Vec<(PathBuf, Promise)>) -> Result<Vec<Promise>, AdmissionError> {
    let (sockets, promises): (Vec<PathBuf>, Vec<Promise>) = known.into_iter().unzip();
    let answers = ask_all::<VmStats>(&sockets, "/stats", PATIENCE)?;
    let now = |(mut promise, answer): (Promise, Result<VmStats, ClientError>)| {
        if let Ok(stats) = answer {
            let stored = stats.memory.store.map_or(0, |store| store.memory_bytes);
            promise.reserve = stats.memory.reserve_bytes;
            promise.overhead = OVERHEAD.max(stats.memory.overhead_bytes.saturating_sub(stored));
        }
        promise
    };
    Ok(promises.into_iter().zip(answers).map(now).collect())
}

fn check(new: &Promise, others: &[Promise], host: &Host, force: bool) -> Result<(), AdmissionError> {
    let promised: u64 = others.iter().map(|p| p.reserve + p.overhead).sum();
    if promised + new.reserve + new.overhead > host.budget {
        return Err(AdmissionError::Promises {
            name: new.name.clone(),
            reserve: new.reserve,
            overhead: new.overhead,
            others: others.len(),
            promised,
            budget: host.budget,
        });
    }
    let Some(most) = host.config.max_overcommit.filter(|_| !force) else { return Ok(()) };
    let ratio = |allowed: Option<f64>, wanted: u64, there: u64| {
        let ratio = wanted as f64 / there.max(1) as f64;
        Some((ratio, allowed?)).filter(|(ratio, allowed)| ratio > allowed)
    };
    let refusal = |(ratio, allowed), wanted, there| AdmissionError::Ratio {
        name: new.name.clone(),
        wanted,
        there,
        ratio,
        allowed,
        config: host.config.path.clone(),
    };
    let memory = new.size + others.iter().map(|p| p.size).sum::<u64>();
    if let Some(over) = ratio(most.memory, memory, host.budget) {
        let there = format!("a budget of {}", size::show(host.budget));
        return Err(refusal(over, format!("{} of memory", size::show(memory)), there));
    }
    let vcpus = new.vcpus + others.iter().map(|p| p.vcpus).sum::<u64>();
    if let Some(over) = ratio(most.cpu, vcpus, host.cpus) {
        return Err(refusal(over, format!("{vcpus} vCPUs"), format!("{} host CPUs", host.cpus)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn host(max_overcommit: Option<&str>) -> Host {
        let max_overcommit = max_overcommit.map(|text| text.parse().unwrap());
        let config = HostConfig { max_overcommit, path: "host.toml".into(), ..HostConfig::default() };
        Host { budget: 1 << 30, cpus: 2, config }
    }

    fn vms(count: usize, reserve: u64) -> Vec<Promise> {
        (0..count).map(|n| Promise::new(&format!("vm{n}"), reserve, 256 * MIB, 1)).collect()
    }

    #[test]
    fn promises_must_fit_and_nothing_overrides_that() {
        let new = Promise::new("new", 500 * MIB, 512 * MIB, 1);
        assert!(check(&new, &vms(1, 400 * MIB), &host(None), false).is_ok());
        for force in [false, true] {
            let refused = check(&new, &vms(2, 300 * MIB), &host(None), force).unwrap_err();
            assert!(refused.is_refusal());
            let said = refused.to_string();
            for part in [
                "new would be promised 516 MiB (500 MiB reserve, 16 MiB overhead)",
                "632 MiB",
                "1.1 GiB",
                "1 GiB",
            ] {
                assert!(said.contains(part), "{said}");
            }
        }
        // 24 VMs without reserves fit, as far as promises go; some day their overheads do not.
        assert!(check(&Promise::new("new", 0, 256 * MIB, 1), &vms(23, 0), &host(None), false).is_ok());
        assert!(check(&Promise::new("new", 0, 256 * MIB, 1), &vms(64, 0), &host(None), false).is_err());
    }

    #[test]
    fn ratios_are_a_policy() {
        let new = Promise::new("new", 0, 256 * MIB, 1);
        let (allowed, refused) = (vms(11, 0), vms(12, 0));
        assert!(check(&new, &allowed, &host(Some("memory=3,cpu=8")), false).is_ok());
        let said = check(&new, &refused, &host(Some("memory=3")), false).unwrap_err().to_string();
        assert!(said.contains("3.2 GiB of memory for a budget of 1 GiB, a ratio of 3.25"), "{said}");
        assert!(said.contains("host.toml allows 3") && said.contains("--force"), "{said}");
        assert!(check(&new, &refused, &host(Some("memory=3")), true).is_ok());
        let said = check(&new, &refused, &host(Some("cpu=6")), false).unwrap_err().to_string();
        assert!(said.contains("13 vCPUs for 2 host CPUs, a ratio of 6.50"), "{said}");
    }
}

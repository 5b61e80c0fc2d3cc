//! `berth set`: what can be changed while a VM runs.

use std::process::ExitCode;
use std::str::FromStr;

use berth_api::Client;
use berth_api::types::{CpuRequest, MemoryRequest};
use berth_image::Name;
use berth_machine::options::{CpuLimit, MAX_PRIORITY, OptionError, check_weight, size};
use clap::Args;
use clap_complete::engine::ArgValueCandidates;

use super::{LiveVm, VmsError, live_names};
use crate::admission;

/// Arguments of `berth set`.
#[derive(Debug, Args)]
#[command(after_help = "\
Keys:
  cpu.weight=W      CPU time compared with other VMs when there is not enough for all: 1 to 10000, 100 is usual
  cpu.limit=L       most CPU time of all threads of the VM, in host CPUs such as 1.5; none for as much as there is
  memory.reserve=S  guest memory that stays in the host's memory, such as 512M
  memory.limit=S    guest memory that is in the host's memory at most; none for as much as the guest uses
  memory.priority=N who keeps memory when there is not enough for all: 0 to 1000, lower ones give way first")]
pub struct SetArguments {
    /// The VM
    #[arg(add = ArgValueCandidates::new(live_names))]
    name: Name,
    /// What to change
    #[arg(required = true, value_name = "KEY=VALUE")]
    changes: Vec<Change>,
}

/// One change.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Change {
    CpuWeight(u32),
    CpuLimit(Option<CpuLimit>),
    MemoryReserve(u64),
    /// 0: none.
    MemoryLimit(u64),
    MemoryPriority(u16),
}

impl FromStr for Change {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let possible =
            "possible are cpu.weight=W, cpu.limit=L, memory.reserve=S, memory.limit=S and memory.priority=N";
        let bytes = |text: &str| {
            let range = 0..=MemoryRequest::MAX_BYTES;
            size::parse(text, range).map_err(|e| OptionError(format!("{text:?}: {e}")))
        };
        let (key, value) = text
            .split_once('=')
            .ok_or_else(|| OptionError(format!("{text:?} is no KEY=VALUE: {possible}")))?;
        match key {
            "cpu.weight" => {
                let weight = value.parse();
                let weight =
                    weight.map_err(|_| OptionError(format!("{value:?} is no weight such as 100")))?;
                check_weight(weight).map(Self::CpuWeight)
            }
            "cpu.limit" if value == "none" => Ok(Self::CpuLimit(None)),
            "cpu.limit" => value.parse().map(|limit| Self::CpuLimit(Some(limit))),
            "memory.reserve" => bytes(value).map(Self::MemoryReserve),
            "memory.limit" if value == "none" => Ok(Self::MemoryLimit(0)),
            "memory.limit" => match bytes(value)? {
                0 => Err(OptionError("0 is no limit: none takes it away".to_owned())),
                limit => Ok(Self::MemoryLimit(limit)),
            },
            "memory.priority" => {
                let priority = value.parse().ok().filter(|priority| *priority <= MAX_PRIORITY);
                let error = || OptionError(format!("{value:?} is no priority from 0 to {MAX_PRIORITY}"));
                priority.map(Self::MemoryPriority).ok_or_else(error)
            }
            _ => Err(OptionError(format!("there is no key {key:?}: {possible}"))),
        }
    }
}

/// `berth set`.
///
/// # Errors
/// [`VmsError`].
pub fn set(arguments: &SetArguments) -> Result<ExitCode, VmsError> {
    let vm = LiveVm::find(&arguments.name)?;
    let (cpu, memory) = requests(&arguments.changes);
    // A higher reserve is a promise, which others must leave room for.
    let admitted = match memory.reserve_bytes {
        Some(reserve) if reserve > vm.ask(Client::stats)?.memory.reserve_bytes => {
            Some(admission::admit_reserve(vm.name(), reserve)?)
        }
        _ => None,
    };
    if memory != MemoryRequest::default() {
        vm.ask(|client| client.set_memory(&memory))?;
    }
    drop(admitted);
    if cpu != CpuRequest::default() {
        vm.ask(|client| client.set_cpu(&cpu))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// All changes together; of two that contradict each other the last counts.
fn requests(changes: &[Change]) -> (CpuRequest, MemoryRequest) {
    let (mut cpu, mut memory) = (CpuRequest::default(), MemoryRequest::default());
    for change in changes {
        match change {
            Change::CpuWeight(weight) => cpu.weight = Some(*weight),
            Change::CpuLimit(limit) => cpu.limit = Some(limit.map_or(0.0, CpuLimit::cpus)),
            Change::MemoryReserve(bytes) => memory.reserve_bytes = Some(*bytes),
            Change::MemoryLimit(bytes) => memory.limit_bytes = Some(*bytes),
            Change::MemoryPriority(priority) => memory.priority = Some(*priority),
        }
    }
    (cpu, memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_put_together() {
        let changes = ["cpu.weight=300", "cpu.limit=1.5", "cpu.weight=200"].map(|c| c.parse().unwrap());
        let cpu = CpuRequest { weight: Some(200), limit: Some(1.5) };
        assert_eq!(requests(&changes), (cpu, MemoryRequest::default()));
        assert_eq!(requests(&["cpu.limit=none".parse().unwrap()]).0.limit, Some(0.0));
        let changes = ["memory.reserve=1M", "memory.limit=2M", "memory.priority=7", "memory.limit=none"];
        let memory = MemoryRequest { reserve_bytes: Some(1 << 20), limit_bytes: Some(0), priority: Some(7) };
        assert_eq!(requests(&changes.map(|c| c.parse().unwrap())).1, memory);
    }

    #[test]
    fn mistakes_are_named() {
        for (text, part) in [
            ("cpu.weight", "KEY=VALUE"),
            ("cpu=1", "possible are cpu.weight"),
            ("cpu.weight=0", "from 1 to 10000"),
            ("cpu.limit=0", "0.01"),
            ("cpu.limit=x", "1.5"),
            ("memory.limit=0", "none takes it away"),
            ("memory.reserve=much", "such as 512M"),
            ("memory.priority=1001", "from 0 to 1000"),
        ] {
            let error = text.parse::<Change>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}

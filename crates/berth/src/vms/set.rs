//! `berth set`: what can be changed while a VM runs.

use std::process::ExitCode;
use std::str::FromStr;

use berth_api::types::CpuRequest;
use berth_image::Name;
use berth_machine::options::{CpuLimit, OptionError, check_weight};
use clap::Args;
use clap_complete::engine::ArgValueCandidates;

use super::{LiveVm, VmsError, live_names};

/// Arguments of `berth set`.
#[derive(Debug, Args)]
#[command(after_help = "\
Keys:
  cpu.weight=W   CPU time compared with other VMs when there is not enough for all: 1 to 10000, 100 is usual
  cpu.limit=L    most CPU time of all threads of the VM, in host CPUs such as 1.5; none for as much as there is")]
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
}

impl FromStr for Change {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let possible = "possible are cpu.weight=W and cpu.limit=L";
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
            _ => Err(OptionError(format!("there is no key {key:?}: {possible}"))),
        }
    }
}

/// `berth set`.
///
/// # Errors
/// [`VmsError`].
pub fn set(arguments: &SetArguments) -> Result<ExitCode, VmsError> {
    LiveVm::find(&arguments.name)?.ask(|client| client.set_cpu(&request(&arguments.changes)))?;
    Ok(ExitCode::SUCCESS)
}

/// All changes together; of two that contradict each other the last counts.
fn request(changes: &[Change]) -> CpuRequest {
    let mut request = CpuRequest::default();
    for change in changes {
        match change {
            Change::CpuWeight(weight) => request.weight = Some(*weight),
            Change::CpuLimit(limit) => request.limit = Some(limit.map_or(0.0, CpuLimit::cpus)),
        }
    }
    request
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_put_together() {
        let changes = ["cpu.weight=300", "cpu.limit=1.5", "cpu.weight=200"].map(|c| c.parse().unwrap());
        assert_eq!(request(&changes), CpuRequest { weight: Some(200), limit: Some(1.5) });
        assert_eq!(request(&["cpu.limit=none".parse().unwrap()]).limit, Some(0.0));
    }

    #[test]
    fn mistakes_are_named() {
        for (text, part) in [
            ("cpu.weight", "KEY=VALUE"),
            ("cpu=1", "possible are cpu.weight"),
            ("cpu.weight=0", "from 1 to 10000"),
            ("cpu.limit=0", "0.01"),
            ("cpu.limit=x", "1.5"),
        ] {
            let error = text.parse::<Change>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}

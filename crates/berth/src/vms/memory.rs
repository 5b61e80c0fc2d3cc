//! Memory of running VMs.

use std::process::ExitCode;

use berth_api::types::ReclaimRequest;
use berth_machine::options::{ByteSize, size};
use clap::Args;

use super::{LiveVm, Names, VmsError, for_each};

/// Arguments of `berth reclaim`.
#[derive(Debug, Args)]
pub struct ReclaimArguments {
    #[command(flatten)]
    names: Names,
    /// How much to take of each at most, such as 512M [default: all that is not in use]
    #[arg(short, long, value_name = "SIZE", value_parser = parse_size)]
    size: Option<ByteSize>,
    /// Take only what the guest does not use for so many seconds; 0 takes whatever is coldest
    #[arg(short, long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u32).range(0..=i64::from(ReclaimRequest::MAX_IDLE)))]
    idle: u32,
}

fn parse_size(text: &str) -> Result<ByteSize, size::SizeError> {
    size::parse(text, 0..=ReclaimRequest::MAX_BYTES).map(ByteSize)
}

/// `berth reclaim`.
pub fn reclaim(arguments: &ReclaimArguments) -> Result<ExitCode, VmsError> {
    let bytes = arguments.size.map_or(ReclaimRequest::MAX_BYTES, |size| size.0);
    for_each(&arguments.names.names, |name| {
        let taken = LiveVm::find(name)?.ask(|client| client.reclaim(bytes, arguments.idle))?;
        let (all, zero) = (size::show(taken.bytes), size::show(taken.zero_bytes));
        println!("{name}: {all} to the cold store, {zero} of it zeros");
        Ok(())
    })
}

/// `berth freeze`.
pub fn freeze(names: &Names) -> Result<ExitCode, VmsError> {
    for_each(&names.names, |name| {
        let frozen = LiveVm::find(name)?.ask(berth_api::Client::freeze)?;
        let (all, file) = (size::show(frozen.bytes), size::show(frozen.file_bytes));
        println!("{name}: {all} to the cold store, {file} of it to its file");
        Ok(())
    })
}

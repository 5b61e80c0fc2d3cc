//! `berth explain` and `berth map`: where an address leads, and where memory is.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use berth_api::types::ExplainQuery;
use berth_explain::{AccessKind, Hex, Privilege, map_svg, map_text, svg, text};
use berth_image::Name;
use berth_machine::options::size;
use berth_memory::PAGE_SIZE;
use berth_memory::layout::MAX_RAM;
use clap::{Args, ValueEnum};
use clap_complete::engine::ArgValueCandidates;
use serde::Serialize;

use super::{LiveVm, VmsError, live_names};
use crate::print;

/// Arguments of `berth explain`.
#[derive(Debug, Args)]
#[command(long_about = "\
Explains the whole way of an address: the guest's page tables with every entry on the way, the guest physical address, \
what is there, the host virtual address, and (for root) the machine frame. An access that faults is explained as the \
fault that it raises.

The address is guest virtual in the address space that vCPU 0 is in, unless an option says otherwise. The VM runs on; \
the vCPU stops for a moment so that its state is exact.")]
pub struct ExplainArguments {
    /// The VM
    #[arg(add = ArgValueCandidates::new(live_names))]
    name: Name,
    /// The address: 0xffffffff81000000, or decimal
    address: Hex,
    /// In the address space of this process of the guest (64-bit Linux)
    #[arg(long, value_name = "GUESTPID", group = "space")]
    pid: Option<u32>,
    /// Through the page tables that this value of CR3 leads to
    #[arg(long, value_name = "CR3", group = "space")]
    cr3: Option<Hex>,
    /// The address is guest physical
    #[arg(long, group = "space")]
    physical: bool,
    /// With the control registers of this vCPU
    #[arg(long, default_value_t = 0)]
    vcpu: u8,
    /// The access that may fault: read, write or execute
    #[arg(long, value_enum, default_value_t)]
    access: AccessArgument,
    /// The access is a program's [default below the middle of a 64-bit address space]
    #[arg(long, group = "privilege")]
    user: bool,
    /// The access is the kernel's [default elsewhere]
    #[arg(long, group = "privilege")]
    supervisor: bool,
    #[command(flatten)]
    output: Output,
}

/// Arguments of `berth map`.
#[derive(Debug, Args)]
#[command(long_about = "\
Draws guest physical memory by page state, a character or a square for each chunk: resident, shared, stored in the \
cold store or swap, released by the guest, untouched.")]
pub struct MapArguments {
    /// The VM
    #[arg(add = ArgValueCandidates::new(live_names))]
    name: Name,
    /// Size of a chunk, a power of two such as 4K or 2M [default: so that the map fits on a screen]
    #[arg(long, value_name = "SIZE", value_parser = parse_chunk)]
    chunk: Option<u64>,
    #[command(flatten)]
    output: Output,
}

/// What is printed.
#[derive(Debug, Args)]
struct Output {
    /// As JSON, for programs
    #[arg(long)]
    json: bool,
    /// Draw it into this SVG file; - for standard output
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// As `--chunk` takes it; the VM knows what suits its size.
fn parse_chunk(text: &str) -> Result<u64, size::SizeError> {
    size::parse(text, PAGE_SIZE..=MAX_RAM)
}

/// `--access`.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum AccessArgument {
    #[default]
    R,
    W,
    X,
}

/// `berth explain`.
///
/// # Errors
/// [`VmsError`].
pub fn explain(arguments: &ExplainArguments) -> Result<ExitCode, VmsError> {
    let query = ExplainQuery {
        address: arguments.address,
        pid: arguments.pid,
        cr3: arguments.cr3,
        physical: arguments.physical,
        vcpu: arguments.vcpu,
        access: match arguments.access {
            AccessArgument::R => AccessKind::Read,
            AccessArgument::W => AccessKind::Write,
            AccessArgument::X => AccessKind::Execute,
        },
        privilege: match (arguments.user, arguments.supervisor) {
            (true, _) => Some(Privilege::User),
            (_, true) => Some(Privilege::Supervisor),
            _ => None,
        },
    };
    let vm = LiveVm::find(&arguments.name)?;
    let mut explanation = vm.ask(|client| client.explain(&query))?;
    // The VM may know less of the host than who asks.
    explanation.host = explanation.host.map(|host| host.seen_by_this_process());
    arguments.output.print(&explanation, || svg::render(&explanation), || text::render(&explanation))
}

/// `berth map`.
///
/// # Errors
/// [`VmsError`].
pub fn map(arguments: &MapArguments) -> Result<ExitCode, VmsError> {
    let map = LiveVm::find(&arguments.name)?.ask(|client| client.memory_map(arguments.chunk))?;
    arguments.output.print(&map, || map_svg::render(&map), || map_text::render(&map))
}

impl Output {
    fn print(
        &self,
        value: &impl Serialize,
        svg: impl FnOnce() -> String,
        text: impl FnOnce() -> String,
    ) -> Result<ExitCode, VmsError> {
        match self.svg.as_deref() {
            Some(file) if file == Path::new("-") => return Ok(print(&svg())),
            Some(file) => fs::write(file, svg()).map_err(VmsError::host("write the SVG file"))?,
            None => {}
        }
        if !self.json {
            return Ok(print(&text()));
        }
        // It is made of texts, numbers and lists: it is always possible.
        let json = serde_json::to_string_pretty(value).unwrap_or_default();
        Ok(print(&(json + "\n")))
    }
}

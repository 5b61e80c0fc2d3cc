//! How fast disks and networks are under Berth's soft engine and under QEMU's TCG: the same kernel, initramfs, disk file
//! and programs (fio, iperf3), in turn.
//!
//! ```text
//!   round ─► disk: QEMU, Berth ─► user network: Berth, QEMU ─► tap: QEMU, Berth ─► next round, sides swapped
//!               └─ one guest each: "begin NAME" … "end NAME FIGURES" ─► rate by the guest, CPU time by the host
//! ```
//! Rates are what fio and iperf3 say, by the guest's clock. They suffer from whatever else the host does; the CPU time of
//! the VM's process for each request or byte does so much less.

mod machines;
mod table;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;

use berth_tests_boot::{Namespace, host_program, initrd_with, scripts};
use clap::Args;

use super::process::{self, Interrupt, Process};
use machines::{Attached, Machines};

/// What fio does: name, direction, block size, depth.
const DISK_JOBS: [(&str, &str, &str, u32); 6] = [
    ("read-4k-1", "randread", "4k", 1),
    ("read-4k-32", "randread", "4k", 32),
    ("write-4k-1", "randwrite", "4k", 1),
    ("write-4k-32", "randwrite", "4k", 32),
    ("read-1m", "read", "1M", 8),
    ("write-1m", "write", "1M", 8),
];
/// Size of the disk: it stays in the host's page cache.
const DISK_BYTES: u64 = 256 << 20;

/// Arguments of `bench devices`.
#[derive(Args)]
pub struct DevicesArguments {
    /// How often everything is measured
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// How long each job runs, in seconds
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// Only these
    #[arg(long, value_name = "DEVICE", value_delimiter = ',')]
    only: Vec<Device>,
    /// Where the disk file is made
    #[arg(long, value_name = "DIRECTORY", default_value_os_t = std::env::temp_dir())]
    directory: PathBuf,
    /// Cache mode of the disk, for both
    #[arg(long, default_value = "writeback", value_parser = ["writeback", "none"])]
    cache: String,
    /// A Berth that is built already, instead of this workspace's
    #[arg(long, value_name = "FILE")]
    berth: Option<PathBuf>,
    /// QEMU's system emulator
    #[arg(long, value_name = "PROGRAM", default_value = "qemu-system-x86_64")]
    qemu: PathBuf,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Device {
    /// A raw disk
    Disk,
    /// A network through passt
    User,
    /// A network through a tap device; needs root
    Tap,
}

/// Who is measured; in the order of columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Side {
    Qemu,
    Berth,
}

/// Figures of one job: rates (requests or Mbit/s), and CPU time for each request or megabyte, in microseconds.
#[derive(Clone, Debug, Default)]
struct Figures {
    rates: Vec<f64>,
    costs: Vec<f64>,
}

/// By job and side.
type Results = BTreeMap<(String, Side), Figures>;

/// `bench devices`: prints what it measured, also when it ends early.
///
/// # Errors
/// A text when something is missing, or a guest fails.
pub fn run(arguments: &DevicesArguments) -> Result<(), String> {
    let berth = match &arguments.berth {
        Some(path) => (path.clone(), path.display().to_string()),
        None => super::guest::build_berth()?,
    };
    let version = process::version(&arguments.qemu)
        .ok_or_else(|| format!("{} is not installed", arguments.qemu.display()))?;
    let directory = tempfile::tempdir_in(&arguments.directory)
        .map_err(|e| format!("cannot make a directory in {}: {e}", arguments.directory.display()))?;
    let disk = directory.path().join("disk.img");
    fill(&disk).map_err(|e| format!("{}: {e}", disk.display()))?;
    let initrd = initrd()?;
    let cache = berth_guest_image::cache_directory().map_err(|e| e.to_string())?;
    let guest = berth_guest_image::default_guest(&cache).map_err(|e| e.to_string())?;
    let machines = Machines {
        qemu: arguments.qemu.clone(),
        berth: berth.0,
        kernel: guest.kernel,
        initrd: initrd.path().to_owned(),
    };
    let mut bench =
        Bench { arguments, machines, disk, interrupt: Interrupt::listen()?, results: Results::new() };
    let load = super::load();
    let result = bench.rounds();
    println!("- Berth: {}; {version}; load: {load} before, {} after", berth.1, super::load());
    println!("- rounds: {}, {} s a job, cache={}\n", arguments.rounds, arguments.seconds, arguments.cache);
    table::print(&bench.results);
    result
}

/// The default guest's initramfs with fio, iperf3 and the scripts.
fn initrd() -> Result<tempfile::NamedTempFile, String> {
    let mut files = scripts();
    for name in ["fio", "iperf3"] {
        let program = host_program(name).map_err(|e| format!("{name}: {e}"))?;
        files.extend(program.ok_or_else(|| format!("{name} is not installed"))?);
    }
    let cache = berth_guest_image::cache_directory().map_err(|e| e.to_string())?;
    let guest = berth_guest_image::default_guest(&cache).map_err(|e| e.to_string())?;
    initrd_with(&guest.initrd, &files).map_err(|e| e.to_string())
}

/// Without holes: reads of those would be too good.
fn fill(disk: &PathBuf) -> std::io::Result<()> {
    let mut file = File::create(disk)?;
    std::io::copy(&mut berth_tests_boot::Noise::new(DISK_BYTES), &mut file)?;
    file.sync_all()
}

struct Bench<'a> {
    arguments: &'a DevicesArguments,
    machines: Machines,
    disk: PathBuf,
    interrupt: Interrupt,
    results: Results,
}

impl Bench<'_> {
    fn rounds(&mut self) -> Result<(), String> {
        let wanted = |device: Device| self.arguments.only.is_empty() || self.arguments.only.contains(&device);
        let [disk, user, tap] = [Device::Disk, Device::User, Device::Tap].map(wanted);
        let namespace = if tap { machines::tap_namespace()? } else { None };
        if tap && namespace.is_none() {
            eprintln!("no figures for tap devices: they need root and ip (iproute2)");
        }
        for round in 0..self.arguments.rounds {
            let mut sides = [Side::Qemu, Side::Berth];
            if round % 2 == 1 {
                sides.reverse();
            }
            for side in sides {
                if disk {
                    self.disk(side)?;
                }
                if user {
                    self.user(side)?;
                }
                if let Some(namespace) = &namespace {
                    self.tap(side, namespace)?;
                }
                eprintln!("round {} of {}: {side:?}", round + 1, self.arguments.rounds);
            }
        }
        Ok(())
    }

    fn disk(&mut self, side: Side) -> Result<(), String> {
        let jobs = DISK_JOBS.map(|(name, rw, block, depth)| format!("{name},{rw},{block},{depth}"));
        let orders =
            format!("sh /tests/measure-disk.sh /dev/vda {} {}", self.arguments.seconds, jobs.join(" "));
        let attached = Attached::Disk { path: &self.disk, cache: &self.arguments.cache };
        let command = self.machines.command(side, &attached, None, &orders);
        self.measure(side, "disk", command, |figures| {
            // Of reads and of writes; one of them is zero.
            let numbers: Vec<f64> = figures.split(';').filter_map(|n| n.parse().ok()).collect();
            let [_, _, reads, _, _, writes] = numbers[..] else { return None };
            Some(reads + writes)
        })
    }

    fn user(&mut self, side: Side) -> Result<(), String> {
        let server = machines::iperf(None)?;
        let orders = format!("sh /tests/measure-net.sh router {} {}", self.arguments.seconds, server.port);
        match side {
            Side::Berth => {
                let command = self.machines.command(side, &Attached::User(None), None, &orders);
                self.measure(side, "user", command, |rate| rate.parse().ok())
            }
            Side::Qemu => {
                let passt = machines::passt()?;
                let attached = Attached::User(Some(&passt.socket));
                let command = self.machines.command(side, &attached, None, &orders);
                self.measure(side, "user", command, |rate| rate.parse().ok())
            }
        }
    }

    fn tap(&mut self, side: Side, namespace: &Namespace) -> Result<(), String> {
        let server = machines::iperf(Some(namespace))?;
        let orders = format!(
            "sh /tests/measure-net.sh {} {} {}",
            machines::TAP_ADDRESS,
            self.arguments.seconds,
            server.port
        );
        let command = self.machines.command(side, &Attached::Tap, Some(namespace), &orders);
        self.measure(side, "tap", command, |rate| rate.parse().ok())
    }

    /// Runs a guest and notes what it says of its jobs.
    fn measure(
        &mut self,
        side: Side,
        device: &str,
        mut command: std::process::Command,
        rate: impl Fn(&str) -> Option<f64>,
    ) -> Result<(), String> {
        let mut process = Process::start(&mut command, &self.interrupt)?;
        let (mut begun, mut jobs, mut last) = (None, 0, String::new());
        while let Some(line) = process.line()? {
            if let Some(name) = line.text.strip_prefix("begin ") {
                begun = Some((name.to_owned(), line.times.cpu));
            } else if let (Some(rest), Some((name, cpu))) = (line.text.strip_prefix("end "), begun.take()) {
                let figures = rest.strip_prefix(&name).unwrap_or_default().trim();
                let rate = rate(figures)
                    .ok_or_else(|| format!("{side:?}, {device} {name}: no figures: {figures:?}"))?;
                // Requests, or megabytes of what is said in Mbit/s.
                let rate_of_units = if device == "disk" { rate } else { rate / 8.0 };
                let count = rate_of_units * f64::from(self.arguments.seconds);
                let note = self.results.entry((format!("{device} {name}"), side)).or_default();
                note.rates.push(rate);
                note.costs.push((line.times.cpu - cpu) * 1e6 / count);
                jobs += 1;
            }
            last = line.text;
        }
        process.end().map_err(|e| format!("{side:?}, {device}: {e}; it said last: {last}"))?;
        if jobs == 0 {
            Err(format!("{side:?}, {device}: it did nothing; it said last: {last}"))
        } else {
            Ok(())
        }
    }
}

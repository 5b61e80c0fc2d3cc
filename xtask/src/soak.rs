//! What takes long: VMs that are killed while fio writes, large transfers, and more guest memory than there is.

use std::path::PathBuf;

use berth_tests_boot::kills::Kills;
use berth_tests_boot::overcommit::Overcommit;
use berth_tests_boot::{set_up, set_up_with};
use clap::{Args, Subcommand};

use crate::cargo;

/// Arguments of `soak`.
#[derive(Args)]
pub struct SoakArguments {
    #[command(subcommand)]
    soak: Soak,
}

#[derive(Subcommand)]
enum Soak {
    /// Kill -9 a VM while fio writes to its disk; all that was flushed must be there, each time
    Kill(KillArguments),
    /// Send much through user networking, a bridge, tap devices (both as root) and vsock, and back, with checksums
    Transfer {
        /// How much in each direction, in MiB
        #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
        mib: u32,
    },
    /// Guests with more memory than there is for them, which check what they have in it; none may see a wrong byte
    Overcommit(OvercommitArguments),
}

#[derive(Args)]
struct OvercommitArguments {
    /// How many guests
    #[arg(long, default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..))]
    guests: u32,
    /// Memory of each, in MiB; they write half of it
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(96..))]
    memory: u64,
    /// What all may cost, in MiB
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(64..))]
    budget: u64,
    /// Minutes after all have filled their memory
    #[arg(long, default_value_t = 10)]
    minutes: u64,
    /// Seconds that a guest idles between two rounds
    #[arg(long, default_value_t = 30)]
    idle: u32,
    /// Kill -9 the keeper about every so many seconds, and start another one; 0: never
    #[arg(long, default_value_t = 0)]
    kill_keeper: u32,
    /// Where stores have their files
    #[arg(long, value_name = "DIRECTORY", default_value_os_t = std::env::temp_dir())]
    directory: PathBuf,
    /// Seed of the moments of kills [default: another one each time]
    #[arg(long)]
    seed: Option<u64>,
}

#[derive(Args)]
struct KillArguments {
    /// How often
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    kills: u32,
    /// Format of the disk
    #[arg(long, default_value = "raw", value_parser = ["raw", "qcow2"])]
    format: String,
    /// Its cache mode, as in `berth run --disk …,cache=MODE`
    #[arg(long, default_value = "writeback", value_parser = ["writeback", "none", "writethrough"])]
    cache: String,
    /// Where the disk is made
    #[arg(long, value_name = "DIRECTORY", default_value_os_t = std::env::temp_dir())]
    directory: PathBuf,
    /// Seed of the moments [default: another one each time]
    #[arg(long)]
    seed: Option<u64>,
}

/// `soak`.
///
/// # Errors
/// A text that says what was lost, or why it could not be tried.
pub fn run(arguments: &SoakArguments) -> Result<(), String> {
    match &arguments.soak {
        Soak::Kill(arguments) => kill(arguments),
        Soak::Transfer { mib } => transfer(*mib),
        Soak::Overcommit(arguments) => overcommit(arguments),
    }
}

/// The tests of networks and sockets, with more data.
fn transfer(mib: u32) -> Result<(), String> {
    let mut command = cargo::command();
    command.args(["test", "--workspace", "--test", "networks", "--test", "devices", "--"]);
    command.args(["--test-threads=1", "--nocapture"]);
    command.args(["networking", "bridge", "tap_devices", "sockets_carry"]);
    command.env("BERTH_TEST_TRANSFER_MIB", mib.to_string());
    cargo::run("transfers", &mut command)
}

fn overcommit(arguments: &OvercommitArguments) -> Result<(), String> {
    let programs = std::env::temp_dir().join(format!("berth-soak-programs-{}", std::process::id()));
    let setup = set_up(&programs);
    // Compiled anew the next time.
    let _ = std::fs::remove_dir_all(&programs);
    let setup = setup.map_err(|e| e.to_string())?;
    let directory = tempfile::tempdir_in(&arguments.directory)
        .map_err(|e| format!("cannot make a directory in {}: {e}", arguments.directory.display()))?;
    let seed = arguments.seed.unwrap_or_else(|| fastrand::u64(1..));
    let OvercommitArguments { guests, memory, budget, minutes, idle, kill_keeper, .. } = *arguments;
    let promised = u64::from(guests) * memory;
    println!(
        "{guests} guests of {memory} MiB: {promised} MiB promised, {budget} MiB for it ({:.1}:1), seed {seed}",
        promised as f64 / budget as f64
    );
    let trial = Overcommit {
        setup: &setup,
        directory: directory.path(),
        guests,
        memory,
        budget,
        idle,
        duration: std::time::Duration::from_secs(minutes * 60),
        rounds: 1,
        kill_every: kill_keeper,
        seed,
    };
    let start = std::time::Instant::now();
    let tell = |line: &str| println!("{:>5} s  {line}", start.elapsed().as_secs());
    let seen = trial.run(tell).map_err(|e| format!("seed {seed}: {e}"))?;
    println!("{seen}\nnothing lost");
    Ok(())
}

fn kill(arguments: &KillArguments) -> Result<(), String> {
    let programs = std::env::temp_dir().join(format!("berth-soak-programs-{}", std::process::id()));
    let setup = set_up_with(&programs, &["fio"]);
    // Compiled anew the next time.
    let _ = std::fs::remove_dir_all(&programs);
    let setup = setup.map_err(|e| e.to_string())?;
    let directory = tempfile::tempdir_in(&arguments.directory)
        .map_err(|e| format!("cannot make a directory in {}: {e}", arguments.directory.display()))?;
    let seed = arguments.seed.unwrap_or_else(|| fastrand::u64(1..));
    println!("{} kills, {} disk, cache={}, seed {seed}", arguments.kills, arguments.format, arguments.cache);
    let kills = Kills {
        setup: &setup,
        disk: directory.path().join(format!("disk.{}", arguments.format)),
        options: &format!(",cache={},format={}", arguments.cache, arguments.format),
        count: arguments.kills,
        seed,
    };
    let survived = kills.run(|s| {
        println!("kill {}: {} rounds of 1 MiB flushed, {} read back", s.kills, s.rounds, s.verified);
    });
    let survived = survived.map_err(|e| format!("seed {seed}: {e}"))?;
    println!("{} kills, {} rounds flushed, nothing lost", survived.kills, survived.rounds);
    Ok(())
}

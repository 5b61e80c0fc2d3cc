//! A short run of the fuzz targets for kernel loaders and virtio devices, with the stable compiler and without cargo-fuzz.
//!
//! `libfuzzer-sys` brings libFuzzer itself; what cargo-fuzz adds for coverage is a handful of compiler flags,
//! all of them stable. The address sanitizer is not: for that, `cargo +nightly fuzz run TARGET`. Both use the
//! same corpus and put findings into the same place.

use std::fs;
use std::path::Path;

use clap::Args;

use crate::cargo;

const TARGETS: [&str; 4] = ["bzimage", "elf", "multiboot", "virtio"];
/// As in `fuzz/virtio.rs`.
const DEVICES: [&str; 7] = ["block-raw", "block-qcow2", "console", "balloon", "vsock", "net", "rng"];
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// Coverage that guides libFuzzer, and checks that a release build leaves out.
const FLAGS: &str = "--cfg fuzzing -C passes=sancov-module \
    -C llvm-args=-sanitizer-coverage-level=4 \
    -C llvm-args=-sanitizer-coverage-inline-8bit-counters \
    -C llvm-args=-sanitizer-coverage-pc-table \
    -C llvm-args=-sanitizer-coverage-trace-compares \
    -C codegen-units=1 -C debug-assertions -C overflow-checks";

/// Arguments of `fuzz`.
#[derive(Args)]
pub struct FuzzArguments {
    /// Only this target.
    #[arg(value_parser = TARGETS)]
    target: Option<String>,
    /// Only this device, with the target virtio.
    #[arg(long, value_parser = DEVICES)]
    device: Option<String>,
    /// How long each target runs, in seconds.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// Seed of the random choices [default: another one each time].
    #[arg(long)]
    seed: Option<u32>,
}

/// `fuzz`.
///
/// # Errors
/// A text that names the target that found something, or could not be built or run.
pub fn run(arguments: &FuzzArguments) -> Result<(), String> {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("fuzz");
    let wanted = |target: &&str| arguments.target.as_deref().is_none_or(|wanted| wanted == *target);
    for target in TARGETS.into_iter().filter(wanted) {
        let [corpus, artifacts] = ["corpus", "artifacts"].map(|kind| fuzz.join(kind).join(target));
        for directory in [&corpus, &artifacts] {
            fs::create_dir_all(directory).map_err(|e| format!("cannot make {}: {e}", directory.display()))?;
        }
        println!("== fuzz target {target}: building, then {} s", arguments.seconds);
        let mut command = cargo::command();
        command
            .args(["run", "--quiet", "--release", "--bin", target])
            // With a target named, build scripts do not get the flags: they could not be linked with them.
            .args(["--target", TRIPLE, "--manifest-path"])
            .arg(fuzz.join("Cargo.toml"))
            .arg("--")
            .arg(&corpus)
            .arg(format!("-artifact_prefix={}/", artifacts.display()))
            .arg(format!("-max_total_time={}", arguments.seconds))
            .arg(format!("-seed={}", arguments.seed.unwrap_or_else(|| fastrand::u32(1..))))
            .args(["-max_len=16384", "-timeout=10", "-rss_limit_mb=2048"])
            .args(["-verbosity=0", "-print_final_stats=1"])
            .envs(arguments.device.iter().map(|device| ("BERTH_FUZZ_DEVICE", device)))
            .env("RUSTFLAGS", FLAGS)
            // It would win over RUSTFLAGS.
            .env_remove("CARGO_ENCODED_RUSTFLAGS");
        let output = command.output().map_err(|e| format!("cargo could not be started: {e}"))?;
        // What libFuzzer says is long, and of use only after a finding.
        let said = String::from_utf8_lossy(&output.stderr);
        let inputs = executed(&said).filter(|_| output.status.success()).ok_or_else(|| {
            let status = output.status;
            format!("{said}\nfuzz target {target} failed ({status}); findings are in {}", artifacts.display())
        })?;
        println!("{inputs} inputs, no finding");
    }
    Ok(())
}

/// How many inputs libFuzzer tried, from its statistics.
fn executed(said: &str) -> Option<u64> {
    let line = said.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"))?;
    line.trim().parse().ok()
}

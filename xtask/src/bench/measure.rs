//! What is measured, and how the three sides do it.
//!
//! Work is measured in CPU time: the guest's of the whole VM process, the host's of the program and its
//! children. Other than elapsed time it hardly depends on what else the host does.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use super::guest::{Files, PROGRAM};
use super::process::{Process, Times};

/// RAM of the guests.
const MEMORY_MIB: u32 = 256;
/// So long a guest is left alone before its memory and CPU time are looked at.
const SETTLING: Duration = Duration::from_secs(5);
/// So long an idle guest's CPU time is counted.
const IDLE: Duration = Duration::from_secs(10);
/// What the guest prints when its first user program has run.
const READY: &str = "bench end ready";
/// As Berth's default guest has it.
const CMDLINE: &str = berth_guest_image::KERNEL_PARAMETERS;

/// Who does the work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Side {
    /// The host, without a VM.
    Native,
    /// QEMU's translator.
    Qemu {
        /// Its program.
        program: PathBuf,
        /// What it says of itself.
        version: String,
    },
    /// Berth's soft engine.
    Berth,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Native => "native",
            Self::Qemu { .. } => "TCG",
            Self::Berth => "Berth",
        })
    }
}

/// How a value is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Less is better.
    Seconds,
    /// More is better.
    PerSecond,
    /// Less is better.
    MiB,
    /// Of one core; less is better.
    Percent,
}

/// Something that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// Its name in reports.
    pub name: &'static str,
    /// The unit of its values.
    pub unit: Unit,
}

const fn seconds(name: &'static str) -> Work {
    Work { name, unit: Unit::Seconds }
}

const COREMARK: Work = Work { name: "CoreMark", unit: Unit::PerSecond };
const BOOT: [Work; 4] = [
    seconds("boot to first user program, CPU time"),
    seconds("boot to first user program"),
    seconds("boot, nothing, power off, CPU time"),
    seconds("boot, nothing, power off"),
];
/// Names for the guest's program, and for people.
const PROGRAMS: [(&str, Work); 6] = [
    ("syscalls", seconds("600 000 system calls (dd bs=1)")),
    ("fork-exec", seconds("300 fork and exec (busybox)")),
    ("sha256", seconds("SHA-256 of 20 MiB (busybox)")),
    ("awk", seconds("1 000 000 floating-point loops (awk)")),
    ("ping-pong", seconds("20 000 ping-pongs through pipes")),
    ("mmap", seconds("4 000 mmap, touch, munmap of 64 KiB")),
];
/// What [`idle`] measures, in this order.
pub const IDLE_WORK: [Work; 2] = [
    Work { name: "resident memory, idle guest of 256 MiB", unit: Unit::MiB },
    Work { name: "CPU time, idle guest", unit: Unit::Percent },
];

/// Every kind of work, in the order of reports.
pub fn all() -> Vec<Work> {
    let programs = PROGRAMS.iter().map(|(_, work)| *work);
    BOOT.into_iter().chain([COREMARK]).chain(programs).chain(IDLE_WORK).collect()
}

/// How much is done.
pub struct Plan {
    /// Iterations of CoreMark.
    pub coremark_iterations: u32,
}

/// Does all work once and gives the values.
///
/// # Errors
/// A text when a guest or program fails.
pub fn work(side: &Side, plan: &Plan, files: &Files) -> Result<Vec<(Work, f64)>, String> {
    let iterations = plan.coremark_iterations;
    let names: Vec<_> = PROGRAMS.iter().map(|(name, _)| *name).collect();
    let order = format!("ready coremark={iterations} {}", names.join(" "));
    let mut values = Vec::new();
    if *side != Side::Native {
        let (ready, end) = boot(side, files)?;
        values.extend(BOOT.into_iter().zip([ready.cpu, ready.wall, end.cpu, end.wall]));
    }

    let mut process = Process::start(&mut match side {
        Side::Native => {
            let mut command = Command::new(&files.program);
            command.arg(&files.busybox).args(order.split(' '));
            command
        }
        _ => vm_with_program(side, files, &order),
    })?;
    let mut cpu_begun = 0.0;
    let mut found = Vec::new();
    while let Some(line) = process.line()? {
        match line.text.split(' ').collect::<Vec<_>>()[..] {
            ["bench", "begin", _] => cpu_begun = line.times.cpu,
            ["bench", "end", name, own] => {
                let own = own.parse().map_err(|_| format!("{side}: {:?} is no time", line.text))?;
                let cpu = if *side == Side::Native { own } else { line.times.cpu - cpu_begun };
                found.push((name.to_owned(), cpu));
            }
            ["bench", "failed", ..] => return Err(format!("{side}: {}", line.text)),
            _ => {}
        }
    }
    process.end()?;
    let time = |name: &str| {
        let found = found.iter().find(|(n, _)| n == name).map(|(_, seconds)| *seconds);
        found.ok_or_else(|| format!("{side}: {name} was not done"))
    };
    values.push((COREMARK, f64::from(iterations) / time("coremark")?));
    for (name, work) in PROGRAMS {
        values.push((work, time(name)?));
    }
    Ok(values)
}

/// Boots a guest that does nothing: the times when its first program ran, and at its end.
fn boot(side: &Side, files: &Files) -> Result<(Times, Times), String> {
    let mut process = Process::start(&mut vm_with_program(side, files, "ready"))?;
    let mut ready = None;
    while let Some(line) = process.line()? {
        if line.text.starts_with(READY) {
            ready = Some(line.times);
        }
    }
    let ready = ready.ok_or_else(|| format!("{side}: no user program was started"))?;
    Ok((ready, process.end()?))
}

/// Boots the default guest as it is to its shell and leaves it alone: resident memory in MiB, CPU time in percent
/// of a core.
///
/// # Errors
/// A text when it does not come up.
pub fn idle(side: &Side, files: &Files) -> Result<[f64; 2], String> {
    let mut process = Process::start(&mut vm(side, files, &files.plain_initrd, ""))?;
    loop {
        match process.line()? {
            // Its init says so before it starts the shell.
            Some(line) if line.text.starts_with("Berth guest: Linux") => break,
            Some(_) => {}
            None => return Err(format!("{side}: no user program was started")),
        }
    }
    thread::sleep(SETTLING);
    let before = process.cpu()?;
    thread::sleep(IDLE);
    let cpu = (process.cpu()? - before) / IDLE.as_secs_f64();
    Ok([process.resident()? / f64::from(1 << 20), cpu * 100.0])
}

/// A VM that runs `script`, then ends.
fn vm_with_program(side: &Side, files: &Files, script: &str) -> Command {
    let end = if matches!(side, Side::Qemu { .. }) { "; reboot -f" } else { "" };
    vm(side, files, &files.initrd, &format!(" berth.run=\"{PROGRAM} /bin/busybox {script}{end}\""))
}

/// A VM with `parameters` for its kernel and init.
fn vm(side: &Side, files: &Files, initrd: &Path, parameters: &str) -> Command {
    let memory = format!("{MEMORY_MIB}M");
    let (mut command, dashes) = match side {
        Side::Qemu { program, .. } => {
            let mut command = Command::new(program);
            // Without ACPI this machine cannot be switched off, but a restart ends QEMU too.
            command.args([
                "-M",
                "microvm,acpi=off",
                "-accel",
                "tcg,thread=multi",
                "-cpu",
                "max",
                "-smp",
                "1",
            ]);
            command.args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"]);
            command.args(["-no-reboot", "-m", &memory]);
            (command, "-")
        }
        Side::Native | Side::Berth => {
            let mut command = Command::new(&files.berth);
            command.args(["run", "--engine", "soft", "--memory", &memory, "--cpus", "1"]);
            (command, "--")
        }
    };
    command.arg(format!("{dashes}kernel")).arg(&files.kernel);
    command.arg(format!("{dashes}initrd")).arg(initrd);
    command.arg(format!("{dashes}append")).arg(format!("{CMDLINE} reboot=t{parameters}"));
    command
}

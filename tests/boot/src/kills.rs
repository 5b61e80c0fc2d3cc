//! fio in a guest whose VM is killed, again and again; what it flushed must be there.
//!
//! ```text
//!   guest: fio writes round N to part N modulo 8 ─► fsync ─► "durable N;"     kill -9 at any moment
//!   host: fio reads back rounds N-5 … N, all of each ─► the next guest goes on with round N+1
//! ```
//! At most two rounds were begun after the last that the host has heard of, because the line may have been under way:
//! 6 of 8 parts hold what was flushed. A block that is damaged, missing or of another round fails: each holds its round
//! and its place.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use crate::{Guest, GuestError, Setup};

/// Parts of the disk, as in `programs/fio-rounds.sh`.
const PARTS: u64 = 8;
/// So long may a guest take to its first durable round.
const LIMIT: Duration = Duration::from_secs(240);

/// A disk, and how often its VM is killed.
pub struct Kills<'a> {
    /// What a VM needs. Its initramfs has fio.
    pub setup: &'a Setup,
    /// Where the disk is made; names that end in `.qcow2` are that.
    pub disk: PathBuf,
    /// What follows the file's name in `--disk`, with a comma before.
    pub options: &'a str,
    /// How often.
    pub count: u32,
    /// Seed of the moments.
    pub seed: u64,
}

/// What was seen.
#[derive(Clone, Copy, Debug, Default)]
pub struct Survived {
    /// Kills.
    pub kills: u32,
    /// Rounds that the guests flushed.
    pub rounds: u64,
    /// Rounds that were read back, some several times.
    pub verified: u64,
}

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum KillsError {
    /// The guest.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// A program of the host.
    #[error("{what}: {said}")]
    Program {
        /// What it was to do.
        what: String,
        /// What it said.
        said: String,
    },
    /// The guest had flushed it.
    #[error("kill {kill}: round {round}, which was flushed, is not there as a whole (last: {last}): {said}")]
    Lost {
        /// Which kill, from 1.
        kill: u32,
        /// Which round.
        round: u64,
        /// The last durable one.
        last: u64,
        /// What fio said.
        said: String,
    },
    /// Another round than what is there was taken for it.
    #[error("the check cannot fail: it takes round {round} for round {other}")]
    Blind {
        /// What is there.
        round: u64,
        /// What was looked for.
        other: u64,
    },
}

impl Kills<'_> {
    /// Kills; `report` hears of each.
    ///
    /// # Errors
    /// [`KillsError`].
    pub fn run(&self, mut report: impl FnMut(&Survived)) -> Result<Survived, KillsError> {
        let path = self.disk.to_string_lossy().into_owned();
        program(&self.setup.berth, &["disk", "create", &path, "8M"])?;
        let mut state = self.seed | 1;
        let mut survived = Survived::default();
        let mut next = 0;
        for kill in 1..=self.count {
            let disk = format!("{path}{}", self.options);
            let command = format!("sh /tests/fio-rounds.sh /dev/vda {next}");
            let arguments = ["--cpus", "2", "--memory", "512M", "--disk", &disk];
            let mut guest =
                Guest::start(&self.setup.berth, self.setup.initrd.path(), &arguments, &command, LIMIT)?;
            guest.wait_for_line("durable ")?;
            // Up to 3 seconds: the middle of any of some rounds.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            thread::sleep(Duration::from_millis(state % 3000));
            guest.signal(libc::SIGKILL)?;
            // All that it printed before.
            let lines = guest.last_lines();
            // A line without its end was cut off, and may lack digits.
            let round = |l: &String| l.strip_prefix("durable ")?.strip_suffix(';')?.parse().ok();
            let last = lines.iter().rev().find_map(round);
            let last: u64 = last.unwrap_or(next);
            survived.kills = kill;
            survived.rounds += last + 1 - next;
            let raw = self.raw_image()?;
            for round in last.saturating_sub(PARTS - 3)..=last {
                if let Err(said) = verify(&raw, round, round) {
                    return Err(KillsError::Lost { kill, round, last, said });
                }
                survived.verified += 1;
            }
            if verify(&raw, last, last + 1).is_ok() {
                return Err(KillsError::Blind { round: last, other: last + 1 });
            }
            report(&survived);
            next = last + 1;
        }
        Ok(survived)
    }

    /// The content of the disk as a raw file. A qcow2 image is checked on the way.
    fn raw_image(&self) -> Result<PathBuf, KillsError> {
        if self.disk.extension().is_none_or(|e| e != "qcow2") {
            return Ok(self.disk.clone());
        }
        let path = self.disk.to_string_lossy().into_owned();
        check_qcow2(&path)?;
        let raw = self.disk.with_extension("raw");
        // Not there the first time.
        let _ = std::fs::remove_file(&raw);
        program(&self.setup.berth, &["disk", "convert", &path, &raw.to_string_lossy()])?;
        Ok(raw)
    }
}

/// No errors; clusters that nobody uses any more are none (exit code 3 of qemu-img). Without qemu-img nothing.
///
/// # Errors
/// [`KillsError::Program`] with what it found.
pub fn check_qcow2(path: &str) -> Result<(), KillsError> {
    let Ok(output) = Command::new("qemu-img").args(["check", "-f", "qcow2", path]).output() else {
        println!("skipped: qemu-img, which would check the image, is not installed");
        return Ok(());
    };
    match output.status.code() {
        Some(0 | 3) => Ok(()),
        _ => Err(KillsError::Program {
            what: format!("qemu-img check {path}"),
            said: String::from_utf8_lossy(&output.stdout).into_owned(),
        }),
    }
}

fn program(program: &Path, arguments: &[&str]) -> Result<(), KillsError> {
    let failed = |said: String| KillsError::Program { what: arguments.join(" "), said };
    let output = Command::new(program).args(arguments).output().map_err(|e| failed(e.to_string()))?;
    if output.status.success() {
        Ok(())
    } else {
        Err(failed(String::from_utf8_lossy(&output.stderr).into_owned()))
    }
}

/// Whether the part of round `place` holds round `round`, all of it; what fio says if not.
fn verify(raw: &Path, place: u64, round: u64) -> Result<(), String> {
    let output = Command::new("fio")
        .args(["--name=round", "--rw=randwrite", "--bs=4k", "--size=1M", "--ioengine=psync"])
        .args(["--verify=pattern", "--verify_only", "--verify_fatal=1", "--verify_state_save=0", "--minimal"])
        .arg(format!("--filename={}", raw.display()))
        .arg(format!("--offset={}M", place % PARTS))
        .arg(format!("--randseed={round}"))
        .arg(format!("--verify_pattern=0x{round:08x}%o"))
        .output()
        .map_err(|e| format!("fio: {e}"))?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

//! More guest memory than there is for it: the short form of `cargo xtask soak overcommit`.

use std::fs;
use std::path::Path;
use std::time::Duration;

use berth_tests_boot::overcommit::Overcommit;
use berth_tests_boot::{SetupError, set_up};

/// Whether the host can have a cold store: UFFDIO_MOVE came with Linux 6.8.
fn has_store() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse::<u32>().unwrap_or(0));
    (numbers.next(), numbers.next()) >= (Some(6), Some(8))
}

#[test]
fn guests_with_more_memory_than_there_is_lose_nothing() {
    let setup = match set_up(&Path::new(env!("CARGO_TARGET_TMPDIR")).join("boot-programs")) {
        Ok(setup) => setup,
        Err(SetupError::Lacking(what)) => return println!("skipped: {what}"),
        Err(e) => panic!("{e}"),
    };
    if !has_store() {
        return println!("skipped: this kernel has no UFFDIO_MOVE");
    }
    let directory = tempfile::tempdir().unwrap();
    let trial = Overcommit {
        setup: &setup,
        directory: directory.path(),
        guests: 4,
        memory: 160,
        budget: 256,
        idle: 8,
        duration: Duration::from_secs(15),
        rounds: 4,
        kill_every: 6,
        seed: 20_261_126,
    };
    let seen = trial.run(|line| println!("{line}")).unwrap_or_else(|e| {
        panic!("{e}\n{}", fs::read_to_string(directory.path().join("keeper.log")).unwrap_or_default())
    });
    println!("{seen}");
    assert!(seen.rounds >= 4 && seen.kills > 0);
    assert!(seen.touched > 256 << 20, "the guests did not need more than there was");
}

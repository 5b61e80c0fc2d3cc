//! Guest memory in the default guest: what a limit keeps in memory, and that nothing is lost by it.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use berth_tests_boot::{Guest, Setup, set_up_or_skip};

/// Generous: the tests may share a small machine with others.
const LIMIT: Duration = Duration::from_secs(400);

/// `None`: the host cannot do this test, and was told so.
fn setup() -> Option<Setup> {
    set_up_or_skip(env!("CARGO_TARGET_TMPDIR"), &[])
}

/// Memory of a process that is resident, in MiB.
fn resident(process: u32) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{process}/smaps_rollup")).unwrap();
    let line = rollup.lines().find_map(|l| l.strip_prefix("Rss:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() >> 10
}

/// Whether the host can have a cold store: UFFDIO_MOVE came with Linux 6.8.
fn has_store() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse::<u32>().unwrap_or(0));
    (numbers.next(), numbers.next()) >= (Some(6), Some(8))
}

#[test]
fn idle_memory_is_compressed_and_nothing_is_lost() {
    let Some(setup) = setup() else { return };
    if !has_store() {
        println!("skipped: this kernel has no UFFDIO_MOVE");
        return;
    }
    let arguments = ["--cpus", "2", "--memory", "256M,limit=48M"];
    let command = "/tests/pages 128 2 40";
    let mut guest = Guest::start(&setup.berth, setup.initrd.path(), &arguments, command, LIMIT).unwrap();
    guest.wait_for_line("filled").unwrap();
    let full = resident(guest.process());
    let mut least = full;
    let end = Instant::now() + LIMIT;
    while !guest.new_lines().iter().any(|line| line.starts_with("verified 0")) {
        assert!(Instant::now() < end, "the guest does not verify its memory");
        least = least.min(resident(guest.process()));
        thread::sleep(Duration::from_millis(200));
    }
    println!("{full} MiB resident when the guest had filled its memory, {least} MiB at the least");
    assert!(full > 128 && least < full - 80, "{full} MiB, then {least} MiB");
    let ended = guest.wait().unwrap();
    assert!(ended.status.success(), "{}: {}\n{:#?}", ended.status, ended.complaints, ended.console);
    assert!(ended.console.iter().any(|line| line.trim() == "ok pages"), "{:#?}", ended.console);
}

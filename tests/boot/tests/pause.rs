//! A guest that stands still for longer than its watchdogs wait, and sees nothing of it.

use std::process::Command;
use std::time::Duration;

use berth_tests_boot::{Guest, Setup, set_up_or_skip};

/// Generous: the tests may share a small machine with others.
const LIMIT: Duration = Duration::from_secs(300);
/// Longer than Linux's soft-lockup watchdog (20 s) and RCU's stall detector (21 s) wait.
const PAUSE: Duration = Duration::from_secs(25);
/// Parts of kernel messages that tell of a clock that jumped.
const TROUBLE: [&str; 6] = ["BUG", "WARNING", "lockup", "stall", "unstable", "clocksource: Long readout"];

/// `None`: the host cannot do this test, and was told so.
fn setup() -> Option<Setup> {
    set_up_or_skip(env!("CARGO_TARGET_TMPDIR"), &[])
}

#[test]
fn a_paused_guest_sees_no_time_pass() {
    let Some(setup) = setup() else { return };
    let runtime = tempfile::tempdir().unwrap();
    let berth = || {
        let mut command = Command::new(&setup.berth);
        command.env("XDG_RUNTIME_DIR", runtime.path());
        command
    };
    // Uptime and time of day, from two clocks of the kernel.
    let command = "i=0; while [ $i -lt 40 ]; do i=$((i+1)); \
        echo tick $i $(cut -d. -f1 /proc/uptime) $(date +%s); sleep 0.2; done; \
        echo === messages; dmesg; echo === end";
    let arguments = ["--cpus", "2", "--name", "pause"];
    let mut guest = Guest::start_by(&mut berth(), setup.initrd.path(), &arguments, command, LIMIT).unwrap();
    guest.wait_for_line("tick 10 ").unwrap_or_else(|e| panic!("{e}"));
    assert!(berth().args(["pause", "pause"]).status().unwrap().success());
    std::thread::sleep(PAUSE);
    assert!(berth().args(["resume", "pause"]).status().unwrap().success());
    let ended = guest.wait().unwrap_or_else(|e| panic!("{e}"));
    assert!(ended.status.success(), "{}\n{:#?}", ended.complaints, ended.console);

    let ticks: Vec<[u64; 2]> = ended
        .console
        .iter()
        .filter_map(|line| line.strip_prefix("tick "))
        .map(|line| {
            let numbers: Vec<u64> = line.split(' ').filter_map(|n| n.parse().ok()).collect();
            [numbers[1], numbers[2]]
        })
        .collect();
    assert_eq!(ticks.len(), 40, "{:#?}", ended.console);
    for clock in 0..2 {
        let steps = ticks.windows(2).map(|pair| pair[1][clock].checked_sub(pair[0][clock]));
        let longest = steps.map(|step| step.expect("the clock goes backwards")).max();
        assert!(longest < Some(PAUSE.as_secs() / 2), "clock {clock} jumps by {longest:?} s: {ticks:?}");
    }
    let messages = ended.section("messages");
    let bad: Vec<_> = messages.iter().filter(|line| TROUBLE.iter().any(|t| line.contains(t))).collect();
    assert!(bad.is_empty(), "{bad:#?}");
}

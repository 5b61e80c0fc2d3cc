//! Boots with 1, 2 and 4 vCPUs.

use std::time::Duration;

use berth_tests_boot::{Ended, Guest, PROGRAMS, Setup, set_up_or_skip};

/// Generous: the tests may share a small machine with others.
const LIMIT: Duration = Duration::from_secs(150);

/// Kernel messages of warning level and above that say nothing about Berth.
const HARMLESS: [(&str, &str); 0] = [];

/// Parts of kernel messages of any level that tell of a fault.
const TROUBLE: [&str; 8] =
    ["BUG", "WARNING", "Call Trace", "lockup", "Oops", "stall", "unstable", "clocksource: Long readout"];

/// `None`: the host cannot do this test, and was told so.
fn setup() -> Option<Setup> {
    set_up_or_skip(env!("CARGO_TARGET_TMPDIR"), &[])
}

fn start(setup: &Setup, arguments: &[&str], command: &str) -> Guest {
    Guest::start(&setup.berth, setup.initrd.path(), arguments, command, LIMIT)
        .unwrap_or_else(|e| panic!("{e}"))
}

/// Runs `command` in a guest that then powers off, which ends Berth with 0.
fn run(setup: &Setup, arguments: &[&str], command: &str) -> Ended {
    let ended = start(setup, arguments, command).wait().unwrap_or_else(|e| panic!("{e}"));
    assert!(ended.status.success(), "{}: {}\n{:#?}", ended.status, ended.complaints, ended.console);
    ended
}

fn kernel_is_content(vcpus: &str) {
    let Some(setup) = setup() else { return };
    let command = "echo === cpus; nproc; \
        echo === clock; cat /sys/devices/system/clocksource/clocksource0/current_clocksource; \
        echo === stat; cat /proc/stat; \
        echo === flags; grep -m1 flags /proc/cpuinfo; \
        sleep 1; echo === interrupts; cat /proc/interrupts; \
        echo === warnings; dmesg -r | grep '^<[0-4]>'; \
        echo === messages; dmesg; echo === end";
    let ended = run(&setup, &["--cpus", vcpus], command);

    assert_eq!(ended.section("cpus"), [vcpus]);
    let clock = ended.section("clock");
    assert!(matches!(clock[..], ["tsc" | "kvm-clock"]), "clocksource {clock:?}");

    // The eighth number of a line is steal time (proc(5)).
    let stat = ended.section("stat");
    let per_cpu = stat.iter().filter(|l| l.starts_with("cpu") && !l.starts_with("cpu "));
    let steal: Vec<u64> =
        per_cpu.filter_map(|l| l.split_whitespace().nth(8)).filter_map(|n| n.parse().ok()).collect();
    assert_eq!(steal.len().to_string(), vcpus, "{stat:?}");

    let flags = ended.section("flags").concat();
    for flag in ["avx2", "fma", "bmi2", "movbe", "aes", "pclmulqdq", "cx16", "popcnt", "xsave"] {
        assert!(flags.split_whitespace().any(|f| f == flag), "CPU flag {flag} is not in: {flags}");
    }

    // Each CPU has its own timer.
    let interrupts = ended.section("interrupts");
    let timers = interrupts.iter().find(|l| l.trim_start().starts_with("LOC:")).expect("no LOC line");
    let counts: Vec<u64> = timers.split_whitespace().skip(1).map_while(|n| n.parse().ok()).collect();
    assert_eq!(counts.len().to_string(), vcpus);
    assert!(counts.iter().all(|n| *n > 0), "a CPU has no timer interrupts: {timers}");

    let warnings = ended.section("warnings");
    let unknown: Vec<_> =
        warnings.iter().filter(|l| HARMLESS.iter().all(|(text, _)| !l.contains(text))).collect();
    assert!(unknown.is_empty(), "the kernel warns: {unknown:#?}");
    let messages = ended.section("messages");
    assert!(messages.iter().any(|l| l.contains("Linux version")), "{messages:#?}");
    let trouble: Vec<_> = messages.iter().filter(|l| TROUBLE.iter().any(|t| l.contains(t))).collect();
    assert!(trouble.is_empty(), "{trouble:#?}");
    assert!(ended.console.iter().any(|l| l.contains("reboot: Power down")), "{:#?}", ended.console);
}

fn programs_find_no_fault(vcpus: &str) {
    let Some(setup) = setup() else { return };
    let command = format!(
        "for p in {}; do echo === $p; /tests/$p; echo exit status $?; done; \
         echo === trouble; dmesg -r | grep '^<[0-4]>'; echo === end",
        PROGRAMS.join(" ")
    );
    let ended = run(&setup, &["--cpus", vcpus], &command);
    let mut bad = Vec::new();
    for name in PROGRAMS {
        let lines = ended.section(name);
        let good = lines.iter().filter(|l| l.starts_with("ok ")).count();
        let finished = lines.last() == Some(&"exit status 0");
        if good == 0 || !finished || good + 1 != lines.len() {
            bad.push((name, lines));
        }
    }
    assert!(bad.is_empty(), "{bad:#?}");
    let trouble = ended.section("trouble");
    assert!(trouble.is_empty(), "the kernel warns: {trouble:#?}; the console: {:#?}", ended.console);
}

#[test]
fn kernel_is_content_with_1_vcpu() {
    kernel_is_content("1");
}

#[test]
fn kernel_is_content_with_2_vcpus() {
    kernel_is_content("2");
}

#[test]
fn kernel_is_content_with_4_vcpus() {
    kernel_is_content("4");
}

#[test]
fn programs_find_no_fault_with_1_vcpu() {
    programs_find_no_fault("1");
}

#[test]
fn programs_find_no_fault_with_2_vcpus() {
    programs_find_no_fault("2");
}

#[test]
fn programs_find_no_fault_with_4_vcpus() {
    programs_find_no_fault("4");
}

#[test]
fn reboot_with_no_reboot_ends_the_process() {
    let Some(setup) = setup() else { return };
    let ended = run(&setup, &["--no-reboot", "--cpus", "2"], "echo first boot; reboot; sleep 60");
    assert_eq!(ended.console.iter().filter(|l| *l == "first boot").count(), 1, "{:#?}", ended.console);
    assert!(ended.console.iter().any(|l| l.contains("reboot: Restarting system")), "{:#?}", ended.console);
}

#[test]
fn reboot_boots_again() {
    let Some(setup) = setup() else { return };
    let mut guest = start(&setup, &["--cpus", "2"], "echo this boot; reboot; sleep 60");
    for _ in 0..3 {
        guest.wait_for_line("this boot").unwrap_or_else(|e| panic!("{e}"));
    }
}

#[test]
fn sigterm_presses_the_power_button() {
    let Some(setup) = setup() else { return };
    let mut guest = start(&setup, &["--cpus", "2"], "echo running; sleep 120");
    guest.wait_for_line("running").unwrap_or_else(|e| panic!("{e}"));
    guest.signal(libc::SIGTERM).unwrap_or_else(|e| panic!("{e}"));
    let ended = guest.wait().unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(ended.status.code(), Some(0), "{}\n{:#?}", ended.complaints, ended.console);
    assert!(ended.console.iter().any(|l| l.contains("reboot: Power down")), "{:#?}", ended.console);
}

#[test]
fn init_reports_how_the_command_ended() {
    let Some(setup) = setup() else { return };
    let ended = run(&setup, &[], "exit 7");
    assert!(ended.console.iter().any(|l| l == "Berth guest: exit status 7"), "{:#?}", ended.console);
}

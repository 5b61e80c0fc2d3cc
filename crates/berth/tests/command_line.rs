//! The command as users and scripts see it: what it prints and how it exits.

use std::process::{Command, Output};

fn berth(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_berth")).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn bad_arguments_exit_with_2_and_name_what_was_bad() {
    for (arguments, named) in [
        (&["run", "--memory", "0"][..], "'0'"),
        (&["run", "--memory", "1K"], "from 1 MiB to"),
        (&["run", "--memory", "1P"], "from 1 MiB to"),
        (&["run", "--memory", "many"], "not a size"),
        (&["run", "--cpus", "65"], "1..=64"),
        (&["run", "--cpus", "-1"], "-1"),
        (&["run", "--engine", "warp"], "auto, soft, kvm"),
        (&["run", "--name", "a/b"], "'a/b'"),
        (&["run", "--no-default-guest"], "--kernel"),
        (&["run", "extra"], "extra"),
        (&["sink"], "sink"),
    ] {
        let output = berth(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(text(&output.stderr).contains(named), "{arguments:?}: {}", text(&output.stderr));
        assert!(output.stdout.is_empty(), "{arguments:?}");
    }
}

#[test]
fn an_engine_that_is_not_there_exits_with_1() {
    let output = berth(&["run", "--engine", "kvm"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("not available yet"), "{}", text(&output.stderr));
}

#[test]
fn bad_files_exit_with_1_and_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("empty"), b"").unwrap();
    std::fs::write(
        path("noise"),
        (0..100_000u32).flat_map(|i| i.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect::<Vec<_>>(),
    )
    .unwrap();
    for kernel in ["missing", "empty", "noise", "."] {
        let output = berth(&["run", "--kernel", &path(kernel)]);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{kernel}: {said}");
        assert_eq!(said.lines().count(), 1, "{kernel}: {said}");
        assert!(said.starts_with("berth: error: "), "{kernel}: {said}");
        assert!(!said.contains("panicked"), "{kernel}: {said}");
    }
}

#[test]
fn without_apt_the_default_guest_says_how_to_name_another() {
    let cache = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_berth"))
        .arg("run")
        .env("XDG_CACHE_HOME", cache.path())
        .env("PATH", "/nonexistent")
        .output()
        .unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("--kernel") && said.contains("--initrd"), "{said}");
}

#[test]
fn host_reports_for_people_and_programs() {
    let people = berth(&["host"]);
    assert!(people.status.success());
    for label in
        ["engine", "CPU", "/dev/kvm", "memory", "huge pages", "KSM", "swap", "userfaultfd", "cgroups"]
    {
        assert!(text(&people.stdout).lines().any(|l| l.starts_with(label)), "no {label}");
    }
    let programs = berth(&["host", "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&programs.stdout).unwrap();
    assert_eq!(json["engine"]["engine"], "soft");
    assert!(json["cpu"]["online"].as_u64().unwrap() >= 1);
}

#[test]
fn help_version_and_completions() {
    let help = text(&berth(&["run", "--help"]).stdout);
    for word in ["--memory", "Ctrl-A x", "10 seconds", "Exit code"] {
        assert!(help.contains(word), "no {word} in:\n{help}");
    }
    assert_eq!(text(&berth(&["--version"]).stdout), format!("berth {}\n", env!("CARGO_PKG_VERSION")));
    for shell in ["bash", "zsh", "fish"] {
        let script = text(&berth(&["completions", shell]).stdout);
        assert!(script.contains("no-default-guest"), "{shell}");
    }
}

#[test]
fn a_bad_log_filter_is_no_obstacle() {
    let output =
        Command::new(env!("CARGO_BIN_EXE_berth")).arg("host").env("BERTH_LOG", "==x==").output().unwrap();
    assert!(output.status.success());
    assert!(text(&output.stderr).contains("BERTH_LOG"));
}

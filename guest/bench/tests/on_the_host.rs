//! All work of the program, once each, on the machine that the tests run on.

use std::process::{Command, Output};

/// Work that needs a busybox, which this machine may not have.
const WITH_BUSYBOX: [&str; 3] = ["awk", "dd", "fork-exec"];

fn program(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_berth-guest-bench")).args(arguments).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn each_piece_of_work_is_done_and_its_result_is_right() {
    let list = stdout(&program(&["--list"]));
    let names: Vec<_> = list.lines().filter_map(|line| line.split_whitespace().next()).collect();
    let names: Vec<_> = names.into_iter().filter(|name| !WITH_BUSYBOX.contains(name)).collect();
    assert!(names.len() > 30, "{names:?}");
    let orders: Vec<_> = names.iter().map(|name| format!("{name}=1")).collect();
    let arguments: Vec<_> =
        ["--one-cpu", "/absent"].into_iter().chain(orders.iter().map(String::as_str)).collect();
    let output = stdout(&program(&arguments));
    for name in names {
        let done = |line: &str| {
            line.starts_with(&format!("bench end {name} "))
                || line.starts_with(&format!("bench skipped {name}: "))
        };
        assert!(output.lines().any(done), "{name} was not done:\n{output}");
    }
}

#[test]
fn work_that_fails_does_not_end_the_rest() {
    let output = stdout(&program(&["/absent", "dd=1", "sieve=1"]));
    let lines: Vec<_> = output.lines().collect();
    assert_eq!(
        lines[..2],
        ["bench begin dd", "bench failed dd: /absent: No such file or directory (os error 2)"]
    );
    assert!(lines[3].starts_with("bench end sieve "), "{output}");
}

#[test]
fn wrong_arguments_are_told() {
    for arguments in [&[][..], &["busybox", "sieve"], &["busybox", "sieve=0"], &["busybox", "sieves=1"]] {
        let output = program(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("usage: "), "{arguments:?}");
    }
}

//! All tests of the workspace, with nothing but cargo: the test command of the README.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use clap::Args;

use crate::cargo;

/// Arguments of `test`.
#[derive(Args, Default)]
pub struct TestArguments {
    /// For the test runner, such as a part of the names of the tests to run.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

/// `test`: by cargo-nextest where it is installed (it runs tests of different crates side by side and ends those
/// that hang), else by `cargo test`.
///
/// # Errors
/// A text when a test failed or the tests could not be built.
pub fn run(arguments: &TestArguments) -> Result<(), String> {
    if arguments.rest.is_empty() {
        // Tests with whole guests build it too, but there it would count as their own time, and show nothing.
        cargo::run("Berth, optimised", cargo::command().args(["build", "--release", "--package", "berth"]))?;
    }
    let mut command = cargo::command();
    if has_nextest() {
        command.args(["nextest", "run", "--workspace"]).args(&arguments.rest);
        return cargo::run("tests", &mut command);
    }
    // Without --no-fail-fast the first crate with a failure would hide those of the others.
    command.args(["test", "--no-fail-fast", "--workspace"]).args(&arguments.rest);
    let mut child =
        command.stdout(Stdio::piped()).spawn().map_err(|e| format!("cargo could not be started: {e}"))?;
    // `cargo test` sums up each test program by itself.
    let (mut passed, mut failed) = (0, 0);
    for line in child.stdout.take().into_iter().flat_map(|out| BufReader::new(out).lines()) {
        let line = line.map_err(|e| format!("cannot read what the tests say: {e}"))?;
        println!("{line}");
        if let Some((p, f)) = parse_result(&line) {
            passed += p;
            failed += f;
        }
    }
    let status = child.wait().map_err(|e| format!("cannot wait for cargo: {e}"))?;
    println!("{passed} passed, {failed} failed");
    if status.success() { Ok(()) } else { Err(format!("tests failed ({status})")) }
}

fn has_nextest() -> bool {
    let mut command = cargo::command();
    command.args(["nextest", "--version"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// How many tests passed and failed, from a line such as `test result: ok. 3 passed; 0 failed; 1 ignored`.
fn parse_result(line: &str) -> Option<(u64, u64)> {
    let counts = line.strip_prefix("test result: ")?.split_once(". ")?.1;
    let count = |what: &str| counts.split("; ").find_map(|part| part.strip_suffix(what)?.trim().parse().ok());
    Some((count("passed")?, count("failed")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_test_programs_are_read() {
        let line =
            "test result: FAILED. 12 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0s";
        assert_eq!(parse_result(line), Some((12, 3)));
        assert_eq!(parse_result("test result: ok. 0 passed; 0 failed; 0 ignored"), Some((0, 0)));
        assert_eq!(parse_result("test results::are_read ... ok"), None);
    }
}

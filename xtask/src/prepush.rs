//! What CI checks, before pushing.

use crate::{cargo, test};

const CHECKS: [(&str, &[&str]); 2] = [
    ("formatting", &["fmt", "--all", "--check"]),
    ("lints", &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]),
];

/// Runs all steps; stops at the first that fails.
///
/// # Errors
/// A text that names the step.
pub fn run() -> Result<(), String> {
    for (step, arguments) in CHECKS {
        cargo::run(step, cargo::command().args(arguments))?;
    }
    test::run(&test::TestArguments::default())
}

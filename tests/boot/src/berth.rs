//! The `berth` command that is tested: always the optimised one, because the translator is slow without.

use std::path::PathBuf;
use std::process::Command;

/// Why there is no command.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// Cargo does not start.
    #[error("cannot start cargo: {0}")]
    NoCargo(#[from] std::io::Error),
    /// Cargo failed.
    #[error("cargo build --release -p berth failed:\n{0}")]
    Failed(String),
    /// Cargo says nothing about the program.
    #[error("cargo build --release -p berth made no program named berth")]
    NoProgram,
}

/// Environment variable: the path of a `berth` command to test instead of one built here.
const UNDER_TEST: &str = "BERTH_UNDER_TEST";

/// Builds the command (cargo does nothing if it is there) and says where it is.
///
/// # Errors
/// Any [`BuildError`].
pub fn berth() -> Result<PathBuf, BuildError> {
    if let Some(path) = std::env::var_os(UNDER_TEST) {
        return Ok(path.into());
    }
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["build", "--release", "--quiet", "-p", "berth", "--message-format=json-render-diagnostics"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()?;
    if !output.status.success() {
        return Err(BuildError::Failed(String::from_utf8_lossy(&output.stderr).into_owned()));
    }
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == "berth")
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .ok_or(BuildError::NoProgram)
}

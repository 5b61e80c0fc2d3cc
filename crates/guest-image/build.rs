//! Builds the guest's init program (`guest/init`) as one static file for `src/lib.rs` to embed.
//!
//! A nested cargo does it, with a target directory of its own, because the program needs another profile and
//! static linking whatever the flags of this build are. On a host without a static C library the build goes
//! on: Berth then says at run time that it has no default guest and how to get it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() {
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo"));
    let init = here.join("../../guest/init");
    println!("cargo::rerun-if-changed=build.rs");
    // It is the agent and the load too.
    let others = ["../../guest/agent", "../../guest/load", "../agent-protocol"].map(|other| here.join(other));
    for package in [&init].into_iter().chain(&others) {
        for part in ["src", "Cargo.toml"] {
            println!("cargo::rerun-if-changed={}", package.join(part).display());
        }
    }
    let program = build(&init, &out.join("guest")).unwrap_or_else(|reason| {
        for line in reason.lines() {
            println!("cargo::warning={line}");
        }
        println!(
            "cargo::warning=Berth is built without its default guest: the guest's init could not be built"
        );
        println!("cargo::warning=(on Fedora and others: install the package glibc-static)");
        Vec::new()
    });
    fs::write(out.join("guest-init"), program).expect("cargo made the directory");
}

fn build(init: &Path, target_dir: &Path) -> Result<Vec<u8>, String> {
    let cargo = env::var_os("CARGO").expect("set by cargo");
    let mut command = Command::new(cargo);
    command
        .args(["build", "--quiet", "--profile", "guest", "--target", TARGET, "--manifest-path"])
        .arg(init.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(target_dir)
        // Linked to run at fixed addresses: nothing to relocate when the guest starts it.
        .env("RUSTFLAGS", "-C target-feature=+crt-static -C relocation-model=static");
    // What the outer cargo, or clippy, sets for this build must not change that one.
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let outer = ["CARGO_ENCODED_RUSTFLAGS", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "RUSTDOCFLAGS"];
        if outer.contains(&&*text) || text.starts_with("CARGO_PROFILE_") || text.starts_with("CARGO_BUILD_") {
            command.env_remove(&name);
        }
    }
    let output = command.output().map_err(|e| format!("cannot start cargo: {e}"))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let program = target_dir.join(TARGET).join("guest/berth-guest-init");
    fs::read(&program).map_err(|e| format!("cannot read {}: {e}", program.display()))
}

//! Completion in shells. A shell asks `berth` itself what fits, so that names of images complete too.

use clap::CommandFactory;
use clap_complete::CompleteEnv;
use clap_complete::env::Shells;

use crate::cli::Cli;

/// The environment variable by which a shell asks. Its value is the name of the shell.
const VARIABLE: &str = "BERTH_COMPLETE";

/// Answers a shell that asks what fits, and ends; else does nothing. Call it first.
pub fn answer_shell() {
    CompleteEnv::with_factory(Cli::command).var(VARIABLE).complete();
}

/// What makes `shell`, one of [`Shells::builtins`], ask; empty for others.
pub fn script(shell: &str) -> String {
    let mut script = Vec::new();
    if let Some(completer) = Shells::builtins().completer(shell) {
        let program = std::env::current_exe().ok();
        let program = program.map_or("berth".into(), |p| p.to_string_lossy().into_owned());
        // Writing to memory cannot fail.
        let _ = completer.write_registration(VARIABLE, "berth", "berth", &program, &mut script);
    }
    String::from_utf8_lossy(&script).into_owned()
}

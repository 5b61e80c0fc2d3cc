//! Which case to make, in a form that fits into one line of a command, and what to say when it fails.

use iced_x86::Code;

use crate::case::{Case, CodeMode};
use crate::forms::Catalogue;
use crate::generate::{Pool, sequence, single};
use crate::runner::{Runner, Verdict, describe};

/// Names a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CaseId {
    /// The instruction form; `None`: a sequence.
    pub form: Option<(Code, bool)>,
    /// Size of code.
    pub mode: CodeMode,
    /// Seed of the random choices.
    pub seed: u64,
}

/// Makes cases from their names.
pub struct Factory {
    /// What is compared on this host.
    pub catalogue: Catalogue,
    pool64: Pool,
    pool32: Pool,
}

impl Default for Factory {
    fn default() -> Self {
        let catalogue = Catalogue::default();
        let (pool64, pool32) =
            (Pool::new(&catalogue, CodeMode::Bits64), Pool::new(&catalogue, CodeMode::Bits32));
        Self { catalogue, pool64, pool32 }
    }
}

impl Factory {
    /// The case, if the random choices give one.
    pub fn make(&self, id: &CaseId) -> Option<Case> {
        match (id.form, id.mode) {
            (Some((code, memory)), mode) => single(code, memory, id.seed, mode, &self.catalogue),
            (None, CodeMode::Bits64) => sequence(&self.pool64, id.seed, &self.catalogue),
            (None, CodeMode::Bits32) => sequence(&self.pool32, id.seed, &self.catalogue),
        }
    }
}

impl CaseId {
    /// The command that runs this case alone.
    pub fn command(&self) -> String {
        let what = match self.form {
            Some((code, memory)) => format!("--form {code:?}{}", if memory { " --memory" } else { "" }),
            None => "--sequence".into(),
        };
        let bits = if self.mode == CodeMode::Bits32 { " --bits32" } else { "" };
        let soft = std::env::var("BERTH_SOFT").map_or(String::new(), |v| format!("BERTH_SOFT={v} "));
        format!("{soft}cargo xtask isa-case {what}{bits} --seed {}", self.seed)
    }
}

/// Runs the named case. A difference comes back as a text for people, minimized.
///
/// # Errors
/// The text.
pub fn check(runner: &mut Runner, id: &CaseId, case: &Case) -> Result<Verdict, String> {
    let verdict = runner.check(case);
    if !matches!(verdict, Verdict::Different(_)) {
        return Ok(verdict);
    }
    let small = runner.minimize(case);
    let (text, list) = match runner.check(&small) {
        Verdict::Different(list) => (describe(&small), list),
        _ => match verdict {
            Verdict::Different(list) => (describe(case), list),
            other => return Ok(other),
        },
    };
    let lines: Vec<String> = list.iter().map(|d| format!("  {d}")).collect();
    Err(format!("{text}{}\n  {}\n", lines.join("\n"), id.command()))
}

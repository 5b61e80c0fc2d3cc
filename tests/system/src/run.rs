//! The harness: every case is a test on each engine, `ENGINE::FILE::CASE`.

use std::collections::BTreeSet;

use libtest_mimic::{Arguments, Trial};

use crate::engine::{EngineKind, with_engine};
use crate::limits::{self, KvmHost};

/// A case: its name, and what it does.
pub type Case = (&'static str, fn());

/// The cases of one file.
pub struct Group {
    /// Its name.
    pub name: &'static str,
    /// All of them.
    pub cases: &'static [Case],
}

/// Makes the list of a file's cases, `CASES`; a function that is in none is reported as unused.
#[macro_export]
macro_rules! cases {
    ($($name:ident),* $(,)?) => {
        /// All cases of this file.
        pub const CASES: &[$crate::run::Case] = &[$((stringify!($name), $name)),*];
    };
}

/// Runs what the command line asks for, and ends the process.
pub fn run(groups: &'static [Group]) -> ! {
    let arguments = Arguments::from_args();
    let host = KvmHost::look();
    let places: BTreeSet<String> =
        groups.iter().flat_map(|g| g.cases.iter().map(|(name, _)| format!("{}::{name}", g.name))).collect();
    for place in limits::PAGE_TABLES.iter().flat_map(|(_, cases)| *cases) {
        assert!(places.contains(*place), "the table of limits names {place}, which is no case");
    }
    let mut trials = Vec::new();
    for group in groups {
        for &(name, case) in group.cases {
            let place = format!("{}::{name}", group.name);
            let trial = |engine: EngineKind| {
                Trial::test(format!("{engine}::{place}"), move || {
                    with_engine(engine, case);
                    Ok(())
                })
            };
            trials.push(trial(EngineKind::Soft));
            let skipped = host.skips(&place);
            let asked = match &arguments.filter {
                Some(filter) if arguments.exact => format!("kvm::{place}") == *filter,
                Some(filter) => format!("kvm::{place}").contains(filter.as_str()),
                None => true,
            };
            if let Some(reason) = skipped.filter(|_| asked && !arguments.list) {
                eprintln!("skipped: kvm::{place}: {reason}");
            }
            trials.push(trial(EngineKind::Kvm).with_ignored_flag(skipped.is_some()));
        }
    }
    libtest_mimic::run(&arguments, trials).exit()
}

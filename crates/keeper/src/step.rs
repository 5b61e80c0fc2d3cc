//! What the policy decides.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What kind of thing is done, from cheap to costly for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Step {
    /// Pages that the guest does not use go to the cold store, where equal ones are kept once.
    Cold,
    /// The cold store goes from memory to its file.
    File,
    /// The guest is asked to give back what it could do without.
    Balloon,
    /// The VM stands still, and its memory goes to the store.
    Freeze,
    /// A frozen VM goes on.
    Thaw,
    /// The guest gets back what it gave.
    Deflate,
    /// Nothing can be done.
    Stuck,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Cold => "cold",
            Self::File => "file",
            Self::Balloon => "balloon",
            Self::Freeze => "freeze",
            Self::Thaw => "thaw",
            Self::Deflate => "deflate",
            Self::Stuck => "stuck",
        })
    }
}

/// What is to be done with a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Take so many bytes that were not used for so many seconds to the cold store.
    Reclaim {
        /// At most.
        bytes: u64,
        /// In seconds.
        idle: u32,
    },
    /// Move so many bytes of the cold store to its file.
    ToFile {
        /// At least, if there are as many.
        bytes: u64,
    },
    /// Ask the guest to give back so many bytes in all.
    Balloon {
        /// In all.
        target: u64,
    },
    /// Freeze it.
    Freeze,
    /// Let it go on.
    Thaw,
    /// Nothing.
    None,
}

/// A decision, for who carries it out and for people.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// The VM; empty if it is about all.
    pub vm: String,
    /// What kind of thing it is.
    pub step: Step,
    /// What is to be done.
    pub action: Action,
    /// What the VM is expected to give, in bytes.
    pub gain: u64,
    /// Why, in a sentence for people.
    pub reason: String,
}

/// A size for people.
pub fn show(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..1_048_576 => format!("{:.0} KiB", bytes as f64 / 1024.0),
        1_048_576..1_073_741_824 => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
        _ => format!("{:.2} GiB", bytes as f64 / 1_073_741_824.0),
    }
}

//! What `berth rehearse` and the load in its guests say to each other: the host sends [`ASK`], the guest answers a
//! [`Count`] as a line of text.

use std::fmt;
use std::str::FromStr;

/// The vsock port that the load listens at.
pub const PORT: u32 = 1025;
/// The small request whose latency is measured.
pub const ASK: u8 = b'?';
/// Longest line of an answer, its end included.
pub const MAX_LINE: usize = 100;

/// What a guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Each vCPU computes by itself, without a pause.
    Cpu,
    /// The vCPUs work on what the kernel keeps under locks, without a pause: one address space, a mutex, a pipe.
    Lock,
    /// The vCPUs check and rewrite half of the guest's memory, without a pause.
    Memory,
    /// Bursts of all three; between them the guest waits.
    Mixed,
    /// Next to nothing, once a second.
    Idle,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Cpu, Self::Lock, Self::Memory, Self::Mixed, Self::Idle];

    /// Its name on command lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Lock => "lock",
            Self::Memory => "memory",
            Self::Mixed => "mixed",
            Self::Idle => "idle",
        }
    }

    /// What one unit of its throughput is, in the plural.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Cpu => "rounds of 200 000 steps",
            Self::Lock => "rounds of 20 mappings, 20 locks and 20 bytes through a pipe",
            Self::Memory => "rounds of 256 pages that were checked and rewritten",
            Self::Mixed => "bursts (each vCPU wants 10 of them)",
            Self::Idle => "wake-ups (each vCPU wants 1 of them)",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Kind {
    type Err = UnknownKind;

    fn from_str(text: &str) -> Result<Self, UnknownKind> {
        Self::ALL.into_iter().find(|kind| kind.name() == text).ok_or_else(|| UnknownKind(text.to_owned()))
    }
}

/// There is no such load.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no load: cpu, lock, memory, mixed and idle are")]
pub struct UnknownKind(String);

/// What a guest has done since its load began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// The guest's monotonic clock, in nanoseconds.
    pub nanos: u64,
    /// Units of work, of all vCPUs.
    pub units: u64,
    /// Results that were wrong: a byte of memory, a number.
    pub errors: u64,
    /// Whether all vCPUs have begun to work: memory is filled.
    pub ready: bool,
}

impl Count {
    /// As a line.
    pub fn to_line(self) -> String {
        format!("{} {} {} {}\n", self.nanos, self.units, self.errors, u8::from(self.ready))
    }

    /// From a line, with or without its end; `None` if it is not one.
    pub fn from_line(line: &str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace();
        let mut number = || words.next()?.parse::<u64>().ok();
        let (nanos, units, errors, ready) = (number()?, number()?, number()?, number()?);
        (words.next().is_none() && ready <= 1).then_some(Self { nanos, units, errors, ready: ready == 1 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_survive_the_way() {
        for count in [
            Count::default(),
            Count { nanos: u64::MAX, units: u64::MAX, errors: u64::MAX, ready: true },
            Count { nanos: 1, units: 2, errors: 3, ready: false },
        ] {
            let line = count.to_line();
            assert!(line.len() <= MAX_LINE && line.ends_with('\n'));
            assert_eq!(Count::from_line(&line), Some(count));
        }
        for wrong in ["", "1 2 3", "1 2 3 4", "1 2 3 1 5", "1 2 -3 1", "a b c d"] {
            assert_eq!(Count::from_line(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn names_lead_back() {
        for kind in Kind::ALL {
            assert_eq!(kind.name().parse(), Ok(kind));
        }
        assert!("disk".parse::<Kind>().unwrap_err().to_string().contains("mixed"));
    }
}

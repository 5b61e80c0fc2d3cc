//! Memory.

use std::str::FromStr;

use berth_memory::PAGE_SIZE;
use berth_memory::layout::MAX_RAM;
use serde::{Deserialize, Serialize};

use super::size::{ByteSize, SizeError};
use super::{OptionError, text};

/// Smallest RAM of a VM in bytes.
const MIN_RAM: u64 = 1 << 20;

/// Which priority a VM has unless it says otherwise.
pub const DEFAULT_PRIORITY: u16 = 100;
/// Highest priority.
pub const MAX_PRIORITY: u16 = 1000;

/// The guest's memory: `--memory [size=]SIZE[,reserve=SIZE][,limit=SIZE][,priority=N][,hugepages=thp|none]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct MemoryOptions {
    /// What the guest has.
    pub size: ByteSize,
    /// What always stays in memory, once the guest has used so much.
    pub reserve: ByteSize,
    /// What is to be in memory at most: colder pages go to the cold store.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<ByteSize>,
    /// Who keeps memory when there is not enough for all: those with a lower number give way first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority: Option<u16>,
    /// Whether the host is to use huge pages; without this it does as it always does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugepages: Option<HugePages>,
}

/// Huge pages for guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HugePages {
    /// Transparent ones wherever they fit.
    Thp,
    /// No huge page.
    None,
}

impl Default for MemoryOptions {
    fn default() -> Self {
        Self { size: ByteSize(512 << 20), reserve: ByteSize(0), limit: None, priority: None, hugepages: None }
    }
}

impl MemoryOptions {
    /// Memory of this size in bytes, and no wishes.
    pub fn of_size(size: u64) -> Self {
        Self { size: ByteSize(size), ..Self::default() }
    }

    /// [`Self::priority`], or what it is without one.
    pub fn priority(&self) -> u16 {
        self.priority.unwrap_or(DEFAULT_PRIORITY)
    }

    /// Whether these values are possible together.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self) -> Result<(), OptionError> {
        let range = MIN_RAM..=MAX_RAM;
        if !range.contains(&self.size.0) {
            return Err(OptionError(format!("size: {}", SizeError::OutOfRange { range })));
        }
        if !self.size.0.is_multiple_of(PAGE_SIZE) {
            return Err(OptionError(format!("size: {}", SizeError::NotPages)));
        }
        if let Some(priority) = self.priority.filter(|priority| *priority > MAX_PRIORITY) {
            return Err(OptionError(format!("priority: {priority} is not from 0 to {MAX_PRIORITY}")));
        }
        if self.reserve > self.size {
            return Err(OptionError(format!("reserve: more than the size, which is {}", self.size)));
        }
        match self.limit {
            Some(limit) if limit > self.size => {
                Err(OptionError(format!("limit: more than the size, which is {}", self.size)))
            }
            Some(limit) if limit < self.reserve => {
                Err(OptionError(format!("limit: less than the reserve, which is {}", self.reserve)))
            }
            _ => Ok(()),
        }
    }
}

impl FromStr for MemoryOptions {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let options: Self = text::parse(text, Some("size"))?;
        options.check()?;
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_enough() {
        assert_eq!("2G".parse(), Ok(MemoryOptions::of_size(2 << 30)));
        assert_eq!("size=1M".parse(), Ok(MemoryOptions::of_size(1 << 20)));
        let all: MemoryOptions = "2G,reserve=512M,limit=1G,hugepages=none".parse().unwrap();
        assert_eq!((all.reserve, all.limit), (ByteSize(512 << 20), Some(ByteSize(1 << 30))));
        assert_eq!(all.hugepages, Some(HugePages::None));
        assert_eq!(all.priority(), DEFAULT_PRIORITY);
        assert_eq!("1G,priority=0".parse::<MemoryOptions>().unwrap().priority(), 0);
        assert_eq!("limit=256M".parse::<MemoryOptions>().unwrap().size, ByteSize(512 << 20));
    }

    #[test]
    fn what_cannot_be_is_named() {
        for (text, word) in [
            ("1K", "1 MiB to 511 GiB"),
            ("1048577", "multiple of 4096"),
            ("1G,reserve=2G", "reserve"),
            ("1G,limit=2G", "limit"),
            ("1G,reserve=512M,limit=256M", "reserve, which is 512 MiB"),
            ("1G,priority=1001", "from 0 to 1000"),
            ("1G,priority=-1", "priority"),
            ("1G,hugepages=1g", "thp"),
            ("1G,limits=2G", "do you mean limit"),
        ] {
            let error = text.parse::<MemoryOptions>().unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}

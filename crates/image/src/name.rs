//! Names of images and VMs.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest name: what a host name may have (RFC 1123).
const MAX_NAME: usize = 63;

/// A name of an image or of a VM: letters, digits, `-`, `_` and `.`, with a letter or digit first; at most 63. It is
/// safe as the name of a file and as a part of a command line.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

/// Why a text is no [`Name`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Too long.
    #[error("it has more than {MAX_NAME} characters")]
    TooLong,
    /// It has a character that it may not have.
    #[error("a name begins with a letter or digit, and '-', '_' and '.' may follow")]
    Character,
}

impl Name {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        text.to_owned().try_into()
    }
}

impl TryFrom<String> for Name {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if text.len() > MAX_NAME {
            Err(NameError::TooLong)
        } else if !text.starts_with(|c: char| c.is_ascii_alphanumeric()) || !text.chars().all(good) {
            Err(NameError::Character)
        } else {
            Ok(Self(text))
        }
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_safe_file_names() {
        for good in ["a", "debian-12.1_x", "0", &"x".repeat(63)] {
            assert_eq!(good.parse::<Name>().map(|n| n.to_string()), Ok(good.to_owned()));
        }
        for bad in ["", ".", "..", "../x", "-x", ".hidden", "a/b", "a b", "ä", "a\n"] {
            assert_eq!(bad.parse::<Name>(), Err(NameError::Character), "{bad:?}");
        }
        assert_eq!("x".repeat(64).parse::<Name>(), Err(NameError::TooLong));
    }
}

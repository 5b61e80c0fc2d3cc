//! Numbers that are addresses or bits: text in JSON, because JSON's numbers end at 53 bits for many readers.

use std::fmt;
use std::str::FromStr;

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// An address or bits, hexadecimal after `0x`.
#[derive(utoipa::ToSchema, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[schema(value_type = String, pattern = "^0x[0-9a-f]{1,16}$", example = "0xffffffff81000000")]
pub struct Hex(pub u64);

impl fmt::Display for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{:#x}", self.0))
    }
}

impl fmt::Debug for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A text that is no number.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not a number of at most 64 bits: write it as 0xffff880012345678 or in decimal")]
pub struct BadNumber {
    /// The text.
    pub text: String,
}

impl FromStr for Hex {
    type Err = BadNumber;

    /// Hexadecimal after `0x`, else decimal; `_` and a backquote between digits are skipped.
    fn from_str(text: &str) -> Result<Self, BadNumber> {
        let bad = || BadNumber { text: text.to_owned() };
        let (digits, radix) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
            Some(digits) => (digits, 16),
            None => (text, 10),
        };
        let digits: String = digits.chars().filter(|c| !matches!(c, '_' | '`')).collect();
        if digits.starts_with(['+', '-']) {
            return Err(bad());
        }
        u64::from_str_radix(&digits, radix).map(Self).map_err(|_| bad())
    }
}

impl Serialize for Hex {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Hex {
    /// Only what [`Serialize`] writes, as the OpenAPI document says: people may write it in more ways ([`FromStr`]).
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let is_digit = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
        let plain = |digits: &str| (1..=16).contains(&digits.len()) && digits.bytes().all(is_digit);
        if !text.strip_prefix("0x").is_some_and(plain) {
            return Err(D::Error::custom(format!("{text:?} is no number such as 0xffff880012345678")));
        }
        text.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_hexadecimal_after_0x() {
        for (text, value) in [("0x10", 16), ("10", 10), ("0xffff_8800`0000_0000", 0xffff_8800_0000_0000)] {
            assert_eq!(text.parse(), Ok(Hex(value)), "{text}");
        }
        for text in ["", "0x", "-1", "+1", "ffff", "0x1ffffffffffffffff", "0x+1"] {
            assert!(text.parse::<Hex>().is_err(), "{text}");
        }
    }

    #[test]
    fn json_has_text() {
        let json = serde_json::to_string(&Hex(u64::MAX)).unwrap();
        assert_eq!(json, "\"0xffffffffffffffff\"");
        assert_eq!(serde_json::from_str::<Hex>(&json).unwrap(), Hex(u64::MAX));
        for bad in ["10", "0x", "0X1", "0xF", "0x1_0", "0x10000000000000000"] {
            assert!(serde_json::from_str::<Hex>(&format!("\"{bad}\"")).is_err(), "{bad}");
        }
    }
}

//! Sizes as people write them: `512M`, `2G`, `1GiB`, plain bytes.

use std::fmt;
use std::ops::RangeInclusive;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Why a text is no usable size.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// Not a number with a unit.
    #[error(
        "it is not a size: write a whole number of bytes, or one with K, M, G or T, such as 512M or 2GiB"
    )]
    NotASize,
    /// The number does not fit into 64 bits.
    #[error("it is larger than anything: the largest is {}", show(*range.end()))]
    Huge {
        /// What is possible.
        range: RangeInclusive<u64>,
    },
    /// Not in the range.
    #[error("from {} to {} are possible", show(*range.start()), show(*range.end()))]
    OutOfRange {
        /// What is possible.
        range: RangeInclusive<u64>,
    },
    /// Not whole pages.
    #[error("it must be a multiple of {} bytes", berth_memory::PAGE_SIZE)]
    NotPages,
}

/// Parses a size in bytes inside `range`. Units are powers of 1024, in any case: K, KB and KiB are the same.
///
/// # Errors
/// [`SizeError`], except [`SizeError::NotPages`].
pub fn parse(text: &str, range: RangeInclusive<u64>) -> Result<u64, SizeError> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err(SizeError::NotASize);
    }
    let shift = match unit.trim_start().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        "p" | "pb" | "pib" => 50,
        _ => return Err(SizeError::NotASize),
    };
    let size = number.parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift));
    match size {
        None => Err(SizeError::Huge { range }),
        Some(size) if !range.contains(&size) => Err(SizeError::OutOfRange { range }),
        Some(size) => Ok(size),
    }
}

/// As [`parse`] for memory: only whole pages.
///
/// # Errors
/// [`SizeError`].
pub fn parse_pages(text: &str, range: RangeInclusive<u64>) -> Result<u64, SizeError> {
    let size = parse(text, range)?;
    if size.is_multiple_of(berth_memory::PAGE_SIZE) { Ok(size) } else { Err(SizeError::NotPages) }
}

/// A size for people: exact if it is a whole number of a unit, else with one decimal.
pub fn show(bytes: u64) -> String {
    const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    let Some((unit, shift)) = UNITS.into_iter().find(|(_, shift)| bytes >> shift > 0) else {
        return format!("{bytes} B");
    };
    if bytes.is_multiple_of(1 << shift) {
        format!("{} {unit}", bytes >> shift)
    } else {
        format!("{:.1} {unit}", bytes as f64 / (1u64 << shift) as f64)
    }
}

/// A number of bytes, read from a number or from a text with a unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&show(self.0))
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = ByteSize;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as \"512M\", or a number of bytes")
            }
            fn visit_u64<E: de::Error>(self, value: u64) -> Result<ByteSize, E> {
                Ok(ByteSize(value))
            }
            fn visit_i64<E: de::Error>(self, value: i64) -> Result<ByteSize, E> {
                u64::try_from(value).map(ByteSize).map_err(|_| E::custom("a size cannot be negative"))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<ByteSize, E> {
                parse(text, 0..=u64::MAX).map(ByteSize).map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: RangeInclusive<u64> = 0..=u64::MAX;

    #[test]
    fn units_are_powers_of_1024() {
        for (text, size) in [
            ("4096", 4096),
            ("0", 0),
            ("1k", 1024),
            ("512M", 512 << 20),
            ("2G", 2 << 30),
            ("1GiB", 1 << 30),
            ("1 gb", 1 << 30),
            (" 3T ", 3 << 40),
            ("1P", 1 << 50),
        ] {
            assert_eq!(parse(text, ALL), Ok(size), "{text}");
        }
    }

    #[test]
    fn other_texts_are_refused() {
        for text in ["", "M", "-1", "+1", "1.5G", "1X", "1MM", "0x10", "１M", "1 2", "1e3"] {
            assert_eq!(parse(text, ALL), Err(SizeError::NotASize), "{text}");
        }
        assert_eq!(parse("99999999999999999999", ALL), Err(SizeError::Huge { range: ALL }));
        assert_eq!(parse("16777216T", ALL), Err(SizeError::Huge { range: ALL }));
    }

    #[test]
    fn the_range_is_named() {
        let error = parse("1K", 1 << 20..=1 << 30).unwrap_err();
        assert_eq!(error.to_string(), "from 1 MiB to 1 GiB are possible");
        assert_eq!(parse_pages("5000", 0..=1 << 20), Err(SizeError::NotPages));
        assert_eq!(parse_pages("8192", 0..=1 << 20), Ok(8192));
    }

    #[test]
    fn sizes_are_shown_as_short_as_they_are_exact() {
        assert_eq!(show(0), "0 B");
        assert_eq!(show(1536), "1.5 KiB");
        assert_eq!(show(512 << 20), "512 MiB");
        assert_eq!(show(511 << 30), "511 GiB");
    }
}

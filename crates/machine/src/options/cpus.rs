//! vCPUs, and how much CPU time they get.

use std::fmt;
use std::str::FromStr;

use berth_cpu::MAX_VCPUS;
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{OptionError, text};

/// Weights that control groups take (cgroup-v2.rst, cpu.weight).
const WEIGHTS: std::ops::RangeInclusive<u32> = 1..=10_000;
/// Most host CPUs that a limit or a list can name.
const MAX_HOST_CPUS: u32 = 4096;

/// vCPUs: `--cpus N` or `--cpus count=N[,weight=W][,limit=L][,pin=LIST]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CpusOptions {
    /// How many, 1 to 64.
    pub count: u8,
    /// How much CPU time compared with other VMs when there is not enough for all, 1 to 10000; 100 is usual.
    pub weight: u32,
    /// Most CPU time, of all threads of the VM together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<CpuLimit>,
    /// Host CPUs that the vCPUs run on; without it all that the process may use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pin: Option<CpuList>,
}

impl Default for CpusOptions {
    fn default() -> Self {
        Self { count: 1, weight: 100, limit: None, pin: None }
    }
}

impl CpusOptions {
    fn check(self) -> Result<Self, OptionError> {
        if !(1..=MAX_VCPUS).contains(&self.count) {
            return Err(OptionError(format!(
                "{} vCPUs are not possible: from 1 to {MAX_VCPUS} can be",
                self.count
            )));
        }
        check_weight(self.weight)?;
        Ok(self)
    }
}

/// Refuses weights that control groups do not take.
///
/// # Errors
/// [`OptionError`].
pub fn check_weight(weight: u32) -> Result<u32, OptionError> {
    if WEIGHTS.contains(&weight) {
        return Ok(weight);
    }
    let (least, most) = (WEIGHTS.start(), WEIGHTS.end());
    Err(OptionError(format!(
        "weight: {weight} is not possible: from {least} to {most} can be, and 100 is usual"
    )))
}

impl FromStr for CpusOptions {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        text::parse::<Keys>(text, Some("count"))?.into_options()
    }
}

/// The keys.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Keys {
    count: u8,
    weight: u32,
    limit: Option<CpuLimit>,
    pin: Option<CpuList>,
}

impl Default for Keys {
    fn default() -> Self {
        let CpusOptions { count, weight, limit, pin } = CpusOptions::default();
        Self { count, weight, limit, pin }
    }
}

impl Keys {
    fn into_options(self) -> Result<CpusOptions, OptionError> {
        let Self { count, weight, limit, pin } = self;
        CpusOptions { count, weight, limit, pin }.check()
    }
}

/// In a VM file it is a number, or a table with the keys.
impl<'de> Deserialize<'de> for CpusOptions {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NumberOrKeys;
        impl<'de> Visitor<'de> for NumberOrKeys {
            type Value = CpusOptions;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of vCPUs, or a table with the keys count, weight, limit and pin")
            }

            fn visit_i64<E: de::Error>(self, count: i64) -> Result<CpusOptions, E> {
                let bad = || E::custom(format!("{count} is not in 1..={MAX_VCPUS}"));
                let count = u8::try_from(count).map_err(|_| bad())?;
                CpusOptions { count, ..CpusOptions::default() }.check().map_err(|_| bad())
            }

            fn visit_u64<E: de::Error>(self, count: u64) -> Result<CpusOptions, E> {
                self.visit_i64(i64::try_from(count).unwrap_or(i64::MAX))
            }

            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<CpusOptions, A::Error> {
                let keys = Keys::deserialize(de::value::MapAccessDeserializer::new(map))?;
                keys.into_options().map_err(de::Error::custom)
            }
        }
        deserializer.deserialize_any(NumberOrKeys)
    }
}

/// Most CPU time: a number of host CPUs, in thousandths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CpuLimit(u32);

impl CpuLimit {
    /// As a number of host CPUs.
    pub fn cpus(self) -> f64 {
        f64::from(self.0) / 1000.0
    }
}

impl TryFrom<f64> for CpuLimit {
    type Error = OptionError;

    fn try_from(cpus: f64) -> Result<Self, OptionError> {
        if !(0.01..=f64::from(MAX_HOST_CPUS)).contains(&cpus) {
            return Err(OptionError(format!(
                "a limit of {cpus} is not possible: it is a number of host CPUs from 0.01 to {MAX_HOST_CPUS}, such as 1.5"
            )));
        }
        // In range by the check.
        Ok(Self((cpus * 1000.0).round() as u32))
    }
}

impl FromStr for CpuLimit {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let cpus = text.parse::<f64>();
        cpus.map_err(|_| OptionError(format!("{text:?} is no number of host CPUs such as 1.5")))?.try_into()
    }
}

impl fmt::Display for CpuLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.cpus())
    }
}

impl Serialize for CpuLimit {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.cpus())
    }
}

/// A number in a VM file, text on the command line.
impl<'de> Deserialize<'de> for CpuLimit {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Number;
        impl Visitor<'_> for Number {
            type Value = CpuLimit;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of host CPUs such as 1.5")
            }
            fn visit_f64<E: de::Error>(self, cpus: f64) -> Result<CpuLimit, E> {
                cpus.try_into().map_err(E::custom)
            }
            fn visit_i64<E: de::Error>(self, cpus: i64) -> Result<CpuLimit, E> {
                self.visit_f64(cpus as f64)
            }
            fn visit_u64<E: de::Error>(self, cpus: u64) -> Result<CpuLimit, E> {
                self.visit_f64(cpus as f64)
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<CpuLimit, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Number)
    }
}

/// Host CPUs as the kernel lists them, such as `0-3,8` (cpuset(7), "List format"); on the command line with `+` for
/// the comma.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuList(Vec<u32>);

impl CpuList {
    /// The numbers, in ascending order.
    pub fn cpus(&self) -> &[u32] {
        &self.0
    }
}

impl FromStr for CpuList {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let bad = || {
            OptionError(format!("{text:?} is no list of host CPUs below {MAX_HOST_CPUS}: write 0-3 or 0-3+8"))
        };
        let mut cpus = Vec::new();
        for part in text.split(['+', ',']) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let number = |text: &str| text.trim().parse::<u32>().ok().filter(|&n| n < MAX_HOST_CPUS);
            let (first, last) = (number(first).ok_or_else(bad)?, number(last).ok_or_else(bad)?);
            if first > last {
                return Err(bad());
            }
            cpus.extend(first..=last);
        }
        cpus.sort_unstable();
        cpus.dedup();
        Ok(Self(cpus))
    }
}

impl Serialize for CpuList {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let list: Vec<String> = self.0.iter().map(u32::to_string).collect();
        serializer.serialize_str(&list.join(","))
    }
}

impl<'de> Deserialize<'de> for CpuList {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_or_keys() {
        assert_eq!("4".parse(), Ok(CpusOptions { count: 4, ..CpusOptions::default() }));
        let all = CpusOptions {
            count: 4,
            weight: 300,
            limit: Some(CpuLimit(1500)),
            pin: Some(CpuList(vec![0, 1, 5])),
        };
        assert_eq!("count=4,weight=300,limit=1.5,pin=0-1+5".parse(), Ok(all.clone()));
        assert_eq!("4,weight=300,limit=1.5,pin=0-1+5".parse(), Ok(all));
    }

    #[test]
    fn mistakes_are_named() {
        for (text, part) in [
            ("0", "from 1 to 64"),
            ("65", "from 1 to 64"),
            ("300", "count"),
            ("2,weight=0", "from 1 to 10000"),
            ("2,limit=0", "0.01"),
            ("2,limit=NaN", "0.01"),
            ("2,limit=x", "1.5"),
            ("2,pin=3-1", "0-3"),
            ("2,pin=", "0-3"),
            ("2,pin=5000", "below 4096"),
            ("2,wieght=3", "do you mean weight?"),
        ] {
            let error = text.parse::<CpusOptions>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}

//! What the owner of this host wants for all VMs: a file (docs/overcommit.md describes it).

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use berth_host::Memory;
use berth_machine::options::size;
use serde::{Deserialize, Deserializer, de};

/// Names a file to take instead, for tests and the curious.
const VARIABLE: &str = "BERTH_HOST_CONFIG";
/// For all users of the host.
const SYSTEM: &str = "/etc/berth/host.toml";
/// Percent of the host's memory that VMs may cost unless somebody says otherwise.
const DEFAULT_BUDGET: f64 = 90.0;

/// Why the file is of no use. One line for people.
#[derive(Debug, thiserror::Error)]
pub enum HostConfigError {
    /// It cannot be read.
    #[error("host configuration {}: cannot be read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
    /// It makes no sense.
    #[error("host configuration {}: {reason}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// What the file says.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct HostConfig {
    /// What all VMs of a user together may cost.
    pub budget: Option<Budget>,
    /// How much may be promised.
    #[serde(deserialize_with = "from_text")]
    pub max_overcommit: Option<Overcommit>,
    /// Where files of cold stores are made.
    pub store_dir: Option<PathBuf>,
    /// The file that this came from.
    #[serde(skip)]
    pub path: PathBuf,
}

impl HostConfig {
    /// Reads the user's file, or that of the host; nothing is configured where there is neither.
    ///
    /// # Errors
    /// [`HostConfigError`].
    pub fn read() -> Result<Self, HostConfigError> {
        if let Some(path) = std::env::var_os(VARIABLE).filter(|p| !p.is_empty()) {
            return Self::read_at(Path::new(&path)).map(Option::unwrap_or_default);
        }
        let configured = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from).filter(|p| p.is_absolute());
        let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".config"));
        let of_user = configured.or_else(home).map(|directory| directory.join("berth/host.toml"));
        for path in of_user.into_iter().chain([SYSTEM.into()]) {
            if let Some(config) = Self::read_at(&path)? {
                return Ok(config);
            }
        }
        Ok(Self::default())
    }

    fn read_at(path: &Path) -> Result<Option<Self>, HostConfigError> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(HostConfigError::Read { path: path.to_owned(), source }),
        };
        let content = |reason: String| HostConfigError::Content { path: path.to_owned(), reason };
        let mut config: Self = toml::from_str(&text).map_err(|e| {
            let line =
                e.span().and_then(|span| text.get(..span.start)).map_or(1, |t| t.matches('\n').count() + 1);
            content(format!("line {line}: {}", e.message().replace('\n', ", ")))
        })?;
        if config.store_dir.as_ref().is_some_and(|directory| !directory.is_absolute()) {
            return Err(content("store-dir: an absolute path is needed".to_owned()));
        }
        config.path = path.to_owned();
        Ok(Some(config))
    }

    /// The budget in bytes.
    pub fn budget_bytes(&self) -> u64 {
        self.budget.unwrap_or(Budget::Percent(DEFAULT_BUDGET)).bytes(Memory::usable(Path::new("/")))
    }
}

/// What all VMs together may cost: a size, or percent of the host's memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// In bytes.
    Bytes(u64),
    /// Percent of the host's memory, or of what this process's control groups may have.
    Percent(f64),
}

impl Budget {
    /// In bytes, on a host that has `total`.
    pub fn bytes(self, total: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Percent(percent) => (total as f64 * percent / 100.0) as u64,
        }
    }
}

impl FromStr for Budget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(percent) = text.trim().strip_suffix('%') {
            let percent: f64 =
                percent.trim().parse().map_err(|_| format!("{text:?} is no percentage such as 80%"))?;
            // More than all is a promise that nothing can keep.
            return match percent {
                1.0..=100.0 => Ok(Self::Percent(percent)),
                _ => Err(format!("{text}: from 1% to 100% are possible")),
            };
        }
        let bytes = size::parse(text, 64 << 20..=1 << 50);
        bytes.map(Self::Bytes).map_err(|e| format!("{text:?}: {e}; or a percentage such as 80%"))
    }
}

impl<'de> Deserialize<'de> for Budget {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// How many times as much may be promised as there is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Overcommit {
    /// Sizes of all VMs, in budgets.
    pub memory: Option<f64>,
    /// vCPUs of all VMs, in host CPUs.
    pub cpu: Option<f64>,
}

impl FromStr for Overcommit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut all = Self::default();
        for part in text.split(',') {
            let (key, value) =
                part.split_once('=').ok_or_else(|| format!("{part:?} is not memory=RATIO or cpu=RATIO"))?;
            let ratio = value.trim().parse::<f64>().ok().filter(|r| r.is_finite() && *r > 0.0);
            let ratio = ratio.ok_or_else(|| format!("{value:?} is no ratio such as 3 or 1.5"))?;
            match key.trim() {
                "memory" => all.memory = Some(ratio),
                "cpu" => all.cpu = Some(ratio),
                other => return Err(format!("there is no {other:?}: memory and cpu are possible")),
            }
        }
        Ok(all)
    }
}

impl fmt::Display for Overcommit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = |name: &str, ratio: Option<f64>| ratio.map(|ratio| format!("{name}={ratio}"));
        let both: Vec<String> =
            [of("memory", self.memory), of("cpu", self.cpu)].into_iter().flatten().collect();
        f.write_str(&both.join(","))
    }
}

fn from_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Overcommit>, D::Error> {
    String::deserialize(deserializer)?.parse().map(Some).map_err(de::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<HostConfig, String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("host.toml");
        std::fs::write(&path, text).unwrap();
        HostConfig::read_at(&path).map(|config| config.unwrap()).map_err(|e| e.to_string())
    }

    #[test]
    fn everything_can_be_said_or_nothing() {
        let config =
            read("budget = '80%'\nmax-overcommit = 'memory=3,cpu=8'\nstore-dir = '/var/lib/x'").unwrap();
        assert_eq!(config.budget, Some(Budget::Percent(80.0)));
        assert_eq!(config.max_overcommit, Some(Overcommit { memory: Some(3.0), cpu: Some(8.0) }));
        assert_eq!(config.max_overcommit.unwrap().to_string(), "memory=3,cpu=8");
        assert_eq!(config.store_dir, Some("/var/lib/x".into()));
        assert_eq!(read("budget = '1G'").unwrap().budget_bytes(), 1 << 30);
        assert_eq!(read("").unwrap().budget, None);
        assert_eq!(HostConfig::read_at(Path::new("/nonexistent/x")).unwrap(), None);
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        for (text, part) in [
            ("\nbudgets = '1G'", "line 2"),
            ("budget = '120%'", "from 1% to 100%"),
            ("budget = 'x'", "80%"),
            ("max-overcommit = 'disk=2'", "memory and cpu"),
            ("max-overcommit = 'cpu=0'", "no ratio"),
            ("store-dir = 'x'", "absolute"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}

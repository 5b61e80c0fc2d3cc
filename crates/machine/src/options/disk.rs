//! Disks.

use std::path::PathBuf;
use std::str::FromStr;

use berth_disk::{CacheMode, Format};
use serde::{Deserialize, Serialize};

use super::{OptionError, text};

/// Most bytes of a serial number (virtio 1.2, 5.2.6.1: VIRTIO_BLK_T_GET_ID).
const MAX_SERIAL: usize = 20;

/// A disk: `--disk path=FILE[,format=raw|qcow2][,ro][,cache=writeback|none|writethrough][,serial=S][,id=ID]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct DiskOptions {
    /// The image file or block device.
    pub path: PathBuf,
    /// What is in it; without it the file's name decides ([`Format::of_name`]).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// Whether the guest can only read it.
    pub ro: bool,
    /// How the host caches it.
    pub cache: CacheMode,
    /// Serial number that the guest sees, up to 20 printable ASCII characters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Name of the device, for commands to the running VM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
}

impl DiskOptions {
    /// Its id as disk number `index`, from 0.
    pub fn id_at(&self, index: usize) -> String {
        self.id.clone().unwrap_or_else(|| format!("disk{index}"))
    }

    pub(super) fn check(&self) -> Result<(), OptionError> {
        if self.path.as_os_str().is_empty() {
            return Err(OptionError("the key path is missing: which file is the disk?".to_owned()));
        }
        let printable = |s: &String| s.len() <= MAX_SERIAL && s.chars().all(|c| c.is_ascii_graphic());
        if let Some(serial) = self.serial.as_ref().filter(|s| !printable(s)) {
            return Err(OptionError(format!(
                "serial: {serial:?} is not possible: up to {MAX_SERIAL} printable ASCII characters without spaces"
            )));
        }
        super::net::check_id(self.id.as_deref())
    }
}

impl FromStr for DiskOptions {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let options: Self = text::parse(text, Some("path"))?;
        options.check()?;
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_keys() {
        let d: DiskOptions =
            "path=/a/b.img,format=qcow2,ro,cache=writethrough,serial=S1,id=root".parse().unwrap();
        let expected = DiskOptions {
            path: "/a/b.img".into(),
            format: Some(Format::Qcow2),
            ro: true,
            cache: CacheMode::Writethrough,
            serial: Some("S1".into()),
            id: Some("root".into()),
        };
        assert_eq!(d, expected);
        assert_eq!("x.img".parse::<DiskOptions>().unwrap().cache, CacheMode::Writeback);
    }

    #[test]
    fn mistakes_are_named() {
        for (text, part) in [
            ("", "path"),
            ("ro=yes", "path"),
            ("x,chace=none", "do you mean cache?"),
            ("x,cache=unsafe", "writeback, none, writethrough"),
            ("x,serial=123456789012345678901", "20"),
            ("x,serial=a b", "printable"),
            ("x,id=", "id"),
        ] {
            let error = text.parse::<DiskOptions>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}

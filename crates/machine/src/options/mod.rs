//! Options of devices: one type for the command line (`KEY=VALUE,…`) and for a VM file (a table with these keys).
//!
//! Each type is read by serde in both cases, so that both know the same keys and refuse the same mistakes. Call
//! [`DeviceOptions::check`] on what came from a file: what a single key cannot show is found there.

mod conflicts;
mod cpus;
mod disk;
mod memory;
mod net;
pub mod size;
mod text;

use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use cpus::{CpuLimit, CpuList, CpusOptions, check_weight};
pub use disk::DiskOptions;
pub use memory::{DEFAULT_PRIORITY, HugePages, MAX_PRIORITY, MemoryOptions};
pub use net::{Forward, MacAddress, NetBackend, NetOptions, Protocol};
pub use size::ByteSize;
pub use text::OptionError;

/// Smallest context identifier of a guest: 0 to 2 are the hypervisor, local and the host (virtio 1.2, 5.10.4).
pub const MIN_GUEST_CID: u32 = 3;
/// Longest path of a Unix socket in bytes (`sun_path` without the NUL), less a port number that is appended.
const MAX_SOCKET_PATH: usize = 107 - "_4294967295".len();

/// The devices that a VM has besides those that every VM has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct DeviceOptions {
    /// Disks, in the order of the guest's names: the first is `vda`.
    pub disk: Vec<DiskOptions>,
    /// Network interfaces.
    pub net: Vec<NetOptions>,
    /// Sockets between host and guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockOptions>,
    /// The memory balloon.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonOptions>,
    /// Whether the guest has a source of random numbers.
    pub rng: bool,
    /// What the user's terminal is connected to.
    pub console: ConsoleKind,
}

impl DeviceOptions {
    /// Refuses what makes no sense together.
    ///
    /// # Errors
    /// [`OptionError`] that names the option, or both of two that cannot be together.
    pub fn check(&self) -> Result<(), OptionError> {
        let named = |option: &str| {
            let option = option.to_owned();
            move |OptionError(e)| OptionError(format!("{option}: {e}"))
        };
        self.disk.iter().try_for_each(|d| d.check().map_err(named("disk")))?;
        self.net.iter().try_for_each(|n| n.check().map_err(named("net")))?;
        self.vsock.iter().try_for_each(|v| v.check().map_err(named("vsock")))?;
        conflicts::check(self)
    }
}

/// What the user's terminal is connected to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConsoleKind {
    /// The serial port, `ttyS0`.
    #[default]
    Serial,
    /// A virtio console, `hvc0`.
    Virtio,
}

impl FromStr for ConsoleKind {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        match text {
            "serial" => Ok(Self::Serial),
            "virtio" => Ok(Self::Virtio),
            _ => Err(OptionError("possible are serial and virtio".to_owned())),
        }
    }
}

/// Sockets between host and guest: `--vsock path=SOCKET[,cid=N]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct VsockOptions {
    /// The Unix socket at which host programs reach the guest's ports: they send `CONNECT PORT` and a newline.
    /// A guest that connects to port P of the host reaches the Unix socket at this path with `_P` appended.
    pub path: PathBuf,
    /// The guest's context identifier, [`MIN_GUEST_CID`] or more.
    #[serde(default = "default_cid")]
    pub cid: u32,
}

fn default_cid() -> u32 {
    MIN_GUEST_CID
}

impl VsockOptions {
    fn check(&self) -> Result<(), OptionError> {
        if self.cid < MIN_GUEST_CID || self.cid == u32::MAX {
            return Err(OptionError(format!(
                "cid: {} is not possible: a guest has {MIN_GUEST_CID} to {}",
                self.cid,
                u32::MAX - 1
            )));
        }
        let len = self.path.as_os_str().len();
        if len == 0 || len > MAX_SOCKET_PATH {
            return Err(OptionError(format!(
                "path: a Unix socket's path has 1 to {MAX_SOCKET_PATH} bytes here, this one {len}"
            )));
        }
        Ok(())
    }
}

impl FromStr for VsockOptions {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let options: Self = text::parse(text, Some("path"))?;
        options.check()?;
        Ok(options)
    }
}

/// The memory balloon: `--balloon [size=SIZE][,deflate-on-oom=on|off][,reporting=on|off][,hinting=on|off]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct BalloonOptions {
    /// Memory that the guest is asked to give back at the start.
    pub size: ByteSize,
    /// Whether the guest may take memory back from the balloon when it has none left.
    pub deflate_on_oom: bool,
    /// Whether the guest reports free pages by itself, so that the host gets them back.
    pub reporting: bool,
    /// Whether the guest names its free pages when it is asked to.
    pub hinting: bool,
}

impl Default for BalloonOptions {
    fn default() -> Self {
        Self { size: ByteSize(0), deflate_on_oom: true, reporting: true, hinting: true }
    }
}

impl FromStr for BalloonOptions {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        text::parse(text, Some("size"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vsock_takes_a_path_and_a_cid() {
        let v: VsockOptions = "/run/v.sock,cid=7".parse().unwrap();
        assert_eq!((v.path, v.cid), (PathBuf::from("/run/v.sock"), 7));
        assert_eq!("path=v".parse::<VsockOptions>().unwrap().cid, 3);
        for bad in ["", "v,cid=2", "v,cid=4294967295", "cid=4", "v,port=1", &"x".repeat(98)] {
            assert!(bad.parse::<VsockOptions>().is_err(), "{bad}");
        }
    }

    #[test]
    fn balloon_sizes_have_units() {
        let b: BalloonOptions = "size=128M,deflate-on-oom=off".parse().unwrap();
        assert_eq!(b.size, ByteSize(128 << 20));
        assert!(!b.deflate_on_oom && b.reporting);
        assert_eq!("".parse(), Ok(BalloonOptions::default()));
    }
}

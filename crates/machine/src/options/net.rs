//! Network interfaces.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{OptionError, text};

/// Longest name of a network interface in bytes (`IFNAMSIZ` without the NUL).
const MAX_INTERFACE: usize = 15;
/// Longest id of a device.
const MAX_ID: usize = 63;

/// A network interface: `--net user[,forward=tcp:8080:80]…`, `--net tap=NAME`, `--net bridge=NAME`, each with
/// `[,mac=ADDRESS][,id=ID]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct NetOptions {
    /// Through passt: the guest reaches what this user's programs reach, without privilege.
    pub user: bool,
    /// Through the existing tap device of this name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// Through a tap device that is made and attached to the existing bridge of this name; needs CAP_NET_ADMIN.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bridge: Option<String>,
    /// Through a program that already listens on this Unix socket with passt's protocol.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// With `user`: ports of the host that lead to ports of the guest.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub forward: Vec<Forward>,
    /// The guest's address; without it one that follows from the VM's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddress>,
    /// Name of the device, for commands to the running VM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
}

/// What a network interface is connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NetBackend<'a> {
    /// passt, with these ports forwarded.
    User(&'a [Forward]),
    /// An existing tap device.
    Tap(&'a str),
    /// A tap device of our own on this bridge.
    Bridge(&'a str),
    /// A listening Unix socket.
    Socket(&'a std::path::Path),
}

impl NetOptions {
    /// Its id as interface number `index`, from 0.
    pub fn id_at(&self, index: usize) -> String {
        self.id.clone().unwrap_or_else(|| format!("net{index}"))
    }

    /// What the interface is connected to.
    ///
    /// # Errors
    /// [`OptionError`] unless exactly one of `user`, `tap`, `bridge` and `socket` is given.
    pub fn backend(&self) -> Result<NetBackend<'_>, OptionError> {
        match (self.user, &self.tap, &self.bridge, &self.socket) {
            (true, None, None, None) => Ok(NetBackend::User(&self.forward)),
            (false, Some(name), None, None) => Ok(NetBackend::Tap(name)),
            (false, None, Some(name), None) => Ok(NetBackend::Bridge(name)),
            (false, None, None, Some(path)) => Ok(NetBackend::Socket(path)),
            (user, tap, bridge, socket) => {
                let keys = [
                    ("user", user),
                    ("tap", tap.is_some()),
                    ("bridge", bridge.is_some()),
                    ("socket", socket.is_some()),
                ];
                let given: Vec<&str> = keys.iter().filter(|(_, given)| *given).map(|(key, _)| *key).collect();
                Err(OptionError(if given.is_empty() {
                    "say what it is connected to: one of user, tap=NAME, bridge=NAME and socket=PATH"
                        .to_owned()
                } else {
                    format!(
                        "{} cannot be together: an interface is connected to one thing",
                        given.join(" and ")
                    )
                }))
            }
        }
    }

    pub(super) fn check(&self) -> Result<(), OptionError> {
        match self.backend()? {
            NetBackend::Tap(name) | NetBackend::Bridge(name) => {
                let good = |c: char| c.is_ascii_graphic() && c != '/' && c != ':';
                if name.is_empty()
                    || name.len() > MAX_INTERFACE
                    || name.starts_with('.')
                    || !name.chars().all(good)
                {
                    return Err(OptionError(format!(
                        "{name:?} is no name of a network interface: 1 to {MAX_INTERFACE} characters without '/', ':' and spaces"
                    )));
                }
            }
            NetBackend::User(_) | NetBackend::Socket(_) => {}
        }
        if !self.user && !self.forward.is_empty() {
            return Err(OptionError(
                "forward: only user networking forwards ports; other interfaces have addresses of their own"
                    .to_owned(),
            ));
        }
        check_id(self.id.as_deref())
    }
}

/// Ids go into names of files and threads.
pub(super) fn check_id(id: Option<&str>) -> Result<(), OptionError> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    match id {
        Some(id) if id.is_empty() || id.len() > MAX_ID || !id.chars().all(good) => Err(OptionError(format!(
            "id: {id:?} is not possible: 1 to {MAX_ID} letters, digits, '-', '_' and '.'"
        ))),
        _ => Ok(()),
    }
}

impl FromStr for NetOptions {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let options: Self = text::parse(text, None)?;
        options.check()?;
        Ok(options)
    }
}

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A port of the host that leads to one of the guest: `tcp:8080:80` or `udp:127.0.0.1:5353:53`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Forward {
    /// The protocol.
    pub protocol: Protocol,
    /// The host's address to listen at; all without one.
    pub address: Option<IpAddr>,
    /// Port on the host.
    pub host_port: u16,
    /// Port in the guest.
    pub guest_port: u16,
}

impl FromStr for Forward {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let bad = || {
            OptionError(format!(
                "{text:?} is not possible: write tcp:HOSTPORT:GUESTPORT or tcp:ADDRESS:HOSTPORT:GUESTPORT, or the same with udp"
            ))
        };
        let (protocol, rest) = text.split_once(':').ok_or_else(bad)?;
        let protocol = match protocol {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            _ => return Err(bad()),
        };
        let (rest, guest) = rest.rsplit_once(':').ok_or_else(bad)?;
        let (address, host) = match rest.rsplit_once(':') {
            Some((address, host)) => {
                let address = address.trim_start_matches('[').trim_end_matches(']');
                (Some(address.parse().map_err(|_| bad())?), host)
            }
            None => (None, rest),
        };
        let port = |text: &str| text.parse::<u16>().ok().filter(|&p| p != 0).ok_or_else(bad);
        Ok(Self { protocol, address, host_port: port(host)?, guest_port: port(guest)? })
    }
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.protocol {
            Protocol::Tcp => "tcp:",
            Protocol::Udp => "udp:",
        })?;
        match self.address {
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:")?,
            Some(IpAddr::V4(address)) => write!(f, "{address}:")?,
            None => {}
        }
        write!(f, "{}:{}", self.host_port, self.guest_port)
    }
}

/// A station's Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// The address of interface `index` of the VM `name`: always the same, locally administered (IEEE 802,
    /// 8.4), and by all likelihood no other VM's.
    pub fn of_vm(name: &str, index: usize) -> Self {
        // FNV-1a: the same on every host and in every version, which the standard library's hasher is not.
        let bytes = name.bytes().chain([0]).chain((index as u64).to_le_bytes());
        let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        let [a, b, c, d, e, f, ..] = (hash ^ hash >> 48).to_le_bytes();
        Self([a & 0xfc | 0x02, b, c, d, e, f])
    }
}

impl FromStr for MacAddress {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let bad = || {
            OptionError(format!(
                "{text:?} is no Ethernet address of a station: six pairs of hexadecimal digits such as 52:54:00:12:34:56, the first even"
            ))
        };
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()));
            *byte = u8::from_str_radix(part.ok_or_else(bad)?, 16).map_err(|_| bad())?;
        }
        // The lowest bit of the first byte marks groups.
        if parts.next().is_some() || bytes[0] & 1 != 0 || bytes == [0; 6] {
            Err(bad())
        } else {
            Ok(Self(bytes))
        }
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

macro_rules! as_text {
    ($($name:ident)*) => {$(
        impl TryFrom<String> for $name {
            type Error = OptionError;
            fn try_from(text: String) -> Result<Self, OptionError> {
                text.parse()
            }
        }
        impl From<$name> for String {
            fn from(value: $name) -> String {
                value.to_string()
            }
        }
    )*};
}
as_text!(Forward MacAddress);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_interfaces() {
        let n: NetOptions = "user,forward=tcp:8080:80,forward=udp:127.0.0.1:53:5353".parse().unwrap();
        assert_eq!(n.backend(), Ok(NetBackend::User(&n.forward)));
        assert_eq!(n.forward.len(), 2);
        let n: NetOptions = "tap=tap0,mac=52:54:00:12:34:56".parse().unwrap();
        assert_eq!(n.backend(), Ok(NetBackend::Tap("tap0")));
        assert_eq!(n.mac.unwrap().to_string(), "52:54:00:12:34:56");
        assert_eq!("bridge=br0".parse::<NetOptions>().unwrap().backend(), Ok(NetBackend::Bridge("br0")));
    }

    #[test]
    fn mistakes_are_named() {
        for (text, part) in [
            ("", "one of user"),
            ("user,tap=x", "user and tap cannot be together"),
            ("usr", "do you mean user?"),
            ("tap=much-too-long-name", "15"),
            ("tap=a/b", "name"),
            ("tap=t,forward=tcp:1:2", "forward"),
            ("user,forward=tcp:80", "tcp:HOSTPORT"),
            ("user,forward=tcp:0:80", "tcp:HOSTPORT"),
            ("user,forward=tcp:nowhere:1:80", "tcp:HOSTPORT"),
            ("user,mac=01:00:00:00:00:00", "first even"),
            ("user,mac=0:0:0:0:0:1", "pairs"),
        ] {
            let error = text.parse::<NetOptions>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn forwards_and_addresses_are_shown_as_they_are_read() {
        for text in ["tcp:8080:80", "udp:10.0.0.1:1:2", "tcp:[::1]:65535:1"] {
            assert_eq!(text.parse::<Forward>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn addresses_follow_from_the_name() {
        let a = MacAddress::of_vm("web", 0);
        assert_eq!(a, MacAddress::of_vm("web", 0));
        assert_ne!(a, MacAddress::of_vm("web", 1));
        assert_ne!(a, MacAddress::of_vm("db", 0));
        assert_eq!(a.0[0] & 3, 2);
        assert_eq!(a.to_string().parse(), Ok(a));
    }
}

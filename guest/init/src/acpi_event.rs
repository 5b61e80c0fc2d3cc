//! ACPI events, among them the power button, from the kernel's generic netlink family `acpi_event`
//! (`drivers/acpi/event.c`). Unlike the input device it needs no module but the button's own driver.

use std::io::{Error, ErrorKind};
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Length of a netlink message's header (`struct nlmsghdr`).
const NETLINK_HEADER: usize = 16;
/// Length of a generic netlink header (`struct genlmsghdr`).
const GENERIC_HEADER: usize = 4;
/// Attribute of a family description: its multicast groups (`CTRL_ATTR_MCAST_GROUPS` of linux/genetlink.h).
const ATTR_GROUPS: u16 = 7;
/// Attribute of a group: its name (`CTRL_ATTR_MCAST_GRP_NAME`).
const ATTR_GROUP_NAME: u16 = 1;
/// Attribute of a group: its number (`CTRL_ATTR_MCAST_GRP_ID`).
const ATTR_GROUP_ID: u16 = 2;

/// A subscription to the kernel's ACPI events.
pub struct AcpiEvents(OwnedFd);

impl AsRawFd for AcpiEvents {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AcpiEvents {
    /// Subscribes.
    ///
    /// # Errors
    /// What the kernel says; [`ErrorKind::Unsupported`] when it has no such events.
    pub fn open() -> std::io::Result<Self> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: it takes numbers.
        let fd = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_GENERIC) };
        if fd < 0 {
            return Err(Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        let this = Self(unsafe { OwnedFd::from_raw_fd(fd) });
        let group = this.find_group()?;
        // SAFETY: the option reads a 32-bit integer, which lives through the call.
        let result = unsafe {
            libc::setsockopt(
                fd,
                libc::SOL_NETLINK,
                libc::NETLINK_ADD_MEMBERSHIP,
                (&raw const group).cast(),
                size_of::<u32>() as libc::socklen_t,
            )
        };
        if result != 0 { Err(Error::last_os_error()) } else { Ok(this) }
    }

    /// Asks the generic netlink controller for the number of the multicast group.
    fn find_group(&self) -> std::io::Result<u32> {
        let request = family_request("acpi_event");
        // SAFETY: pointer and length are those of one live buffer. The kernel answers before send returns.
        if unsafe { libc::send(self.as_raw_fd(), request.as_ptr().cast(), request.len(), 0) } < 0 {
            return Err(Error::last_os_error());
        }
        let mut buffer = [0; 4096];
        let answer = self.receive(&mut buffer)?;
        multicast_group(answer)
            .ok_or_else(|| Error::new(ErrorKind::Unsupported, "the kernel reports no ACPI events"))
    }

    fn receive<'a>(&self, buffer: &'a mut [u8]) -> std::io::Result<&'a [u8]> {
        // SAFETY: pointer and length are those of one live buffer.
        let n = unsafe { libc::recv(self.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        let n = usize::try_from(n).map_err(|_| Error::last_os_error())?;
        Ok(buffer.get(..n).unwrap_or_default())
    }

    /// Takes all events that came; whether one was the power button.
    pub fn power_button_pressed(&self) -> bool {
        let mut pressed = false;
        let mut buffer = [0; 4096];
        while let Ok(message) = self.receive(&mut buffer) {
            pressed |= is_power_button(message);
        }
        pressed
    }
}

/// The request `CTRL_CMD_GETFAMILY` for a family by name.
fn family_request(family: &str) -> Vec<u8> {
    const GENL_ID_CTRL: u16 = 0x10;
    const NLM_F_REQUEST: u16 = 1;
    const CTRL_CMD_GETFAMILY: u8 = 3;
    const CTRL_ATTR_FAMILY_NAME: u16 = 2;

    let attribute = 4 + family.len() + 1;
    let padded = attribute.next_multiple_of(4);
    let mut m = Vec::new();
    m.extend(((NETLINK_HEADER + GENERIC_HEADER + padded) as u32).to_ne_bytes());
    m.extend(GENL_ID_CTRL.to_ne_bytes());
    m.extend(NLM_F_REQUEST.to_ne_bytes());
    m.extend([0; 8]); // sequence number and port: none
    m.extend([CTRL_CMD_GETFAMILY, 1, 0, 0]);
    m.extend((attribute as u16).to_ne_bytes());
    m.extend(CTRL_ATTR_FAMILY_NAME.to_ne_bytes());
    m.extend(family.as_bytes());
    m.resize(NETLINK_HEADER + GENERIC_HEADER + padded, 0);
    m
}

/// The number of the group `acpi_mc_group` in the controller's answer.
fn multicast_group(answer: &[u8]) -> Option<u32> {
    let body = answer.get(NETLINK_HEADER + GENERIC_HEADER..)?;
    let (_, groups) = attributes(body).find(|(kind, _)| *kind == ATTR_GROUPS)?;
    attributes(groups).find_map(|(_, group)| {
        let part = |wanted| attributes(group).find(|(kind, _)| *kind == wanted).map(|(_, data)| data);
        part(ATTR_GROUP_NAME)?.starts_with(b"acpi_mc_group\0").then_some(())?;
        Some(u32::from_ne_bytes(part(ATTR_GROUP_ID)?.try_into().ok()?))
    })
}

/// Whether a message is an event of the power button. Its only attribute is a `struct acpi_genl_event`, which
/// begins with the device class, a string.
fn is_power_button(message: &[u8]) -> bool {
    message
        .get(NETLINK_HEADER + GENERIC_HEADER..)
        .is_some_and(|body| attributes(body).any(|(_, data)| data.starts_with(b"button/power\0")))
}

/// The attributes (`struct nlattr`: length, kind, data, padding to 4) in `data`, up to the first bad one.
fn attributes(mut data: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(u16::from_ne_bytes([*data.first()?, *data.get(1)?]));
        let kind = u16::from_ne_bytes([*data.get(2)?, *data.get(3)?]) & 0x3fff;
        let content = data.get(4..len)?;
        data = data.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, content))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, data: &[u8]) -> Vec<u8> {
        let mut a = ((4 + data.len()) as u16).to_ne_bytes().to_vec();
        a.extend(kind.to_ne_bytes());
        a.extend(data);
        a.resize(a.len().next_multiple_of(4), 0);
        a
    }

    fn message(body: &[u8]) -> Vec<u8> {
        [&[0; NETLINK_HEADER + GENERIC_HEADER], body].concat()
    }

    #[test]
    fn finds_the_group_among_the_attributes() {
        let group =
            [attribute(ATTR_GROUP_ID, &7u32.to_ne_bytes()), attribute(ATTR_GROUP_NAME, b"acpi_mc_group\0")];
        let groups = attribute(ATTR_GROUPS, &attribute(1, &group.concat()));
        let answer = message(&[attribute(2, b"acpi_event\0"), groups].concat());
        assert_eq!(multicast_group(&answer), Some(7));
        for cut in 0..answer.len() - 1 {
            assert_eq!(multicast_group(&answer[..cut]), None, "cut at {cut}");
        }
    }

    #[test]
    fn knows_the_power_button_from_other_events() {
        assert!(is_power_button(&message(&attribute(1, b"button/power\0\0\0\0\0\0\0\0LNXPWRBN:00\0"))));
        assert!(!is_power_button(&message(&attribute(1, b"button/sleep\0\0\0\0\0\0\0\0"))));
        assert!(!is_power_button(b""));
    }

    #[test]
    fn the_running_kernel_understands_the_request() {
        match AcpiEvents::open() {
            Ok(events) => assert!(!events.power_button_pressed()),
            // A kernel without the family, or a sandbox without netlink: but never "invalid argument".
            Err(e) => assert_ne!(e.raw_os_error(), Some(libc::EINVAL), "{e}"),
        }
    }
}

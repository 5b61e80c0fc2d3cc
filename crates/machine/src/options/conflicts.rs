//! Devices of one VM that cannot be together. Each message names both.

use super::{DeviceOptions, Forward, NetBackend, OptionError};

/// Refuses the first two devices that cannot be together.
pub(super) fn check(options: &DeviceOptions) -> Result<(), OptionError> {
    ids(options)?;
    files(options)?;
    interfaces(options)?;
    forwards(options)
}

/// All pairs of different elements, each once.
fn pairs<T>(all: &[T]) -> impl Iterator<Item = (&T, &T)> {
    all.iter().enumerate().flat_map(|(i, a)| all[i + 1..].iter().map(move |b| (a, b)))
}

fn ids(options: &DeviceOptions) -> Result<(), OptionError> {
    let mut ids: Vec<String> = options.disk.iter().enumerate().map(|(i, d)| d.id_at(i)).collect();
    ids.extend(options.net.iter().enumerate().map(|(i, n)| n.id_at(i)));
    match pairs(&ids).find(|(a, b)| a == b) {
        Some((id, _)) => Err(OptionError(format!("two devices have the id {id:?}"))),
        None => Ok(()),
    }
}

/// A file by two names is found by its lock, later.
fn files(options: &DeviceOptions) -> Result<(), OptionError> {
    let disks: Vec<_> = options.disk.iter().enumerate().collect();
    match pairs(&disks).find(|((_, a), (_, b))| a.path == b.path && !(a.ro && b.ro)) {
        Some(((i, a), (k, b))) => Err(OptionError(format!(
            "the disks {} and {} are both {}: only disks that are read-only (ro) can have the same image",
            a.id_at(*i),
            b.id_at(*k),
            a.path.display()
        ))),
        None => Ok(()),
    }
}

fn interfaces(options: &DeviceOptions) -> Result<(), OptionError> {
    let nets: Vec<_> = options.net.iter().enumerate().collect();
    for ((i, a), (k, b)) in pairs(&nets) {
        let both = format!("the network interfaces {} and {} have both", a.id_at(*i), b.id_at(*k));
        if let (NetBackend::Tap(one), NetBackend::Tap(other)) = (a.backend()?, b.backend()?)
            && one == other
        {
            return Err(OptionError(format!("{both} tap={one}: a tap device has one user")));
        }
        if let Some(mac) = a.mac.filter(|mac| Some(*mac) == b.mac) {
            return Err(OptionError(format!("{both} mac={mac}: no two stations can have one address")));
        }
    }
    Ok(())
}

fn forwards(options: &DeviceOptions) -> Result<(), OptionError> {
    let all: Vec<&Forward> = options.net.iter().flat_map(|net| &net.forward).collect();
    // Without an address it is all of them.
    let overlap = |a: &Forward, b: &Forward| {
        let addresses = a.address.is_none() || b.address.is_none() || a.address == b.address;
        (a.protocol, a.host_port) == (b.protocol, b.host_port) && addresses
    };
    match pairs(&all).find(|(a, b)| overlap(a, b)) {
        Some((a, b)) => {
            Err(OptionError(format!("forward={a} and forward={b} listen at the same port of the host")))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The complaint about these disks and network interfaces; empty if there is none.
    fn complaint(disks: &[&str], nets: &[&str]) -> String {
        let disk = disks.iter().map(|d| d.parse().unwrap()).collect();
        let net = nets.iter().map(|n| n.parse().unwrap()).collect();
        let options = DeviceOptions { disk, net, ..DeviceOptions::default() };
        options.check().err().map_or(String::new(), |e| e.to_string())
    }

    #[test]
    fn ids_are_unique() {
        assert!(complaint(&["a.img,id=x"], &["user,id=x"]).contains("\"x\""));
        // The second has the id disk1 by its place.
        assert!(complaint(&["a.img,id=disk1", "b.img"], &[]).contains("\"disk1\""));
        assert_eq!(complaint(&["a.img", "b.img"], &["user", "user"]), "");
    }

    #[test]
    fn an_image_is_written_by_one_disk() {
        let said = complaint(&["a.img", "b.img", "a.img,ro,id=copy"], &[]);
        assert!(said.contains("disk0 and copy") && said.contains("a.img"), "{said}");
        assert_eq!(complaint(&["a.img,ro", "a.img,ro"], &[]), "");
    }

    #[test]
    fn tap_devices_and_addresses_are_used_once() {
        let said = complaint(&[], &["tap=t0", "user", "tap=t0,id=second"]);
        assert!(said.contains("net0 and second") && said.contains("tap=t0"), "{said}");
        assert_eq!(complaint(&[], &["tap=t0", "tap=t1", "bridge=b", "bridge=b"]), "");
        let said = complaint(&[], &["user,mac=52:54:00:00:00:01", "tap=t,mac=52:54:00:00:00:01"]);
        assert!(said.contains("net0 and net1") && said.contains("52:54:00:00:00:01"), "{said}");
        assert_eq!(complaint(&[], &["user,mac=52:54:00:00:00:01", "user,mac=52:54:00:00:00:02"]), "");
    }

    #[test]
    fn ports_of_the_host_lead_to_one_place() {
        let said = complaint(&[], &["user,forward=tcp:80:1", "user,forward=tcp:127.0.0.1:80:2"]);
        assert!(said.contains("tcp:80:1") && said.contains("tcp:127.0.0.1:80:2"), "{said}");
        assert!(!complaint(&[], &["user,forward=udp:80:1,forward=udp:80:1"]).is_empty());
        let different = "user,forward=tcp:80:1,forward=udp:80:1,forward=tcp:81:1";
        assert_eq!(complaint(&[], &[different]), "");
        let addresses = "user,forward=tcp:127.0.0.1:80:1,forward=tcp:127.0.0.2:80:1";
        assert_eq!(complaint(&[], &[addresses]), "");
    }
}

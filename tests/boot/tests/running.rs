//! Devices that change while their guest runs, a host's disk that is full, and devices that nobody uses.

use std::collections::BTreeMap;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;
use std::{fs, io, thread};

use berth_disk::{CreateOptions, Format};
use berth_machine::options::{BalloonOptions, ConsoleKind, DeviceOptions, DiskOptions};
use berth_machine::{NetCounters, Notice};
use berth_tests_boot::{InProcess, Setup, SmallDisk, kills, set_up_or_skip};

/// Generous: the tests may share a small machine with others.
const LIMIT: Duration = Duration::from_secs(200);
const MIB: u64 = 1 << 20;

/// `None`: the host cannot do this test, and was told so.
fn setup() -> Option<Setup> {
    set_up_or_skip(env!("CARGO_TARGET_TMPDIR"), &[])
}

#[test]
fn a_disk_grows_while_the_guest_uses_it() {
    let Some(setup) = setup() else { return };
    let directory = tempfile::tempdir().unwrap();
    for name in ["disk.img", "disk.qcow2"] {
        let path = directory.path().join(name);
        let created = std::process::Command::new(&setup.berth)
            .args(["disk", "create", path.to_str().unwrap(), "4M"])
            .status();
        assert!(created.unwrap().success());
        let disk: DiskOptions = format!("{},id=data", path.display()).parse().unwrap();
        let devices = DeviceOptions { disk: vec![disk], ..DeviceOptions::default() };
        let mut guest = InProcess::start(&setup, 256 * MIB, devices, LIMIT).unwrap();
        assert_eq!(guest.run("cat /sys/block/vda/size"), "8192");
        // Somebody writes all the time.
        guest.run(
            "(while :; do dd if=/dev/urandom of=/dev/vda bs=64k count=16 conv=fsync 2>/dev/null; done) &",
        );
        guest.control().resize_disk("data", 16 * MIB).unwrap();
        guest.run("until [ $(cat /sys/block/vda/size) = 32768 ]; do sleep 0.1; done");
        guest.run("yes grown | dd of=/dev/vda bs=1M seek=15 count=1 iflag=fullblock conv=fsync 2>/dev/null");
        assert_eq!(guest.run("dd if=/dev/vda bs=1M skip=15 2>/dev/null | wc -c"), MIB.to_string());
        assert!(guest.run("dd if=/dev/vda bs=1M skip=15 2>/dev/null | head -n 1").ends_with("grown"));
        let error = guest.control().resize_disk("other", 32 * MIB).unwrap_err().to_string();
        assert!(error.contains("data"), "{error}");
        assert!(guest.control().resize_disk("data", MIB).is_err(), "a disk does not shrink under its guest");
        let [(id, counters)] = &guest.control().disk_counters()[..] else { panic!("one disk") };
        assert_eq!((id.as_str(), counters.errors), ("data", 0));
        assert!(counters.written_bytes > MIB && counters.flushes > 0, "{counters:?}");
    }
}

/// The guest's free memory in bytes, as it says itself.
fn free(guest: &mut InProcess) -> u64 {
    let kib: u64 = guest.run("awk '/^MemFree/ { print $2 }' /proc/meminfo").parse().unwrap();
    kib << 10
}

#[test]
fn a_balloon_takes_and_gives_memory_and_lets_go_when_the_guest_has_none() {
    let Some(setup) = setup() else { return };
    // Reports of free pages would be in the way: they have a test of their own.
    let options = BalloonOptions { reporting: false, ..BalloonOptions::default() };
    let devices = DeviceOptions { balloon: Some(options), ..DeviceOptions::default() };
    let mut guest = InProcess::start(&setup, 512 * MIB, devices, LIMIT).unwrap();
    let actual = |guest: &InProcess| guest.control().balloon().unwrap().status().actual;

    // In and out again.
    let before = free(&mut guest);
    guest.control().balloon().unwrap().set_target(128 * MIB);
    guest.wait_until("128 MiB", |c| c.balloon().unwrap().status().actual == 128 * MIB);
    let inside = free(&mut guest);
    assert!(inside + 100 * MIB < before, "{before} bytes were free, then {inside}");
    guest.control().balloon().unwrap().set_target(0);
    guest.wait_until("0 MiB", |c| c.balloon().unwrap().status().actual == 0);

    // The guest's own account.
    assert!(guest.control().balloon().unwrap().request_statistics());
    let total = |c: &berth_machine::MachineControl| c.balloon()?.status().statistics?.total;
    guest.wait_until("statistics", |c| total(c).is_some());
    let own: u64 = guest.run("awk '/^MemTotal/ { print $2 }' /proc/meminfo").parse().unwrap();
    assert_eq!(total(guest.control()), Some(own << 10));

    // More is asked for than the guest can spare: it gives what it has, and what it needs stays whole.
    guest.run("dd if=/dev/urandom of=/dev/shm/kept bs=1M count=150 2>/dev/null");
    let sum = guest.run("sha256sum /dev/shm/kept");
    guest.control().balloon().unwrap().set_target(480 * MIB);
    guest.wait_until("most of it", |c| c.balloon().unwrap().status().actual > 150 * MIB);
    assert_eq!(guest.run("sha256sum /dev/shm/kept"), sum);

    // It needs more than is left: the balloon lets go, and nobody is killed.
    guest.run("echo 3 > /proc/sys/vm/drop_caches");
    guest.run("mount -o remount,size=100% /dev/shm");
    guest.run("dd if=/dev/zero of=/dev/shm/more bs=1M count=150 2>/dev/null");
    assert!(actual(&guest) < 300 * MIB, "{} bytes are still in the balloon", actual(&guest));
    assert_eq!(guest.run("sha256sum /dev/shm/kept"), sum);
    assert_eq!(guest.run("dmesg | grep -c 'Out of memory: Killed' || true"), "0");
}

#[test]
fn free_pages_are_reported_and_named_when_they_are_asked_for() {
    let Some(setup) = setup() else { return };
    let devices = DeviceOptions { balloon: Some(BalloonOptions::default()), ..DeviceOptions::default() };
    let mut guest = InProcess::start(&setup, 512 * MIB, devices, LIMIT).unwrap();
    guest.run("dd if=/dev/zero of=/dev/shm/x bs=1M count=200 2>/dev/null");
    let before = guest.control().balloon().unwrap().status().reported;
    guest.run("rm /dev/shm/x");
    // The guest waits a while, and leaves out pages between others.
    guest.wait_until("reports", |c| c.balloon().unwrap().status().reported > before + 150 * MIB);

    assert!(guest.control().balloon().unwrap().start_hinting());
    guest.wait_until("hints", |c| {
        let status = c.balloon().unwrap().status();
        !status.hinting && status.hinted > 100 * MIB
    });
    // What was named and given back can be used again.
    let sum = guest.run("dd if=/dev/urandom bs=1M count=200 2>/dev/null | tee /dev/shm/y | sha256sum");
    assert_eq!(guest.run("sha256sum < /dev/shm/y"), sum);
}

#[test]
fn a_full_disk_of_the_host_is_an_error_in_the_guest_and_nothing_else_is_lost() {
    let Some(setup) = setup() else { return };
    for name in ["disk.img", "disk.qcow2"] {
        let host = match SmallDisk::mount(4 * MIB) {
            Ok(host) => host,
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                println!("skipped: a small file system needs root");
                return;
            }
            Err(e) => panic!("{e}"),
        };
        let path = host.path().join(name);
        let format = Format::of_name(&path);
        let options = CreateOptions { path: path.clone(), format, size: Some(16 * MIB), backing: None };
        berth_disk::create(&options).unwrap();
        let disk: DiskOptions = format!("{},id=data", path.display()).parse().unwrap();
        let devices = DeviceOptions { disk: vec![disk], ..DeviceOptions::default() };
        let mut guest = InProcess::start(&setup, 256 * MIB, devices, LIMIT).unwrap();
        let write = |what: &str, at: u64, mib: u64| {
            format!("yes {what} | dd of=/dev/vda bs=1M seek={at} count={mib} iflag=fullblock conv=fsync 2>&1")
        };
        // The kernel's complaints would be among what the console shows.
        guest.run("dmesg -n 1");
        guest.run(&write("first", 0, 2));

        // What does not fit is an error, and the guest knows.
        let said = guest.run(&format!("! {}", write("more", 2, 10)));
        assert!(said.contains("Input/output error"), "{said}");
        let errors: Vec<String> = guest
            .control()
            .notices()
            .after(0)
            .into_iter()
            .filter_map(|r| match r.notice {
                Notice::IoError { device, message } => Some(format!("{device}: {message}")),
                _ => None,
            })
            .collect();
        let [(_, counters)] = &guest.control().disk_counters()[..] else { panic!("one disk") };
        assert!(!errors.is_empty() && errors.len() as u64 == counters.errors, "{errors:?}, {counters:?}");
        assert!(
            errors.iter().all(|e| e.starts_with("data: write of ") && e.contains("No space left on device")),
            "{errors:?}"
        );

        // What was there is there, and what is written where it was too.
        let lines = |guest: &mut InProcess, at: u64, mib: u64, what: &str| {
            guest.run("echo 3 > /proc/sys/vm/drop_caches");
            let read = format!("dd if=/dev/vda bs=1M skip={at} count={mib} 2>/dev/null");
            guest.run(&format!("{read} | cmp - /tmp/{what}"));
        };
        for (what, mib) in [("first", 2), ("again", 1), ("more", 10)] {
            guest.run(&format!(
                "yes {what} | dd of=/tmp/{what} bs=1M count={mib} iflag=fullblock 2>/dev/null"
            ));
        }
        lines(&mut guest, 0, 2, "first");
        guest.run(&write("again", 1, 1));
        lines(&mut guest, 1, 1, "again");

        // The host has room again: all goes on.
        host.resize(32 * MIB).unwrap();
        guest.run(&write("more", 2, 10));
        lines(&mut guest, 2, 10, "more");
        lines(&mut guest, 1, 1, "again");
        drop(guest);
        check_qcow2_of(&path, format);
    }
}

/// As `qemu-img check` sees it, where there is one.
fn check_qcow2_of(path: &Path, format: Format) {
    if format == Format::Qcow2 {
        kills::check_qcow2(path.to_str().unwrap()).unwrap();
    }
}

/// How often each thread of a device has gone to sleep or was interrupted, by the thread's name.
fn turns() -> BTreeMap<String, u64> {
    let mut turns = BTreeMap::new();
    for task in fs::read_dir("/proc/self/task").unwrap() {
        let path = task.unwrap().path();
        // One that has just ended is of no device.
        let Ok(status) = fs::read_to_string(path.join("status")) else { continue };
        let value = |key: &str| status.lines().find_map(|l| l.strip_prefix(key)).map(str::trim);
        let name = value("Name:").unwrap().to_owned();
        let Some((_, role)) = name.split_once('/') else { continue };
        if ["disk", "net", "vsock", "hvc0", "balloon", "rng"].iter().any(|device| role.starts_with(device)) {
            let switches = |key| value(key).unwrap().parse::<u64>().unwrap();
            let sum = switches("voluntary_ctxt_switches:") + switches("nonvoluntary_ctxt_switches:");
            *turns.entry(name).or_default() += sum;
        }
    }
    turns
}

#[test]
fn threads_of_idle_devices_sleep() {
    let Some(setup) = setup() else { return };
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let mut devices =
        DeviceOptions { rng: true, balloon: Some(BalloonOptions::default()), ..DeviceOptions::default() };
    for name in ["a.img", "b.qcow2"] {
        let (path, format) = (path(name), Format::of_name(&path(name)));
        let options = CreateOptions { path: path.clone(), format, size: Some(4 * MIB), backing: None };
        berth_disk::create(&options).unwrap();
        devices.disk.push(path.to_str().unwrap().parse().unwrap());
    }
    devices.vsock = Some(path("v").to_str().unwrap().parse().unwrap());
    devices.console = ConsoleKind::Virtio;
    // A network whose other end says nothing.
    let listener = UnixListener::bind(path("net")).unwrap();
    devices.net.push(format!("socket={}", path("net").display()).parse().unwrap());
    let mut guest = InProcess::start(&setup, 256 * MIB, devices, LIMIT).unwrap();
    let (_peer, _) = listener.accept().unwrap();
    // All have had something to do.
    guest.run(
        "for d in vda vdb; do dd if=/dev/urandom of=/dev/$d bs=64k count=4 conv=fsync 2>/dev/null; done",
    );
    // IPv6 asks for routers again and again.
    guest.run("for f in /proc/sys/net/ipv6/conf/*/disable_ipv6; do ! [ -e $f ] || echo 1 > $f; done");
    guest.run("ip link set eth0 up; ip addr add 10.0.0.2/24 dev eth0; ! ping -c 1 -W 1 10.0.0.1 > /dev/null");
    assert_eq!(guest.run("dd if=/dev/hwrng bs=64 count=1 2>/dev/null | wc -c"), "64");
    let [(_, NetCounters { sent_packets, .. })] = guest.control().net_counters()[..] else {
        panic!("one network")
    };
    assert!(sent_packets > 0);
    // Free pages are reported for a while, and what was printed last is under way.
    let quiet = Duration::from_secs(3);
    let mut before = turns();
    guest.wait_until("devices that sleep", |_| {
        thread::sleep(quiet);
        let now = turns();
        let slept = now == before;
        before = now;
        slept
    });
    for role in ["disk0.0", "disk0.1", "disk1.0", "net0.0", "vsock", "hvc0", "balloon", "rng"] {
        assert!(before.keys().any(|name| name.ends_with(&format!("/{role}"))), "no {role}: {before:?}");
    }
}

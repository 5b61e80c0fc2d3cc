//! Devices that change while their guest runs: disks that grow, balloons.

use std::path::Path;
use std::time::Duration;

use berth_machine::options::{BalloonOptions, DeviceOptions, DiskOptions};
use berth_tests_boot::{InProcess, Setup, SetupError, set_up};

/// Generous: the tests may share a small machine with others.
const LIMIT: Duration = Duration::from_secs(200);
const MIB: u64 = 1 << 20;

/// `None`: the host cannot do this test, and was told so.
fn setup() -> Option<Setup> {
    match set_up(&Path::new(env!("CARGO_TARGET_TMPDIR")).join("boot-programs")) {
        Ok(setup) => Some(setup),
        Err(SetupError::Lacking(what)) => {
            println!("skipped: {what}");
            None
        }
        Err(e) => panic!("{e}"),
    }
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

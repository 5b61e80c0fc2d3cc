//! Virtio devices inside the default guest.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use berth_tests_boot::kills::{Kills, check_qcow2};
use berth_tests_boot::{Ended, Guest, Noise, Setup, set_up_or_skip, transfer};

/// Generous: the tests may share a small machine with others.
const LIMIT: Duration = Duration::from_secs(150);
/// As in `programs/writer.c`.
const BLOCK: usize = 4096;
const PLACES: u64 = 1024;

/// `None`: the host cannot do this test, and was told so.
fn setup() -> Option<Setup> {
    set_up_or_skip(env!("CARGO_TARGET_TMPDIR"), &[])
}

fn start(setup: &Setup, arguments: &[&str], command: &str) -> Guest {
    Guest::start(&setup.berth, setup.initrd.path(), arguments, command, LIMIT)
        .unwrap_or_else(|e| panic!("{e}"))
}

fn wait_for_line(guest: &mut Guest, text: &str) {
    guest.wait_for_line(text).unwrap_or_else(|e| panic!("{e}"));
}

fn wait(guest: Guest) -> Ended {
    let ended = guest.wait().unwrap_or_else(|e| panic!("{e}"));
    assert!(ended.status.success(), "{}: {}\n{:#?}", ended.status, ended.complaints, ended.console);
    ended
}

fn run(program: &Path, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{arguments:?}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Whether every block of `disk` up to number `durable` is there, or a later one at its place.
fn check_blocks(disk: &Path, durable: u64) {
    let content = fs::read(disk).unwrap();
    for n in durable.saturating_sub(PLACES - 1)..=durable {
        let at = (n % PLACES) as usize * BLOCK;
        let words: Vec<u64> =
            content[at..at + BLOCK].chunks(8).map(|w| u64::from_le_bytes(w.try_into().unwrap())).collect();
        assert!(
            words[0] >= n && words[0] % PLACES == n % PLACES,
            "block {n} was durable and holds {}",
            words[0]
        );
        // The next block may have been under way to this place: 4 KiB are not written at once by promise.
        let torn = words.iter().any(|&w| w != words[0]);
        assert!(!torn || words.iter().all(|&w| w == n || w == n + PLACES), "block {n}: {words:?}");
    }
}

/// Ends a VM by `kill -9` while it writes, again and again; what was durable stays.
fn killed_while_writing(name: &str, options: &str, kills: usize) {
    let Some(setup) = setup() else { return };
    let directory = tempfile::tempdir().unwrap();
    let disk = directory.path().join(name);
    let path = disk.to_str().unwrap();
    run(&setup.berth, &["disk", "create", path, "4M"]);
    let mut next = 0_u64;
    for kill in 0..kills {
        let command = format!("/tests/writer /dev/vda {next}");
        let mut guest = start(&setup, &["--disk", &format!("{path}{options}")], &command);
        wait_for_line(&mut guest, "durable ");
        // Another moment each time.
        thread::sleep(Duration::from_millis(100 + 170 * kill as u64));
        let lines = guest.new_lines();
        guest.signal(libc::SIGKILL).unwrap();
        drop(guest);
        let last = lines.iter().rev().find_map(|l| l.strip_prefix("durable ")?.parse::<u64>().ok());
        let durable = last.unwrap_or(next.next_multiple_of(8));
        let raw = directory.path().join("raw.img");
        if name.ends_with(".qcow2") {
            check_qcow2(path).unwrap();
            let _ = fs::remove_file(&raw);
            run(&setup.berth, &["disk", "convert", path, raw.to_str().unwrap()]);
            check_blocks(&raw, durable);
        } else {
            check_blocks(&disk, durable);
        }
        next = durable + 1;
    }
    assert!(next > kills as u64, "it wrote next to nothing: {next} blocks");
}

#[test]
fn raw_disks_survive_kills() {
    killed_while_writing("disk.img", "", 3);
}

#[test]
fn qcow2_disks_survive_kills() {
    killed_while_writing("disk.qcow2", ",cache=none", 2);
}

/// The long form is `cargo xtask soak kill`.
fn killed_while_fio_writes(name: &str, options: &str, count: u32) {
    let Some(setup) = set_up_or_skip(env!("CARGO_TARGET_TMPDIR"), &["fio"]) else { return };
    let directory = tempfile::tempdir().unwrap();
    let disk = directory.path().join(name);
    let survived = Kills { setup: &setup, disk, options, count, seed: 0x5eed }.run(|_| {});
    let survived = survived.unwrap_or_else(|e| panic!("{e}"));
    assert!(survived.kills == count && survived.rounds >= u64::from(count), "{survived:?}");
}

#[test]
fn what_fio_flushed_to_a_raw_disk_survives_kills() {
    killed_while_fio_writes("disk.img", "", 3);
}

#[test]
fn what_fio_flushed_to_a_qcow2_disk_survives_kills() {
    killed_while_fio_writes("disk.qcow2", "", 2);
}

#[test]
fn disks_keep_what_the_guest_wrote_when_it_powers_off() {
    let Some(setup) = setup() else { return };
    let directory = tempfile::tempdir().unwrap();
    let (raw, qcow2) = (directory.path().join("a.img"), directory.path().join("b.qcow2"));
    let mut content = Vec::new();
    Noise::new(8 << 20).read_to_end(&mut content).unwrap();
    fs::write(&raw, &content).unwrap();
    let path = qcow2.to_str().unwrap();
    run(&setup.berth, &["disk", "create", path, "8M"]);
    let arguments = [
        "--cpus",
        "2",
        "--disk",
        &format!("{},ro,serial=FIRST", raw.display()),
        "--disk",
        &format!("{path},cache=writethrough"),
        "--console",
        "virtio",
        "--rng",
    ];
    let command = "echo === facts; tty; cat /sys/block/vda/serial; echo; cat /sys/block/vda/ro /sys/block/vdb/ro; \
        cat /sys/block/vdb/queue/write_cache; ls /sys/block/vda/mq | wc -l; \
        dd if=/dev/hwrng bs=64 count=1 2>/dev/null | wc -c; \
        dd if=/dev/vda of=/dev/vdb bs=64k 2>/dev/null; echo === end";
    let ended = wait(start(&setup, &arguments, command));
    assert_eq!(
        ended.section("facts"),
        ["/dev/hvc0", "FIRST", "1", "0", "write through", "2", "64"],
        "{:#?}",
        ended.console
    );
    check_qcow2(path).unwrap();
    let copy = directory.path().join("copy.img");
    run(&setup.berth, &["disk", "convert", path, copy.to_str().unwrap()]);
    assert!(fs::read(&copy).unwrap() == content, "the copy is not what was copied");
}

#[test]
fn a_disk_in_use_is_refused_and_says_by_whom() {
    let Some(setup) = setup() else { return };
    let directory = tempfile::tempdir().unwrap();
    let disk = directory.path().join("disk.img");
    let path = disk.to_str().unwrap();
    run(&setup.berth, &["disk", "create", path, "1M"]);
    let mut guest = start(&setup, &["--name", "holder", "--disk", path], "echo holding; sleep 100");
    wait_for_line(&mut guest, "holding");
    let second = start(&setup, &["--disk", path], "true").wait().unwrap();
    assert_eq!(second.status.code(), Some(1));
    let who = format!("in use for writing by process {} (", guest.process());
    assert!(second.complaints.contains(&who), "{}", second.complaints);
    assert!(second.complaints.contains("--name holder"), "{}", second.complaints);
}

/// Sends `len` bytes and gets them back.
fn echo(stream: &UnixStream, len: u64) {
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let begin = Instant::now();
    thread::scope(|s| {
        s.spawn(|| {
            std::io::copy(&mut Noise::new(len), &mut &*stream).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        });
        assert!(Noise::new(len).is_same(stream).unwrap(), "the echo is not what was sent");
    });
    println!("{} MiB to the guest and back in {:.1?}", len >> 20, begin.elapsed());
}

#[test]
fn sockets_carry_data_both_ways() {
    let Some(setup) = setup() else { return };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("v");
    let len = transfer();
    let listener = UnixListener::bind(directory.path().join("v_77")).unwrap();
    let arguments = ["--cpus", "2", "--vsock", path.to_str().unwrap()];
    let mut guest = start(&setup, &arguments, "/tests/vsock listen 52; /tests/vsock connect 77");
    wait_for_line(&mut guest, "vsock listens");
    let mut host = UnixStream::connect(&path).unwrap();
    host.write_all(b"CONNECT 52\n").unwrap();
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') {
        let mut byte = [0];
        host.read_exact(&mut byte).unwrap();
        answer.push(byte[0]);
    }
    assert!(answer.starts_with(b"OK "), "{answer:?}");
    echo(&host, len);
    let (host, _) = listener.accept().unwrap();
    echo(&host, len);
    let ended = wait(guest);
    let echoed = format!("echoed {len}");
    assert_eq!(ended.console.iter().filter(|l| **l == echoed).count(), 2, "{:#?}", ended.console);
}

/// Anonymous memory of a process that is resident, in KiB.
fn resident(process: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn the_host_gets_memory_back() {
    let Some(setup) = setup() else { return };
    let arguments = ["--memory", "512M", "--balloon=size=64M"];
    // A file in memory, deleted when the host has seen it.
    let command = "dd if=/dev/zero of=/dev/shm/x bs=1M count=200 2>/dev/null; echo full; sleep 5; rm /dev/shm/x; \
         echo empty; sleep 100";
    let mut guest = start(&setup, &arguments, command);
    wait_for_line(&mut guest, "full");
    let full = resident(guest.process());
    assert!(full > 200 << 10, "{full} KiB");
    wait_for_line(&mut guest, "empty");
    let end = Instant::now() + LIMIT / 2;
    while resident(guest.process()) + (150 << 10) > full {
        assert!(Instant::now() < end, "of {full} KiB {} are resident", resident(guest.process()));
        thread::sleep(Duration::from_millis(100));
    }
}

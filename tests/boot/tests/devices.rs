//! Virtio devices inside the default guest.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use berth_tests_boot::{Ended, Guest, Setup, SetupError, set_up};

/// Generous: the tests may share a small machine with others.
const LIMIT: Duration = Duration::from_secs(150);
/// As in `programs/writer.c`.
const BLOCK: usize = 4096;
const PLACES: u64 = 1024;
/// Bytes that go through sockets and networks: enough for many rounds of every buffer.
const TRANSFER: usize = 12 << 20;

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

/// Bytes that do not repeat soon (xorshift64).
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(len).collect()
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
            check_qcow2(path);
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

/// No errors; clusters that nobody uses any more are none (exit code 3 of qemu-img).
fn check_qcow2(path: &str) {
    match Command::new("qemu-img").args(["check", "-f", "qcow2", path]).output() {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(matches!(output.status.code(), Some(0 | 3)), "{said}");
        }
        Err(_) => println!("skipped: qemu-img, which would check the image, is not installed"),
    }
}

#[test]
fn raw_disks_survive_kills() {
    killed_while_writing("disk.img", "", 3);
}

#[test]
fn qcow2_disks_survive_kills() {
    killed_while_writing("disk.qcow2", ",cache=none", 2);
}

#[test]
fn disks_keep_what_the_guest_wrote_when_it_powers_off() {
    let Some(setup) = setup() else { return };
    let directory = tempfile::tempdir().unwrap();
    let (raw, qcow2) = (directory.path().join("a.img"), directory.path().join("b.qcow2"));
    let content = noise(8 << 20);
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
    check_qcow2(path);
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

/// Sends `data` and gets it back.
fn echo(stream: &UnixStream, data: &[u8]) {
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let mut back = vec![0; data.len()];
    thread::scope(|s| {
        s.spawn(|| {
            (&*stream).write_all(data).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        });
        (&*stream).read_exact(&mut back).unwrap();
    });
    assert!(back == data, "the echo is not what was sent");
}

#[test]
fn sockets_carry_data_both_ways() {
    let Some(setup) = setup() else { return };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("v");
    let data = noise(TRANSFER);
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
    echo(&host, &data);
    let (host, _) = listener.accept().unwrap();
    echo(&host, &data);
    let ended = wait(guest);
    let echoed = format!("echoed {TRANSFER}");
    assert_eq!(ended.console.iter().filter(|l| **l == echoed).count(), 2, "{:#?}", ended.console);
}

#[test]
fn user_networking_reaches_the_host_and_back() {
    if Command::new("passt").arg("--version").output().is_err() {
        println!("skipped: passt is not installed");
        return;
    }
    let Some(setup) = setup() else { return };
    let data = noise(TRANSFER);
    let sum = sha256(&data);
    // The host's side: one file over HTTP.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = [0; 1024];
        let _ = stream.read(&mut request).unwrap();
        let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {TRANSFER}\r\n\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(&data).unwrap();
    });
    // A port that is free now; nobody else is likely to take it.
    let forwarded = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    // passt's router is the host.
    let command = format!(
        "echo 'ip addr add $ip/24 dev eth0; ip route add $router dev eth0; ip route add default via $router; \
         echo $router > /tmp/router' > /tmp/script; sed -i 1i#!/bin/sh /tmp/script; chmod +x /tmp/script; \
         ip link set eth0 up; udhcpc -i eth0 -n -q -s /tmp/script; \
         echo === sum; wget -q -O - http://$(cat /tmp/router):{port}/ | sha256sum; echo === end; \
         httpd -p 80 -h /tests; echo serving; sleep 100"
    );
    let net = format!("user,forward=tcp:127.0.0.1:{forwarded}:80");
    let mut guest = start(&setup, &["--cpus", "2", "--net", &net], &command);
    wait_for_line(&mut guest, &sum);
    wait_for_line(&mut guest, "serving");
    server.join().unwrap();
    let mut stream = TcpStream::connect(("127.0.0.1", forwarded)).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.write_all(b"GET /vsock HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert!(answer.starts_with(b"HTTP/1.0 200") || answer.starts_with(b"HTTP/1.1 200"));
    assert!(answer.windows(4).any(|w| w == b"\x7fELF"), "{} bytes", answer.len());
    assert!(answer.len() > 100_000);
}

/// By the host's program, as the guest's sum is by busybox.
fn sha256(data: &[u8]) -> String {
    let mut child = Command::new("sha256sum")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(data).unwrap();
    let output = child.wait_with_output().unwrap();
    String::from_utf8_lossy(&output.stdout).split_whitespace().next().unwrap().to_owned()
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

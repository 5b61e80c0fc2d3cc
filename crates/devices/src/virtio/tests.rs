//! Devices as their drivers see them, good ones and bad ones.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use berth_disk::{CacheMode, CreateOptions, Format, OpenOptions};
use parking_lot::Mutex;

use super::balloon::{Balloon, BalloonFeatures};
use super::block::{Block, BlockCounters, BlockOperation, BlockOptions};
use super::console::{Console, Output};
use super::net::{Net, Stream};
use super::rng::Rng;
use super::testing::{DATA, Driver, INDIRECT, MEMORY, NEXT, WRITE};
use super::vsock::Vsock;
use crate::pci::PciFunction;

const EVENT_INDEX: u64 = 1 << 29;

fn rng() -> Driver {
    Driver::new(Arc::new(Rng::new("test/rng".into())))
}

#[test]
fn a_request_is_answered_and_interrupts() {
    let mut d = rng();
    d.start(0);
    d.request(0, 0, &[], &[(DATA, 64), (DATA + 0x1000, 32)]);
    assert_eq!(d.used(0), (0, 96));
    assert!(d.get(DATA, 64).iter().any(|&b| b != 0));
    d.wait_for_message(0);
    assert_eq!(d.status(), 0xf);
}

#[test]
fn many_requests_go_round_the_ring() {
    for without in [0, EVENT_INDEX] {
        let mut d = rng();
        d.start(without);
        for i in 0..100 {
            d.request(0, i % 16, &[], &[(DATA, 8)]);
            assert_eq!(d.used(0), (i % 16, 8));
        }
    }
}

#[test]
fn features_are_agreed_on() {
    let d = rng();
    let offered = d.offered();
    assert_eq!(offered >> 32 & 1, 1, "VERSION_1");
    assert!(!d.accept(offered & !(1 << 32)), "without VERSION_1");
    d.write::<1>(0x14, 0);
    assert!(!d.accept(offered | 1 << 60), "a feature that is not offered");
    d.write::<1>(0x14, 0);
    assert_eq!(d.status(), 0);
    d.write::<1>(0x14, 4);
    assert_ne!(d.status() & 0x40, 0, "DRIVER_OK without FEATURES_OK");
}

#[test]
fn indirect_tables_are_followed() {
    let mut d = rng();
    d.start(0);
    d.put_descriptor(DATA, (DATA + 0x100, 8, WRITE | NEXT, 1));
    d.put_descriptor(DATA + 16, (DATA + 0x200, 8, WRITE, 0));
    d.descriptor(0, 3, (DATA, 32, INDIRECT, 0));
    d.offer(0, 3);
    assert_eq!(d.used(0), (3, 16));
}

#[test]
fn broken_chains_make_the_device_need_a_reset() {
    type Breaker = fn(&mut Driver);
    let breakers: [(&str, Breaker); 9] = [
        ("a circle", |d| {
            d.descriptor(0, 0, (DATA, 8, WRITE | NEXT, 1));
            d.descriptor(0, 1, (DATA, 8, WRITE | NEXT, 0));
            d.offer(0, 0);
        }),
        ("no such head", |d| d.offer(0, 16)),
        ("no such next", |d| {
            d.descriptor(0, 0, (DATA, 8, WRITE | NEXT, 77));
            d.offer(0, 0);
        }),
        ("a buffer outside of RAM", |d| d.request(0, 0, &[], &[(MEMORY, 8)])),
        ("a buffer that leaves RAM", |d| d.request(0, 0, &[], &[(MEMORY - 4, 8)])),
        ("a buffer that wraps", |d| d.request(0, 0, &[], &[(u64::MAX - 3, 8)])),
        ("readable behind writable", |d| {
            d.descriptor(0, 0, (DATA, 8, WRITE | NEXT, 1));
            d.descriptor(0, 1, (DATA, 8, 0, 0));
            d.offer(0, 0);
        }),
        ("an odd indirect table", |d| {
            d.descriptor(0, 0, (DATA, 24, INDIRECT, 0));
            d.offer(0, 0);
        }),
        ("an indirect table in an indirect table", |d| {
            d.put_descriptor(DATA, (DATA, 16, INDIRECT, 0));
            d.descriptor(0, 0, (DATA, 16, INDIRECT, 0));
            d.offer(0, 0);
        }),
    ];
    for (what, breaker) in breakers {
        let mut d = rng();
        d.start(0);
        breaker(&mut d);
        d.wait_for_failure();
        // The configuration's interrupt tells the driver.
        d.wait_for_message(1);
        // Nothing was used, and after a reset all is well.
        assert_eq!(d.get(0x1_8002, 2), [0, 0], "{what}");
        d.write::<1>(0x14, 0);
        d.put(0x1_4000, &[0; 0x8000]);
        d.start(0);
        d.request(0, 0, &[], &[(DATA, 8)]);
        assert_eq!(d.used(0), (0, 8), "{what}");
    }
}

#[test]
fn an_index_that_jumps_is_a_fault() {
    let mut d = rng();
    d.start(0);
    d.put(0x1_4002, &1000_u16.to_le_bytes());
    d.write::<2>(0x3000, 0);
    d.wait_for_failure();
}

#[test]
fn rings_outside_of_ram_are_a_fault() {
    let d = rng();
    assert!(d.accept(d.offered()));
    d.write::<4>(0x20, MEMORY);
    d.write::<4>(0x28, MEMORY);
    d.write::<4>(0x30, MEMORY);
    d.write::<2>(0x1c, 1);
    assert_ne!(d.status() & 0x40, 0);
    assert_eq!(d.read::<2>(0x1c), 0);
}

#[test]
fn the_pin_interrupts_without_msix() {
    let mut d = rng();
    d.start(0);
    let mut capability = [0];
    d.pci.config_read(0x34, &mut capability);
    d.pci.config_write(u16::from(capability[0]) + 2, &[0, 0]);
    d.request(0, 0, &[], &[(DATA, 8)]);
    d.used(0);
    d.wait("ISR status", |d| {
        let mut status = [0];
        d.pci.config_read(6, &mut status);
        status[0] & 8 != 0
    });
    assert_eq!(d.read::<1>(0x1000), 1);
    assert_eq!(d.read::<1>(0x1000), 0);
}

#[test]
fn masked_vectors_are_pending_until_they_are_unmasked() {
    let mut d = rng();
    d.start(0);
    d.write::<4>(0x400c, 1);
    d.request(0, 0, &[], &[(DATA, 8)]);
    d.used(0);
    d.wait("a pending bit", |d| d.read::<4>(0x5000) == 1);
    d.write::<4>(0x400c, 0);
    d.wait_for_message(0);
    assert_eq!(d.read::<4>(0x5000), 0);
}

#[test]
fn the_window_in_configuration_space_reaches_the_registers() {
    let d = rng();
    let mut at = [0];
    d.pci.config_read(0x34, &mut at);
    loop {
        let mut head = [0; 4];
        d.pci.config_read(at[0].into(), &mut head);
        if head[0] == 9 && head[3] == 5 {
            break;
        }
        at[0] = head[1];
    }
    let window = u16::from(at[0]);
    d.pci.config_write(window + 8, &0x12_u32.to_le_bytes());
    d.pci.config_write(window + 12, &2_u32.to_le_bytes());
    let mut queues = [0xff; 4];
    d.pci.config_read(window + 16, &mut queues);
    assert_eq!(queues, [1, 0, 0, 0]);
    d.pci.config_write(window + 8, &0x14_u32.to_le_bytes());
    d.pci.config_write(window + 12, &1_u32.to_le_bytes());
    d.pci.config_write(window + 16, &[1, 0, 0, 0]);
    assert_eq!(d.status(), 1);
}

#[test]
fn a_saved_device_goes_on_elsewhere() {
    let mut d = rng();
    d.start(0);
    for i in 0..5 {
        d.request(0, i, &[], &[(DATA, 8)]);
        d.used(0);
    }
    d.pci.pause();
    // Not lost: found when the device goes on.
    d.request(0, 5, &[], &[(DATA, 16)]);
    let state = serde_json::to_string(&d.pci.state()).unwrap();
    let memory = d.get(0, MEMORY as usize);

    let other = rng();
    other.put(0, &memory);
    other.pci.restore(&serde_json::from_str(&state).unwrap()).unwrap();
    assert_eq!(other.status(), 0xf);
    other.pci.resume();
    other.wait("the request that was there", |o| o.get(0x1_8002, 2) == [6, 0]);
    other.wait_for_message(0);
    assert_eq!(other.get(0x1_8004 + 8 * 5, 8), [5, 0, 0, 0, 16, 0, 0, 0]);

    let console = Driver::new(Arc::new(Console::new(output().0, "t".into()).unwrap()));
    let error = console.pci.restore(&serde_json::from_str(&state).unwrap()).unwrap_err();
    assert_eq!(error.device, "test");
}

fn disk(format: Format, options: BlockOptions) -> (tempfile::TempDir, Arc<Block>, Driver) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(format!("disk.{format}"));
    berth_disk::create(&CreateOptions { path: path.clone(), format, size: Some(1 << 20), backing: None })
        .unwrap();
    let cache = CacheMode::Writeback;
    let image =
        berth_disk::open(&OpenOptions { path, format: Some(format), read_only: false, cache }).unwrap();
    let block = Arc::new(Block::new(image.into(), options, vec!["test/disk".into()]));
    let driver = Driver::new(block.clone());
    (directory, block, driver)
}

/// A request of a disk; returns its status and how many bytes were written.
fn disk_request(d: &mut Driver, kind: u32, sector: u64, data: &[(u64, u32)], reads: bool) -> (u8, u32) {
    let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
    d.put(DATA, &header);
    d.put(DATA + 16, &[0xee]);
    let (mut readable, mut writable) = (vec![(DATA, 16)], vec![]);
    if reads { &mut writable } else { &mut readable }.extend(data);
    writable.push((DATA + 16, 1));
    d.request(0, 0, &readable, &writable);
    let (_, written) = d.used(0);
    (d.get(DATA + 16, 1)[0], written)
}

#[test]
fn disks_read_and_write_by_ring_and_by_threads() {
    for (format, no_ring) in [(Format::Raw, false), (Format::Raw, true), (Format::Qcow2, false)] {
        for writethrough in [false, true] {
            let options = BlockOptions { serial: "S1".into(), writethrough, queues: 1, no_ring };
            let (_directory, _block, mut d) = disk(format, options);
            d.start(0);
            let (a, b) = (DATA + 0x1000, DATA + 0x4000);
            d.put(a, &[5; 1024]);
            d.put(b, &[6; 512]);
            assert_eq!(disk_request(&mut d, 1, 7, &[(a, 1024), (b, 512)], false), (0, 1));
            assert_eq!(disk_request(&mut d, 4, 0, &[], false), (0, 1), "flush");
            d.put(a, &[0; 2048]);
            assert_eq!(disk_request(&mut d, 0, 7, &[(a, 512), (b, 1024)], true), (0, 1537));
            assert_eq!(d.get(a, 512), [5; 512]);
            assert_eq!(d.get(b, 1024), [[5; 512], [6; 512]].concat());
            // Discard, then zeroes for one of the sectors.
            let range = |sector: u64, sectors: u32, flags: u32| {
                [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
            };
            d.put(a, &range(8, 1, 1));
            assert_eq!(disk_request(&mut d, 13, 0, &[(a, 16)], false), (0, 1), "write zeroes");
            d.put(a, &range(100, 8, 0));
            assert_eq!(disk_request(&mut d, 11, 0, &[(a, 16)], false), (0, 1), "discard");
            assert_eq!(disk_request(&mut d, 0, 7, &[(b, 1536)], true), (0, 1537));
            assert_eq!(d.get(b, 1536), [[5; 512], [0; 512], [6; 512]].concat());
            assert_eq!(disk_request(&mut d, 8, 0, &[(b, 20)], true).0, 0, "serial");
            assert_eq!(d.get(b, 4), b"S1\0\0");
        }
    }
}

#[test]
fn impossible_disk_requests_are_refused() {
    let (_directory, _block, mut d) = disk(Format::Raw, BlockOptions::default());
    d.start(0);
    let a = DATA + 0x1000;
    for (kind, sector, len, reads) in [
        (0, 2048, 512, true),
        (0, 2047, 1024, true),
        (0, u64::MAX, 512, true),
        (0, 1 << 55, 512, true),
        (0, 0, 100, true),
        (1, 2048, 512, false),
        (11, 0, 15, false),
        (11, 0, 0x4000, false),
        (13, 0, 8, false),
    ] {
        assert_eq!(disk_request(&mut d, kind, sector, &[(a, len)], reads), (1, 1), "{kind} {sector} {len}");
    }
    assert_eq!(disk_request(&mut d, 99, 0, &[], false), (2, 1));
    // Flags that a discard does not have; ranges outside.
    d.put(a, &[&0_u64.to_le_bytes()[..], &8_u32.to_le_bytes(), &1_u32.to_le_bytes()].concat());
    assert_eq!(disk_request(&mut d, 11, 0, &[(a, 16)], false), (2, 1));
    d.put(a, &[&u64::MAX.to_le_bytes()[..], &8_u32.to_le_bytes(), &0_u32.to_le_bytes()].concat());
    assert_eq!(disk_request(&mut d, 11, 0, &[(a, 16)], false), (1, 1));
    // No place for a status.
    d.request(0, 0, &[(DATA, 16)], &[]);
    d.wait_for_failure();
}

#[test]
fn a_disk_grows_under_its_driver() {
    let (_directory, block, mut d) = disk(Format::Qcow2, BlockOptions::default());
    d.start(0);
    assert_eq!(d.read::<8>(0x2000), 2048);
    let generation = d.read::<1>(0x15);
    block.grow(2 << 20).unwrap();
    d.wait_for_message(1);
    assert_eq!(d.read::<8>(0x2000), 4096);
    assert_ne!(d.read::<1>(0x15), generation);
    assert!(block.grow(1 << 20).is_err());
    assert_eq!(disk_request(&mut d, 0, 4095, &[(DATA + 0x1000, 512)], true), (0, 513));
}

fn output() -> (Output, Arc<Mutex<Vec<u8>>>) {
    struct Sink(Arc<Mutex<Vec<u8>>>);
    impl Write for Sink {
        fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
            self.0.lock().extend(data);
            Ok(data.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let bytes = Arc::new(Mutex::new(Vec::new()));
    (Arc::new(Mutex::new(Box::new(Sink(bytes.clone())))), bytes)
}

#[test]
fn a_console_talks_both_ways() {
    let (sink, printed) = output();
    let console = Arc::new(Console::new(sink, "test/console".into()).unwrap());
    let mut d = Driver::new(console.clone());
    assert_eq!(console.push_input(b"early"), 5);
    d.start(0);
    d.request(0, 0, &[], &[(DATA, 3)]);
    d.request(0, 1, &[], &[(DATA + 16, 64)]);
    assert_eq!((d.used(0), d.used(0)), ((0, 3), (1, 2)));
    assert_eq!((d.get(DATA, 3), d.get(DATA + 16, 2)), (b"ear".to_vec(), b"ly".to_vec()));
    d.request(0, 2, &[], &[(DATA, 64)]);
    console.push_input(b"later");
    assert_eq!(d.used(0), (2, 5));
    d.put(DATA, b"hello world");
    d.request(1, 0, &[(DATA, 6), (DATA + 6, 5)], &[]);
    d.used(1);
    assert_eq!(*printed.lock(), b"hello world");
    console.set_size(132, 43);
    assert_eq!(d.read::<4>(0x2000), 43 << 16 | 132);
    // Input that nobody takes is bounded.
    assert_eq!(console.push_input(&vec![0; 1 << 20]), 64 << 10);
    assert!(!console.wait_for_room(Duration::from_millis(1)));
}

#[test]
fn a_balloon_gives_pages_back() {
    let features = BalloonFeatures { deflate_on_oom: true, reporting: true, hinting: true };
    let balloon = Arc::new(Balloon::new(8192, features, "test/balloon".into()));
    let mut d = Driver::new(balloon.clone());
    d.start(0);
    assert_eq!(d.read::<4>(0x2000), 2);
    let page = |n: u64| 0x30_0000 + n * 4096;
    for n in 0..8 {
        d.put(page(n), &[n as u8 + 1; 4096]);
    }
    let numbers: Vec<u8> = [page(1), page(2), page(4), u64::from(u32::MAX) << 12]
        .iter()
        .flat_map(|p| ((p >> 12) as u32).to_le_bytes())
        .collect();
    d.put(DATA, &numbers);
    d.request(0, 0, &[(DATA, 16)], &[]);
    d.used(0);
    let kept: Vec<bool> = (0..8).map(|n| d.get(page(n), 1)[0] != 0).collect();
    assert_eq!(kept, [true, false, false, true, false, true, true, true]);
    d.write::<4>(0x2004, 3);
    let status = balloon.status();
    assert_eq!((status.target, status.actual), (8192, 3 * 4096));

    // Statistics: the buffer comes back when they are asked for.
    let statistic = [&4_u16.to_le_bytes()[..], &1234_u64.to_le_bytes()].concat();
    d.put(DATA, &statistic);
    d.request(2, 0, &[(DATA, 10)], &[]);
    d.wait("statistics", |_| balloon.status().statistics.is_some());
    assert_eq!(balloon.status().statistics.unwrap().free, Some(1234));
    assert!(balloon.request_statistics() && !balloon.request_statistics());
    assert_eq!(d.used(2), (0, 0));

    // Reporting: only whole pages inside the buffer.
    d.request(4, 0, &[], &[(page(5) + 1, 8192)]);
    d.used(4);
    assert_eq!((d.get(page(5), 1)[0], d.get(page(6), 1)[0], d.get(page(7), 1)[0]), (6, 0, 8));
    assert_eq!(balloon.status().reported, 4096);

    // Hinting: only pages of the hinting that goes on.
    d.request(3, 0, &[], &[(page(3), 4096)]);
    d.used(3);
    assert_eq!(d.get(page(3), 1)[0], 4);
    assert!(balloon.start_hinting());
    let command = d.read::<4>(0x2008) as u32;
    d.put(DATA, &command.to_le_bytes());
    d.request(3, 0, &[(DATA, 4)], &[]);
    d.used(3);
    d.request(3, 0, &[], &[(page(3), 4096)]);
    d.used(3);
    assert_eq!(d.get(page(3), 1)[0], 0);
    d.put(DATA, &0_u32.to_le_bytes());
    d.request(3, 0, &[(DATA, 4)], &[]);
    d.used(3);
    assert_eq!(d.read::<4>(0x2008), 1, "done");
    let status = balloon.status();
    assert_eq!((status.hinted, status.hinting), (4096, false));
}

/// A packet of a guest with CID 3.
fn packet(op: u16, ports: (u32, u32), data: &[u8]) -> Vec<u8> {
    let mut bytes = [3_u64.to_le_bytes(), 2_u64.to_le_bytes()].concat();
    for field in [ports.0, ports.1, data.len() as u32] {
        bytes.extend(field.to_le_bytes());
    }
    bytes.extend([1_u16.to_le_bytes(), op.to_le_bytes()].concat());
    for field in [0, 65536, 0_u32] {
        bytes.extend(field.to_le_bytes());
    }
    bytes.extend(data);
    bytes
}

fn send(d: &mut Driver, packet: &[u8]) {
    d.put(DATA, packet);
    d.request(1, 0, &[(DATA, packet.len() as u32)], &[]);
    d.used(1);
}

/// Receives a packet: operation, the host's port, the guest's, data.
fn receive(d: &mut Driver) -> (u16, u32, u32, Vec<u8>) {
    let at = DATA + 0x1_0000;
    d.request(0, 0, &[], &[(at, 44), (at + 0x100, 4096)]);
    let (_, written) = d.used(0);
    let header = d.get(at, 44);
    let field = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let op = u16::from_le_bytes([header[30], header[31]]);
    (op, field(16), field(20), d.get(at + 0x100, written as usize - 44))
}

#[test]
fn sockets_reach_from_the_guest_to_the_host() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("v");
    let listener = UnixListener::bind(directory.path().join("v_99")).unwrap();
    let mut d = Driver::new(Arc::new(Vsock::new(3, &path, "test/vsock".into()).unwrap()));
    assert_eq!(d.read::<8>(0x2000), 3);
    d.start(0);
    send(&mut d, &packet(1, (1000, 99), &[]));
    assert_eq!(receive(&mut d), (2, 99, 1000, vec![]));
    let (mut host, _) = listener.accept().unwrap();
    send(&mut d, &packet(5, (1000, 99), b"from the guest"));
    let mut data = [0; 14];
    host.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"from the guest");
    host.write_all(b"from the host").unwrap();
    assert_eq!(receive(&mut d), (5, 99, 1000, b"from the host".to_vec()));
    drop(host);
    assert_eq!(receive(&mut d), (4, 99, 1000, vec![]));
    send(&mut d, &packet(4, (1000, 99), &[]));
    // Nobody listens there, and there is no such connection.
    for (op, port) in [(1, 98), (5, 97)] {
        send(&mut d, &packet(op, (1000, port), &[]));
        assert_eq!(receive(&mut d), (3, port, 1000, vec![]));
    }
}

#[test]
fn sockets_reach_from_the_host_to_the_guest() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("v");
    let mut d = Driver::new(Arc::new(Vsock::new(3, &path, "test/vsock".into()).unwrap()));
    assert!(Vsock::new(3, &path, "second".into()).is_err());
    d.start(0);
    let mut host = UnixStream::connect(&path).unwrap();
    host.write_all(b"CONNECT 52\nearly").unwrap();
    let (op, port, guest, _) = receive(&mut d);
    assert_eq!((op, guest), (1, 52));
    send(&mut d, &packet(2, (52, port), &[]));
    let mut answer = vec![0; format!("OK {port}\n").len()];
    host.read_exact(&mut answer).unwrap();
    assert_eq!(answer, format!("OK {port}\n").as_bytes());
    assert_eq!(receive(&mut d), (5, port, 52, b"early".to_vec()));
    send(&mut d, &packet(3, (52, port), &[]));
    assert_eq!(host.read(&mut [0; 8]).unwrap(), 0);
    // Nonsense ends the connection.
    let mut host = UnixStream::connect(&path).unwrap();
    host.write_all(b"HELLO\n").unwrap();
    assert_eq!(host.read(&mut [0; 8]).unwrap(), 0);
}

#[test]
fn a_guest_that_sends_more_than_there_is_room_for_is_cut_off() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("v");
    let listener = UnixListener::bind(directory.path().join("v_1")).unwrap();
    let mut d = Driver::new(Arc::new(Vsock::new(3, &path, "test/vsock".into()).unwrap()));
    d.start(0);
    send(&mut d, &packet(1, (5, 1), &[]));
    assert_eq!(receive(&mut d).0, 2);
    let (host, _) = listener.accept().unwrap();
    for _ in 0..30 {
        send(&mut d, &packet(5, (5, 1), &[7; 60_000]));
    }
    // The host reads nothing: its socket takes some, our buffer the rest, then it is over.
    loop {
        match receive(&mut d).0 {
            6 => {}
            op => break assert_eq!(op, 3),
        }
    }
    drop(host);
    // A packet that lies about its length.
    let mut lie = packet(5, (5, 1), &[]);
    lie[24] = 200;
    d.put(DATA, &lie);
    d.request(1, 0, &[(DATA, 44)], &[]);
    d.wait_for_failure();
}

#[test]
fn packets_go_through_a_stream() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("net");
    let listener = UnixListener::bind(&path).unwrap();
    let stream = Stream::connect(&path).unwrap();
    let (mut peer, _) = listener.accept().unwrap();
    let mut d = Driver::new(Arc::new(Net::new([2, 0, 0, 0, 0, 1], Arc::new(stream), vec![])));
    assert_eq!(d.read::<8>(0x2000) & 0xffff_ffff_ffff, 0x0100_0000_0002);
    d.start(0);
    d.put(DATA, &[0; 12]);
    d.put(DATA + 12, &[0xab; 60]);
    d.request(1, 0, &[(DATA, 12), (DATA + 12, 60)], &[]);
    d.used(1);
    let mut packet = [0; 64];
    peer.read_exact(&mut packet).unwrap();
    assert_eq!(packet[..], [&60_u32.to_be_bytes()[..], &[0xab; 60]].concat());
    // One packet in two buffers, because they are mergeable.
    let at = DATA + 0x10_0000;
    for (i, first) in [0_u64, 1].into_iter().zip([0, 1]) {
        d.request(0, first, &[], &[(at + i * 0x1000, 1000)]);
    }
    d.request(0, 2, &[], &[(at + 0x2000, 0x1_0000)]);
    peer.write_all(&[&1500_u32.to_be_bytes()[..], &[0xcd; 1500]].concat()).unwrap();
    assert_eq!((d.used(0), d.used(0)), ((0, 1000), (1, 512)));
    assert_eq!(d.get(at + 10, 3), [2, 0, 0xcd]);
    assert_eq!(d.get(at + 0x1000, 512), [0xcd; 512]);
    // A packet without a header.
    d.request(1, 0, &[(DATA, 11)], &[]);
    d.wait_for_failure();
}

#[test]
fn devices_count_what_they_do() {
    let (_directory, block, mut d) = disk(Format::Raw, BlockOptions::default());
    d.start(0);
    let a = DATA + 0x1000;
    assert_eq!(disk_request(&mut d, 1, 0, &[(a, 1024)], false).0, 0);
    assert_eq!(disk_request(&mut d, 0, 0, &[(a, 512)], true).0, 0);
    assert_eq!(disk_request(&mut d, 4, 0, &[], false).0, 0);
    // Not for the host to do, so nothing of it is counted.
    assert_eq!(disk_request(&mut d, 0, 4096, &[(a, 512)], true).0, 1);
    let expected = BlockCounters {
        reads: 1,
        read_bytes: 512,
        writes: 1,
        written_bytes: 1024,
        flushes: 1,
        ..BlockCounters::default()
    };
    assert_eq!(block.counters(), expected);
}

#[test]
fn requests_that_the_host_cannot_do_are_told() {
    // Somebody cut the file: what is behind its end cannot be read.
    let (directory, block, mut d) = disk(Format::Raw, BlockOptions::default());
    let errors = Arc::new(Mutex::new(Vec::new()));
    let sink = errors.clone();
    block.on_error(move |e| sink.lock().push(e));
    d.start(0);
    let file = std::fs::File::options().write(true).open(directory.path().join("disk.raw")).unwrap();
    file.set_len(512 << 10).unwrap();
    assert_eq!(disk_request(&mut d, 0, 2040, &[(DATA + 0x1000, 4096)], true).0, 1);
    let errors = errors.lock();
    assert_eq!(errors.len(), 1);
    assert_eq!(
        (errors[0].operation, errors[0].offset, errors[0].len),
        (BlockOperation::Read, 2040 * 512, 4096)
    );
    assert_eq!((block.counters().errors, block.counters().read_bytes), (1, 0));
}

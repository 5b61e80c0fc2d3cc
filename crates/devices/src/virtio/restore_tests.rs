//! Each device is saved in the middle of its work and goes on as a fresh one, in a memory of its own.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use berth_disk::{CacheMode, CreateOptions, Format, OpenOptions};
use parking_lot::Mutex;

use super::balloon::{Balloon, BalloonFeatures};
use super::block::{Block, BlockOptions};
use super::console::Console;
use super::net::{Net, Stream};
use super::rng::Rng;
use super::testing::{DATA, Driver};
use super::vsock::Vsock;

const BUFFER: u64 = DATA + 0x1000;

#[test]
fn a_disk_does_what_was_asked_of_the_one_before() {
    for format in [Format::Raw, Format::Qcow2] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let create = CreateOptions { path: path.clone(), format, size: Some(1 << 20), backing: None };
        berth_disk::create(&create).unwrap();
        let open = || {
            let options = OpenOptions {
                path: path.clone(),
                format: Some(format),
                read_only: false,
                cache: CacheMode::Writeback,
            };
            Arc::new(Block::new(berth_disk::open(&options).unwrap().into(), BlockOptions::default(), vec![]))
        };
        let header = |kind: u32| [&kind.to_le_bytes()[..], &[0; 12]].concat();
        let mut d = Driver::new(open());
        d.start(0);
        // One that is done, and one that comes while it is paused.
        d.put(DATA, &header(1));
        d.put(BUFFER, &[1; 1024]);
        d.request(0, 0, &[(DATA, 16), (BUFFER, 1024)], &[(DATA + 16, 1)]);
        d.used(0);
        let saved = d.save(|d| {
            d.put(BUFFER, &[2; 512]);
            d.put(DATA + 16, &[0xee]);
            d.request(0, 3, &[(DATA, 16), (BUFFER, 512)], &[(DATA + 16, 1)]);
        });
        // The first one is gone: its image is locked no more.
        let mut d = Driver::restore(open(), &saved);
        assert_eq!((d.used(0), d.get(DATA + 16, 1)[0]), ((3, 1), 0));
        d.put(DATA, &header(0));
        d.request(0, 6, &[(DATA, 16)], &[(BUFFER, 1024), (DATA + 16, 1)]);
        assert_eq!(d.used(0), (6, 1025));
        assert_eq!(d.get(BUFFER, 1024), [[2; 512], [1; 512]].concat());
    }
}

#[test]
fn a_console_keeps_its_input() {
    let console =
        || Arc::new(Console::new(Arc::new(Mutex::new(Box::new(std::io::sink()))), "t".into()).unwrap());
    let first = console();
    let mut d = Driver::new(first.clone());
    d.start(0);
    first.push_input(b"typed early");
    d.request(0, 0, &[], &[(BUFFER, 6)]);
    assert_eq!(d.used(0), (0, 6));
    let saved = d.save(|d| d.request(0, 1, &[], &[(BUFFER, 64)]));
    let mut d = Driver::restore(console(), &saved);
    assert_eq!(d.used(0), (1, 5));
    assert_eq!(d.get(BUFFER, 5), b"early");
}

#[test]
fn a_balloon_keeps_its_size_and_the_buffer_for_statistics() {
    let features = BalloonFeatures { deflate_on_oom: true, reporting: true, hinting: true };
    let mut d = Driver::new(Arc::new(Balloon::new(3 << 20, features, "t".into())));
    d.start(0);
    d.write::<4>(0x2004, 256);
    // The device keeps the buffer until it wants statistics again.
    d.put(DATA, &[&4_u16.to_le_bytes()[..], &7_u64.to_le_bytes()].concat());
    d.request(2, 5, &[(DATA, 10)], &[]);
    let saved = d.save(|_| ());
    let balloon = Arc::new(Balloon::new(0, features, "t".into()));
    let mut d = Driver::restore(balloon.clone(), &saved);
    let status = balloon.status();
    assert_eq!((status.target, status.actual), (3 << 20, 1 << 20));
    assert_eq!(d.read::<4>(0x2000), 768);
    d.wait("statistics", |_| balloon.status().statistics.is_some());
    assert_eq!(balloon.status().statistics.unwrap().free, Some(7));
    assert!(balloon.request_statistics());
    assert_eq!(d.used(2), (5, 0));
}

#[test]
fn a_network_interface_uses_the_buffers_that_the_one_before_had_taken() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("net");
    let listener = UnixListener::bind(&path).unwrap();
    let connect = || {
        let stream = Stream::connect(&path).unwrap();
        let (peer, _) = listener.accept().unwrap();
        (Arc::new(Net::new([2, 0, 0, 0, 0, 1], Arc::new(stream), vec![])), peer)
    };
    let (net, mut peer) = connect();
    let mut d = Driver::new(net);
    d.start(0);
    for i in 0..4_u16 {
        d.request(0, i, &[], &[(BUFFER + u64::from(i) * 0x1000, 2048)]);
    }
    let packet = [&60_u32.to_be_bytes()[..], &[0xab; 60]].concat();
    peer.write_all(&packet).unwrap();
    assert_eq!(d.used(0), (0, 72));
    // It has taken more of them by now, for the packets to come.
    let saved = d.save(|d| {
        d.put(DATA, &[0; 12]);
        d.put(DATA + 12, &[0xcd; 60]);
        d.request(1, 0, &[(DATA, 72)], &[]);
    });
    let (net, mut peer) = connect();
    let mut d = Driver::restore(net.clone(), &saved);
    let mut sent = [0; 64];
    peer.read_exact(&mut sent).unwrap();
    assert_eq!(sent[4..], [0xcd; 60]);
    assert_eq!(d.used(1), (0, 0));
    for i in 1..4 {
        peer.write_all(&packet).unwrap();
        assert_eq!(d.used(0), (i, 72));
        assert_eq!(d.get(BUFFER + u64::from(i) * 0x1000 + 12, 60), [0xab; 60]);
    }
    let counters = net.counters();
    assert_eq!((counters.sent_packets, counters.received_packets, counters.received_bytes), (1, 3, 180));
}

#[test]
fn a_guest_hears_that_its_sockets_are_gone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("v");
    let vsock = || Arc::new(Vsock::new(3, &path, "t".into()).unwrap());
    let mut d = Driver::new(vsock());
    d.start(0);
    d.request(2, 0, &[], &[(BUFFER, 8)]);
    d.put(BUFFER, &[0xee; 8]);
    let saved = d.save(|_| ());
    let mut d = Driver::restore(vsock(), &saved);
    assert_eq!(d.used(2), (0, 4));
    assert_eq!(d.get(BUFFER, 5), [0, 0, 0, 0, 0xee]);
    // Told once: a second buffer stays.
    d.request(2, 1, &[], &[(BUFFER, 8)]);
    d.pci.pause();
    d.pci.resume();
    d.pci.pause();
    assert_eq!(d.get(0x3_8002, 2), [1, 0]);
}

#[test]
fn features_that_are_not_agreed_on_do_not_hinder_a_restore() {
    let rng = || Arc::new(Rng::new("t".into()));
    let d = Driver::new(rng());
    // Bits that nobody offers, and no FEATURES_OK after them.
    d.write::<4>(0xc, 0xff_0000);
    let saved = d.save(|_| ());
    let mut d = Driver::restore(rng(), &saved);
    assert_eq!(d.read::<4>(0xc), 0xff_0000);
    // The driver begins again, and all works.
    d.pci.reset();
    d.start(0);
    d.request(0, 0, &[], &[(BUFFER, 16)]);
    assert_eq!(d.used(0), (0, 16));
}

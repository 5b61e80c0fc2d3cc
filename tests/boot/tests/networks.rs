//! Networks of guests: through passt, a bridge and a tap device. Bridge and tap live in network namespaces of the test.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use berth_tests_boot::{Ended, Guest, Namespace, Noise, Setup, set_up_or_skip, transfer, transfer_limit};

/// Bits of virtio 1.2, 5.1.3: checksums and segmentation both ways, buffers that are merged.
const OFFLOADS: [usize; 7] = [0, 1, 7, 8, 11, 12, 15];
/// Several pairs of queues.
const MULTI_QUEUE: usize = 22;

/// `None`: the host cannot do this test, and was told so.
fn setup(of_host: &[&str]) -> Option<Setup> {
    set_up_or_skip(env!("CARGO_TARGET_TMPDIR"), of_host)
}

/// The host's side of `programs/exchange.sh`.
struct Exchange {
    web: u16,
    back: u16,
    server: JoinHandle<io::Result<bool>>,
}

impl Exchange {
    /// Serves at two ports of `address`, those of the namespace that the calling thread is in.
    fn listen(address: &str) -> io::Result<Self> {
        let (web, back) = (TcpListener::bind((address, 0))?, TcpListener::bind((address, 0))?);
        let (web_port, back_port) = (web.local_addr()?.port(), back.local_addr()?.port());
        let server = thread::spawn(move || {
            let serve = |mut stream: TcpStream| {
                let _ = stream.read(&mut [0; 1024])?;
                write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", transfer())?;
                io::copy(&mut Noise::new(transfer()), &mut stream)
            };
            let (first, _) = web.accept()?;
            let begin = Instant::now();
            serve(first)?;
            let there = begin.elapsed();
            let (second, _) = web.accept()?;
            let begin = Instant::now();
            let second = thread::spawn(move || serve(second));
            let same = Noise::new(transfer()).is_same(back.accept()?.0)?;
            second.join().expect("the server")?;
            let mib = transfer() >> 20;
            println!("{mib} MiB to the guest in {there:.1?}, there and back in {:.1?}", begin.elapsed());
            Ok(same)
        });
        Ok(Self { web: web_port, back: back_port, server })
    }

    /// Whether what came back is what was sent.
    fn came_back(self) -> bool {
        self.server.join().expect("the server").expect("a whole exchange")
    }
}

/// By the host's program, as the guest's sum is by busybox.
fn sum() -> String {
    let mut child = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    io::copy(&mut Noise::new(transfer()), &mut child.stdin.take().unwrap()).unwrap();
    let output = child.wait_with_output().unwrap();
    String::from_utf8_lossy(&output.stdout).split_whitespace().next().unwrap().to_owned()
}

#[test]
fn user_networking_reaches_the_host_and_back() {
    if Command::new("passt").arg("--version").output().is_err() {
        println!("skipped: passt is not installed");
        return;
    }
    let Some(setup) = setup(&[]) else { return };
    let exchange = Exchange::listen("127.0.0.1").unwrap();
    // A port that is free now; nobody else is likely to take it.
    let forwarded = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    // passt's router is the host.
    let command = format!(
        "echo 'ip addr add $ip/24 dev eth0; ip route add $router dev eth0; ip route add default via $router; \
         echo $router > /tmp/router' > /tmp/script; sed -i 1i#!/bin/sh /tmp/script; chmod +x /tmp/script; \
         ip link set eth0 up; udhcpc -i eth0 -n -q -s /tmp/script; \
         sh /tests/exchange.sh $(cat /tmp/router) {} {}; \
         httpd -p 80 -h /tests; echo serving; sleep 100",
        exchange.web, exchange.back
    );
    let net = format!("user,forward=tcp:127.0.0.1:{forwarded}:80");
    let arguments = ["--cpus", "2", "--net", &net];
    let mut guest =
        Guest::start(&setup.berth, setup.initrd.path(), &arguments, &command, transfer_limit()).unwrap();
    for line in [&*sum(), "=== exchanged", "serving"] {
        guest.wait_for_line(line).unwrap_or_else(|e| panic!("{e}"));
    }
    assert!(exchange.came_back(), "what came back is not what was sent");
    let mut stream = TcpStream::connect(("127.0.0.1", forwarded)).unwrap();
    stream.set_read_timeout(Some(transfer_limit())).unwrap();
    stream.write_all(b"GET /vsock HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert!(answer.starts_with(b"HTTP/1.0 200") || answer.starts_with(b"HTTP/1.1 200"));
    assert!(answer.windows(4).any(|w| w == b"\x7fELF"), "{} bytes", answer.len());
    assert!(answer.len() > 100_000);
}

/// A namespace for the VM and one beyond its network, with address 10.77.0.1.
struct Network {
    vm: Namespace,
    peer: Namespace,
}

impl Network {
    /// `None`: this user may not make one, and was told so.
    fn make() -> Option<Self> {
        let (Some(vm), Some(peer)) = (Namespace::make(), Namespace::make()) else {
            println!("skipped: network namespaces need root and ip (iproute2)");
            return None;
        };
        vm.ip(&format!(
            "link add br0 type bridge
             link add up0 type veth peer name eth0 netns {}
             link set up0 master br0
             link set up0 up
             link set br0 up",
            peer.name()
        ))
        .unwrap();
        peer.ip("addr add 10.77.0.1/24 dev eth0\n link set eth0 up\n link set lo up").unwrap();
        Some(Self { vm, peer })
    }

    /// A guest with two vCPUs and the network `net` that runs `programs/bridged.sh`.
    fn run(&self, setup: &Setup, net: &str) -> Ended {
        let exchange = self.peer.inside(|| Exchange::listen("10.77.0.1")).unwrap();
        let mut iperf = self.peer.command("iperf3");
        iperf.args(["--server", "--forceflush"]).stdout(Stdio::piped());
        let mut iperf = iperf.spawn().unwrap();
        let output = BufReader::new(iperf.stdout.take().unwrap());
        let listens = output.lines().map_while(Result::ok).any(|l| l.contains("listening"));
        assert!(listens, "iperf3 does not listen");

        let command = format!("sh /tests/bridged.sh 10.77.0.2 10.77.0.1 {} {}", exchange.web, exchange.back);
        let arguments = ["--name", "bridged", "--cpus", "2", "--net", net];
        let mut berth = self.vm.command(&setup.berth);
        let guest = Guest::start_by(&mut berth, setup.initrd.path(), &arguments, &command, transfer_limit());
        let ended = guest.and_then(Guest::wait);
        // It has done its work.
        let _ = iperf.kill();
        let _ = iperf.wait();
        let ended = ended.unwrap_or_else(|e| panic!("{e}"));
        assert!(ended.status.success(), "{}: {}\n{:#?}", ended.status, ended.complaints, ended.console);
        let given = ended.section("sum").first().map(|line| line.split(' ').next().unwrap().to_owned());
        assert_eq!(given, Some(sum()), "{:#?}", ended.console);
        assert!(exchange.came_back(), "what came back is not what was sent");
        for direction in ["up", "down"] {
            let said = ended.section(direction);
            assert!(said.contains(&"iperf Done."), "{said:#?}");
        }
        ended
    }
}

/// The feature bits that driver and device agreed on.
fn features(ended: &Ended) -> Vec<usize> {
    let bits = ended.section("facts")[1];
    bits.char_indices().filter(|(_, bit)| *bit == '1').map(|(n, _)| n).collect()
}

/// Both directions carry packets larger than any on a wire.
fn check_segmentation(ended: &Ended) {
    let counters: Vec<u64> = ended.section("counters").iter().map(|l| l.parse().unwrap()).collect();
    let [tx_packets, tx_bytes, rx_packets, rx_bytes] = counters[..] else { panic!("{counters:?}") };
    assert!(tx_bytes / tx_packets > 3000, "{counters:?}");
    assert!(rx_bytes / rx_packets > 3000, "{counters:?}");
}

/// Interrupts of the queue `name`.
fn interrupts(ended: &Ended, name: &str) -> u64 {
    let lines = ended.section("interrupts");
    let line = lines.iter().find(|l| l.split_whitespace().last() == Some(name));
    let numbers = line.unwrap_or_else(|| panic!("no {name}: {lines:#?}")).split_whitespace().skip(1).take(2);
    numbers.map(|n| n.parse::<u64>().unwrap()).sum()
}

#[test]
fn a_bridge_carries_large_packets_by_several_queues() {
    let Some(network) = Network::make() else { return };
    let Some(setup) = setup(&["iperf3"]) else { return };
    let ended = network.run(&setup, "bridge=br0");
    let agreed = features(&ended);
    let missing: Vec<_> = OFFLOADS.iter().chain([&MULTI_QUEUE]).filter(|f| !agreed.contains(f)).collect();
    assert!(missing.is_empty(), "features {missing:?} are missing of {agreed:?}");
    // Two queues to receive, two to transmit, each in use.
    assert_eq!(ended.section("facts")[2], "4");
    for queue in ["virtio0-input.0", "virtio0-output.0", "virtio0-input.1", "virtio0-output.1"] {
        assert!(interrupts(&ended, queue) > 0, "{queue}: {:#?}", ended.section("interrupts"));
    }
    check_segmentation(&ended);
    // The tap device has gone with the VM.
    let left = Command::new("ip").args(["-n", network.vm.name(), "-o", "link"]).output().unwrap();
    let left = String::from_utf8_lossy(&left.stdout).into_owned();
    assert!(left.contains("up0") && !left.contains(": berth"), "{left}");
}

#[test]
fn existing_tap_devices_are_used() {
    let Some(network) = Network::make() else { return };
    let Some(setup) = setup(&["iperf3"]) else { return };
    let mut addresses = Vec::new();
    for (device, multi) in [("tap-one", ""), ("tap-many", "multi_queue")] {
        network
            .vm
            .ip(&format!(
                "tuntap add dev {device} mode tap {multi}
                 link set {device} master br0
                 link set {device} up"
            ))
            .unwrap();
        let ended = network.run(&setup, &format!("tap={device}"));
        let agreed = features(&ended);
        assert!(OFFLOADS.iter().all(|f| agreed.contains(f)), "{agreed:?}");
        assert_eq!(agreed.contains(&MULTI_QUEUE), !multi.is_empty(), "{agreed:?}");
        check_segmentation(&ended);
        addresses.push(ended.section("facts")[0].to_owned());
    }
    // It follows from the VM's name, which was the same.
    assert_eq!(addresses[0], addresses[1]);
    // Without the device nothing is made in its place.
    let mut berth = network.vm.command(&setup.berth);
    let guest =
        Guest::start_by(&mut berth, setup.initrd.path(), &["--net", "tap=none"], "", transfer_limit());
    let ended = guest.and_then(Guest::wait).unwrap();
    assert_eq!(ended.status.code(), Some(1));
    assert!(ended.complaints.contains("ip tuntap add dev none mode tap"), "{}", ended.complaints);
}

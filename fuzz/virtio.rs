//! Virtio devices with drivers that do anything.
//!
//! The input is what a driver does: accesses to registers and configuration space, descriptors, rings, notifications; and
//! what the host does meanwhile. Its first byte chooses the device, unless the environment variable `BERTH_FUZZ_DEVICE` has
//! the name of one. Each input begins with a device that was reset and, mostly, started.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::sync::{Arc, LazyLock};

use berth_devices::pci::PciFunction;
use berth_devices::virtio::balloon::{Balloon, BalloonFeatures};
use berth_devices::virtio::block::{Block, BlockOptions};
use berth_devices::virtio::console::Console;
use berth_devices::virtio::net::{Net, Stream};
use berth_devices::virtio::rng::Rng;
use berth_devices::virtio::testing::{DATA, Driver};
use berth_devices::virtio::vsock::Vsock;
use berth_devices::virtio::VirtioDevice;
use berth_disk::{CacheMode, CreateOptions, Format, OpenOptions};
use parking_lot::Mutex;

/// Most actions of one input.
const MAX_ACTIONS: usize = 200;

/// Names of the devices for `BERTH_FUZZ_DEVICE`, in the order of [`TARGETS`].
pub const NAMES: [&str; 7] = ["block-raw", "block-qcow2", "console", "balloon", "vsock", "net", "rng"];

/// A device with its driver, and what the host may do with it.
struct Target {
    driver: Driver,
    host: Box<dyn Fn(u64) + Send>,
}

/// The devices, made once: making one costs threads. Only one thread fuzzes.
static TARGETS: LazyLock<Mutex<Vec<Target>>> = LazyLock::new(|| {
    let directory = tempfile::tempdir().expect("a directory").keep();
    let disk = |format: Format| {
        let path = directory.join(format!("disk.{format}"));
        let options = CreateOptions { path: path.clone(), format, size: Some(1 << 20), backing: None };
        berth_disk::create(&options).expect("an image");
        let cache = CacheMode::Writeback;
        let options = OpenOptions { path, format: Some(format), read_only: false, cache };
        let image = berth_disk::open(&options).expect("an image that opens");
        Arc::new(Block::new(image.into(), BlockOptions { queues: 2, ..BlockOptions::default() }, Vec::new()))
    };
    let output: Box<dyn Write + Send> = Box::new(std::io::sink());
    let console = Arc::new(Console::new(Arc::new(Mutex::new(output)), "hvc".into()).expect("a console"));
    console.push_input(b"input that waits");
    let features = BalloonFeatures { deflate_on_oom: true, reporting: true, hinting: true };
    let balloon = Arc::new(Balloon::new(1 << 20, features, "balloon".into()));
    balloon.start_hinting();
    let echo = UnixListener::bind(directory.join("v_1")).expect("a socket");
    std::thread::spawn(move || {
        for stream in echo.incoming().flatten() {
            std::thread::spawn(move || reflect(stream));
        }
    });
    let vsock_path = directory.join("v");
    let vsock = Vsock::new(3, &vsock_path, "vsock".into()).expect("a vsock");
    let listener = UnixListener::bind(directory.join("net")).expect("a socket");
    let cable = Stream::connect(&directory.join("net")).expect("a cable");
    let (peer, _) = listener.accept().expect("its other end");
    std::thread::spawn(move || reflect(peer));
    let target = |device: Arc<dyn VirtioDevice>, host: Box<dyn Fn(u64) + Send>| {
        Target { driver: Driver::new(device), host }
    };
    let disk_target = |disk: Arc<Block>| {
        let host = disk.clone();
        // At most twice the size, so that images stay small. It cannot shrink, and refuses.
        target(disk, Box::new(move |n| _ = host.grow(n % (2 << 20) & !511)))
    };
    Mutex::new(vec![
        disk_target(disk(Format::Raw)),
        disk_target(disk(Format::Qcow2)),
        target(console.clone(), Box::new(move |n| match n % 2 {
            0 => _ = console.push_input(&n.to_le_bytes()),
            _ => console.set_size(n as u16, (n >> 16) as u16),
        })),
        target(balloon.clone(), Box::new(move |n| match n % 3 {
            0 => balloon.set_target(n),
            1 => _ = balloon.start_hinting(),
            _ => _ = balloon.request_statistics(),
        })),
        // A host program that connects, says something and goes, or stays for a while.
        target(Arc::new(vsock), Box::new(move |n| {
            if let Ok(mut stream) = std::os::unix::net::UnixStream::connect(&vsock_path) {
                let _ = stream.write_all(format!("CONNECT {}\n{n:x}", n % 8).as_bytes());
                let mut kept = HOST_STREAMS.lock();
                kept.push_back(stream);
                if kept.len() > 4 {
                    kept.pop_front();
                }
            }
        })),
        target(Arc::new(Net::new([2, 0, 0, 0, 0, 1], Arc::new(cable), Vec::new())), Box::new(|_| ())),
        target(Arc::new(Rng::new("rng".into())), Box::new(|_| ())),
    ])
});

/// Streams of host programs to the guest.
static HOST_STREAMS: Mutex<VecDeque<std::os::unix::net::UnixStream>> = Mutex::new(VecDeque::new());

/// The device that the environment names, by number.
static CHOSEN: LazyLock<Option<usize>> = LazyLock::new(|| {
    let name = std::env::var("BERTH_FUZZ_DEVICE").ok()?;
    Some(NAMES.iter().position(|n| *n == name).unwrap_or_else(|| panic!("{name}: one of {NAMES:?}")))
});

/// Sends back what comes.
fn reflect(mut stream: std::os::unix::net::UnixStream) {
    let mut data = [0; 4096];
    while let Ok(n @ 1..) = stream.read(&mut data) {
        if stream.write_all(&data[..n]).is_err() {
            break;
        }
    }
}

/// Takes numbers from the input; zeroes when it is over.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn number<const N: usize>(&mut self) -> u64 {
        let mut bytes = [0; 8];
        let n = N.min(self.0.len());
        bytes[..n].copy_from_slice(&self.0[..n]);
        self.0 = &self.0[n..];
        u64::from_le_bytes(bytes)
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let (bytes, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        bytes.to_vec()
    }
}

/// Does what `data` says.
pub fn drive(data: &[u8]) {
    let mut targets = TARGETS.lock();
    let mut input = Input(data);
    let choice = input.number::<1>() as usize;
    let count = targets.len();
    let Target { driver, host } = &mut targets[CHOSEN.unwrap_or(choice % count)];
    driver.pci.reset();
    for queue in 1..8 {
        driver.put(queue * 0x1_0000, &[0; 0x1_0000]);
    }
    if choice < 0xe0 {
        driver.start(input.number::<8>() & !(1 << 32));
    }
    for _ in 0..MAX_ACTIONS {
        if input.0.is_empty() {
            break;
        }
        act(driver, host, &mut input);
    }
}

fn act(driver: &mut Driver, host: &dyn Fn(u64), input: &mut Input<'_>) {
    let queue = |input: &mut Input<'_>| input.number::<1>() as u16 % 6;
    match input.number::<1>() % 16 {
        0 => driver.write::<4>(input.number::<2>() & 0x7fff, input.number::<4>()),
        1 => driver.write::<2>(input.number::<1>() & 0x3f, input.number::<2>()),
        2 => driver.write::<1>(input.number::<2>() & 0x7fff, input.number::<1>()),
        3 => {
            driver.read::<8>(input.number::<2>() & 0x7fff);
        }
        4 => {
            let offset = input.number::<1>() as u16;
            let len = input.number::<1>() as usize % 8;
            driver.pci.config_write(offset, &input.bytes(len));
            let mut back = [0; 8];
            driver.pci.config_read(offset, &mut back[..len]);
        }
        // A descriptor with anything in it, or one that is nearly right.
        5 => {
            let (queue, index) = (queue(input), input.number::<1>() as u16);
            let descriptor =
                (input.number::<8>(), input.number::<4>() as u32, input.number::<2>() as u16, input.number::<2>() as u16);
            driver.descriptor(queue, index, descriptor);
        }
        6 => {
            let (queue, index) = (queue(input), input.number::<1>() as u16 % 16);
            let address = DATA + input.number::<2>();
            let descriptor =
                (address, input.number::<2>() as u32, input.number::<1>() as u16 & 7, input.number::<1>() as u16 % 17);
            driver.descriptor(queue, index, descriptor);
        }
        7 => driver.offer(queue(input), input.number::<1>() as u16 % 18),
        // A request that is right in form: data to read, room to write.
        8 | 9 => {
            let queue = queue(input);
            let (out, room) = (input.number::<1>() as usize, input.number::<2>() as u32);
            let data = input.bytes(out);
            driver.put(DATA, &data);
            let readable = [(DATA, data.len() as u32)];
            let writable = [(DATA + 0x1000, room), (DATA + 0x2_0000, 1)];
            let readable = if data.is_empty() { &[][..] } else { &readable };
            let writable = match room {
                0 => &[][..],
                1 => &writable[1..],
                _ => &writable[..],
            };
            if !readable.is_empty() || !writable.is_empty() {
                driver.request(queue, input.number::<1>() as u16 % 13, readable, writable);
            }
        }
        10 => {
            let at = input.number::<3>();
            let len = input.number::<1>() as usize;
            driver.put(at, &input.bytes(len));
        }
        11 => {
            driver.pci.pause();
            driver.pci.resume();
        }
        // The device's own configuration, in any piece.
        12 => {
            let (offset, len) = (0x2000 + (input.number::<1>() & 0x7f), 1 + input.number::<1>() as usize % 8);
            driver.pci.bar_write(0, offset, &input.bytes(len));
            let mut back = vec![0; len];
            driver.pci.bar_read(0, offset, &mut back);
        }
        13 => host(input.number::<8>()),
        // Saved in the middle of whatever it does, and restored.
        14 => {
            driver.pci.pause();
            let state = driver.pci.state();
            driver.pci.restore(&state).expect("its own state");
            driver.pci.resume();
        }
        // The driver resets and begins again, or accepts other features.
        _ => {
            driver.pci.reset();
            driver.start(input.number::<8>() & !(1 << 32));
        }
    }
}

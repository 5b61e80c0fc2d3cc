use std::io;

use berth_engine::Bus;

use super::*;
use crate::irqchip::InterruptChips;
use crate::timer::{Timers, TscClock};

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);
impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().extend(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Port {
    serial: Arc<Serial>,
    chips: Arc<InterruptChips>,
    sink: Sink,
}

impl Port {
    fn new() -> Self {
        let timers = Timers::manual();
        let chips = InterruptChips::new(1, &timers, &TscClock::new(1, timers.clock().clone())).unwrap();
        let sink = Sink::default();
        let serial = Serial::new(chips.line(4).unwrap(), Box::new(sink.clone()));
        Self { serial, chips, sink }
    }
    fn read(&self, offset: u16) -> u8 {
        let mut data = [0];
        PortDevice::read(&*self.serial, offset, &mut data);
        data[0]
    }
    fn write(&self, offset: u16, value: u8) {
        PortDevice::write(&*self.serial, offset, &[value]);
    }
    fn interrupt(&self) -> bool {
        self.chips.is_asserted(4)
    }
    /// As Linux's driver leaves the port when a terminal is opened.
    fn open() -> Self {
        let port = Self::new();
        port.write(2, 0x81);
        port.write(4, 0x0b);
        port.write(1, 0x05);
        port
    }
}

#[test]
fn output_goes_to_the_sink() {
    let port = Port::new();
    b"hello".iter().for_each(|&byte| port.write(0, byte));
    assert_eq!(*port.sink.0.lock(), b"hello");
    assert_eq!(port.read(5), 0x60);
}

#[test]
fn linux_recognises_a_16550a() {
    let port = Port::new();
    // Interrupt enable keeps four bits, the loop back carries RTS and OUT2.
    port.write(1, 0xff);
    assert_eq!(port.read(1), 0x0f);
    port.write(1, 0);
    port.write(4, 0x1a);
    assert_eq!(port.read(6) & 0xf0, 0x90);
    port.write(4, 0x08);
    port.write(2, 0x01);
    assert_eq!(port.read(2) >> 6, 3);
    // Enabling the transmitter interrupt raises it each time, reading IIR takes it back.
    for _ in 0..2 {
        port.write(1, 2);
        assert_eq!(port.read(2) & 0xf, 2);
        assert_eq!(port.read(2) & 0xf, 1);
        port.write(1, 0);
    }
    port.write(7, 0x5a);
    assert_eq!(port.read(7), 0x5a);
}

#[test]
fn the_divisor_is_separate() {
    let port = Port::new();
    port.write(3, 0x83);
    port.write(0, 1);
    port.write(1, 0);
    assert_eq!((port.read(0), port.read(1)), (1, 0));
    port.write(3, 0x03);
    assert_eq!(port.read(1), 0);
    assert!(port.sink.0.lock().is_empty());
}

#[test]
fn the_transmitter_interrupts_when_it_is_empty() {
    let port = Port::open();
    port.write(1, 0x07);
    assert!(port.interrupt());
    assert_eq!(port.read(2), 0xc2);
    assert!(!port.interrupt());
    port.write(0, b'x');
    assert!(port.interrupt());
    port.write(1, 0x05);
    assert!(!port.interrupt());
}

#[test]
fn input_interrupts_until_it_is_read() {
    let port = Port::open();
    assert_eq!(port.serial.push_input(b"0123456789"), 10);
    assert!(port.interrupt());
    assert_eq!(port.read(2), 0xc4);
    assert_eq!(port.read(5), 0x61);
    let first: Vec<u8> = (0..3).map(|_| port.read(0)).collect();
    assert_eq!(first, b"012");
    assert_eq!(port.read(2), 0xcc);
    (0..7).for_each(|_| _ = port.read(0));
    assert!(!port.interrupt());
    assert_eq!((port.read(5), port.read(0)), (0x60, 0));
}

#[test]
fn input_before_the_driver_is_ready_is_kept() {
    let port = Port::new();
    port.serial.push_input(b"early");
    // Linux's set-up clears the FIFO and reads everything once.
    port.write(2, 0x01);
    port.write(2, 0x07);
    port.write(2, 0x00);
    for offset in [5, 0, 2, 6] {
        port.read(offset);
    }
    assert_eq!(port.read(5) & 1, 0);
    port.write(4, 0x0b);
    port.write(2, 0x81);
    port.write(1, 0x05);
    assert!(port.interrupt());
    port.write(2, 0x83);
    let read: Vec<u8> = (0..5).map(|_| port.read(0)).collect();
    assert_eq!(read, b"early");
}

#[test]
fn a_guest_that_polls_gets_input_too() {
    let port = Port::new();
    port.serial.push_input(b"ab");
    let poll = || (0..100).find(|_| port.read(5) & 1 != 0).map(|_| port.read(0));
    assert_eq!([poll(), poll(), poll()], [Some(b'a'), Some(b'b'), None]);
}

#[test]
fn a_full_queue_takes_no_more_and_loses_nothing() {
    let port = Port::open();
    let input: Vec<u8> = (0..QUEUE_SIZE + 1000).map(|i| (i % 251) as u8).collect();
    let mut taken = port.serial.push_input(&input);
    assert_eq!(taken, QUEUE_SIZE);
    let reader = port.serial.clone();
    std::thread::scope(|scope| {
        let pusher = scope.spawn(|| {
            while taken < input.len() {
                assert!(reader.wait_for_room(Duration::from_secs(20)));
                taken += reader.push_input(&input[taken..]);
            }
        });
        let mut read = Vec::new();
        while read.len() < input.len() {
            if port.read(5) & 1 != 0 {
                read.push(port.read(0));
            } else {
                std::thread::yield_now();
            }
        }
        pusher.join().unwrap();
        assert!(read == input);
    });
    assert!(port.serial.wait_for_room(Duration::ZERO));
}

#[test]
fn every_fifo_full_of_input_is_an_edge() {
    let port = Port::open();
    let mut bus = MachineBus::new();
    port.chips.register(&mut bus).unwrap();
    // Vectors from 0x30 on, automatic end of interrupt, nothing masked.
    for (at, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 3), (0x21, 0)] {
        bus.port_write(at, &[value]);
    }
    port.serial.push_input(&[b'x'; 40]);
    for len in [16, 16, 8] {
        assert_eq!(port.chips.acknowledge_pic(), Some(0x34));
        assert_eq!(port.chips.acknowledge_pic(), None);
        (0..len).for_each(|_| _ = port.read(0));
    }
    assert!(!port.interrupt());
    assert_eq!(port.chips.acknowledge_pic(), None);
}

#[test]
fn looped_back_bytes_are_received_and_not_sent() {
    let port = Port::new();
    port.write(2, 0x01);
    port.write(4, 0x10);
    port.write(0, 0xa5);
    assert_eq!(port.read(5) & 1, 1);
    assert_eq!(port.read(0), 0xa5);
    assert!(port.sink.0.lock().is_empty());
}

//! A hostile guest: random accesses of every size at every device, at all local APIC registers, while time passes.
//! Nothing may panic, hang, or leave a lock held.

use std::io;
use std::sync::Arc;

use berth_engine::{Bus, LocalApic, VcpuId};
use berth_memory::GuestPhysAddr;
use berth_memory::layout::{IOAPIC_BASE, PCI_ECAM_START, PCI_MMIO32_START, PCI_MMIO64_START, ports};

use crate::acpi_pm::AcpiPm;
use crate::bus::MachineBus;
use crate::cmos::Cmos;
use crate::debug_exit::DebugExit;
use crate::i8042::I8042;
use crate::irq::InterruptController;
use crate::irqchip::InterruptChips;
use crate::pci::PciRoot;
use crate::pit::Pit;
use crate::power::PowerSink;
use crate::serial::Serial;
use crate::timer::{Timers, TscClock};

/// xorshift64*: the same sequence in every run.
struct Random(u64);
impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
    /// Mostly values with few bits, which mean more to devices.
    fn value(&mut self) -> u64 {
        match self.below(4) {
            0 => 1 << self.below(64),
            1 => self.below(256),
            2 => self.next() & self.next() & self.next(),
            _ => self.next(),
        }
    }
}

struct Machine {
    timers: Timers,
    chips: Arc<InterruptChips>,
    serial: Arc<Serial>,
    bus: MachineBus,
}

fn machine() -> Machine {
    let timers = Timers::manual();
    let tsc = TscClock::new(2_345_678_901, timers.clock().clone());
    let chips = InterruptChips::new(3, &timers, &tsc).unwrap();
    let line = |irq| chips.line(irq).unwrap();
    let power = PowerSink::new(|_| ());
    let mut bus = MachineBus::new();
    chips.register(&mut bus).unwrap();
    Pit::new(line(0), &timers).register(&mut bus).unwrap();
    I8042::new(line(1), power.clone()).register(&mut bus).unwrap();
    let serial = Serial::new(line(ports::SERIAL_IRQ), Box::new(io::sink()));
    serial.register(ports::SERIAL, &mut bus).unwrap();
    Cmos::new(line(ports::CMOS_IRQ), &timers, 3 << 30, 1 << 30).register(ports::CMOS, &mut bus).unwrap();
    AcpiPm::new(line(ports::SCI_GSI), power.clone(), &timers).register(&mut bus).unwrap();
    PciRoot::new(power.clone()).register(&mut bus).unwrap();
    let debug_exit = Arc::new(DebugExit::new(power));
    bus.register_ports(ports::DEBUG_EXIT, 1, "debug exit", debug_exit).unwrap();
    Machine { timers, chips, serial, bus }
}

const PORTS: [(u16, u16); 10] = [
    (0x20, 2),
    (0x40, 4),
    (0x60, 8),
    (0x70, 2),
    (0xa0, 2),
    (0xf4, 1),
    (0x3f8, 8),
    (0x4d0, 2),
    (0x600, 0x30),
    (0xcf8, 8),
];
const MMIO: [(GuestPhysAddr, u64); 5] = [
    (IOAPIC_BASE, 0x60),
    (PCI_ECAM_START, 0x2000),
    (PCI_MMIO32_START, 0x100),
    (PCI_MMIO64_START, 0x100),
    (GuestPhysAddr(u64::MAX - 8), 9),
];

fn one_access(machine: &Machine, random: &mut Random) {
    let mut data = random.value().to_le_bytes();
    let len = [1, 2, 4, 8][random.below(4) as usize];
    let data = &mut data[..len];
    let vcpu = VcpuId(random.below(3) as u8);
    let apic = machine.chips.local_apic(vcpu).unwrap();
    match random.below(10) {
        kind @ 0..4 => {
            let (start, count) = PORTS[random.below(PORTS.len() as u64) as usize];
            let port = start + random.below(count.into()) as u16;
            let data = &mut data[..len.min(4)];
            if kind % 2 == 0 { machine.bus.port_read(port, data) } else { machine.bus.port_write(port, data) }
        }
        kind @ 4..6 => {
            let (start, count) = MMIO[random.below(MMIO.len() as u64) as usize];
            let address = start.wrapping_add(random.below(count));
            if kind % 2 == 0 {
                machine.bus.mmio_read(address, data)
            } else {
                machine.bus.mmio_write(address, data)
            }
        }
        6 => {
            let offset = random.below(0x1000) as u16 & if random.below(2) == 0 { 0xff0 } else { 0xfff };
            apic.mmio_read(offset, data);
            apic.mmio_write(offset, &random.value().to_le_bytes()[..len]);
        }
        7 => {
            let msr = [0x1b, 0x6e0, 0x800 + random.below(0x100) as u32][random.below(3) as usize];
            // Faults are as good an answer as values.
            let _ = apic.read_msr(msr);
            let _ = apic.write_msr(msr, random.value() | if msr == 0x1b { 0xfee0_0800 } else { 0 });
        }
        8 => {
            if apic.has_event() {
                apic.take_event();
            }
            if apic.has_interrupt() {
                apic.acknowledge();
            }
            apic.needs_explicit_eoi();
            apic.eoi();
            apic.send_ipi(random.value());
            machine.chips.deliver_msi(0xfee0_0000 | random.next() & 0xf_ffff, random.value() as u32);
        }
        _ => {
            machine.serial.push_input(data);
            machine.timers.advance(random.below(3_000_000));
        }
    }
}

#[test]
fn random_accesses_do_no_harm() {
    let machine = machine();
    let mut random = Random(0x5eed_cafe_f00d_d00d);
    for _ in 0..150_000 {
        one_access(&machine, &mut random);
    }
    // Whatever the guest did, it can still start over.
    machine.chips.reset();
    machine.bus.port_write(0x3fb, &[0x03]);
    let mut lcr = [0];
    machine.bus.port_read(0x3fb, &mut lcr);
    assert_eq!(lcr, [0x03]);
}

#[test]
fn random_accesses_from_several_threads_do_no_harm() {
    let machine = machine();
    std::thread::scope(|scope| {
        for seed in 1..=3 {
            let machine = &machine;
            scope.spawn(move || {
                let mut random = Random(seed);
                for _ in 0..20_000 {
                    one_access(machine, &mut random);
                }
            });
        }
    });
    machine.chips.reset();
    assert!(!machine.chips.local_apic(VcpuId(0)).unwrap().has_interrupt());
}

//! The DSDT: processors, the PCI host bridge with its windows, and the legacy devices with fixed addresses.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal, IO, If,
    Interrupt, Local, Memory32Fixed, Method, Name, NotEqual, ONE, Or, Package, PackageBuilder, Path,
    ResourceTemplate, Return, Scope, Store, Uuid, ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};
use berth_memory::layout::{
    PCI_ECAM_SIZE, PCI_ECAM_START, PCI_MMIO32_SIZE, PCI_MMIO32_START, PCI_MMIO64_SIZE, PCI_MMIO64_START,
    ports,
};

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::Platform;

/// Length of a table's header in bytes.
const HEADER_LEN: u32 = 36;
/// AML of ACPI 2.0 and later: integers have 64 bits.
const REVISION: u8 = 2;

/// `_OSC` of a PCI host bridge (PCI Firmware Specification 3.3, 4.5.1).
const PCI_OSC_UUID: &str = "33db4d5b-1ff7-401c-9657-7441c03dd766";
/// What the operating system may control: the PCI Express capability structure.
const OSC_GRANTED: u32 = 1 << 4;
/// Answers in the first dword: unknown UUID, unknown revision, some requests denied.
const OSC_BAD_UUID: u32 = 1 << 2;
const OSC_BAD_REVISION: u32 = 1 << 3;
const OSC_MASKED: u32 = 1 << 4;
/// Offset of the dword with the requests.
const OSC_CONTROL_OFFSET: u8 = 8;

const PCI_SLOTS: u32 = 32;
const PCI_PINS: u32 = 4;
/// Ports of CF8/CFC, which are not part of the host bridge's windows.
const PCI_CONFIG: u16 = 0xcf8;
const PCI_CONFIG_LEN: u8 = 8;
/// First port that PCI devices may take: those below are the board's.
const PCI_IO_START: u16 = 0x1000;

/// The whole table for `platform`.
pub fn table(platform: &Platform) -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", HEADER_LEN, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let mut aml = Vec::new();
    soft_off(&mut aml);
    let mut system = Vec::new();
    processors(platform, &mut system);
    host_bridge(&mut system);
    motherboard(&mut system);
    serial(&mut system);
    clock(&mut system);
    panic_port(&mut system);
    aml.extend(Scope::raw("_SB_".into(), system));
    dsdt.append_slice(&aml);
    dsdt
}

/// `\_S5`: what to write to PM1a control for soft off.
fn soft_off(aml: &mut Vec<u8>) {
    let sleep_type = ports::SLP_TYP_S5;
    Name::new("_S5_".into(), &Package::new(vec![&sleep_type, &sleep_type, &ZERO, &ZERO])).to_aml_bytes(aml);
}

/// One processor device a vCPU; `_UID` is the one of the MADT.
fn processors(platform: &Platform, aml: &mut Vec<u8>) {
    for id in 0..platform.vcpus {
        let name = format!("C{id:03}");
        Device::new(
            name.as_str().into(),
            vec![&Name::new("_HID".into(), &"ACPI0007"), &Name::new("_UID".into(), &id)],
        )
        .to_aml_bytes(aml);
    }
}

fn host_bridge(aml: &mut Vec<u8>) {
    let buses = AddressSpace::new_bus_number(0_u16, 0xff_u16);
    let config = IO::new(PCI_CONFIG, PCI_CONFIG, 1, PCI_CONFIG_LEN);
    let io = AddressSpace::new_io(PCI_IO_START, 0xffff_u16, None);
    let mmio32 = memory_window(PCI_MMIO32_START.0 as u32, (PCI_MMIO32_START.0 + PCI_MMIO32_SIZE - 1) as u32);
    let mmio64 = memory_window(PCI_MMIO64_START.0, PCI_MMIO64_START.0 + PCI_MMIO64_SIZE - 1);
    let windows = ResourceTemplate::new(vec![&buses, &config, &io, &mmio32, &mmio64]);
    let mut routes = PackageBuilder::new();
    for (slot, pin) in (0..PCI_SLOTS).flat_map(|slot| (0..PCI_PINS).map(move |pin| (slot, pin))) {
        let address = slot << 16 | 0xffff;
        let gsi = u32::from(ports::PCI_INTX_GSI) + (slot + pin) % PCI_PINS;
        routes.add_element(&Package::new(vec![&address, &pin, &ZERO, &gsi]));
    }
    Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_SEG".into(), &ZERO),
            &Name::new("_BBN".into(), &ZERO),
            // Coherent DMA.
            &Name::new("_CCA".into(), &ONE),
            &Name::new("_CRS".into(), &windows),
            &Name::new("_PRT".into(), &routes),
            &OperatingSystemControl,
        ],
    )
    .to_aml_bytes(aml);
}

fn memory_window<T: Default>(first: T, last: T) -> AddressSpace<T> {
    AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, first, last, None)
}

/// `_OSC` (ACPI 6.5, 6.2.11): the operating system asks in the third dword what it may control, and finds the answer
/// there. The first dword takes the errors.
struct OperatingSystemControl;

impl Aml for OperatingSystemControl {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let (status, control, asked) = (Path::new("STAT"), Path::new("CTRL"), Local(0));
        let bad_uuid = Or::new(&status, &status, &OSC_BAD_UUID);
        let bad_revision = Or::new(&status, &status, &OSC_BAD_REVISION);
        let masked = Or::new(&status, &status, &OSC_MASKED);
        Method::new(
            "_OSC".into(),
            4,
            true,
            vec![
                &CreateDWordField::new(&status, &Arg(3), &ZERO),
                &If::new(
                    &Equal::new(&Arg(0), &Uuid::new(PCI_OSC_UUID)),
                    vec![
                        &CreateDWordField::new(&control, &Arg(3), &OSC_CONTROL_OFFSET),
                        &Store::new(&asked, &control),
                        &And::new(&control, &control, &OSC_GRANTED),
                        &If::new(&NotEqual::new(&asked, &control), vec![&masked]),
                        &If::new(&NotEqual::new(&Arg(1), &ONE), vec![&bad_revision]),
                    ],
                ),
                &Else::new(vec![&bad_uuid]),
                &Return::new(&Arg(3)),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// Addresses that no device driver may take: the PCI configuration space and the ports of power management.
fn motherboard(aml: &mut Vec<u8>) {
    let pm_len = (ports::GPE0 - ports::PM1A_EVT) as u8 + ports::GPE0_LEN;
    legacy_device(
        "MBRD",
        "PNP0C02",
        vec![
            &Memory32Fixed::new(true, PCI_ECAM_START.0 as u32, PCI_ECAM_SIZE as u32),
            &IO::new(ports::PM1A_EVT, ports::PM1A_EVT, 1, pm_len),
        ],
        aml,
    );
}

fn serial(aml: &mut Vec<u8>) {
    legacy_device(
        "COM1",
        "PNP0501",
        vec![&IO::new(ports::SERIAL, ports::SERIAL, 1, 8), &isa_interrupt(ports::SERIAL_IRQ)],
        aml,
    );
}

fn clock(aml: &mut Vec<u8>) {
    legacy_device(
        "RTC0",
        "PNP0B00",
        vec![&IO::new(ports::CMOS, ports::CMOS, 1, 2), &isa_interrupt(ports::CMOS_IRQ)],
        aml,
    );
}

/// Where the guest's kernel tells that it has panicked. The identifier is QEMU's, and no EISA one.
fn panic_port(aml: &mut Vec<u8>) {
    Device::new(
        "PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&IO::new(ports::PANIC, ports::PANIC, 1, 1)]),
            ),
        ],
    )
    .to_aml_bytes(aml);
}

/// An ISA interrupt: edge-triggered, active high, not shared.
fn isa_interrupt(irq: u8) -> Interrupt {
    Interrupt::new(true, true, false, false, u32::from(irq))
}

fn legacy_device(name: &str, hid: &str, resources: Vec<&dyn Aml>, aml: &mut Vec<u8>) {
    Device::new(
        name.into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new(hid)),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
        ],
    )
    .to_aml_bytes(aml);
}

//! The ACPI tables (ACPI 6.5), written where firmware would have left them.
//!
//! ```text
//!   RSDP (0xe0000) ──► XSDT ──► FADT ──► DSDT, FACS
//!                          ├──► MADT: local APICs, I/O APIC, overrides
//!                          └──► MCFG: PCI configuration space
//! ```
//! The numbers are those of [`berth_memory::layout`], which the devices use too. The machine is in ACPI mode from
//! the start: there is no SMI command port.

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, facs::FACS, mcfg::MCFG, rsdp::Rsdp, xsdt::XSDT};
use berth_memory::layout::{IOAPIC_BASE, LAPIC_BASE, PCI_ECAM_START, ports};
use berth_memory::{GuestMemory, GuestPhysAddr, MemoryError};

use crate::Platform;
use crate::low_memory::{ACPI, HIGH_MEMORY};

mod dsdt;

/// Who made the tables, as every table says it.
const OEM_ID: [u8; 6] = *b"BERTH ";
const OEM_TABLE_ID: [u8; 8] = *b"BERTHVM ";
const OEM_REVISION: u32 = 1;

/// The FACS must be 64-byte aligned (ACPI 6.5, 5.2.10); all tables are.
const ALIGNMENT: u64 = 64;

/// Length of the MADT before its entries, in bytes (ACPI 6.5, 5.2.12).
const MADT_HEADER_LEN: u32 = 44;
const MADT_REVISION: u8 = 5;
/// MADT flag: 8259 PICs are there too.
const PCAT_COMPAT: u32 = 1;
/// ID of the I/O APIC: behind those of the local APICs.
const IOAPIC_ID: u8 = berth_cpu::MAX_VCPUS;

/// FADT boot flags (ACPI 6.5, table 5.10): legacy devices, 8042, no VGA.
const BOOT_FLAGS: u16 = 1 << 0 | 1 << 1 | 1 << 2;
/// C2 and C3 latency of processors that have neither state.
const NO_C_STATE: u16 = 0xfff;
/// CMOS index of the century.
const CENTURY: u8 = 0x32;

/// Writes all tables for `platform`; returns where the RSDP is.
///
/// # Errors
/// [`MemoryError::OutOfRange`] when there is no RAM below 1 MiB, or the tables outgrow their area.
pub fn write(memory: &GuestMemory, platform: &Platform) -> Result<GuestPhysAddr, MemoryError> {
    let mut area = Area { memory, next: ACPI + ALIGNMENT };
    let dsdt = area.place(&bytes(&dsdt::table(platform)))?;
    let facs = area.place(&bytes(&FACS::new()))?;
    let fadt = area.place(&fadt(dsdt, facs))?;
    let madt = area.place(&bytes(&madt(platform)))?;
    let mcfg = area.place(&bytes(&mcfg()))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in [fadt, madt, mcfg] {
        xsdt.add_entry(table.0);
    }
    let xsdt = area.place(&bytes(&xsdt))?;
    memory.write(ACPI, &bytes(&Rsdp::new(OEM_ID, xsdt.0)))?;
    Ok(ACPI)
}

/// The part of the area that is still free.
struct Area<'a> {
    memory: &'a GuestMemory,
    next: GuestPhysAddr,
}

impl Area<'_> {
    fn place(&mut self, table: &[u8]) -> Result<GuestPhysAddr, MemoryError> {
        let start = self.next;
        let len = table.len() as u64;
        if start.0 + len > HIGH_MEMORY.0 {
            return Err(MemoryError::OutOfRange { start, len });
        }
        self.memory.write(start, table)?;
        self.next = GuestPhysAddr((start.0 + len).next_multiple_of(ALIGNMENT));
        Ok(start)
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// A register of `bits` at an I/O port, 32 bits at the most.
fn port_register(port: u16, bits: u8) -> GAS {
    let access = match bits {
        8 => AccessSize::ByteAccess,
        16 => AccessSize::WordAccess,
        32 => AccessSize::DwordAccess,
        _ => AccessSize::Undefined,
    };
    GAS::new(AddressSpace::SystemIo, bits, 0, access, u64::from(port))
}

/// Fixed hardware (ACPI 6.5, 5.2.9). The power button is a fixed one because its "absent" flag is clear.
fn fadt(dsdt: GuestPhysAddr, facs: GuestPhysAddr) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup)
        .firmware_ctrl_32(facs.0 as u32)
        .dsdt_64(dsdt.0)
        .gpe_info(ports::GPE0.into(), 0, ports::GPE0_LEN, 0, 0);
    fadt.dsdt = (dsdt.0 as u32).into();
    fadt.sci_int = u16::from(ports::SCI_GSI).into();
    fadt.pm1a_evt_blk = u32::from(ports::PM1A_EVT).into();
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = u32::from(ports::PM1A_CNT).into();
    fadt.pm1_cnt_len = 2;
    fadt.pm_tmr_blk = u32::from(ports::PM_TMR).into();
    fadt.pm_tmr_len = 4;
    fadt.p_lvl2_lat = NO_C_STATE.into();
    fadt.p_lvl3_lat = NO_C_STATE.into();
    fadt.century = CENTURY;
    fadt.iapc_boot_arch = BOOT_FLAGS.into();
    fadt.reset_reg = port_register(ports::RESET, 8);
    fadt.reset_value = ports::RESET_VALUE;
    fadt.x_pm1a_evt_blk = port_register(ports::PM1A_EVT, 32);
    fadt.x_pm1a_cnt_blk = port_register(ports::PM1A_CNT, 16);
    fadt.x_pm_tmr_blk = port_register(ports::PM_TMR, 32);
    fadt.x_gpe0_blk = port_register(ports::GPE0, ports::GPE0_LEN * 8);
    bytes(&fadt.finalize())
}

/// Interrupt controllers (ACPI 6.5, 5.2.12).
fn madt(platform: &Platform) -> Sdt {
    let mut madt = Sdt::new(*b"APIC", MADT_HEADER_LEN, MADT_REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    madt.write_u32(36, LAPIC_BASE.0 as u32);
    madt.write_u32(40, PCAT_COMPAT);
    for id in 0..platform.vcpus {
        madt.append_slice(&bytes(&ProcessorLocalApic::new(id, id, EnabledStatus::Enabled)));
    }
    madt.append_slice(&bytes(&IoApic::new(IOAPIC_ID, IOAPIC_BASE.0 as u32, 0)));
    // The timer is on pin 2, as on every PC; polarity and trigger as the bus has them.
    madt.append_slice(&source_override(0, 2, 0));
    // The SCI: active high (1), level-triggered (3).
    madt.append_slice(&source_override(ports::SCI_GSI, ports::SCI_GSI, 0b1101));
    // NMI on LINT1 of all processors (0xff).
    madt.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    madt
}

/// ISA interrupt `irq` is at `gsi` with MPS flags `flags` (ACPI 6.5, 5.2.12.5).
fn source_override(irq: u8, gsi: u8, flags: u16) -> [u8; 10] {
    let [low, high] = flags.to_le_bytes();
    [2, 10, 0, irq, gsi, 0, 0, 0, low, high]
}

/// PCI configuration space (PCI Firmware Specification 3.3, 4.1.2).
fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(PCI_ECAM_START.0, 0, 0, 0xff);
    mcfg
}

#[cfg(test)]
mod tests;

//! The guest physical address map, as on a PC with a Q35-like chip set.
//!
//! ```text
//!   0 ─────────── LOW_RAM_END ── ECAM ── 32-bit MMIO ── IOAPIC/LAPIC ── 4 GiB ── high RAM ── 64-bit MMIO
//! ```

use crate::GuestPhysAddr;

/// End of RAM below 4 GiB at the most: the hole for devices starts here (3 GiB).
pub const LOW_RAM_END: GuestPhysAddr = GuestPhysAddr(0xC000_0000);
/// Start of RAM above the hole (4 GiB).
pub const HIGH_RAM_START: GuestPhysAddr = GuestPhysAddr(1 << 32);
/// PCI Express configuration space (ECAM), 256 MiB for 256 buses.
pub const PCI_ECAM_START: GuestPhysAddr = GuestPhysAddr(0xE000_0000);
/// Size of the ECAM window in bytes.
pub const PCI_ECAM_SIZE: u64 = 0x1000_0000;
/// Window for 32-bit PCI memory BARs.
pub const PCI_MMIO32_START: GuestPhysAddr = GuestPhysAddr(0xC000_0000);
/// Size of the window for 32-bit PCI memory BARs in bytes.
pub const PCI_MMIO32_SIZE: u64 = 0x2000_0000;
/// The I/O APIC's registers.
pub const IOAPIC_BASE: GuestPhysAddr = GuestPhysAddr(0xFEC0_0000);
/// The local APIC's registers after reset (SDM volume 3, 11.4.1).
pub const LAPIC_BASE: GuestPhysAddr = GuestPhysAddr(0xFEE0_0000);
/// Window for 64-bit PCI memory BARs: 64 GiB from 512 GiB on, above the largest RAM.
pub const PCI_MMIO64_START: GuestPhysAddr = GuestPhysAddr(0x80_0000_0000);
/// Size of the window for 64-bit PCI memory BARs in bytes.
pub const PCI_MMIO64_SIZE: u64 = 0x10_0000_0000;
/// Largest RAM of one VM in bytes: what fits between 0 and [`PCI_MMIO64_START`] without the hole.
pub const MAX_RAM: u64 = PCI_MMIO64_START.0 - (HIGH_RAM_START.0 - LOW_RAM_END.0);

/// Port numbers, interrupt numbers and values that the devices and the ACPI tables must agree on.
pub mod ports {
    /// 16550 serial port COM1, 8 ports.
    pub const SERIAL: u16 = 0x3f8;
    /// Interrupt of COM1.
    pub const SERIAL_IRQ: u8 = 4;
    /// CMOS and RTC: index at this port, data at the next.
    pub const CMOS: u16 = 0x70;
    /// Interrupt of the RTC.
    pub const CMOS_IRQ: u8 = 8;
    /// ACPI PM1a event block: status and enable, 2 bytes each (ACPI 6.5, 4.8.3.1).
    pub const PM1A_EVT: u16 = 0x600;
    /// ACPI PM1a control block, 2 bytes (ACPI 6.5, 4.8.3.2).
    pub const PM1A_CNT: u16 = 0x604;
    /// ACPI power-management timer, 4 bytes, 32 bits wide (ACPI 6.5, 4.8.3.3).
    pub const PM_TMR: u16 = 0x608;
    /// ACPI general-purpose event block 0: status, then enable.
    pub const GPE0: u16 = 0x620;
    /// Length of the general-purpose event block 0 in bytes: half status, half enable.
    pub const GPE0_LEN: u8 = 16;
    /// Global system interrupt of ACPI events: level-triggered, active high.
    pub const SCI_GSI: u8 = 9;
    /// SLP_TYP that means S5 (soft off) in PM1a control.
    pub const SLP_TYP_S5: u8 = 5;
    /// Reset control register; [`RESET_VALUE`] resets the machine.
    pub const RESET: u16 = 0xcf9;
    /// What the ACPI reset register takes.
    pub const RESET_VALUE: u8 = 6;
    /// Debug exit: ends the VM with `(value << 1) | 1`.
    pub const DEBUG_EXIT: u16 = 0xf4;
    /// The guest's kernel tells here that it has panicked (QEMU, docs/specs/pvpanic).
    pub const PANIC: u16 = 0x505;
    /// PCI pin A of device 0 goes to this GSI; pin `p` (0 to 3) of device `d` to this plus `(d + p) % 4`.
    pub const PCI_INTX_GSI: u8 = 16;
}

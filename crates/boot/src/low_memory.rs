//! What Berth puts below 1 MiB before the guest starts.
//!
//! ```text
//!   0x00400  BIOS data area: where conventional memory ends
//!   0x90000  GDT
//!   0x91000  page tables: PML4, PDPT, four PDs (64-bit entry only)
//!   0x97000  boot information: zero page, start info or multiboot information
//!   0x98000  memory map and module list (PVH and multiboot)
//!   0x99000  command line, then short strings
//!   0x9fc00  ── end of conventional memory: EBDA, VGA and BIOS areas, reserved in every memory map ──
//!   0xe0000  ACPI: RSDP first, then the tables
//!  0x100000  RAM again
//! ```

use berth_memory::GuestPhysAddr;

/// Start of everything that [`crate::load`] needs in conventional memory.
pub const BOOT_DATA: GuestPhysAddr = GuestPhysAddr(0x9_0000);
/// Global descriptor table.
pub const GDT: GuestPhysAddr = BOOT_DATA;
/// Top level of the page tables.
pub const PML4: GuestPhysAddr = GuestPhysAddr(0x9_1000);
/// Page-directory-pointer table, four entries used.
pub const PDPT: GuestPhysAddr = GuestPhysAddr(0x9_2000);
/// Four page directories, one after the other.
pub const PAGE_DIRECTORIES: GuestPhysAddr = GuestPhysAddr(0x9_3000);
/// The structure that the boot protocol hands to the kernel.
pub const BOOT_INFO: GuestPhysAddr = GuestPhysAddr(0x9_7000);
/// Tables that the boot information points to.
pub const BOOT_TABLES: GuestPhysAddr = GuestPhysAddr(0x9_8000);
/// The kernel's command line, NUL-terminated.
pub const CMDLINE: GuestPhysAddr = GuestPhysAddr(0x9_9000);
/// Room for the command line in bytes, its NUL included.
pub const CMDLINE_SIZE: u64 = 0x4000;
/// Names of modules and of the boot loader.
pub const STRINGS: GuestPhysAddr = GuestPhysAddr(0x9_d000);
/// Room for each of the strings in bytes.
pub const STRING_SIZE: u64 = 0x400;
/// End of conventional memory; the extended BIOS data area follows.
pub const CONVENTIONAL_END: GuestPhysAddr = GuestPhysAddr(0x9_fc00);
/// The RSDP, and after it the other ACPI tables: where operating systems look without UEFI (ACPI 6.5, 5.2.5.1).
pub const ACPI: GuestPhysAddr = GuestPhysAddr(0xe_0000);
/// RAM starts again.
pub const HIGH_MEMORY: GuestPhysAddr = GuestPhysAddr(0x10_0000);
/// Word in the BIOS data area: segment of the extended BIOS data area.
pub const BDA_EBDA_SEGMENT: GuestPhysAddr = GuestPhysAddr(0x40e);
/// Word in the BIOS data area: KiB of conventional memory.
pub const BDA_MEMORY_SIZE: GuestPhysAddr = GuestPhysAddr(0x413);

//! Linux's bzImage by its 64-bit entry (Documentation/arch/x86/boot.rst).
//!
//! ```text
//!   file:    setup code, setup header at 0x1f1 │ protected-mode kernel (decompressor and payload)
//!   memory:  zero page ◄── header copied         pref_address ◄── copied; init_size bytes are its own
//! ```
//! The kernel starts at its 512th byte in 64-bit mode with RSI pointing to the zero page.

use berth_memory::{GuestMemory, GuestPhysAddr};
use linux_loader::loader::bootparam::{
    LOADED_HIGH, XLF_KERNEL_64, boot_e820_entry, boot_params, setup_header,
};
use vm_memory::ByteValued;

use crate::cpu::{ZERO_PAGE_REGISTER, long_mode, with_register};
use crate::image::{Image, ImageError};
use crate::low_memory::{BOOT_INFO, CMDLINE, HIGH_MEMORY};
use crate::memory_map::memory_map;
use crate::placement::PlacementError;
use crate::{Booted, KernelError, Loader, Protocol};

/// Offset of the setup header in the file and in the zero page.
const HEADER_OFFSET: u64 = 0x1f1;
/// Offset of the magic number [`MAGIC`].
const MAGIC_OFFSET: usize = 0x202;
const MAGIC: &[u8] = b"HdrS";
const BOOT_FLAG: u16 = 0xaa55;
/// Boot protocol 2.12 brought the 64-bit entry (Linux 3.8).
const FIRST_VERSION: u16 = 0x020c;
/// The header must reach this far to hold `init_size`.
const HEADER_END: u64 = 0x264;
/// Offset of the 64-bit entry in the protected-mode kernel.
const ENTRY_64: u64 = 0x200;
const SECTOR: u64 = 512;
/// `type_of_loader` of a boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;

/// Why a bzImage cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BzImageError {
    /// Reading or copying failed.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// It does not fit.
    #[error(transparent)]
    Placement(#[from] PlacementError),
    /// The kernel is too old.
    #[error(
        "is a bzImage of boot protocol {}.{:02}: at least 2.12 is needed (Linux 3.8)", .version >> 8, .version & 0xff
    )]
    OldProtocol {
        /// The version as in the header.
        version: u16,
    },
    /// The kernel is a 32-bit one.
    #[error("is a bzImage without a 64-bit entry: a 64-bit kernel is needed")]
    No64BitEntry,
    /// The header contradicts itself.
    #[error("is a damaged bzImage: {0}")]
    Damaged(&'static str),
}

/// Whether the file's beginning is that of a bzImage (or of an old zImage, which is refused later).
pub fn detect(head: &[u8]) -> bool {
    head.get(MAGIC_OFFSET..MAGIC_OFFSET + MAGIC.len()) == Some(MAGIC)
}

/// Loads the kernel, the initrd and the zero page.
pub fn load(loader: &mut Loader<'_>, kernel: &mut Image<'_>) -> Result<Booted, KernelError> {
    let header = read_header(kernel).map_err(KernelError::BzImage)?;
    let start = load_kernel(loader, kernel, &header).map_err(KernelError::BzImage)?;
    let initrd = loader.load_initrd(u64::from(header.initrd_addr_max).saturating_add(1))?;
    // cmdline_size does not count the NUL.
    loader.write_cmdline(loader.cmdline, u64::from(header.cmdline_size).saturating_add(1))?;

    let mut params = boot_params { hdr: header, ..boot_params::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.code32_start = start.0 as u32;
    params.hdr.cmd_line_ptr = CMDLINE.0 as u32;
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = initrd.start;
        params.hdr.ramdisk_size = initrd.len;
    }
    params.acpi_rsdp_addr = loader.rsdp.0;
    write_e820(&mut params, loader.memory);
    loader.memory.write(BOOT_INFO, params.as_slice()).map_err(ImageError::from)?;

    let state = long_mode(loader.memory, start.0 + ENTRY_64).map_err(ImageError::from)?;
    let state = with_register(state, ZERO_PAGE_REGISTER, BOOT_INFO.0);
    Ok(Booted { state, protocol: Protocol::LinuxBzImage })
}

/// The setup header: fields that this kernel's version lacks are zero.
fn read_header(kernel: &mut Image<'_>) -> Result<setup_header, BzImageError> {
    let mut header = setup_header::default();
    let mut bytes = [0; size_of::<setup_header>()];
    let mut jump = [0; 2];
    kernel.read_at("the setup header", 0x200, &mut jump)?;
    // The header ends where its short jump leads.
    let end = 0x202 + u64::from(jump[1]);
    let len = (end.saturating_sub(HEADER_OFFSET) as usize).min(bytes.len());
    kernel.read_at("the setup header", HEADER_OFFSET, &mut bytes[..len])?;
    header.as_mut_slice().copy_from_slice(&bytes);

    if header.boot_flag != BOOT_FLAG {
        return Err(BzImageError::Damaged("the boot sector's signature is missing"));
    }
    if header.version < FIRST_VERSION {
        return Err(BzImageError::OldProtocol { version: header.version });
    }
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BzImageError::No64BitEntry);
    }
    if end < HEADER_END {
        return Err(BzImageError::Damaged("the setup header is too short for its version"));
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(BzImageError::Damaged("it wants to be loaded below 1 MiB"));
    }
    Ok(header)
}

/// Copies the protected-mode part to its preferred address and returns that.
fn load_kernel(
    loader: &mut Loader<'_>,
    kernel: &mut Image<'_>,
    header: &setup_header,
) -> Result<GuestPhysAddr, BzImageError> {
    let sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    let setup_len = (sectors + 1) * SECTOR;
    let stated_len = u64::from(header.syssize) * 16;
    kernel.check("the kernel", setup_len, stated_len)?;
    let len = kernel.len() - setup_len;
    if stated_len <= ENTRY_64 {
        return Err(BzImageError::Damaged("it has no code"));
    }
    let payload_end = u64::from(header.payload_offset) + u64::from(header.payload_length);
    if payload_end > len {
        return Err(BzImageError::Damaged("its compressed kernel is longer than the file"));
    }
    let start = GuestPhysAddr(header.pref_address);
    if start < HIGH_MEMORY {
        return Err(BzImageError::Damaged("its preferred address is below 1 MiB"));
    }
    loader.placement.claim("kernel", start, len.max(u64::from(header.init_size)))?;
    kernel.copy_to("the kernel", setup_len, len, loader.memory, start)?;
    Ok(start)
}

fn write_e820(params: &mut boot_params, memory: &GuestMemory) {
    let map = memory_map(memory);
    params.e820_entries = map.len() as u8;
    for (i, r) in map.iter().enumerate() {
        params.e820_table[i] = boot_e820_entry { addr: r.start.0, size: r.len, r#type: r.kind as u32 };
    }
}

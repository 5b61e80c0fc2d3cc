//! Multiboot 1 kernels (Multiboot Specification 0.6.96): a header in the first 8 KiB, ELF or loaded as the header
//! says, entered in 32-bit protected mode with EAX the magic number and EBX the multiboot information.
//!
//! 64-bit ELF files are taken too: the entry is 32-bit code all the same.

use berth_cpu::bits::gpr;
use berth_memory::{GuestPhysAddr, MemoryError};

use crate::cpu::{protected_mode, with_register};
use crate::elf::{Elf, ElfError, LoadSegment};
use crate::image::{Image, ImageError};
use crate::low_memory::{
    BOOT_INFO, BOOT_TABLES, CMDLINE, CMDLINE_SIZE, CONVENTIONAL_END, HIGH_MEMORY, STRING_SIZE, STRINGS,
};
use crate::memory_map::{low_ram_end, memory_map};
use crate::{Booted, KernelError, LoadedInitrd, Loader, Protocol};

/// The header lies in this many bytes (specification, 3.1).
pub const SEARCH_LEN: usize = 8192;
const HEADER_MAGIC: u32 = 0x1bad_b002;
/// What EAX says at the entry (specification, 3.2).
const ENTRY_MAGIC: u64 = 0x2bad_b002;

/// Header flags that must be understood: bits 0 to 15. Modules are page-aligned (0) and memory is described (1)
/// always; a wish for a video mode (2) cannot be fulfilled and kernels cope; others are unknown.
const UNKNOWN_REQUIREMENTS: u32 = 0xfff8;
/// The header says where to load the file (bit 16).
const HAS_ADDRESSES: u32 = 1 << 16;

/// Fields of the multiboot information that are valid (specification, 3.3).
const INFO_MEMORY: u32 = 1 << 0;
const INFO_CMDLINE: u32 = 1 << 2;
const INFO_MODULES: u32 = 1 << 3;
const INFO_MEMORY_MAP: u32 = 1 << 6;
const INFO_LOADER_NAME: u32 = 1 << 9;
/// Length of the multiboot information up to and with the loader's name, in bytes.
const INFO_LEN: usize = 68;

/// Why a multiboot kernel cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum MultibootError {
    /// The kernel insists on something that Berth does not know.
    #[error("is a multiboot kernel that requires features that Berth does not have (flags {flags:#x})")]
    Requirements {
        /// The unknown ones of the required flags.
        flags: u32,
    },
    /// The addresses in the header make no sense.
    #[error("is a damaged multiboot kernel: {0}")]
    Damaged(&'static str),
}

/// The multiboot header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Its offset in the file.
    offset: u64,
    flags: u32,
    /// header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr.
    addresses: [u32; 5],
}

impl Header {
    /// Whether the header, not ELF segments, says what is loaded where.
    pub fn has_addresses(&self) -> bool {
        self.flags & HAS_ADDRESSES != 0
    }
}

/// Finds the header in the file's beginning.
pub fn detect(head: &[u8]) -> Option<Header> {
    let head = &head[..head.len().min(SEARCH_LEN)];
    (0..head.len()).step_by(4).find_map(|offset| {
        let word = |i: usize| {
            let bytes = head.get(offset + i * 4..offset + i * 4 + 4)?;
            bytes.try_into().ok().map(u32::from_le_bytes)
        };
        let (magic, flags, checksum) = (word(0)?, word(1)?, word(2)?);
        if magic != HEADER_MAGIC || magic.wrapping_add(flags).wrapping_add(checksum) != 0 {
            return None;
        }
        let mut addresses = [0; 5];
        if flags & HAS_ADDRESSES != 0 {
            for (i, address) in addresses.iter_mut().enumerate() {
                *address = word(3 + i)?;
            }
        }
        Some(Header { offset: offset as u64, flags, addresses })
    })
}

/// Loads the kernel, the initrd as its module, and the multiboot information. `elf` is given if its segments say
/// what to load.
pub fn load(
    loader: &mut Loader<'_>,
    kernel: &mut Image<'_>,
    header: &Header,
    elf: Option<&Elf>,
) -> Result<Booted, KernelError> {
    let flags = header.flags & UNKNOWN_REQUIREMENTS;
    if flags != 0 {
        return Err(MultibootError::Requirements { flags }.into());
    }
    let entry = match elf {
        Some(elf) => {
            elf.load(kernel, loader.memory, &mut loader.placement)?;
            elf.physical_entry()?
        }
        None => load_by_addresses(loader, kernel, header)?,
    };
    let initrd = loader.load_initrd(u64::MAX)?;
    // The first word is the kernel's name, as GRUB has it: kernels skip it.
    let cmdline = format!("{} {}", loader.kernel_name, loader.cmdline);
    loader.write_cmdline(&cmdline, CMDLINE_SIZE)?;
    write_info(loader, initrd).map_err(ImageError::from)?;
    let state = protected_mode(loader.memory, entry).map_err(ImageError::from)?;
    let state = with_register(state, gpr::RAX, ENTRY_MAGIC);
    Ok(Booted { state: with_register(state, gpr::RBX, BOOT_INFO.0), protocol: Protocol::Multiboot1 })
}

/// Loads a file whose header says what goes where (specification, 3.1.3), ELF or not.
fn load_by_addresses(
    loader: &mut Loader<'_>,
    kernel: &mut Image<'_>,
    header: &Header,
) -> Result<u32, KernelError> {
    if !header.has_addresses() {
        return Err(MultibootError::Damaged(
            "it is no ELF file, and its header does not say where to load it",
        )
        .into());
    }
    let [header_addr, load_addr, load_end, bss_end, entry] = header.addresses;
    let before_header = header_addr
        .checked_sub(load_addr)
        .ok_or(MultibootError::Damaged("its load address is behind its header's address"))?;
    let offset = header
        .offset
        .checked_sub(u64::from(before_header))
        .ok_or(MultibootError::Damaged("its load address is before the start of the file"))?;
    let file_len = match load_end {
        0 => kernel.len() - offset,
        end => u64::from(
            end.checked_sub(load_addr).ok_or(MultibootError::Damaged("it ends before its load address"))?,
        ),
    };
    let memory_len = match bss_end {
        0 => file_len,
        end => u64::from(end).saturating_sub(u64::from(load_addr)).max(file_len),
    };
    let phys = GuestPhysAddr(u64::from(load_addr));
    let segment = LoadSegment { offset, virt: phys.0, phys, file_len, memory_len };
    let elf = Elf { entry: u64::from(entry), segments: vec![segment], pvh_entry: None };
    let entry = elf
        .check_entry(elf.entry)
        .map_err(|_| MultibootError::Damaged("its entry is not in what is loaded"))?;
    elf.load(kernel, loader.memory, &mut loader.placement).map_err(|e| match e {
        ElfError::Image(e) => KernelError::Image(e),
        other => KernelError::Elf(other),
    })?;
    Ok(entry)
}

/// Module list first, the memory map behind it, both in [`BOOT_TABLES`].
fn write_info(loader: &Loader<'_>, initrd: Option<LoadedInitrd>) -> Result<(), MemoryError> {
    let memory = loader.memory;
    let module_name = STRINGS;
    let loader_name = STRINGS + STRING_SIZE;
    write_string(loader, module_name, loader.initrd_name)?;
    write_string(loader, loader_name, "Berth")?;

    let mut tables = Vec::new();
    if let Some(initrd) = initrd {
        for word in [initrd.start, initrd.start + initrd.len, module_name.0 as u32, 0] {
            tables.extend_from_slice(&word.to_le_bytes());
        }
    }
    let map_start = BOOT_TABLES.0 as u32 + tables.len() as u32;
    let map_offset = tables.len();
    for r in memory_map(memory) {
        // The size field does not count itself.
        tables.extend_from_slice(&20_u32.to_le_bytes());
        tables.extend_from_slice(&r.start.0.to_le_bytes());
        tables.extend_from_slice(&r.len.to_le_bytes());
        tables.extend_from_slice(&(r.kind as u32).to_le_bytes());
    }
    memory.write(BOOT_TABLES, &tables)?;

    let mut info = [0_u8; INFO_LEN];
    let mut put = |offset: usize, value: u32| info[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    put(0, INFO_MEMORY | INFO_CMDLINE | INFO_MODULES | INFO_MEMORY_MAP | INFO_LOADER_NAME);
    put(4, (CONVENTIONAL_END.0 >> 10) as u32);
    put(8, (low_ram_end(memory).0.saturating_sub(HIGH_MEMORY.0) >> 10) as u32);
    put(16, CMDLINE.0 as u32);
    put(20, u32::from(initrd.is_some()));
    put(24, BOOT_TABLES.0 as u32);
    put(44, (tables.len() - map_offset) as u32);
    put(48, map_start);
    put(64, loader_name.0 as u32);
    memory.write(BOOT_INFO, &info)
}

/// Writes `text` with its NUL, cut to the room that there is.
fn write_string(loader: &Loader<'_>, at: GuestPhysAddr, text: &str) -> Result<(), MemoryError> {
    let room = STRING_SIZE as usize - 1;
    let mut bytes: Vec<u8> = text.bytes().take(room).collect();
    bytes.push(0);
    loader.memory.write(at, &bytes)
}

//! ELF kernels with a PVH entry (Xen's docs/misc/pvh.pandoc, xen/include/public/arch-x86/hvm/start_info.h).
//!
//! The entry is called in 32-bit protected mode with EBX pointing to `hvm_start_info`.

use berth_cpu::bits::gpr;
use berth_memory::MemoryError;
use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::ByteValued;

use crate::cpu::{protected_mode, with_register};
use crate::elf::Elf;
use crate::image::{Image, ImageError};
use crate::low_memory::{BOOT_INFO, BOOT_TABLES, CMDLINE, CMDLINE_SIZE};
use crate::memory_map::memory_map;
use crate::{Booted, KernelError, LoadedInitrd, Loader, Protocol};

/// Version of `hvm_start_info` that has a memory map.
const START_INFO_VERSION: u32 = 1;

/// Loads the kernel, the initrd and the start info. `entry` is the note's address.
pub fn load(
    loader: &mut Loader<'_>,
    kernel: &mut Image<'_>,
    elf: &Elf,
    entry: u32,
) -> Result<Booted, KernelError> {
    let entry = elf.check_entry(u64::from(entry))?;
    elf.load(kernel, loader.memory, &mut loader.placement)?;
    let initrd = loader.load_initrd(u64::MAX)?;
    loader.write_cmdline(loader.cmdline, CMDLINE_SIZE)?;
    write_start_info(loader, initrd).map_err(ImageError::from)?;
    let state = protected_mode(loader.memory, entry).map_err(ImageError::from)?;
    Ok(Booted { state: with_register(state, gpr::RBX, BOOT_INFO.0), protocol: Protocol::Pvh })
}

/// Module list first, the memory map behind it, both in [`BOOT_TABLES`].
fn write_start_info(loader: &Loader<'_>, initrd: Option<LoadedInitrd>) -> Result<(), MemoryError> {
    let mut tables = Vec::new();
    if let Some(initrd) = initrd {
        let module = hvm_modlist_entry {
            paddr: initrd.start.into(),
            size: initrd.len.into(),
            ..hvm_modlist_entry::default()
        };
        tables.extend_from_slice(module.as_slice());
    }
    let memmap_paddr = BOOT_TABLES.0 + tables.len() as u64;
    let map = memory_map(loader.memory);
    for r in &map {
        let entry =
            hvm_memmap_table_entry { addr: r.start.0, size: r.len, type_: r.kind as u32, reserved: 0 };
        tables.extend_from_slice(entry.as_slice());
    }
    loader.memory.write(BOOT_TABLES, &tables)?;
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: START_INFO_VERSION,
        nr_modules: u32::from(initrd.is_some()),
        modlist_paddr: if initrd.is_some() { BOOT_TABLES.0 } else { 0 },
        cmdline_paddr: CMDLINE.0,
        rsdp_paddr: loader.rsdp.0,
        memmap_paddr,
        memmap_entries: map.len() as u32,
        ..hvm_start_info::default()
    };
    loader.memory.write(BOOT_INFO, info.as_slice())
}

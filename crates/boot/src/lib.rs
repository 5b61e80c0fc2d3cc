//! Puts a kernel, its initrd and the description of the machine into guest memory, and says in which state vCPU 0
//! starts.
//!
//! ```text
//!   kernel file ──detected by content──► bzImage │ ELF with multiboot header │ ELF with PVH note
//!                                           │              │                      │
//!   initrd, command line, memory map, ACPI ─┴──────────────┴──────────────────────┴──► guest memory, CpuState
//! ```
//!
//! There is no firmware: what firmware would leave behind (ACPI tables, BIOS data area) is written directly.
//! Every size and address in a file is checked before it is used: against the file, against the RAM, and against
//! everything else that is placed ([`placement`]).
//!
//! The same function serves the first start and every reset: it writes all that it needs, and clears what must be
//! zero, whatever the memory held before.

use std::fs::File;
use std::path::{Path, PathBuf};

use berth_cpu::CpuState;
use berth_memory::{GuestMemory, GuestPhysAddr, MemoryError};

pub mod acpi;
mod bzimage;
mod cpu;
mod elf;
mod image;
pub mod low_memory;
mod memory_map;
mod multiboot;
pub mod placement;
mod pvh;
#[cfg(test)]
mod tests;

pub use bzimage::BzImageError;
pub use elf::ElfError;
pub use image::{ImageError, Source};
pub use multiboot::MultibootError;
pub use placement::PlacementError;

use image::Image;
use low_memory::{BDA_EBDA_SEGMENT, BDA_MEMORY_SIZE, CMDLINE, CMDLINE_SIZE, CONVENTIONAL_END};
use placement::Placement;

/// What to boot.
#[derive(Clone, Debug)]
pub struct BootSource {
    /// The kernel: see the [crate's](crate) description for the formats.
    pub kernel: PathBuf,
    /// The initrd: Linux's initial RAM disk, or the one module of a multiboot kernel.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line, without NULs.
    pub cmdline: String,
}

/// What the tables must say about the machine.
#[derive(Clone, Copy, Debug)]
pub struct Platform {
    /// Number of vCPUs, 1 to [`berth_cpu::MAX_VCPUS`]; vCPU `n` has APIC ID `n`.
    pub vcpus: u8,
}

/// How the kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Linux's 64-bit boot protocol.
    LinuxBzImage,
    /// PVH's 32-bit entry.
    Pvh,
    /// Multiboot 1.
    Multiboot1,
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::LinuxBzImage => "Linux 64-bit boot protocol",
            Self::Pvh => "PVH",
            Self::Multiboot1 => "multiboot 1",
        })
    }
}

/// The outcome: everything else is in guest memory.
#[derive(Clone, Debug)]
pub struct Booted {
    /// The state of vCPU 0 at the kernel's entry.
    pub state: CpuState,
    /// How it is entered.
    pub protocol: Protocol,
}

/// Why the guest cannot be started. One line for people.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel.
    #[error("kernel {}: {source}", .path.display())]
    Kernel {
        /// Its file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<KernelError>,
    },
    /// The initrd.
    #[error("initrd {}: {source}", .path.display())]
    Initrd {
        /// Its file.
        path: PathBuf,
        /// What is wrong with it.
        source: ImageError,
    },
    /// The initrd is a file of no bytes.
    #[error("initrd {}: is empty", .path.display())]
    EmptyInitrd {
        /// Its file.
        path: PathBuf,
    },
    /// The number of vCPUs is impossible.
    #[error("{vcpus} vCPUs are not possible: from 1 to {} can be", berth_cpu::MAX_VCPUS)]
    Vcpus {
        /// What was asked for.
        vcpus: u8,
    },
    /// The machine's description could not be written.
    #[error("the machine's description does not fit into guest memory: {0}")]
    Tables(#[from] MemoryError),
}

/// What is wrong with a kernel file, or with what is loaded together with it.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// A file of no bytes.
    #[error("is empty")]
    Empty,
    /// No format that can be booted.
    #[error("is not a bzImage, not an ELF file with a PVH note, and not a multiboot 1 kernel")]
    UnknownFormat,
    /// An ELF file, but not a kernel.
    #[error("is an ELF file without a PVH note or a multiboot 1 header in its first 8 KiB")]
    NotBootableElf,
    /// Reading or copying failed.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Broken bzImage.
    #[error(transparent)]
    BzImage(#[from] BzImageError),
    /// Broken ELF file.
    #[error(transparent)]
    Elf(#[from] ElfError),
    /// Broken multiboot kernel.
    #[error(transparent)]
    Multiboot(#[from] MultibootError),
    /// Kernel and initrd do not fit.
    #[error(transparent)]
    Placement(#[from] PlacementError),
    /// The command line is too long.
    #[error("the command line has {len} bytes, this kernel takes at most {max}")]
    CmdlineTooLong {
        /// Its length in bytes.
        len: u64,
        /// The most that would do.
        max: u64,
    },
    /// A NUL ends a command line.
    #[error("the command line has a NUL character in it")]
    CmdlineHasNul,
    /// The initrd could not be copied.
    #[error("the initrd {0}")]
    Initrd(ImageError),
}

/// Loads `source` into `memory`, with the tables that describe `platform`.
///
/// # Errors
/// [`BootError`]: files that are missing, broken or of no known format; memory that is too small.
pub fn load(memory: &GuestMemory, source: &BootSource, platform: &Platform) -> Result<Booted, BootError> {
    let kernel_error =
        |e: KernelError| BootError::Kernel { path: source.kernel.clone(), source: Box::new(e) };
    let mut kernel = open(&source.kernel).map_err(|e| kernel_error(e.into()))?;
    let name = |path: &Path| path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let mut initrd = match &source.initrd {
        None => None,
        Some(path) => {
            let initrd_error = |e| BootError::Initrd { path: path.clone(), source: e };
            let file = open(path).map_err(initrd_error)?;
            if file.metadata().map_err(|e| initrd_error(e.into()))?.len() == 0 {
                return Err(BootError::EmptyInitrd { path: path.clone() });
            }
            Some((file, name(path)))
        }
    };
    check_platform(platform)?;
    let initrd = initrd.as_mut().map(|(file, name)| (file as &mut dyn Source, name.as_str()));
    let images = Images { kernel: &mut kernel, kernel_name: &name(&source.kernel), initrd };
    let rsdp = write_description(memory, platform)?;
    load_images(memory, images, &source.cmdline, rsdp).map_err(|e| match (e, &source.initrd) {
        (KernelError::Initrd(e), Some(path)) => BootError::Initrd { path: path.clone(), source: e },
        (e, _) => kernel_error(e),
    })
}

/// The files, wherever they come from.
pub struct Images<'a> {
    /// The kernel.
    pub kernel: &'a mut dyn Source,
    /// Its name, for kernels that are told.
    pub kernel_name: &'a str,
    /// The initrd and its name.
    pub initrd: Option<(&'a mut dyn Source, &'a str)>,
}

/// [`load`] for images that are not files, for instance in fuzzing.
///
/// # Errors
/// As [`load`], without the files' names.
pub fn load_from(
    memory: &GuestMemory,
    images: Images<'_>,
    cmdline: &str,
    platform: &Platform,
) -> Result<Booted, BootError> {
    check_platform(platform)?;
    let rsdp = write_description(memory, platform)?;
    let path = PathBuf::from(images.kernel_name);
    load_images(memory, images, cmdline, rsdp).map_err(|e| BootError::Kernel { path, source: Box::new(e) })
}

fn load_images(
    memory: &GuestMemory,
    images: Images<'_>,
    cmdline: &str,
    rsdp: GuestPhysAddr,
) -> Result<Booted, KernelError> {
    let mut kernel = Image::new(images.kernel)?;
    if kernel.len() == 0 {
        return Err(KernelError::Empty);
    }
    let (initrd, initrd_name) = match images.initrd {
        Some((source, name)) => (Some(Image::new(source).map_err(KernelError::Initrd)?), name),
        None => (None, ""),
    };
    let mut loader = Loader {
        memory,
        placement: Placement::new(memory),
        cmdline,
        kernel_name: images.kernel_name,
        initrd,
        initrd_name,
        rsdp,
    };
    let head = kernel.head(multiboot::SEARCH_LEN)?;
    let is_elf = head.starts_with(elf::MAGIC);
    // Hypervisors have both a multiboot header and a PVH note; the note is for running under Xen.
    if let Some(header) = multiboot::detect(&head) {
        let by_segments = is_elf && !header.has_addresses();
        let elf = if by_segments { Some(elf::Elf::parse(&mut kernel)?) } else { None };
        return multiboot::load(&mut loader, &mut kernel, &header, elf.as_ref());
    }
    if is_elf {
        let elf = elf::Elf::parse(&mut kernel)?;
        let entry = elf.pvh_entry.ok_or(KernelError::NotBootableElf)?;
        return pvh::load(&mut loader, &mut kernel, &elf, entry);
    }
    if bzimage::detect(&head) {
        return bzimage::load(&mut loader, &mut kernel);
    }
    Err(KernelError::UnknownFormat)
}

/// What the boot protocols share while they load.
struct Loader<'a> {
    memory: &'a GuestMemory,
    placement: Placement,
    cmdline: &'a str,
    kernel_name: &'a str,
    initrd: Option<Image<'a>>,
    initrd_name: &'a str,
    rsdp: GuestPhysAddr,
}

/// Where the initrd is: below 4 GiB.
#[derive(Clone, Copy)]
struct LoadedInitrd {
    start: u32,
    len: u32,
}

impl Loader<'_> {
    /// Copies the initrd as high as possible below `limit`, if there is one.
    fn load_initrd(&mut self, limit: u64) -> Result<Option<LoadedInitrd>, KernelError> {
        let Some(image) = &mut self.initrd else { return Ok(None) };
        let start = self.placement.claim_initrd(image.len(), limit)?;
        image.copy_to("the initrd", 0, image.len(), self.memory, start).map_err(KernelError::Initrd)?;
        // Placement is below the hole, so both fit.
        Ok(Some(LoadedInitrd { start: start.0 as u32, len: image.len() as u32 }))
    }

    /// Writes `cmdline` with its NUL; `room` is what the kernel takes, the NUL included.
    fn write_cmdline(&self, cmdline: &str, room: u64) -> Result<(), KernelError> {
        let len = cmdline.len() as u64;
        let max = room.min(CMDLINE_SIZE).saturating_sub(1);
        if len > max {
            return Err(KernelError::CmdlineTooLong { len, max });
        }
        if cmdline.contains('\0') {
            return Err(KernelError::CmdlineHasNul);
        }
        let bytes = [cmdline.as_bytes(), &[0]].concat();
        Ok(self.memory.write(CMDLINE, &bytes).map_err(ImageError::from)?)
    }
}

fn check_platform(platform: &Platform) -> Result<(), BootError> {
    match platform.vcpus {
        1..=berth_cpu::MAX_VCPUS => Ok(()),
        vcpus => Err(BootError::Vcpus { vcpus }),
    }
}

/// Writes what firmware would leave behind; returns where the RSDP is.
fn write_description(memory: &GuestMemory, platform: &Platform) -> Result<GuestPhysAddr, MemoryError> {
    memory.write(BDA_EBDA_SEGMENT, &((CONVENTIONAL_END.0 >> 4) as u16).to_le_bytes())?;
    memory.write(BDA_MEMORY_SIZE, &((CONVENTIONAL_END.0 >> 10) as u16).to_le_bytes())?;
    acpi::write(memory, platform)
}

/// Opens a regular file: others (a FIFO) would block, or have no length.
fn open(path: &Path) -> Result<File, ImageError> {
    if !std::fs::metadata(path)?.is_file() {
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "it is not a regular file").into());
    }
    Ok(File::open(path)?)
}

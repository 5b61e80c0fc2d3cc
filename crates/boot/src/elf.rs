//! ELF executables, 32-bit and 64-bit: segments to load, entry, and the PVH note.

use berth_memory::{GuestMemory, GuestPhysAddr};
use object::LittleEndian;
use object::elf::{EM_386, EM_X86_64, FileHeader32, FileHeader64, PT_LOAD, PT_NOTE};
use object::read::elf::{FileHeader, ProgramHeader};
use object::read::{ReadCache, ReadRef};

use crate::image::{Image, ImageError, clear};
use crate::placement::{Placement, PlacementError};

/// First bytes of every ELF file.
pub const MAGIC: &[u8] = b"\x7fELF";

/// More program headers than any kernel has; a limit on what a broken file can make us do.
const MAX_PROGRAM_HEADERS: u16 = 256;
/// Longest note segment that is searched, in bytes.
const MAX_NOTES: u64 = 1 << 20;
/// Note type and name of the PVH entry (xen/include/public/elfnote.h: XEN_ELFNOTE_PHYS32_ENTRY).
const PHYS32_ENTRY: (u32, &[u8]) = (18, b"Xen");

/// Why an ELF file cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum ElfError {
    /// Reading or copying failed.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Its parts do not fit into memory.
    #[error(transparent)]
    Placement(#[from] PlacementError),
    /// The file's structure is broken.
    #[error("is a damaged ELF file: {0}")]
    Damaged(&'static str),
    /// The parser found it broken.
    #[error("is a damaged ELF file: {0}")]
    Parse(object::read::Error),
    /// Not for this machine.
    #[error("is an ELF file for another machine: only little-endian x86 and x86-64 can be booted")]
    WrongMachine,
}

/// A part of the file that is loaded.
#[derive(Clone, Copy, Debug)]
pub struct LoadSegment {
    /// Offset in the file.
    pub offset: u64,
    /// Linear address that the kernel is linked for.
    pub virt: u64,
    /// Where it is loaded.
    pub phys: GuestPhysAddr,
    /// Bytes in the file.
    pub file_len: u64,
    /// Bytes in memory; those behind `file_len` are zero. At least `file_len`.
    pub memory_len: u64,
}

/// What is needed of an ELF file.
#[derive(Clone, Debug)]
pub struct Elf {
    /// The entry in the header.
    pub entry: u64,
    /// Loadable segments in the file's order.
    pub segments: Vec<LoadSegment>,
    /// Physical address of the PVH entry, if there is one.
    pub pvh_entry: Option<u32>,
}

impl Elf {
    /// Parses the headers and notes of `image`.
    ///
    /// # Errors
    /// [`ElfError::WrongMachine`], [`ElfError::Damaged`], [`ElfError::Parse`].
    pub fn parse(image: &mut Image<'_>) -> Result<Self, ElfError> {
        let mut ident = [0; 6];
        image.read_at("the ELF header", 0, &mut ident)?;
        let [_, _, _, _, class, data] = ident;
        let cache = ReadCache::new(image.source());
        match (class, data) {
            (1, 1) => parse::<FileHeader32<LittleEndian>, _>(&cache),
            (2, 1) => parse::<FileHeader64<LittleEndian>, _>(&cache),
            _ => Err(ElfError::WrongMachine),
        }
    }

    /// Copies the segments to memory and clears what the file does not fill.
    ///
    /// # Errors
    /// [`ElfError::Placement`] when they do not fit or overlap; [`ElfError::Image`].
    pub fn load(
        &self,
        image: &mut Image<'_>,
        memory: &GuestMemory,
        placement: &mut Placement,
    ) -> Result<(), ElfError> {
        for s in &self.segments {
            image.check("a segment", s.offset, s.file_len)?;
            placement.claim("kernel", s.phys, s.memory_len)?;
        }
        for s in &self.segments {
            image.copy_to("a segment", s.offset, s.file_len, memory, s.phys)?;
            clear(memory, s.phys.wrapping_add(s.file_len), s.memory_len - s.file_len)
                .map_err(ImageError::from)?;
        }
        Ok(())
    }

    /// The header's entry as a physical address: it is a linear address if it lies in a segment's linear range,
    /// as boot loaders take it.
    ///
    /// # Errors
    /// [`ElfError::Damaged`] when no segment holds it, or it is not below 4 GiB.
    pub fn physical_entry(&self) -> Result<u32, ElfError> {
        let physical = self.segments.iter().find_map(|s| {
            let offset = self.entry.checked_sub(s.virt)?;
            (offset < s.memory_len).then(|| s.phys.wrapping_add(offset))
        });
        let entry = physical.unwrap_or(GuestPhysAddr(self.entry));
        self.check_entry(entry.0)
    }

    /// Refuses an entry that is not in a loaded segment below 4 GiB.
    pub fn check_entry(&self, entry: u64) -> Result<u32, ElfError> {
        let loaded =
            |s: &LoadSegment| entry.checked_sub(s.phys.0).is_some_and(|offset| offset < s.memory_len);
        if !self.segments.iter().any(loaded) {
            return Err(ElfError::Damaged("the entry address is in no segment that is loaded"));
        }
        u32::try_from(entry).map_err(|_| ElfError::Damaged("the entry address is not below 4 GiB"))
    }
}

fn parse<'data, H, R>(data: R) -> Result<Elf, ElfError>
where
    H: FileHeader<Endian = LittleEndian>,
    R: ReadRef<'data>,
{
    let endian = LittleEndian;
    let header = H::parse(data).map_err(ElfError::Parse)?;
    if ![EM_386, EM_X86_64].contains(&header.e_machine(endian)) {
        return Err(ElfError::WrongMachine);
    }
    if header.e_phnum(endian) > MAX_PROGRAM_HEADERS {
        return Err(ElfError::Damaged("it has too many program headers"));
    }
    let mut elf = Elf { entry: header.e_entry(endian).into(), segments: Vec::new(), pvh_entry: None };
    for ph in header.program_headers(endian, data).map_err(ElfError::Parse)? {
        let (file_len, memory_len) = (ph.p_filesz(endian).into(), ph.p_memsz(endian).into());
        if ph.p_type(endian) == PT_LOAD && memory_len > 0 {
            if file_len > memory_len {
                return Err(ElfError::Damaged("a segment is longer in the file than in memory"));
            }
            elf.segments.push(LoadSegment {
                offset: ph.p_offset(endian).into(),
                virt: ph.p_vaddr(endian).into(),
                phys: GuestPhysAddr(ph.p_paddr(endian).into()),
                file_len,
                memory_len,
            });
        } else if ph.p_type(endian) == PT_NOTE && elf.pvh_entry.is_none() && file_len <= MAX_NOTES {
            elf.pvh_entry = pvh_note::<H, R>(ph, data)?;
        }
    }
    if elf.segments.is_empty() {
        return Err(ElfError::Damaged("it has no segment to load"));
    }
    Ok(elf)
}

/// Looks for the PVH entry among the notes of `ph`. Its value has 4 or 8 bytes.
fn pvh_note<'data, H, R>(ph: &H::ProgramHeader, data: R) -> Result<Option<u32>, ElfError>
where
    H: FileHeader<Endian = LittleEndian>,
    R: ReadRef<'data>,
{
    let endian = LittleEndian;
    let Some(mut notes) = ph.notes(endian, data).map_err(ElfError::Parse)? else { return Ok(None) };
    while let Some(note) = notes.next().map_err(ElfError::Parse)? {
        if (note.n_type(endian).0, note.name()) != PHYS32_ENTRY {
            continue;
        }
        return match note.desc() {
            [a, b, c, d] | [a, b, c, d, 0, 0, 0, 0] => Ok(Some(u32::from_le_bytes([*a, *b, *c, *d]))),
            _ => Err(ElfError::Damaged("its PVH entry is not a 32-bit address")),
        };
    }
    Ok(None)
}

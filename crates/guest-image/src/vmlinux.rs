//! The kernel proper, an ELF file, out of a bzImage (the kernel's Documentation/arch/x86/boot.rst).
//!
//! A bzImage unpacks itself in the guest. That costs each guest CPU time at each boot, and memory that stays
//! touched: the image, its copy and what the unpacking needs. Taken out once, the kernel is started by its
//! PVH entry instead. The address at which it runs is then always the same (no KASLR), because it is the
//! unpacking code that would move it.

use object::elf::FileHeader64;
use object::read::elf::{FileHeader, ProgramHeader};
use object::{LittleEndian, elf};

use crate::decompress::Format;

/// Most bytes that a kernel may unpack to.
const MAX_KERNEL: u64 = 512 << 20;
/// Note type and name of the PVH entry (xen/include/public/elfnote.h: XEN_ELFNOTE_PHYS32_ENTRY).
const PHYS32_ENTRY: (u32, &[u8]) = (18, b"Xen");

/// Why a bzImage's kernel cannot be started without its unpacking code. For people.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum VmlinuxError {
    /// No setup header of boot protocol 2.08 or later, which tells where the payload is.
    #[error("it is not a bzImage of boot protocol 2.08 or later")]
    NotBzImage,
    /// Header and file contradict each other.
    #[error("its payload is longer than the file")]
    Truncated,
    /// The compression is none of [`Format`].
    #[error("its compression is not gzip, xz, zstd or lz4")]
    UnknownCompression,
    /// Unpacking failed.
    #[error("its payload is damaged: {0}")]
    Damaged(String),
    /// The kernel was built without `CONFIG_PVH`, or is no 64-bit kernel.
    #[error("the kernel in it has no PVH entry")]
    NoPvhEntry,
}

/// The ELF file inside `bzimage`, which has a PVH entry.
///
/// # Errors
/// Any [`VmlinuxError`].
pub fn extract(bzimage: &[u8]) -> Result<Vec<u8>, VmlinuxError> {
    let payload = payload(bzimage)?;
    let format = Format::of(payload).ok_or(VmlinuxError::UnknownCompression)?;
    // Whatever the format, the last 4 bytes are the unpacked size: gzip's own, or added by the kernel's build.
    let (packed, size) = payload.split_last_chunk::<4>().ok_or(VmlinuxError::Truncated)?;
    let packed = if format == Format::Gzip { payload } else { packed };
    let kernel = format.unpack(packed, MAX_KERNEL).map_err(VmlinuxError::Damaged)?;
    let size = u32::from_le_bytes(*size);
    if kernel.len() as u64 != u64::from(size) {
        let reason = format!("it unpacks to {} bytes instead of {size}", kernel.len());
        return Err(VmlinuxError::Damaged(reason));
    }
    if !has_pvh_entry(&kernel) {
        return Err(VmlinuxError::NoPvhEntry);
    }
    Ok(kernel)
}

/// The compressed kernel.
fn payload(bzimage: &[u8]) -> Result<&[u8], VmlinuxError> {
    let field = |offset: usize| -> Option<u64> {
        let bytes = bzimage.get(offset..)?.first_chunk::<4>()?;
        Some(u32::from_le_bytes(*bytes).into())
    };
    let version = field(0x206).ok_or(VmlinuxError::NotBzImage)? & 0xffff;
    if bzimage.get(0x202..0x206) != Some(b"HdrS") || version < 0x208 {
        return Err(VmlinuxError::NotBzImage);
    }
    let (Some(sectors), Some(offset), Some(len)) = (bzimage.get(0x1f1), field(0x248), field(0x24c)) else {
        return Err(VmlinuxError::Truncated);
    };
    // Zero means 4, for the sake of very old boot loaders.
    let sectors = if *sectors == 0 { 4 } else { u64::from(*sectors) };
    let start = (sectors + 1) * 512 + offset;
    bzimage.get(start as usize..(start + len) as usize).ok_or(VmlinuxError::Truncated)
}

fn has_pvh_entry(kernel: &[u8]) -> bool {
    let endian = LittleEndian;
    let Ok(header) = FileHeader64::<LittleEndian>::parse(kernel) else { return false };
    let Ok(segments) = header.program_headers(endian, kernel) else { return false };
    let notes = segments.iter().filter_map(|s| s.notes(endian, kernel).ok().flatten());
    notes.into_iter().any(|mut notes| {
        while let Ok(Some(note)) = notes.next() {
            if (note.n_type(endian).0, note.name()) == PHYS32_ENTRY {
                return header.e_machine(endian) == elf::EM_X86_64;
            }
        }
        false
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decompress::tests::lz4_legacy;

    /// An ELF file with one program header, for a note of this type.
    fn kernel(note_type: u32) -> Vec<u8> {
        let mut file = b"\x7fELF\x02\x01\x01".to_vec();
        file.resize(16, 0);
        let halves = |values: &[u16]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>();
        let words = |values: &[u32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>();
        let longs = |values: &[u64]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>();
        file.extend(halves(&[elf::ET_EXEC.0, elf::EM_X86_64.0]));
        file.extend(words(&[1]));
        file.extend(longs(&[0, 64, 0])); // entry, program headers, section headers
        file.extend(words(&[0]));
        file.extend(halves(&[64, 56, 1, 64, 0, 0])); // sizes and numbers of headers
        file.extend(words(&[elf::PT_NOTE.0, 0]));
        file.extend(longs(&[120, 0, 0, 20, 20, 4])); // offset, addresses, sizes, alignment
        file.extend(words(&[4, 4, note_type]));
        file.extend(b"Xen\0");
        file.extend(words(&[0x100_0000]));
        file
    }

    /// A bzImage with this payload and boot protocol 2.15.
    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut file = vec![0; 1024 + 100];
        file[0x1f1] = 1;
        file[0x202..0x206].copy_from_slice(b"HdrS");
        file[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
        file[0x248..0x24c].copy_from_slice(&100_u32.to_le_bytes());
        file[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        file.extend(payload);
        file.extend(b"what follows the payload");
        file
    }

    fn packed(kernel: &[u8], size: usize) -> Vec<u8> {
        [&lz4_legacy(kernel)[..], &(size as u32).to_le_bytes()].concat()
    }

    #[test]
    fn the_kernel_comes_out_as_it_was() {
        let kernel = kernel(18);
        assert_eq!(extract(&bzimage(&packed(&kernel, kernel.len()))), Ok(kernel));
    }

    #[test]
    fn a_kernel_without_pvh_entry_is_refused() {
        for kernel in [kernel(17), b"no ELF file".to_vec()] {
            let image = bzimage(&packed(&kernel, kernel.len()));
            assert_eq!(extract(&image), Err(VmlinuxError::NoPvhEntry));
        }
    }

    #[test]
    fn damaged_images_are_refused() {
        let kernel = kernel(18);
        let good = bzimage(&packed(&kernel, kernel.len()));
        assert_eq!(extract(&bzimage(b"BZh9")), Err(VmlinuxError::UnknownCompression));
        assert!(matches!(extract(&bzimage(&packed(&kernel, 5))), Err(VmlinuxError::Damaged(_))));
        // A file may end anywhere.
        for len in 0..good.len() - 24 {
            assert!(matches!(extract(&good[..len]), Err(VmlinuxError::NotBzImage | VmlinuxError::Truncated)));
        }
        let mut far = good;
        far[0x248..0x250].fill(0xff);
        assert_eq!(extract(&far), Err(VmlinuxError::Truncated));
    }
}

//! A kernel or initrd file: something that can be read at an offset, of known length.
//!
//! Files may be larger than they are useful (debug information), so nothing is read whole: headers are read
//! into small buffers, contents go to guest memory in pieces.

use std::io::{self, Read, Seek, SeekFrom};

use berth_memory::{GuestMemory, GuestPhysAddr, MemoryError, PAGE_SIZE};

/// Bytes that are copied at a time.
const CHUNK: u64 = 256 << 10;

/// What an image is read from.
pub trait Source: Read + Seek {}
impl<T: Read + Seek> Source for T {}

/// Why an image could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The host's file system said no.
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
    /// The file ends too early.
    #[error("is truncated: {what} needs {end} bytes, but the file has {len}")]
    Truncated {
        /// What was to be read.
        what: &'static str,
        /// Offset past its last byte.
        end: u64,
        /// Length of the file in bytes.
        len: u64,
    },
    /// There is no RAM where the contents should go.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// An image with its length.
pub struct Image<'a> {
    source: &'a mut dyn Source,
    len: u64,
}

impl<'a> Image<'a> {
    /// Takes `source` and finds its length.
    ///
    /// # Errors
    /// [`ImageError::Io`] when it cannot be sought.
    pub fn new(source: &'a mut dyn Source) -> Result<Self, ImageError> {
        let len = source.seek(SeekFrom::End(0))?;
        Ok(Self { source, len })
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The source itself, for parsers that read by themselves.
    pub fn source(&mut self) -> &mut dyn Source {
        self.source
    }

    /// Refuses a range that is not inside the file. `what` names the range in the message.
    pub fn check(&self, what: &'static str, offset: u64, len: u64) -> Result<(), ImageError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            end => Err(ImageError::Truncated { what, end: end.unwrap_or(u64::MAX), len: self.len }),
        }
    }

    /// Fills `data` from `offset` on.
    ///
    /// # Errors
    /// [`ImageError::Truncated`] when the file is shorter; [`ImageError::Io`].
    pub fn read_at(&mut self, what: &'static str, offset: u64, data: &mut [u8]) -> Result<(), ImageError> {
        self.check(what, offset, data.len() as u64)?;
        self.source.seek(SeekFrom::Start(offset))?;
        Ok(self.source.read_exact(data)?)
    }

    /// At most the first `limit` bytes.
    pub fn head(&mut self, limit: usize) -> Result<Vec<u8>, ImageError> {
        let mut head = vec![0; (limit as u64).min(self.len) as usize];
        self.read_at("the beginning", 0, &mut head)?;
        Ok(head)
    }

    /// Copies `len` bytes from `offset` on to guest physical `to`. Pages that are zero in the file and in memory
    /// stay untouched: a kernel's file has several MiB of them, for variables without initial value.
    ///
    /// # Errors
    /// [`ImageError::Truncated`] before anything was copied; [`ImageError::Io`]; [`ImageError::Memory`].
    pub fn copy_to(
        &mut self,
        what: &'static str,
        offset: u64,
        len: u64,
        memory: &GuestMemory,
        to: GuestPhysAddr,
    ) -> Result<(), ImageError> {
        self.check(what, offset, len)?;
        self.source.seek(SeekFrom::Start(offset))?;
        let mut buffer = vec![0; CHUNK.min(len) as usize];
        let mut done = 0;
        while done < len {
            let piece = &mut buffer[..CHUNK.min(len - done) as usize];
            self.source.read_exact(piece)?;
            write_sparsely(memory, to.wrapping_add(done), piece)?;
            done += piece.len() as u64;
        }
        Ok(())
    }
}

const ZERO: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];

/// Writes `data` to guest physical `to`; pages of zeroes only where the memory is not zero already.
fn write_sparsely(memory: &GuestMemory, to: GuestPhysAddr, data: &[u8]) -> Result<(), MemoryError> {
    let (mut at, mut rest) = (to, data);
    while !rest.is_empty() {
        let len = ((PAGE_SIZE - at.page_offset()) as usize).min(rest.len());
        let (piece, behind) = rest.split_at(len);
        if *piece == ZERO[..len] {
            clear(memory, at, len as u64)?;
        } else {
            memory.write(at, piece)?;
        }
        (at, rest) = (at.wrapping_add(len as u64), behind);
    }
    Ok(())
}

/// Makes `len` bytes from `start` on zero, without touching pages that are zero already (after a reset of the
/// guest they need not be).
pub fn clear(memory: &GuestMemory, start: GuestPhysAddr, len: u64) -> Result<(), MemoryError> {
    let mut page = ZERO;
    let mut done = 0;
    while done < len {
        let at = start.wrapping_add(done);
        let piece = (PAGE_SIZE - at.page_offset()).min(len - done) as usize;
        memory.read(at, &mut page[..piece])?;
        if page[..piece] != ZERO[..piece] {
            memory.write(at, &ZERO[..piece])?;
        }
        done += piece as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    #[test]
    fn ranges_outside_the_file_are_refused() {
        let mut bytes = Cursor::new(vec![7; 100]);
        let mut image = Image::new(&mut bytes).unwrap();
        assert!(image.read_at("x", 90, &mut [0; 10]).is_ok());
        for (offset, len) in [(90, 11), (100, 1), (u64::MAX, 2)] {
            let error = image.read_at("x", offset, &mut vec![0; len]).unwrap_err();
            assert!(matches!(error, ImageError::Truncated { len: 100, .. }));
        }
    }

    #[test]
    fn contents_arrive_across_pieces() {
        let contents: Vec<u8> = (0..CHUNK + 1000).map(|i| (i % 251) as u8).collect();
        let mut source = Cursor::new(contents.clone());
        let memory = GuestMemory::new(1 << 20).unwrap();
        let mut image = Image::new(&mut source).unwrap();
        image.copy_to("x", 1, image.len() - 1, &memory, GuestPhysAddr(0x1001)).unwrap();
        let mut back = vec![0; contents.len() - 1];
        memory.read(GuestPhysAddr(0x1001), &mut back).unwrap();
        assert_eq!(back, contents[1..]);
    }

    #[test]
    fn zeroes_overwrite_what_is_there() {
        let mut contents = vec![0; 1 << 19];
        contents[..3].fill(1);
        contents[300_000] = 2;
        let mut source = Cursor::new(contents.clone());
        let memory = GuestMemory::new(1 << 20).unwrap();
        let mut image = Image::new(&mut source).unwrap();
        image.copy_to("x", 0, image.len(), &memory, GuestPhysAddr(100)).unwrap();
        let mut back = vec![9; contents.len()];
        memory.read(GuestPhysAddr(100), &mut back).unwrap();
        assert_eq!(back, contents);

        memory.write(GuestPhysAddr(0), &vec![7; 1 << 20]).unwrap();
        image.copy_to("x", 0, image.len(), &memory, GuestPhysAddr(100)).unwrap();
        memory.read(GuestPhysAddr(100), &mut back).unwrap();
        assert_eq!(back, contents);
    }

    #[test]
    fn clearing_leaves_the_neighbours() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        memory.write(GuestPhysAddr(0), &[1; 0x4000]).unwrap();
        clear(&memory, GuestPhysAddr(0xfff), 0x2002).unwrap();
        let mut back = [9; 0x4000];
        memory.read(GuestPhysAddr(0), &mut back).unwrap();
        assert!(back[..0xfff].iter().chain(&back[0x3001..]).all(|&b| b == 1));
        assert!(back[0xfff..0x3001].iter().all(|&b| b == 0));
    }
}

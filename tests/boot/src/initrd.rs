//! The default guest's initramfs with the test programs appended: the kernel unpacks one archive after the other.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use cpio::newc::Builder;

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;

/// Why there is no initramfs.
#[derive(Debug, thiserror::Error)]
pub enum InitrdError {
    /// The default guest's cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The new one cannot be written.
    #[error("cannot write a temporary initramfs: {0}")]
    Write(#[source] io::Error),
}

/// A temporary file with the archive `base` and `programs` in `/tests`.
///
/// # Errors
/// Any [`InitrdError`].
pub fn initrd_with(
    base: &Path,
    programs: &[(&str, Vec<u8>)],
) -> Result<tempfile::NamedTempFile, InitrdError> {
    let mut bytes =
        std::fs::read(base).map_err(|source| InitrdError::Read { path: base.to_owned(), source })?;
    append(&mut bytes, programs).map_err(InitrdError::Write)?;
    let mut file = tempfile::NamedTempFile::with_prefix("berth-boot-").map_err(InitrdError::Write)?;
    file.write_all(&bytes).map_err(InitrdError::Write)?;
    Ok(file)
}

fn append(bytes: &mut Vec<u8>, programs: &[(&str, Vec<u8>)]) -> io::Result<()> {
    // An archive begins at a multiple of 4 bytes.
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    Builder::new("tests").ino(1).mode(DIRECTORY).nlink(2).write(&mut *bytes, 0).finish()?;
    for (i, (name, content)) in (2..).zip(programs) {
        let size = u32::try_from(content.len()).map_err(io::Error::other)?;
        let mut writer =
            Builder::new(&format!("tests/{name}")).ino(i).mode(PROGRAM).nlink(1).write(&mut *bytes, size);
        writer.write_all(content)?;
        writer.finish()?;
    }
    cpio::newc::trailer(bytes)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_holds_the_programs_after_the_base() {
        let mut bytes = vec![7; 5];
        append(&mut bytes, &[("a", b"content".to_vec())]).unwrap();
        let directory = cpio::newc::Reader::new(&bytes[8..]).unwrap();
        assert_eq!((directory.entry().name(), directory.entry().mode()), ("tests", DIRECTORY));
        let mut program = cpio::newc::Reader::new(directory.finish().unwrap()).unwrap();
        assert_eq!((program.entry().name(), program.entry().mode()), ("tests/a", PROGRAM));
        let mut content = Vec::new();
        io::Read::read_to_end(&mut program, &mut content).unwrap();
        assert_eq!(content, b"content");
    }
}

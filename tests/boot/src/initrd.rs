//! The default guest's initramfs with the test programs appended: the kernel unpacks one archive after the other.

use std::collections::BTreeSet;
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

/// A file for the guest, which may be run there.
pub struct File {
    /// Its path in the guest.
    pub path: String,
    /// What is in it.
    pub content: Vec<u8>,
}

/// A temporary file with the archive `base` and `files`, later ones in place of earlier ones of the same path.
///
/// # Errors
/// Any [`InitrdError`].
pub fn initrd_with(base: &Path, files: &[File]) -> Result<tempfile::NamedTempFile, InitrdError> {
    let mut bytes =
        std::fs::read(base).map_err(|source| InitrdError::Read { path: base.to_owned(), source })?;
    append(&mut bytes, files).map_err(InitrdError::Write)?;
    let mut file = tempfile::NamedTempFile::with_prefix("berth-boot-").map_err(InitrdError::Write)?;
    file.write_all(&bytes).map_err(InitrdError::Write)?;
    Ok(file)
}

fn append(bytes: &mut Vec<u8>, files: &[File]) -> io::Result<()> {
    // An archive begins at a multiple of 4 bytes.
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    let paths = || files.iter().map(|file| Path::new(file.path.trim_start_matches('/')));
    // Parents before children, as their names are sorted.
    let directories: BTreeSet<&Path> =
        paths().flat_map(|p| p.ancestors().skip(1)).filter(|p| !p.as_os_str().is_empty()).collect();
    for (i, directory) in (1..).zip(&directories) {
        let builder = Builder::new(&directory.to_string_lossy()).ino(i).mode(DIRECTORY).nlink(2);
        builder.write(&mut *bytes, 0).finish()?;
    }
    for ((i, path), file) in (1 + directories.len() as u32..).zip(paths()).zip(files) {
        let size = u32::try_from(file.content.len()).map_err(io::Error::other)?;
        let builder = Builder::new(&path.to_string_lossy()).ino(i).mode(PROGRAM).nlink(1);
        let mut writer = builder.write(&mut *bytes, size);
        writer.write_all(&file.content)?;
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
        let file = File { path: "/tests/a".to_owned(), content: b"content".to_vec() };
        append(&mut bytes, &[file]).unwrap();
        let directory = cpio::newc::Reader::new(&bytes[8..]).unwrap();
        assert_eq!((directory.entry().name(), directory.entry().mode()), ("tests", DIRECTORY));
        let mut program = cpio::newc::Reader::new(directory.finish().unwrap()).unwrap();
        assert_eq!((program.entry().name(), program.entry().mode()), ("tests/a", PROGRAM));
        let mut content = Vec::new();
        io::Read::read_to_end(&mut program, &mut content).unwrap();
        assert_eq!(content, b"content");
    }
}

//! What a file was when it was made, to see whether it still is that.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Size, time and checksum of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRecord {
    /// In bytes.
    pub size: u64,
    /// Modification time in nanoseconds since 1970.
    pub modified: u64,
    /// SHA-256 of the content in hexadecimal digits.
    pub sha256: String,
}

impl FileRecord {
    /// The file at `path` as it is now. Reads all of it.
    ///
    /// # Errors
    /// What the host says.
    pub fn of(path: &Path) -> io::Result<Self> {
        let mut file = File::open(path)?;
        let metadata = file.metadata()?;
        let mut digest = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            match io::Read::read(&mut file, &mut buffer)? {
                0 => break,
                n => digest.update(buffer.get(..n).unwrap_or_default()),
            }
        }
        Ok(Self { size: metadata.len(), modified: modified(&metadata), sha256: hex(&digest.finalize()) })
    }

    /// A file with this content that has just been written.
    pub fn of_content(content: &[u8], metadata: &fs::Metadata) -> Self {
        Self { size: content.len() as u64, modified: modified(metadata), sha256: sha256(content) }
    }

    /// Whether the file at `path` is still the same. One with the recorded size and time is taken as it is; with
    /// another time its content is compared.
    pub fn is_intact(&self, path: &Path) -> bool {
        let Ok(metadata) = fs::metadata(path) else { return false };
        metadata.is_file()
            && metadata.len() == self.size
            && (modified(&metadata) == self.modified
                || Self::of(path).is_ok_and(|now| now.sha256 == self.sha256))
    }
}

/// SHA-256 of `data` in hexadecimal digits.
pub fn sha256(data: &[u8]) -> String {
    hex(&Sha256::digest(data))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn modified(metadata: &fs::Metadata) -> u64 {
    let since = metadata.modified().ok().and_then(|t| t.duration_since(SystemTime::UNIX_EPOCH).ok());
    since.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_record_tells_a_file_from_its_changes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let content = vec![7; 3 << 20];
        fs::write(&path, &content).unwrap();
        let record = FileRecord::of(&path).unwrap();
        assert_eq!(record, FileRecord::of_content(&content, &fs::metadata(&path).unwrap()));
        assert!(record.is_intact(&path));

        let set_time = |seconds| {
            let file = File::options().write(true).open(&path).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)).unwrap();
        };
        set_time(1);
        assert!(record.is_intact(&path), "another time is no change");
        fs::write(&path, vec![8; 3 << 20]).unwrap();
        set_time(2);
        assert!(!record.is_intact(&path));
        fs::write(&path, b"").unwrap();
        assert!(!record.is_intact(&path));
        fs::remove_file(&path).unwrap();
        assert!(!record.is_intact(&path));
        assert!(!record.is_intact(dir.path()));
    }

    #[test]
    fn the_checksum_is_that_of_sha256sum() {
        assert_eq!(sha256(b"abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}

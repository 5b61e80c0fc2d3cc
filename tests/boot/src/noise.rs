//! Bytes that do not repeat soon, as many as are wanted, without keeping them.

use std::io::{self, Read};

/// A stream of `len` bytes, always the same (xorshift64).
pub struct Noise {
    state: u64,
    left: u64,
}

impl Noise {
    /// `len` bytes.
    pub fn new(len: u64) -> Self {
        Self { state: 0x9e37_79b9_7f4a_7c15, left: len }
    }

    /// Reads all of `other`: whether it is the same.
    ///
    /// # Errors
    /// Of the reader.
    pub fn is_same(mut self, mut other: impl Read) -> io::Result<bool> {
        // Of 8 bytes each but for the last.
        let (mut ours, mut theirs) = (vec![0; 1 << 16], vec![0; 1 << 16]);
        loop {
            let n = self.read(&mut ours)?;
            if n == 0 {
                return Ok(other.read(&mut theirs[..1])? == 0);
            }
            match other.read_exact(&mut theirs[..n]) {
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
                result => result?,
            }
            if ours[..n] != theirs[..n] {
                return Ok(false);
            }
        }
    }
}

impl Read for Noise {
    /// Whole words as long as there is room for one, so that any way to read it gives the same bytes.
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        let len = usize::try_from(self.left).unwrap_or(usize::MAX).min(data.len() & !7);
        for word in data[..len].chunks_mut(8) {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
            word.copy_from_slice(&self.state.to_le_bytes()[..word.len()]);
        }
        self.left -= len as u64;
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_the_same_noise_each_time() {
        let mut all = Vec::new();
        Noise::new(100_003).read_to_end(&mut all).unwrap();
        assert_eq!(all.len(), 100_003);
        assert!(Noise::new(100_003).is_same(&*all).unwrap());
        assert!(!Noise::new(100_003).is_same(&all[..100_000]).unwrap());
        all.push(0);
        assert!(!Noise::new(100_003).is_same(&*all).unwrap());
        all.pop();
        all[90_000] ^= 1;
        assert!(!Noise::new(100_003).is_same(&*all).unwrap());
    }
}

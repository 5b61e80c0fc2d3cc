//! One bit for each page of RAM.

use std::sync::atomic::{AtomicU64, Ordering};

/// Bits that any thread may set, clear and read. Not resident before they are set.
pub(crate) struct PageBits(Box<[AtomicU64]>);

impl PageBits {
    pub(crate) fn new(pages: usize) -> Self {
        // `vec![0; n]` asks for zeroed memory, which is not resident before it is touched.
        let zeroed = vec![0u64; pages.div_ceil(64)].into_boxed_slice();
        // SAFETY: AtomicU64 has the same size, alignment and valid values as u64.
        Self(unsafe { Box::from_raw(Box::into_raw(zeroed) as *mut [AtomicU64]) })
    }

    pub(crate) fn get(&self, page: usize) -> bool {
        self.0.get(page / 64).is_some_and(|word| word.load(Ordering::Relaxed) >> (page % 64) & 1 != 0)
    }

    /// Sets the bit. Cheap if it is set already.
    pub(crate) fn set(&self, page: usize) {
        if let Some(word) = self.0.get(page / 64) {
            let bit = 1 << (page % 64);
            if word.load(Ordering::Relaxed) & bit == 0 {
                word.fetch_or(bit, Ordering::Relaxed);
            }
        }
    }

    /// The bits of pages `64 * word` and the next 63; clears them.
    pub(crate) fn take_word(&self, word: usize) -> u64 {
        match self.0.get(word) {
            // An unset word is only read, so that it does not become resident.
            Some(bits) if bits.load(Ordering::Relaxed) != 0 => bits.swap(0, Ordering::Relaxed),
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_independent() {
        let bits = PageBits::new(130);
        for page in [0, 63, 64, 129] {
            bits.set(page);
        }
        assert!(bits.get(63) && !bits.get(62) && bits.get(129) && !bits.get(1 << 20));
        bits.set(1 << 20);
        assert!(!bits.get(1 << 20));
        assert_eq!((bits.take_word(0), bits.take_word(0)), (1 << 63 | 1, 0));
        assert!(bits.get(64) && !bits.get(0));
    }
}

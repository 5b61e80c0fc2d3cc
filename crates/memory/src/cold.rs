//! Which pages are cold.
//!
//! Whoever accesses guest memory for the guest marks the page ([`GuestMemory::mark_accessed`]): devices at each access,
//! an engine at the first access after it was asked to begin a new period. [`Ages`] collects the marks of a period and
//! counts for each page how many periods ago it was last accessed.

use crate::pagemap::{self, Backing};
use crate::{GuestMemory, PAGE_SHIFT};

/// The age of each page of RAM in periods, up to 255.
pub struct Ages(Box<[u8]>);

impl Ages {
    /// Every page is young.
    pub fn new(memory: &GuestMemory) -> Self {
        Self(vec![0; (memory.size() >> PAGE_SHIFT) as usize].into())
    }

    /// A period is over: takes its marks, so that pages without one are a period older.
    pub fn end_period(&mut self, memory: &GuestMemory) {
        for (word, ages) in self.0.chunks_mut(64).enumerate() {
            let accessed = memory.take_accessed(word);
            for (bit, age) in ages.iter_mut().enumerate() {
                *age = if accessed >> bit & 1 != 0 { 0 } else { age.saturating_add(1) };
            }
        }
    }

    /// Numbers of pages that have memory and were not accessed for `min_age` (1 or more) periods, the oldest first, at
    /// most `bytes` of them.
    pub(crate) fn coldest(
        &self,
        memory: &GuestMemory,
        bytes: u64,
        min_age: u8,
    ) -> std::io::Result<Vec<usize>> {
        let mut by_age: [Vec<usize>; 256] = std::array::from_fn(|_| Vec::new());
        let mut first = 0;
        for region in memory.regions() {
            pagemap::scan(region.host, region.len, |run, backing| {
                if backing != Backing::Memory {
                    return;
                }
                for page in run.map(|page| first + page as usize) {
                    let age = self.0.get(page).copied().unwrap_or(0);
                    if age >= min_age {
                        by_age[usize::from(age)].push(page);
                    }
                }
            })?;
            first += (region.len >> PAGE_SHIFT) as usize;
        }
        let most = usize::try_from(bytes >> PAGE_SHIFT).unwrap_or(usize::MAX);
        Ok(by_age.into_iter().rev().flatten().take(most).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{GuestPhysAddr, PAGE_SIZE};

    #[test]
    fn the_oldest_pages_come_first() {
        let m = GuestMemory::new(1 << 20).unwrap();
        let at = |page: u64| GuestPhysAddr(page * PAGE_SIZE);
        for page in 0..6 {
            m.write(at(page), &[1]).unwrap();
        }
        let mut ages = Ages::new(&m);
        for accessed in [[0, 1], [0, 2], [0, 3]] {
            accessed.iter().for_each(|page| m.mark_accessed(at(*page)));
            ages.end_period(&m);
        }
        assert_eq!(ages.coldest(&m, 1 << 20, 1).unwrap(), [4, 5, 1, 2]);
        assert_eq!(ages.coldest(&m, 3 * PAGE_SIZE, 2).unwrap(), [4, 5, 1]);
    }
}

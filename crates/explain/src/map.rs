//! All of guest memory by page state, in chunks: what `berth map` draws.

use std::io;

use berth_memory::{GuestMemory, PAGE_SIZE, PageState, StateRange};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::hex::Hex;

/// Chunks that a map has at most unless a size is asked for: what fits on a screen.
const CHUNKS: u64 = 2048;
/// Chunks that a map has at the very most.
const MAX_CHUNKS: u64 = 1 << 17;

/// All states, in the order in which they are shown.
pub const STATES: [PageState; 5] =
    [PageState::Resident, PageState::Shared, PageState::Stored, PageState::Released, PageState::Untouched];

/// How many bytes are in each state (see [`PageState`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Counts {
    /// In memory of their own.
    pub resident: u64,
    /// Shared with a file or another VM until they are written.
    pub shared: u64,
    /// In the cold store or the host's swap.
    pub stored: u64,
    /// Given back by the guest, and not used since.
    pub released: u64,
    /// Never written.
    pub untouched: u64,
}

/// A map of guest memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MemoryMap {
    /// Name of the VM.
    pub vm: String,
    /// Bytes of RAM.
    pub size_bytes: u64,
    /// Bytes of a chunk; the last of a region may be shorter.
    pub chunk_bytes: u64,
    /// How many bytes are in each state.
    pub bytes: Counts,
    /// The pieces of RAM.
    pub regions: Vec<MapRegion>,
}

/// One piece of RAM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MapRegion {
    /// First guest physical address.
    pub start: Hex,
    /// Length in bytes.
    pub len: u64,
    /// How many bytes of each chunk are in each state.
    pub chunks: Vec<Counts>,
}

/// Why there is no map.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// A chunk that is none.
    #[error("{chunk} bytes are no chunk: a power of two from {least} on can be, for {size} bytes of memory")]
    BadChunk {
        /// What was asked for.
        chunk: u64,
        /// The smallest that is possible.
        least: u64,
        /// Size of the memory.
        size: u64,
    },
    /// The host does not say what is resident.
    #[error("the host does not say which pages of guest memory it has: {0}")]
    Host(#[from] io::Error),
}

impl Counts {
    /// Bytes in `state`.
    pub fn bytes_in(&self, state: PageState) -> u64 {
        match state {
            PageState::Untouched => self.untouched,
            PageState::Resident => self.resident,
            PageState::Shared => self.shared,
            PageState::Stored => self.stored,
            PageState::Released => self.released,
        }
    }

    /// Bytes in all states.
    pub fn total(&self) -> u64 {
        STATES.iter().map(|state| self.bytes_in(*state)).sum()
    }

    fn add(&mut self, state: PageState, bytes: u64) {
        *match state {
            PageState::Untouched => &mut self.untouched,
            PageState::Resident => &mut self.resident,
            PageState::Shared => &mut self.shared,
            PageState::Stored => &mut self.stored,
            PageState::Released => &mut self.released,
        } += bytes;
    }
}

/// The map of the memory of VM `vm`, in chunks of `chunk` bytes or as suits a screen.
///
/// # Errors
/// [`MapError`].
pub fn memory_map(vm: &str, memory: &GuestMemory, chunk: Option<u64>) -> Result<MemoryMap, MapError> {
    let size = memory.size();
    let fitting = |chunks: u64| size.div_ceil(chunks).next_power_of_two().max(PAGE_SIZE);
    let chunk_bytes = chunk.unwrap_or(fitting(CHUNKS));
    let least = fitting(MAX_CHUNKS);
    if !chunk_bytes.is_power_of_two() || chunk_bytes < least {
        return Err(MapError::BadChunk { chunk: chunk_bytes, least, size });
    }
    let mut map = MemoryMap {
        vm: vm.to_owned(),
        size_bytes: size,
        chunk_bytes,
        bytes: Counts::default(),
        regions: memory
            .regions()
            .iter()
            .map(|r| MapRegion {
                start: Hex(r.start.0),
                len: r.len,
                chunks: vec![Counts::default(); r.len.div_ceil(chunk_bytes) as usize],
            })
            .collect(),
    };
    memory.for_each_state(|range| {
        map.bytes.add(range.state, range.len);
        let region = map.regions.iter_mut().find(|r| (r.start.0..r.start.0 + r.len).contains(&range.start.0));
        if let Some(region) = region {
            region.add(range, chunk_bytes);
        }
    })?;
    Ok(map)
}

impl MapRegion {
    /// Counts `range`, which lies within, to the chunks that it touches.
    fn add(&mut self, range: StateRange, chunk_bytes: u64) {
        let (mut at, end) = (range.start.0 - self.start.0, range.start.0 - self.start.0 + range.len);
        while at < end {
            let chunk = at / chunk_bytes;
            let until = end.min((chunk + 1) * chunk_bytes);
            if let Some(counts) = self.chunks.get_mut(chunk as usize) {
                counts.add(range.state, until - at);
            }
            at = until;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_memory::GuestPhysAddr;

    fn touched(pages: &[u64]) -> GuestMemory {
        let memory = GuestMemory::new(8 << 20).unwrap();
        for page in pages {
            memory.write(GuestPhysAddr(page * PAGE_SIZE), &[1]).unwrap();
        }
        memory
    }

    #[test]
    fn every_byte_is_counted_once() {
        let memory = touched(&[0, 1, 5, 2047]);
        let map = memory_map("vm", &memory, None).unwrap();
        assert_eq!((map.chunk_bytes, map.regions[0].chunks.len()), (4096, 2048));
        assert_eq!((map.bytes.total(), map.bytes.resident), (8 << 20, 4 * 4096));
        let map = memory_map("vm", &memory, Some(64 << 10)).unwrap();
        let chunks = &map.regions[0].chunks;
        assert_eq!(chunks.len(), 128);
        assert!(chunks.iter().all(|c| c.total() == 64 << 10));
        let resident: Vec<u64> = chunks.iter().map(|c| c.resident / 4096).collect();
        assert_eq!((resident[0], resident[127], resident.iter().sum::<u64>()), (3, 1, 4));
    }

    #[test]
    fn chunks_are_powers_of_two_of_at_least_a_page() {
        for chunk in [0, 1, 2048, 12288, u64::MAX] {
            assert!(matches!(memory_map("vm", &touched(&[]), Some(chunk)), Err(MapError::BadChunk { .. })));
        }
        assert!(memory_map("vm", &touched(&[]), Some(1 << 40)).is_ok());
    }
}

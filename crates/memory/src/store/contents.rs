//! Contents of pages, compressed, each kept once.
//!
//! zstd at its lowest level: measured on the 12,188 different pages of a booted Debian guest it needs 2.89 times less
//! than the pages, lz4 2.07 times less; taking a page back costs some microseconds with either, which is little
//! beside the fault itself (docs/overcommit.md).

use std::hash::{BuildHasher, RandomState};
use std::io;

use hashbrown::HashTable;
use zstd_safe::{CCtx, CParameter, DCtx};

use super::file::Slot;
use super::log::{Log, Movable, Place, Tier};
use crate::PAGE_SIZE;

/// A page's bytes.
pub(super) type Page = [u8; PAGE_SIZE as usize];

const LEVEL: i32 = 1;
/// What saves less than this is kept as it is.
const WORTHWHILE: usize = PAGE_SIZE as usize - 128;

/// Number of a content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ContentId(pub u32);

struct Content {
    hash: u64,
    place: Place,
    /// How many pages have it; 0: the number is free.
    users: u32,
}

/// Compresses pages. One for each thread that does.
pub(super) struct Compressor {
    context: CCtx<'static>,
    out: Vec<u8>,
}

impl Compressor {
    pub(super) fn new() -> Self {
        let mut context = CCtx::create();
        // The parameter exists, and the level is possible.
        let _ = context.set_parameter(CParameter::CompressionLevel(LEVEL));
        Self { context, out: vec![0; zstd_safe::compress_bound(PAGE_SIZE as usize)] }
    }

    /// The page as it is to be stored: shorter than a page if it was compressed.
    pub(super) fn compress<'a>(&'a mut self, page: &'a Page) -> &'a [u8] {
        match self.context.compress2(&mut self.out[..], page) {
            Ok(len) if len < WORTHWHILE => &self.out[..len],
            _ => page,
        }
    }
}

/// All contents.
pub(super) struct Contents {
    contents: Vec<Content>,
    free: Vec<u32>,
    by_hash: HashTable<u32>,
    hasher: RandomState,
    log: Log,
    context: DCtx<'static>,
    /// For what is read from the file.
    buffer: Vec<u8>,
    pages: u64,
    duplicates: u64,
}

impl Contents {
    pub(super) fn new() -> Self {
        Self {
            contents: Vec::new(),
            free: Vec::new(),
            by_hash: HashTable::new(),
            hasher: RandomState::new(),
            log: Log::default(),
            context: DCtx::create(),
            buffer: Vec::new(),
            pages: 0,
            duplicates: 0,
        }
    }

    /// Pages that have a content here.
    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    /// Pages that were found to have a content that was here already, since the start.
    pub(super) fn duplicates(&self) -> u64 {
        self.duplicates
    }

    /// Different contents.
    pub(super) fn distinct(&self) -> u64 {
        self.by_hash.len() as u64
    }

    /// What is in memory, in compressed bytes.
    pub(super) fn memory(&self) -> Tier {
        self.log.memory()
    }

    /// What is in the file, in compressed bytes.
    pub(super) fn file(&self) -> Tier {
        self.log.file()
    }

    /// The contents in memory that have been here for longest; `all`: even if there are only a few.
    pub(super) fn oldest(&mut self, all: bool) -> Option<Movable> {
        if all {
            self.log.close();
        }
        self.log.oldest()
    }

    /// They are in the file now, unless they have gone meanwhile: `false`.
    pub(super) fn move_to_file(&mut self, movable: &Movable, slot: Slot) -> bool {
        self.log.move_to_file(movable, slot)
    }

    /// Has the host read what is in the file.
    pub(super) fn will_be_read(&self) {
        self.log.will_be_read();
    }

    /// What makes [`Self::find`] and [`Self::insert`] fast. Keyed, so that no guest can make pages that collide.
    pub(super) fn hasher(&self) -> RandomState {
        self.hasher.clone()
    }

    /// One more user for the content that is equal to `page`, if it is here.
    pub(super) fn find(&mut self, hash: u64, page: &Page) -> Option<ContentId> {
        let mut found = Vec::new();
        for &id in self.by_hash.iter_hash(hash) {
            if self.contents[id as usize].hash == hash {
                found.push(id);
            }
        }
        // Different pages with one hash are so rare that each may be looked at.
        let id = found.into_iter().find(|&id| {
            let mut other = [0; PAGE_SIZE as usize];
            self.read(ContentId(id), &mut other).is_ok() && other == *page
        })?;
        self.contents[id as usize].users += 1;
        self.pages += 1;
        self.duplicates += 1;
        Some(ContentId(id))
    }

    /// A new content with one user; `stored` is what [`Compressor::compress`] made of it.
    pub(super) fn insert(&mut self, hash: u64, stored: &[u8]) -> io::Result<ContentId> {
        let id = match self.free.pop() {
            Some(id) => id,
            None => {
                let id = u32::try_from(self.contents.len())
                    .ok()
                    .filter(|id| *id < MAX_CONTENTS)
                    .ok_or_else(|| io::Error::other("the store is full"))?;
                self.contents.push(Content { hash: 0, place: Place::default(), users: 0 });
                id
            }
        };
        let place = match self.log.append(stored, id) {
            Ok(place) => place,
            Err(e) => {
                self.free.push(id);
                return Err(e);
            }
        };
        self.contents[id as usize] = Content { hash, place, users: 1 };
        let contents = &self.contents;
        self.by_hash.insert_unique(hash, id, |&id| contents[id as usize].hash);
        self.pages += 1;
        Ok(ContentId(id))
    }

    /// Fills `page` with the content.
    pub(super) fn read(&mut self, id: ContentId, page: &mut Page) -> io::Result<()> {
        let content = &self.contents[id.0 as usize];
        let (stored, from_file) = self.log.get(content.place, &mut self.buffer)?;
        if stored.len() == page.len() {
            page.copy_from_slice(stored);
        } else {
            match self.context.decompress(&mut page[..], stored) {
                Ok(len) if len == page.len() => {}
                Ok(_) => return Err(io::Error::other("a stored page is too short")),
                Err(code) => return Err(io::Error::other(zstd_safe::get_error_name(code))),
            }
        }
        if from_file && Self::hash(&self.hasher, page) != content.hash {
            return Err(io::Error::other("the file of the store gave back something else than was written"));
        }
        Ok(())
    }

    /// One user less. A content without users goes.
    pub(super) fn release(&mut self, id: ContentId) {
        let content = &mut self.contents[id.0 as usize];
        content.users -= 1;
        self.pages -= 1;
        if content.users > 0 {
            return;
        }
        if let Ok(entry) = self.by_hash.find_entry(content.hash, |&other| other == id.0) {
            entry.remove();
        }
        self.log.release(content.place);
        self.free.push(id.0);
        self.write_again();
    }

    /// Makes room where there are many holes.
    fn write_again(&mut self) {
        let Some((segment, owners)) = self.log.emptiest() else { return };
        let (mut record, mut buffer) = (Vec::new(), Vec::new());
        for id in owners {
            let content = &mut self.contents[id as usize];
            if content.users == 0 || content.place.segment != segment {
                continue;
            }
            record.clear();
            // What cannot be read now stays: who needs it finds out.
            let Ok((stored, _)) = self.log.get(content.place, &mut buffer) else { continue };
            record.extend_from_slice(stored);
            // Without room for it the record stays where it is.
            if let Ok(place) = self.log.append(&record, id) {
                self.log.release(content.place);
                content.place = place;
            }
        }
    }

    /// The hash of a page.
    pub(super) fn hash(hasher: &RandomState, page: &Page) -> u64 {
        hasher.hash_one(page)
    }
}

/// So many numbers fit into a page table of the store beside its own marks.
const MAX_CONTENTS: u32 = (1 << 31) - 16;

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::store::file::StoreFile;

    fn page(seed: u64, compressible: bool) -> Page {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut page = [0; PAGE_SIZE as usize];
        let len = if compressible { 700 } else { page.len() };
        page[..len].iter_mut().for_each(|b| *b = rng.u8(..));
        page
    }

    fn put(contents: &mut Contents, compressor: &mut Compressor, page: &Page) -> ContentId {
        let hash = Contents::hash(&contents.hasher(), page);
        match contents.find(hash, page) {
            Some(id) => id,
            None => contents.insert(hash, compressor.compress(page)).unwrap(),
        }
    }

    #[test]
    fn equal_pages_are_kept_once() {
        let (mut contents, mut compressor) = (Contents::new(), Compressor::new());
        let ids: Vec<_> =
            (0..10).map(|n| put(&mut contents, &mut compressor, &page(n % 3, n % 2 == 0))).collect();
        assert_eq!((contents.pages(), contents.distinct(), contents.duplicates()), (10, 6, 4));
        for (n, id) in ids.iter().enumerate() {
            let mut back = [1; PAGE_SIZE as usize];
            contents.read(*id, &mut back).unwrap();
            assert_eq!(back, page(n as u64 % 3, n % 2 == 0));
        }
        ids.into_iter().for_each(|id| contents.release(id));
        assert_eq!((contents.pages(), contents.distinct(), contents.memory()), (0, 0, Tier::default()));
    }

    /// Random puts and releases, compared with what a map of the plain pages says; with `file`, what is oldest moves
    /// there now and then.
    fn put_and_release(file: Option<&Arc<StoreFile>>) {
        let (mut contents, mut compressor) = (Contents::new(), Compressor::new());
        let mut rng = fastrand::Rng::with_seed(7);
        let mut kept: Vec<(ContentId, u64)> = Vec::new();
        let mut moved = 0;
        for round in 0..6000 {
            if let Some(file) = file.filter(|_| round % 250 == 249)
                && let Some(movable) = contents.oldest(round % 1000 == 999)
            {
                let slot = file.write(movable.bytes()).unwrap();
                moved += u32::from(contents.move_to_file(&movable, slot));
            }
            if rng.u8(..) < 150 || kept.is_empty() {
                let seed = rng.u64(..2000);
                kept.push((put(&mut contents, &mut compressor, &page(seed, !seed.is_multiple_of(4))), seed));
            } else {
                let (id, _) = kept.swap_remove(rng.usize(..kept.len()));
                contents.release(id);
            }
            let Tier { live, used } = contents.memory();
            assert!(used - live <= (256 << 10) + live / 3 + (256 << 10), "{live} of {used}");
            let Tier { live, used } = contents.file();
            assert!(used - live <= (256 << 10) + live + (256 << 10), "{live} of {used} in the file");
        }
        assert_eq!(moved > 5, file.is_some());
        assert_eq!(contents.pages(), kept.len() as u64);
        for (id, seed) in kept {
            let mut back = [0; PAGE_SIZE as usize];
            contents.read(id, &mut back).unwrap();
            assert_eq!(back, page(seed, !seed.is_multiple_of(4)), "{seed}");
        }
    }

    #[test]
    fn nothing_is_lost_when_segments_are_written_again() {
        put_and_release(None);
    }

    #[test]
    fn nothing_is_lost_when_segments_move_to_a_file() {
        let directory = tempfile::tempdir().unwrap();
        put_and_release(Some(&Arc::new(StoreFile::create(directory.path()).unwrap())));
    }

    #[test]
    fn a_file_that_lies_is_found_out() {
        let directory = tempfile::tempdir().unwrap();
        let file = Arc::new(StoreFile::create(directory.path()).unwrap());
        let (mut contents, mut compressor) = (Contents::new(), Compressor::new());
        let id = put(&mut contents, &mut compressor, &page(1, false));
        let movable = contents.oldest(true).unwrap();
        let mut wrong = movable.bytes().to_vec();
        wrong[100] ^= 1;
        assert!(contents.move_to_file(&movable, file.write(&wrong).unwrap()));
        let error = contents.read(id, &mut [0; PAGE_SIZE as usize]).unwrap_err().to_string();
        assert!(error.contains("something else"), "{error}");
    }
}

//! Taking pages out of guest memory.

use std::hash::RandomState;
use std::io;
use std::sync::atomic::Ordering;

use super::contents::{Compressor, ContentId, Contents, Page};
use super::{Evicted, Mark, Shared};
use crate::{PAGE_SHIFT, PAGE_SIZE};

/// Pages that are moved at once: so long the lock is held, some 3 microseconds for each.
pub(super) const BATCH: usize = 32;

/// Takes pages out. There is one for each staging area.
pub(super) struct Evictor {
    compressor: Compressor,
    hasher: RandomState,
}

impl Evictor {
    pub(super) fn new(hasher: RandomState) -> Self {
        Self { compressor: Compressor::new(), hasher }
    }

    pub(super) fn evict(&mut self, shared: &Shared, pages: &[usize]) -> Evicted {
        let mut all = Evicted::default();
        for batch in pages.chunks(BATCH) {
            let moved = move_out(shared, batch);
            all.kept += (batch.len() - moved.len()) as u64;
            for (place, &page) in moved.iter().enumerate() {
                let Some(mark) = shared.staged(place).and_then(|staged| self.store(shared, staged)) else {
                    // The host has no memory for it: as it was.
                    put_back(shared, page, place);
                    all.kept += 1;
                    continue;
                };
                let mut state = shared.state.lock();
                if shared.mark(page) == Mark::Moving(place) {
                    shared.set_mark(&mut state, page, mark);
                    all.pages += 1;
                    all.zero += u64::from(mark == Mark::Zero);
                } else {
                    // Touched or discarded meanwhile.
                    if let Mark::Content(id) = mark {
                        state.contents.release(id);
                    }
                    all.kept += 1;
                }
            }
            clear_staging(shared, moved.len());
        }
        shared.evicted.fetch_add(all.pages, Ordering::Relaxed);
        all
    }

    /// Keeps a page's content. `None`: there is no memory for it.
    fn store(&mut self, shared: &Shared, page: &Page) -> Option<Mark> {
        if page.iter().all(|b| *b == 0) {
            return Some(Mark::Zero);
        }
        let hash = Contents::hash(&self.hasher, page);
        // Each under a lock of its own: compressing takes longer than a fault may wait.
        let found: Option<ContentId> = shared.state.lock().contents.find(hash, page);
        if let Some(id) = found {
            return Some(Mark::Content(id));
        }
        let stored = self.compressor.compress(page);
        shared.state.lock().contents.insert(hash, stored).ok().map(Mark::Content)
    }
}

/// Moves pages to the staging area: the first that could be moved to its first page, and so on. Returns them.
fn move_out(shared: &Shared, pages: &[usize]) -> Vec<usize> {
    let mut moved = Vec::with_capacity(pages.len());
    let _gate = shared.holds.evicting();
    let mut state = shared.state.lock();
    for &page in pages {
        let place = moved.len();
        let Some(from) = shared.host(page) else { continue };
        if shared.mark(page) != Mark::None || shared.holds.is_held(page) {
            continue;
        }
        let to = shared.staging.start() + ((place as u64) << PAGE_SHIFT);
        let result = shared.userfault.move_page(from, to);
        // EAGAIN: the kernel is at the page itself; there are others.
        if result.is_ok() {
            shared.set_mark(&mut state, page, Mark::Moving(place));
            moved.push(page);
        }
    }
    moved
}

fn put_back(shared: &Shared, page: usize, place: usize) {
    let mut state = shared.state.lock();
    if shared.mark(page) != Mark::Moving(place) {
        return;
    }
    let from = shared.staging.start() + ((place as u64) << PAGE_SHIFT);
    let Some(to) = shared.host(page) else { return };
    loop {
        match shared.userfault.move_page(from, to) {
            Ok(()) => break,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
            Err(e) => {
                // It stays in the staging area and must not be lost: nothing else can be done for this VM.
                tracing::error!("a page of guest memory cannot be put back: {e}");
                std::process::abort();
            }
        }
    }
    shared.set_mark(&mut state, page, Mark::None);
}

/// Gives the staging area's memory back. No page is marked as being in it any more.
fn clear_staging(shared: &Shared, pages: usize) {
    if pages > 0 {
        let start = shared.staging.start().0 as *mut libc::c_void;
        // SAFETY: the range is inside the staging area, whose pages nobody looks at before they are moved there.
        unsafe { libc::madvise(start, pages * PAGE_SIZE as usize, libc::MADV_DONTNEED) };
    }
}

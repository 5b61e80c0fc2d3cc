//! Blocks of translated code: lookup, links, invalidation, eviction.
//!
//! All vCPUs share one cache. Blocks are allocated one after the other; when the cache is full, all of them are
//! dropped while no vCPU is inside translated code.
//!
//! A block has one or two *entries*, for guest flags in memory or in the host's flags. Each begins with an
//! aligned eight-byte NOP. To invalidate a block its entries are overwritten, in one store each, by calls of the
//! *tomb* stubs, which leave to the run loop; whatever still jumps to the block (links, jump caches of other
//! vCPUs) thereby ends up there. When the same guest code is translated again, the entries of the dead block are
//! pointed at the new one.
//!
//! There are as many blocks as a guest has basic blocks, so what is kept for each is small: see `block.rs`.

use std::collections::HashMap;
use std::hash::{BuildHasher, BuildHasherDefault, Hasher};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use berth_memory::GuestPhysAddr;
use hashbrown::HashTable;
use parking_lot::RwLock;

use super::asm::Asm;
use super::block::{Block, Draft, Found, Helped, SiteKind};
use super::memory::CodeMemory;
use super::perf_map::PerfMap;
use super::stubs::{self, Stubs};
use crate::mode::Mode;

/// What identifies a translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    /// Guest physical address of the first byte.
    pub gpa: u64,
    /// Linear address of the first byte.
    pub lin: u64,
    /// Offset in the code segment.
    pub rip: u64,
    pub mode: Mode,
}

/// A multiplicative hash: keys are addresses and need no protection from collisions made on purpose, because a
/// guest can only slow itself down.
#[derive(Default)]
pub(crate) struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 32
    }
    fn write(&mut self, bytes: &[u8]) {
        for &b in bytes {
            self.write_u64(u64::from(b));
        }
    }
    fn write_u32(&mut self, n: u32) {
        self.write_u64(u64::from(n));
    }
    fn write_u64(&mut self, n: u64) {
        self.0 = (self.0.rotate_left(5) ^ n).wrapping_mul(0x517c_c1b7_2722_0a95);
    }
}

type Map<K, V> = HashMap<K, V, BuildHasherDefault<KeyHasher>>;

#[derive(Default)]
struct Inner {
    next: u32,
    /// In ascending order of `start`.
    blocks: Vec<Block>,
    /// Numbers of the live blocks, by hash of their key.
    table: HashTable<u32>,
    /// Blocks that have bytes in a guest physical page.
    pages: Map<u64, Vec<u32>>,
    /// The latest dead block of a key.
    dead: Map<Key, u32>,
    /// Instructions that helpers execute: the code has their addresses.
    #[expect(clippy::vec_box, reason = "the code has their addresses")]
    instructions: Vec<Box<Helped>>,
    stats: CacheStats,
    perf_map: Option<PerfMap>,
}

fn hash(key: &Key) -> u64 {
    BuildHasherDefault::<KeyHasher>::default().hash_one(key)
}

impl Inner {
    fn number_of(&self, key: &Key) -> Option<u32> {
        self.table.find(hash(key), |&id| self.blocks[id as usize].key() == *key).copied()
    }

    /// Takes a block out of the table.
    fn bury(&mut self, id: u32) {
        let block = &mut self.blocks[id as usize];
        block.set_dead();
        let key = block.key();
        if let Ok(entry) = self.table.find_entry(hash(&key), |&other| other == id) {
            entry.remove();
        }
    }

    /// The block that holds the cache offset `offset`.
    fn block_at(&self, offset: u32) -> Option<&Block> {
        let index = self.blocks.partition_point(|b| b.start <= offset).checked_sub(1)?;
        let block = &self.blocks[index];
        (offset - block.start < u32::from(block.len)).then_some(block)
    }
}

/// Counters of the code cache since the VM was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Blocks translated.
    pub blocks: u64,
    /// Bytes of host code made.
    pub host_bytes: u64,
    /// Bytes of guest code translated.
    pub guest_bytes: u64,
    /// Blocks dropped because the guest or a device wrote to their code.
    pub invalidated: u64,
    /// How often the whole cache was dropped because it was full.
    pub evictions: u64,
    /// Bytes in use now.
    pub used: u64,
    /// Size of the cache.
    pub size: u64,
}

/// What a host PC stands for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Located {
    pub rip: u64,
    pub site: SiteKind,
    /// Host address where the block goes on, if the exception is found there.
    pub redirect: Option<u64>,
}

/// A jump that wants to be linked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WantedLink {
    /// Where it leads.
    pub rip: u64,
    /// Cache offset of its rel32 field.
    field: u32,
    flags: super::block::FlagsPlace,
}

/// The code cache.
pub(crate) struct CodeCache {
    memory: CodeMemory,
    pub(crate) stubs: Stubs,
    stubs_end: u32,
    inner: RwLock<Inner>,
    /// Counts evictions: whoever holds addresses in the cache must forget them when it changes.
    epoch: AtomicU64,
}

/// The cache is full: evict and translate again.
#[derive(Debug)]
pub(crate) struct Full;

/// Smallest code cache in bytes.
pub const MIN_CODE_CACHE: u64 = 1 << 20;
/// Largest code cache in bytes: jumps reach 2 GiB.
pub const MAX_CODE_CACHE: u64 = 1 << 30;

const CALL: u64 = 0xe8;
const JUMP: u64 = 0xe9;

impl CodeCache {
    pub(crate) fn new(size: u64) -> io::Result<Self> {
        let size = size.clamp(MIN_CODE_CACHE, MAX_CODE_CACHE).next_multiple_of(4096);
        let memory = CodeMemory::new(size as usize)?;
        let mut asm = Asm::default();
        let stubs = stubs::emit(&mut asm, memory.address(0));
        memory.write(0, &asm.code);
        let stubs_end = asm.pos().next_multiple_of(64);
        let inner = RwLock::new(Inner { next: stubs_end, ..Inner::default() });
        Ok(Self { memory, stubs, stubs_end, inner, epoch: AtomicU64::new(0) })
    }

    /// From now on all blocks are named for `perf`.
    pub(crate) fn start_perf_map(&self) -> io::Result<()> {
        let mut map = PerfMap::create()?;
        map.name(self.memory.address(0), self.stubs_end, "stubs")?;
        self.inner.write().perf_map = Some(map);
        Ok(())
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    pub(crate) fn address(&self, offset: u32) -> u64 {
        self.memory.address(offset)
    }

    pub(crate) fn range(&self) -> (u64, u64) {
        let start = self.memory.address(0);
        (start, start + self.memory.size() as u64)
    }

    pub(crate) fn stats(&self) -> CacheStats {
        let inner = self.inner.read();
        CacheStats { used: u64::from(inner.next), size: self.memory.size() as u64, ..inner.stats }
    }

    pub(crate) fn find(&self, key: &Key) -> Option<Found> {
        let inner = self.inner.read();
        inner.number_of(key).map(|id| inner.blocks[id as usize].found())
    }

    /// Puts a translation into the cache, unless somebody was faster. `still_valid` is asked under the lock.
    pub(crate) fn insert(
        &self,
        asm: &mut Asm,
        draft: Draft,
        still_valid: impl FnOnce() -> bool,
    ) -> Result<Option<Found>, Full> {
        let mut inner = self.inner.write();
        let inner = &mut *inner;
        let key = draft.key;
        let old = inner.number_of(&key);
        if let Some(found) = old.map(|id| inner.blocks[id as usize].found())
            && found.second_page == draft.second_page
        {
            return Ok(Some(found));
        }
        if !still_valid() {
            return Ok(None);
        }
        let start = inner.next.next_multiple_of(16);
        let len = asm.pos();
        // The return address of a stub at the end of the block must be inside the cache too.
        if start as usize + len as usize >= self.memory.size() {
            return Err(Full);
        }
        for &(at, target) in &asm.calls {
            let from = self.memory.address(start + at + 4);
            let rel = target.wrapping_sub(from) as u32;
            asm.code[at as usize..at as usize + 4].copy_from_slice(&rel.to_le_bytes());
        }
        self.memory.write(start, &asm.code);
        inner.next = start + len;
        inner.stats.blocks += 1;
        inner.stats.host_bytes += u64::from(len);
        inner.stats.guest_bytes += draft.source.len() as u64;

        if let Some(map) = &mut inner.perf_map
            && let Err(error) = map.name_block(self.memory.address(start), len, &key)
        {
            tracing::warn!("the names of blocks for perf end here: {error}");
            inner.perf_map = None;
        }
        let id = inner.blocks.len() as u32;
        inner.pages.entry(key.gpa >> 12).or_default().push(id);
        if let Some(second) = draft.second_page {
            inner.pages.entry(second >> 12).or_default().push(id);
        }
        let block = Block::new(start, len, &draft);
        inner.instructions.extend(draft.instructions);
        let found = block.found();
        if let Some(dead) = inner.dead.remove(&key) {
            self.redirect(&inner.blocks[dead as usize], JUMP, found.entry_memory, found.entry_host);
        }
        if let Some(old) = old {
            // A block whose second page is another one now.
            inner.bury(old);
            self.redirect(&inner.blocks[old as usize], JUMP, found.entry_memory, found.entry_host);
        }
        inner.blocks.push(block);
        let blocks = &inner.blocks;
        inner.table.insert_unique(hash(&key), id, |&id| hash(&blocks[id as usize].key()));
        Ok(Some(found))
    }

    /// Makes the entries of `block` jump to or call cache offsets.
    fn redirect(&self, block: &Block, opcode: u64, memory: u32, host: u32) {
        let patch = |entry: u32, target: u32| {
            let rel = target.wrapping_sub(entry + 5);
            // The three bytes after it are the rest of the eight-byte NOP.
            let bytes = opcode | u64::from(rel) << 8 | 0x90_90_90 << 40;
            self.memory.patch_head(entry, bytes);
        };
        let found = block.found();
        patch(found.entry_memory, memory);
        if found.entry_host != found.entry_memory {
            patch(found.entry_host, host);
        }
    }

    /// The jump whose link stub was called with return address `pc`.
    pub(crate) fn wanted_link(&self, pc: u64) -> Option<WantedLink> {
        let offset = self.memory.offset_of(pc)?;
        let inner = self.inner.read();
        let block = inner.block_at(offset.checked_sub(1)?)?;
        let link = block.links().find(|l| block.start + l.exit == offset)?;
        let rip = block.key().rip & !0xfff | u64::from(link.rip_low);
        Some(WantedLink { rip, field: block.start + link.field, flags: link.flags })
    }

    /// Makes a jump lead to `found` directly.
    pub(crate) fn link(&self, link: &WantedLink, found: &Found) {
        let host = link.flags.enters_host(found.prefers_host);
        let target = if host { found.entry_host } else { found.entry_memory };
        self.memory.patch_rel32(link.field, target);
    }

    /// First RIP of the dead block whose entry ends at `pc`.
    pub(crate) fn dead_rip(&self, pc: u64) -> Option<u64> {
        let offset = self.memory.offset_of(pc)?;
        self.inner.read().block_at(offset).map(|b| b.key().rip)
    }

    /// Drops the blocks that have bytes in `len` bytes at `start`, which lie in one page. Returns whether there
    /// were any.
    pub(crate) fn invalidate(&self, start: GuestPhysAddr, len: u64) -> bool {
        self.invalidate_if(start, |block| {
            let first = block.key().gpa;
            let source = block.source().len() as u64;
            let in_first = (4096 - (first & 0xfff)).min(source);
            let hits = |at: u64, n: u64| at < start.0 + len && start.0 < at + n;
            hits(first, in_first) || block.found().second_page.is_some_and(|p| hits(p, source - in_first))
        })
    }

    /// Drops the blocks of the page at `page` whose source is not what `read` finds in memory now.
    pub(crate) fn recheck(&self, page: GuestPhysAddr, mut read: impl FnMut(u64, &mut [u8])) {
        self.invalidate_if(page, |block| {
            let (gpa, source) = (block.key().gpa, block.source());
            let in_first = (4096 - (gpa & 0xfff) as usize).min(source.len());
            let mut now = vec![0; source.len()];
            read(gpa, &mut now[..in_first]);
            if let Some(second) = block.found().second_page {
                read(second, &mut now[in_first..]);
            }
            now != source
        });
    }

    fn invalidate_if(&self, page: GuestPhysAddr, mut hit: impl FnMut(&Block) -> bool) -> bool {
        // Most stores to a page with code hit none of it: look first, without keeping others out.
        {
            let inner = self.inner.read();
            let Some(ids) = inner.pages.get(&(page.0 >> 12)) else { return false };
            let mut live = ids.iter().map(|&id| &inner.blocks[id as usize]).filter(|b| b.is_live());
            if !live.any(&mut hit) {
                return false;
            }
        }
        self.kill(&mut self.inner.write(), page, hit)
    }

    /// Drops all blocks of the page at `page` and calls `unmark` while nobody can add one.
    pub(crate) fn release(&self, page: GuestPhysAddr, unmark: impl FnOnce()) {
        let mut inner = self.inner.write();
        self.kill(&mut inner, page, |_| true);
        inner.pages.remove(&(page.0 >> 12));
        unmark();
    }

    /// Drops those blocks of the page at `page` that are `hit`. Returns whether there were any.
    fn kill(&self, inner: &mut Inner, page: GuestPhysAddr, mut hit: impl FnMut(&Block) -> bool) -> bool {
        let Some(mut ids) = inner.pages.remove(&(page.0 >> 12)) else { return false };
        let mut any = false;
        ids.retain(|&id| {
            let block = &inner.blocks[id as usize];
            if !block.is_live() {
                return false;
            }
            if !hit(block) {
                return true;
            }
            any = true;
            inner.stats.invalidated += 1;
            inner.bury(id);
            let block = &inner.blocks[id as usize];
            let offset = |address: u64| (address - self.memory.address(0)) as u32;
            self.redirect(block, CALL, offset(self.stubs.tomb_memory), offset(self.stubs.tomb_host));
            inner.dead.insert(block.key(), id);
            false
        });
        inner.pages.insert(page.0 >> 12, ids);
        any
    }

    /// What the host PC `pc` stands for, if it is at a site of a block.
    pub(crate) fn locate(&self, pc: u64) -> Option<Located> {
        let offset = self.memory.offset_of(pc)?;
        let inner = self.inner.read();
        let block = inner.block_at(offset)?;
        let site = block.sites().find(|s| s.host == offset - block.start)?;
        let rip = match site.what {
            SiteKind::Instruction { offset, .. } => block.key().rip.wrapping_add(u64::from(offset)),
            SiteKind::Poll { index, .. } => block.poll(index)?,
        };
        let redirect = block.redirect(site.host).map(|to| self.memory.address(block.start + to));
        Some(Located { rip, site: site.what, redirect })
    }

    /// Drops everything. No vCPU may be inside translated code. `unmark` is called for each guest physical page
    /// that has no translations any more.
    pub(crate) fn evict_all(&self, mut unmark: impl FnMut(GuestPhysAddr)) {
        let mut inner = self.inner.write();
        for &page in inner.pages.keys() {
            unmark(GuestPhysAddr(page << 12));
        }
        let (stats, perf_map) = (inner.stats, inner.perf_map.take());
        *inner = Inner { next: self.stubs_end, stats, perf_map, ..Inner::default() };
        inner.stats.evictions += 1;
        self.memory.discard_from(self.stubs_end);
        self.epoch.fetch_add(1, Ordering::AcqRel);
    }
}

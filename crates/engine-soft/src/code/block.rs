//! What is kept for one block of translated code.
//!
//! A booting kernel has a hundred thousand blocks, so a block is some 70 bytes here, and all its tables are one
//! allocation: guest bytes, then sites, links and polls in fixed-size records.

use iced_x86::Instruction;

use super::cache::Key;
use crate::fault::Fault;
use crate::mode::Mode;

/// A host instruction in a block at which a signal may be raised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Site {
    /// Offset of the host instruction from the start of the block.
    pub host: u32,
    /// What it stands for.
    pub what: SiteKind,
}

/// Kind of a [`Site`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SiteKind {
    /// A copied guest instruction.
    Instruction {
        /// RIP minus the block's first RIP, less than 1024.
        offset: u16,
        /// The guest's flags are in the host's flags.
        host_flags: bool,
        /// A bad address is a fault of the stack.
        stack: bool,
    },
    /// A poll; the RIP that follows is in the block's polls at this index.
    Poll {
        /// Index, less than 1024.
        index: u16,
        /// The guest's flags are in the host's flags.
        host_flags: bool,
    },
}

/// A jump that can be linked: the block that it leads to is reached without the run loop from then on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    /// Offset of the rel32 field from the start of the block.
    pub field: u32,
    /// Offset of the return address of its stub.
    pub exit: u32,
    /// Low 12 bits of the RIP that it leads to, which is in the block's own page.
    pub rip_low: u16,
    /// Where the guest's flags are when it is taken.
    pub flags: FlagsPlace,
}

/// An instruction that a helper executes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Helped {
    pub insn: Instruction,
    /// The exception that it raises instead, because this CPU or mode does not have it.
    pub unavailable: Option<Fault>,
}

/// Where the guest's arithmetic flags are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum FlagsPlace {
    Memory,
    Host,
    Both,
}

impl FlagsPlace {
    /// Which entry of a block to take; `prefers_host`: how the block itself begins.
    pub(crate) fn enters_host(self, prefers_host: bool) -> bool {
        match self {
            FlagsPlace::Memory => false,
            FlagsPlace::Host => true,
            FlagsPlace::Both => prefers_host,
        }
    }
}

/// A finished translation that is not in the cache yet. Positions are offsets from its start.
pub(crate) struct Draft {
    pub key: Key,
    /// Guest physical address of the second page, if the last instruction crosses into it.
    pub second_page: Option<u64>,
    /// The guest bytes it was made from.
    pub source: Box<[u8]>,
    pub sites: Vec<Site>,
    pub polls: Vec<u64>,
    pub links: Vec<Link>,
    /// Sites after whose signal the block goes on at another place.
    pub redirects: Vec<(u32, u32)>,
    /// Instructions that helpers execute: the code has their addresses.
    #[expect(clippy::vec_box, reason = "the code has their addresses")]
    pub instructions: Vec<Box<Helped>>,
    pub entry_memory: u32,
    pub entry_host: u32,
    pub prefers_host: bool,
}

/// Where translated code for a key is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found {
    /// Offset in the cache of the entry for flags in memory.
    pub entry_memory: u32,
    /// Offset in the cache of the entry for flags in the host.
    pub entry_host: u32,
    /// Guest physical address of the second page, if the block reaches into it.
    pub second_page: Option<u64>,
    /// The block itself begins with flags in the host.
    pub prefers_host: bool,
}

const LIVE: u8 = 1;
const PREFERS_HOST: u8 = 2;

/// A block in the cache.
pub(crate) struct Block {
    gpa: u64,
    lin: u64,
    rip: u64,
    mode: Mode,
    /// Offset in the cache.
    pub start: u32,
    /// Bytes of host code.
    pub len: u16,
    entry_memory: u16,
    entry_host: u16,
    source_len: u16,
    /// Number of the second guest physical page; 0: none (page 0 never follows another page).
    second_page: u32,
    sites: u8,
    links: u8,
    polls: u8,
    redirects: u8,
    state: u8,
    tables: Box<[u8]>,
}

const SITE: usize = 4;
const LINK: usize = 7;
const POLL: usize = 8;
const REDIRECT: usize = 4;

impl Block {
    /// The block for `draft`, placed at `start`. The translator bounds a block's length so that everything fits
    /// its field.
    pub(crate) fn new(start: u32, len: u32, draft: &Draft) -> Self {
        let size = draft.source.len()
            + draft.sites.len() * SITE
            + draft.links.len() * LINK
            + draft.polls.len() * POLL
            + draft.redirects.len() * REDIRECT;
        let mut tables = Vec::with_capacity(size);
        tables.extend_from_slice(&draft.source);
        draft.sites.iter().for_each(|s| tables.extend(encode_site(s)));
        draft.links.iter().for_each(|l| tables.extend(encode_link(l)));
        draft.polls.iter().for_each(|p| tables.extend(p.to_le_bytes()));
        for &(site, to) in &draft.redirects {
            tables.extend((site as u16).to_le_bytes());
            tables.extend((to as u16).to_le_bytes());
        }
        let small = |n: usize| u8::try_from(n).expect("a block has few instructions");
        let short = |n: u32| u16::try_from(n).expect("a block is short");
        Self {
            gpa: draft.key.gpa,
            lin: draft.key.lin,
            rip: draft.key.rip,
            mode: draft.key.mode,
            start,
            len: short(len),
            entry_memory: short(draft.entry_memory),
            entry_host: short(draft.entry_host),
            source_len: short(draft.source.len() as u32),
            second_page: draft.second_page.map_or(0, |p| (p >> 12) as u32),
            sites: small(draft.sites.len()),
            links: small(draft.links.len()),
            polls: small(draft.polls.len()),
            redirects: small(draft.redirects.len()),
            state: LIVE | if draft.prefers_host { PREFERS_HOST } else { 0 },
            tables: tables.into(),
        }
    }

    pub(crate) fn key(&self) -> Key {
        Key { gpa: self.gpa, lin: self.lin, rip: self.rip, mode: self.mode }
    }

    pub(crate) fn found(&self) -> Found {
        Found {
            entry_memory: self.start + u32::from(self.entry_memory),
            entry_host: self.start + u32::from(self.entry_host),
            second_page: (self.second_page != 0).then(|| u64::from(self.second_page) << 12),
            prefers_host: self.state & PREFERS_HOST != 0,
        }
    }

    pub(crate) fn is_live(&self) -> bool {
        self.state & LIVE != 0
    }

    pub(crate) fn set_dead(&mut self) {
        self.state &= !LIVE;
    }

    /// The guest bytes that it was made from.
    pub(crate) fn source(&self) -> &[u8] {
        &self.tables[..usize::from(self.source_len)]
    }

    /// The records of `size` bytes, `count` of them, that follow `before` bytes of tables.
    fn records<const N: usize>(&self, before: usize, count: u8) -> impl Iterator<Item = [u8; N]> {
        let bytes = &self.tables[before..before + usize::from(count) * N];
        bytes.as_chunks::<N>().0.iter().copied()
    }

    fn sites_at(&self) -> usize {
        usize::from(self.source_len)
    }

    fn links_at(&self) -> usize {
        self.sites_at() + usize::from(self.sites) * SITE
    }

    fn polls_at(&self) -> usize {
        self.links_at() + usize::from(self.links) * LINK
    }

    /// Where to go on in the block after a signal at offset `site`, if not at the exit.
    pub(crate) fn redirect(&self, site: u32) -> Option<u32> {
        let before = self.polls_at() + usize::from(self.polls) * POLL;
        let short = |a: u8, b: u8| u32::from(u16::from_le_bytes([a, b]));
        let mut all = self.records::<REDIRECT>(before, self.redirects);
        all.find(|&[a, b, _, _]| short(a, b) == site).map(|[_, _, c, d]| short(c, d))
    }

    pub(crate) fn sites(&self) -> impl Iterator<Item = Site> {
        self.records::<SITE>(self.sites_at(), self.sites).map(decode_site)
    }

    pub(crate) fn links(&self) -> impl Iterator<Item = Link> {
        self.records::<LINK>(self.links_at(), self.links).map(decode_link)
    }

    /// RIP after poll number `index`.
    pub(crate) fn poll(&self, index: u16) -> Option<u64> {
        self.records::<POLL>(self.polls_at(), self.polls).nth(usize::from(index)).map(u64::from_le_bytes)
    }
}

const SITE_NUMBER: u16 = 0x3ff;
const SITE_HOST_FLAGS: u16 = 1 << 10;
const SITE_POLL: u16 = 1 << 11;
const SITE_STACK: u16 = 1 << 12;

fn encode_site(site: &Site) -> [u8; SITE] {
    let flag = |on: bool| if on { SITE_HOST_FLAGS } else { 0 };
    let what = match site.what {
        SiteKind::Instruction { offset, host_flags, stack } => {
            offset & SITE_NUMBER | flag(host_flags) | if stack { SITE_STACK } else { 0 }
        }
        SiteKind::Poll { index, host_flags } => index & SITE_NUMBER | flag(host_flags) | SITE_POLL,
    };
    let [a, b] = (site.host as u16).to_le_bytes();
    let [c, d] = what.to_le_bytes();
    [a, b, c, d]
}

fn decode_site([a, b, c, d]: [u8; SITE]) -> Site {
    let what = u16::from_le_bytes([c, d]);
    let host_flags = what & SITE_HOST_FLAGS != 0;
    let what = if what & SITE_POLL != 0 {
        SiteKind::Poll { index: what & SITE_NUMBER, host_flags }
    } else {
        SiteKind::Instruction { offset: what & SITE_NUMBER, host_flags, stack: what & SITE_STACK != 0 }
    };
    Site { host: u32::from(u16::from_le_bytes([a, b])), what }
}

fn encode_link(link: &Link) -> [u8; LINK] {
    let [a, b] = (link.field as u16).to_le_bytes();
    let [c, d] = (link.exit as u16).to_le_bytes();
    let [e, f] = link.rip_low.to_le_bytes();
    [a, b, c, d, e, f, link.flags as u8]
}

fn decode_link([a, b, c, d, e, f, flags]: [u8; LINK]) -> Link {
    Link {
        field: u32::from(u16::from_le_bytes([a, b])),
        exit: u32::from(u16::from_le_bytes([c, d])),
        rip_low: u16::from_le_bytes([e, f]),
        flags: match flags {
            0 => FlagsPlace::Memory,
            1 => FlagsPlace::Host,
            _ => FlagsPlace::Both,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_survive_packing() {
        let sites = vec![
            Site { host: 0x1234, what: SiteKind::Instruction { offset: 719, host_flags: true, stack: true } },
            Site { host: 0x1300, what: SiteKind::Poll { index: 1, host_flags: false } },
        ];
        let links = vec![Link { field: 0x44, exit: 0x1350, rip_low: 0xfff, flags: FlagsPlace::Both }];
        let key = Key { gpa: 0x1000, lin: 0x2000, rip: 0x2000, mode: Mode(5) };
        let draft = Draft {
            key,
            second_page: Some(0x5000),
            source: vec![1, 2, 3].into(),
            sites: sites.clone(),
            polls: vec![7, u64::MAX],
            links: links.clone(),
            redirects: vec![(0x1300, 0x1340)],
            instructions: Vec::new(),
            entry_memory: 0,
            entry_host: 24,
            prefers_host: true,
        };
        let block = Block::new(0x100, 0x2000, &draft);
        assert_eq!(block.key(), key);
        assert_eq!(block.source(), [1, 2, 3]);
        assert_eq!(block.sites().collect::<Vec<_>>(), sites);
        assert_eq!(block.links().collect::<Vec<_>>(), links);
        assert_eq!((block.poll(1), block.poll(2)), (Some(u64::MAX), None));
        assert_eq!((block.redirect(0x1300), block.redirect(0x1234)), (Some(0x1340), None));
        assert_eq!(block.found().entry_host, 0x118);
        assert_eq!(block.found().second_page, Some(0x5000));
        assert!(size_of::<Block>() <= 72);
    }
}

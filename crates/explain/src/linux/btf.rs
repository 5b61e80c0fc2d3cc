//! As much of BTF, the kernel's type information, as it takes to find members of structures (the kernel's
//! Documentation/bpf/btf.rst). The bytes are the guest's, so nothing in them is believed.

use std::ops::Range;

/// How the header begins: magic number, version 1, no flags, and a header of 24 bytes.
pub const MAGIC: [u8; 8] = [0x9f, 0xeb, 1, 0, 24, 0, 0, 0];
const HEADER_LEN: u64 = 24;
/// A distribution's kernel has 5 MiB.
const MAX_LEN: u64 = 64 << 20;
/// Most members that are looked at for one name, with those of anonymous structures, which may be nested in themselves.
const MAX_MEMBERS: u32 = 1 << 16;
/// How deep anonymous structures may be nested.
const MAX_DEPTH: u32 = 16;

const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;

/// Type information, read and indexed.
pub struct Btf {
    types: Vec<u8>,
    strings: Vec<u8>,
    /// Where the description of type 1, 2, … begins in `types`.
    starts: Vec<u32>,
}

/// A structure or union in a [`Btf`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StructureId(u32);

/// The fixed part of a type's description.
#[derive(Clone, Copy)]
struct Head {
    name: u32,
    info: u32,
}

impl Head {
    fn kind(self) -> u32 {
        self.info >> 24 & 0x1f
    }
    fn len(self) -> u32 {
        self.info & 0xffff
    }
    /// Whether offsets of members share their word with the width of a bit field.
    fn has_bit_fields(self) -> bool {
        self.info >> 31 != 0
    }
    /// Bytes that follow the fixed part; `None` for kinds that are not known.
    fn more(self) -> Option<u32> {
        Some(match self.kind() {
            // INT, VAR, DECL_TAG
            1 | 14 | 17 => 4,
            // PTR, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT, FUNC, FLOAT, TYPE_TAG
            2 | 7..=12 | 16 | 18 => 0,
            // ARRAY
            3 => 12,
            // STRUCT, UNION, DATASEC, ENUM64
            KIND_STRUCT | KIND_UNION | 15 | 19 => 12 * self.len(),
            // ENUM, FUNC_PROTO
            6 | 13 => 8 * self.len(),
            _ => return None,
        })
    }
}

const HEAD_LEN: u32 = 12;
const MEMBER_LEN: u32 = 12;

impl Btf {
    /// Reads it through `read`, which fills a buffer from an offset after the start of the header.
    pub fn read(read: impl Fn(u64, &mut [u8]) -> Option<()>) -> Option<Self> {
        let mut header = [0; HEADER_LEN as usize];
        read(0, &mut header)?;
        let section = |at: usize| -> Option<Range<u64>> {
            let (start, len) = (u64::from(word(&header, at)?), u64::from(word(&header, at + 4)?));
            (start + len <= MAX_LEN).then_some(HEADER_LEN + start..HEADER_LEN + start + len)
        };
        let content = |range: Range<u64>| -> Option<Vec<u8>> {
            // Read in pieces, so that a wrong length costs nothing.
            let mut bytes = Vec::new();
            while (bytes.len() as u64) < range.end - range.start {
                let done = bytes.len();
                let part = (1 << 16).min(range.end - range.start - done as u64);
                bytes.resize(done + part as usize, 0);
                read(range.start + done as u64, &mut bytes[done..])?;
            }
            Some(bytes)
        };
        let (types, strings) = (content(section(8)?)?, content(section(16)?)?);
        let mut btf = Self { types, strings, starts: Vec::new() };
        let mut at = 0;
        while let Some(head) = btf.head_at(at) {
            btf.starts.push(at);
            at += HEAD_LEN + head.more()?;
        }
        (at as usize == btf.types.len()).then_some(btf)
    }

    fn head_at(&self, at: u32) -> Option<Head> {
        let at = at as usize;
        Some(Head { name: word(&self.types, at)?, info: word(&self.types, at + 4)? })
    }

    fn string(&self, at: u32) -> Option<&[u8]> {
        let rest = self.strings.get(at as usize..)?;
        rest.split(|&b| b == 0).next()
    }

    /// The structure called `name`.
    pub fn structure(&self, name: &str) -> Option<StructureId> {
        self.starts.iter().copied().find_map(|at| {
            let head = self.head_at(at)?;
            let found = head.kind() == KIND_STRUCT && self.string(head.name)? == name.as_bytes();
            found.then_some(StructureId(at))
        })
    }

    /// Offset in bytes of the member `name`, also of one in a member without a name.
    pub fn offset(&self, of: StructureId, name: &str) -> Option<u64> {
        self.offset_within(of, name, 0, &mut (0..MAX_MEMBERS))
    }

    fn offset_within(&self, of: StructureId, name: &str, depth: u32, budget: &mut Range<u32>) -> Option<u64> {
        let head = self.head_at(of.0)?;
        (0..head.len()).find_map(|i| {
            budget.next()?;
            let member = (of.0 + HEAD_LEN + i * MEMBER_LEN) as usize;
            let (member_name, type_id) = (word(&self.types, member)?, word(&self.types, member + 4)?);
            let offset = word(&self.types, member + 8)?;
            let bits = if head.has_bit_fields() { offset & 0xff_ffff } else { offset };
            let found = self.string(member_name)?;
            if found == name.as_bytes() {
                return Some(u64::from(bits / 8));
            }
            if found.is_empty() && depth < MAX_DEPTH {
                let inner = self.anonymous(type_id)?;
                return Some(u64::from(bits / 8) + self.offset_within(inner, name, depth + 1, budget)?);
            }
            None
        })
    }

    /// Type `id`, if it is a structure or union.
    fn anonymous(&self, id: u32) -> Option<StructureId> {
        let at = *self.starts.get(id.checked_sub(1)? as usize)?;
        let head = self.head_at(at)?;
        matches!(head.kind(), KIND_STRUCT | KIND_UNION).then_some(StructureId(at))
    }
}

/// The little-endian word at `at`.
fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk::<4>().map(|b| u32::from_le_bytes(*b))
}

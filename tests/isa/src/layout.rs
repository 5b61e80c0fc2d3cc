//! The address space that a case sees, the same natively and in the guest.
//!
//! ```text
//!   CODE   2 pages  read, execute   filled with INT3
//!   DATA   4 pages  read, write     then a hole
//!   CONST  1 page   read            then a hole
//!   STACK  2 pages  read, write
//! ```
//!
//! Everything else is unmapped natively, and not present or supervisor-only in the guest.

/// Size of a page in bytes.
pub const PAGE: u64 = 4096;
/// Where the code of a case lives.
pub const CODE: u64 = 0x1000_0000;
/// Bytes of code.
pub const CODE_LEN: u64 = 2 * PAGE;
/// Where the writable data lives.
pub const DATA: u64 = 0x2000_0000;
/// Bytes of writable data.
pub const DATA_LEN: u64 = 4 * PAGE;
/// Where the read-only data lives; the page before it is a hole.
pub const CONST: u64 = 0x2000_5000;
/// Bytes of read-only data.
pub const CONST_LEN: u64 = PAGE;
/// Where the stack lives.
pub const STACK: u64 = 0x3000_0000;
/// Bytes of stack.
pub const STACK_LEN: u64 = 2 * PAGE;
/// Base of FS when a case starts.
pub const FS_BASE: u64 = DATA + 0x800;
/// Base of GS when a case starts.
pub const GS_BASE: u64 = DATA + 0x1810;

/// Selectors as Linux has them for programs, and the guest's GDT too.
pub mod selector {
    /// Code of 64-bit mode.
    pub const CODE64: u16 = 0x33;
    /// Code of compatibility mode.
    pub const CODE32: u16 = 0x23;
    /// Data and stack.
    pub const DATA: u16 = 0x2b;
}

/// One piece of the address space.
#[derive(Clone, Copy, Debug)]
pub struct Area {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// Whether a case may write it.
    pub write: bool,
    /// Whether a case may execute it.
    pub execute: bool,
}

/// All areas, in the order in which an [`Image`] keeps them.
pub const AREAS: [Area; 4] = [
    Area { start: CODE, len: CODE_LEN, write: false, execute: true },
    Area { start: DATA, len: DATA_LEN, write: true, execute: false },
    Area { start: CONST, len: CONST_LEN, write: false, execute: false },
    Area { start: STACK, len: STACK_LEN, write: true, execute: false },
];

/// Bytes of all areas together.
pub const IMAGE_LEN: usize = (CODE_LEN + DATA_LEN + CONST_LEN + STACK_LEN) as usize;

/// Where address `addr` is in an [`Image`], if it is in an area.
pub fn image_offset(addr: u64) -> Option<usize> {
    let mut before = 0;
    for area in AREAS {
        if let Some(offset) = addr.checked_sub(area.start)
            && offset < area.len
        {
            return Some((before + offset) as usize);
        }
        before += area.len;
    }
    None
}

/// The address of byte `offset` of an [`Image`].
pub fn image_address(offset: usize) -> u64 {
    let mut rest = offset as u64;
    for area in AREAS {
        if rest < area.len {
            return area.start + rest;
        }
        rest -= area.len;
    }
    u64::MAX
}

/// Contents of all areas.
#[derive(Clone, PartialEq, Eq)]
pub struct Image(pub Box<[u8]>);

impl Image {
    /// What the areas hold before a case patches them: INT3 as code, and data that is worth computing with.
    pub fn pristine() -> Self {
        let mut rng = fastrand::Rng::with_seed(0x0069_7361);
        let mut bytes = vec![0xcc; IMAGE_LEN];
        for slot in bytes[CODE_LEN as usize..].chunks_exact_mut(8) {
            let value = match rng.u8(..8) {
                0 => rng.f64().to_bits(),
                1 => u64::from((rng.f32() * 100.0).to_bits()) | u64::from((-rng.f32()).to_bits()) << 32,
                2 => rng.u64(..) >> rng.u32(..64),
                3 => DATA + rng.u64(..DATA_LEN),
                4 => CODE + rng.u64(..CODE_LEN),
                5 => 0,
                _ => rng.u64(..),
            };
            slot.copy_from_slice(&value.to_le_bytes());
        }
        Self(bytes.into())
    }

    /// Writes `data` at `addr`; what is outside of the areas is dropped.
    pub fn patch(&mut self, addr: u64, data: &[u8]) {
        for (i, byte) in data.iter().enumerate() {
            if let Some(at) = image_offset(addr.wrapping_add(i as u64)) {
                self.0[at] = *byte;
            }
        }
    }

    /// The bytes of one area.
    pub fn area(&self, area: &Area) -> &[u8] {
        let at = image_offset(area.start).unwrap_or(0);
        &self.0[at..at + area.len as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_and_addresses_are_inverse() {
        for offset in [0, 1, CODE_LEN as usize, CODE_LEN as usize + 77, IMAGE_LEN - 1] {
            assert_eq!(image_offset(image_address(offset)), Some(offset));
        }
        assert_eq!(image_offset(DATA + DATA_LEN), None);
        assert_eq!(image_address(IMAGE_LEN), u64::MAX);
    }
}

//! From segment and offset to linear address (SDM volume 3, 5.3 to 5.5; volume 1, 3.3.7).

use berth_cpu::Segment;
use berth_cpu::bits::vector;

use super::Access;
use crate::cpu::Cpu;
use crate::fault::{Fault, Guest};
use crate::state::Seg;

/// Whether bits 63 to 47 of `address` are all equal.
pub(crate) const fn is_canonical(address: u64) -> bool {
    ((address as i64) << 16 >> 16) as u64 == address
}

impl Cpu {
    /// The linear address of `len` bytes at `offset` in `seg`, after the checks of the segment.
    ///
    /// # Errors
    /// #SS(0) for the stack segment, #GP(0) for the others.
    pub fn linear(&self, seg: Seg, offset: u64, len: usize, access: Access) -> Guest<u64> {
        let violation = || {
            if seg == Seg::Ss { Fault::with_error(vector::SS, 0) } else { Fault::gp(0) }
        };
        let s = self.s.seg(seg);
        let last = len.max(1) as u64 - 1;
        if self.s.is_64bit() {
            let base = if matches!(seg, Seg::Fs | Seg::Gs) { s.base } else { 0 };
            let lin = base.wrapping_add(offset);
            return if is_canonical(lin) && is_canonical(lin.wrapping_add(last)) {
                Ok(lin)
            } else {
                Err(violation())
            };
        }
        let offset = offset & 0xffff_ffff;
        let lin = s.base.wrapping_add(offset) & 0xffff_ffff;
        if self.s.is_protected() && !self.s.is_v86() {
            let usable = !s.is_unusable()
                && match access {
                    Access::Read => s.is_readable(),
                    Access::Write => s.is_writable(),
                    // CS was checked when it was loaded; right after CR0.PE is set it is still real mode's.
                    Access::Execute => true,
                };
            if !usable {
                return Err(violation());
            }
        }
        if within_limit(s, offset, last) { Ok(lin) } else { Err(violation()) }
    }
}

/// Whether `offset` to `offset + last` lie inside the segment.
fn within_limit(s: &Segment, offset: u64, last: u64) -> bool {
    let limit = u64::from(s.limit);
    if s.is_expand_down() && s.attr & Segment::S != 0 {
        let top = if s.attr & Segment::DB != 0 { 0xffff_ffff } else { 0xffff };
        offset > limit && offset + last <= top
    } else if limit == 0xffff_ffff {
        // A 4 GiB segment wraps.
        true
    } else {
        offset + last <= limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_addresses() {
        assert!(is_canonical(0x0000_7fff_ffff_ffff));
        assert!(is_canonical(0xffff_8000_0000_0000));
        assert!(!is_canonical(0x0000_8000_0000_0000));
        assert!(!is_canonical(0xffff_7fff_ffff_ffff));
    }

    #[test]
    fn expand_down_is_valid_above_the_limit() {
        let s = Segment { limit: 0xfff, attr: 0x97 | Segment::DB, ..Segment::default() };
        assert!(!within_limit(&s, 0xfff, 0));
        assert!(within_limit(&s, 0x1000, 3));
        assert!(within_limit(&s, 0xffff_fffc, 3));
        assert!(!within_limit(&s, 0xffff_fffd, 3));
    }
}

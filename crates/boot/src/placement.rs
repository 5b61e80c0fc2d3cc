//! Who occupies which guest memory at the start: nothing may overlap, and everything must be RAM.

use berth_memory::{GuestMemory, GuestPhysAddr, PAGE_SIZE};

use crate::low_memory::{BOOT_DATA, CONVENTIONAL_END, HIGH_MEMORY};
use crate::memory_map::low_ram_end;

/// Why something has no place.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    /// It ends behind the RAM.
    #[error(
        "the {what} does not fit into the memory: it needs RAM up to {}, the VM has {}; give it more memory",
        mib(*.end), mib(*.have)
    )]
    TooLarge {
        /// What should be placed.
        what: &'static str,
        /// Address past its last byte.
        end: u64,
        /// End of the RAM below the hole.
        have: u64,
    },
    /// The initrd fits nowhere.
    #[error(
        "the initrd of {} does not fit into the memory beside the kernel: about {} would be needed, the VM has {}; give it more memory",
        mib(*.len), mib(*.needed), mib(*.have)
    )]
    NoRoomForInitrd {
        /// Size of the initrd in bytes.
        len: u64,
        /// End of RAM that would do, in bytes.
        needed: u64,
        /// End of the RAM below the hole, or what the kernel can reach of it.
        have: u64,
    },
    /// The kernel cannot reach memory that far up.
    #[error(
        "the initrd of {} does not fit: this kernel takes an initrd only below {}, and the memory there is occupied",
        mib(*.len), mib(*.limit)
    )]
    InitrdOutOfReach {
        /// Size of the initrd in bytes.
        len: u64,
        /// First address that is too high.
        limit: u64,
    },
    /// Two things want the same memory.
    #[error("the {what} at {start:#x}-{end:#x} overlaps the {other}")]
    Overlap {
        /// What should be placed.
        what: &'static str,
        /// Its first address.
        start: u64,
        /// Address past its last byte.
        end: u64,
        /// What is there already.
        other: &'static str,
    },
}

/// `bytes` in MiB, rounded up, for messages.
fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

struct Claim {
    what: &'static str,
    start: u64,
    end: u64,
}

/// The claims made so far.
pub struct Placement {
    ram_end: u64,
    claims: Vec<Claim>,
}

impl Placement {
    /// Claims for the boot data and the BIOS area are there from the start.
    pub fn new(memory: &GuestMemory) -> Self {
        let claims = vec![
            Claim { what: "boot data", start: BOOT_DATA.0, end: CONVENTIONAL_END.0 },
            Claim { what: "BIOS area", start: CONVENTIONAL_END.0, end: HIGH_MEMORY.0 },
        ];
        Self { ram_end: low_ram_end(memory).0, claims }
    }

    /// Claims `len` bytes from `start` on for `what`.
    ///
    /// # Errors
    /// [`PlacementError::TooLarge`] unless all of it is RAM below the hole; [`PlacementError::Overlap`].
    pub fn claim(
        &mut self,
        what: &'static str,
        start: GuestPhysAddr,
        len: u64,
    ) -> Result<(), PlacementError> {
        let start = start.0;
        let end = start.saturating_add(len);
        if end > self.ram_end {
            return Err(PlacementError::TooLarge { what, end, have: self.ram_end });
        }
        if let Some(other) = self.overlapping(start, end) {
            return Err(PlacementError::Overlap { what, start, end, other: other.what });
        }
        if len > 0 {
            self.claims.push(Claim { what, start, end });
        }
        Ok(())
    }

    /// Claims `len` bytes for the initrd: page-aligned, as high as possible, below `limit` and above 1 MiB.
    ///
    /// # Errors
    /// [`PlacementError::NoRoomForInitrd`] or [`PlacementError::InitrdOutOfReach`].
    pub fn claim_initrd(&mut self, len: u64, limit: u64) -> Result<GuestPhysAddr, PlacementError> {
        let mut top = self.ram_end.min(limit);
        // Each turn goes below one more claim, so there are at most as many turns as claims.
        while let Some(start) = top.checked_sub(len).map(|s| s & !(PAGE_SIZE - 1)) {
            if start < HIGH_MEMORY.0 {
                break;
            }
            match self.overlapping(start, start + len) {
                Some(other) => top = other.start,
                None => {
                    self.claims.push(Claim { what: "initrd", start, end: start + len });
                    return Ok(GuestPhysAddr(start));
                }
            }
        }
        if limit < self.ram_end {
            return Err(PlacementError::InitrdOutOfReach { len, limit });
        }
        let occupied = self.claims.iter().map(|c| c.end).max().unwrap_or(0);
        let needed = occupied.saturating_add(len).saturating_add(PAGE_SIZE - 1) & !(PAGE_SIZE - 1);
        Err(PlacementError::NoRoomForInitrd { len, needed, have: self.ram_end })
    }

    fn overlapping(&self, start: u64, end: u64) -> Option<&Claim> {
        self.claims.iter().find(|c| start < c.end && c.start < end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placement(size: u64) -> Placement {
        Placement::new(&GuestMemory::new(size).unwrap())
    }

    #[test]
    fn an_initrd_goes_to_the_top_and_below_what_is_there() {
        let mut p = placement(64 << 20);
        assert_eq!(p.claim_initrd(5000, u64::MAX), Ok(GuestPhysAddr((64 << 20) - 8192)));
        let mut p = placement(64 << 20);
        p.claim("kernel", GuestPhysAddr(60 << 20), 4 << 20).unwrap();
        assert_eq!(p.claim_initrd(4096, u64::MAX), Ok(GuestPhysAddr((60 << 20) - 4096)));
        let mut p = placement(64 << 20);
        assert_eq!(p.claim_initrd(4096, 32 << 20), Ok(GuestPhysAddr((32 << 20) - 4096)));
    }

    #[test]
    fn too_large_an_initrd_is_refused_with_the_memory_it_needs() {
        let mut p = placement(64 << 20);
        p.claim("kernel", GuestPhysAddr(16 << 20), 16 << 20).unwrap();
        let error = p.claim_initrd(40 << 20, u64::MAX).unwrap_err();
        assert_eq!(
            error,
            PlacementError::NoRoomForInitrd { len: 40 << 20, needed: 72 << 20, have: 64 << 20 }
        );
        assert!(error.to_string().contains("72 MiB"), "{error}");
        assert!(matches!(p.claim_initrd(u64::MAX, u64::MAX), Err(PlacementError::NoRoomForInitrd { .. })));
        assert!(matches!(p.claim_initrd(8 << 20, 8 << 20), Err(PlacementError::InitrdOutOfReach { .. })));
    }

    #[test]
    fn overlaps_and_the_end_of_ram_are_noticed() {
        let mut p = placement(2 << 20);
        assert!(matches!(
            p.claim("x", BOOT_DATA, 1),
            Err(PlacementError::Overlap { other: "boot data", .. })
        ));
        assert!(matches!(p.claim("x", GuestPhysAddr(0xf_ffff), 2), Err(PlacementError::Overlap { .. })));
        assert!(matches!(
            p.claim("x", GuestPhysAddr(1 << 20), 2 << 20),
            Err(PlacementError::TooLarge { .. })
        ));
        assert!(matches!(p.claim("x", GuestPhysAddr(u64::MAX), 2), Err(PlacementError::TooLarge { .. })));
        p.claim("a", GuestPhysAddr(1 << 20), 4096).unwrap();
        p.claim("b", GuestPhysAddr((1 << 20) + 4096), 4096).unwrap();
        assert!(matches!(
            p.claim("c", GuestPhysAddr((1 << 20) + 4095), 1),
            Err(PlacementError::Overlap { other: "a", .. })
        ));
    }
}

//! The three kinds of address.

use std::fmt;
use std::ops::{Add, Sub};

/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
/// Size of the smallest page of x86-64, in bytes (SDM volume 3, 4.1).
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The number of the page that holds this address.
            pub const fn page(self) -> u64 {
                self.0 >> PAGE_SHIFT
            }
            /// The first address of the page that holds this address.
            pub const fn page_base(self) -> Self {
                Self(self.0 & !(PAGE_SIZE - 1))
            }
            /// Offset of this address in its page, 0 to 4095.
            pub const fn page_offset(self) -> u64 {
                self.0 & (PAGE_SIZE - 1)
            }
            /// The address `offset` bytes further, wrapping at 2^64.
            pub const fn wrapping_add(self, offset: u64) -> Self {
                Self(self.0.wrapping_add(offset))
            }
            /// The address `offset` bytes further, or `None` past 2^64.
            pub fn checked_add(self, offset: u64) -> Option<Self> {
                self.0.checked_add(offset).map(Self)
            }
        }
        impl Add<u64> for $name {
            type Output = Self;
            fn add(self, offset: u64) -> Self {
                Self(self.0 + offset)
            }
        }
        impl Sub<$name> for $name {
            type Output = u64;
            fn sub(self, other: Self) -> u64 {
                self.0 - other.0
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address!(
    /// A guest linear address, before the guest's own page tables.
    GuestVirtAddr
);
address!(
    /// A guest physical address: what the guest takes for machine memory.
    GuestPhysAddr
);
address!(
    /// An address in Berth's own process.
    HostVirtAddr
);

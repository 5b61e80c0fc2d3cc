//! Guest memory as a vCPU sees it: segment checks, page walks, software TLBs, and the slow path of translated
//! code.
//!
//! ```text
//!   segment:offset ──segment.rs──► linear ──walk.rs──► guest physical ──physical.rs──► host pointer
//!                                     │                                                  ▲
//!                                     └──── tlb.rs: what translated code looks up ───────┘
//! ```
//!
//! - `slots.rs`: what each access in translated code met last; it looks there first.
//! - `tlb.rs`: the first level, searched when a slot misses, and its second level, tagged by address space.
//! - `walk.rs`: the guest's page tables (SDM volume 3, chapter 4).
//! - `access.rs`: loads and stores for helpers.
//! - `slow.rs`: what a miss in translated code calls, including MMIO, page crossings and code pages.

mod access;
mod physical;
mod segment;
pub mod slots;
pub mod slow;
pub mod tlb;
mod walk;

pub(crate) use physical::HostMap;
pub(crate) use segment::is_canonical;
pub(crate) use tlb::CpuMemory;
pub use tlb::Flush;

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Load.
    Read,
    /// Store, or load and store.
    Write,
    /// Instruction fetch.
    Execute,
}

/// With which rights a linear address is accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rights {
    /// CPL 3.
    User,
    /// CPL 0 to 2; user pages allowed or not (SMAP).
    Kernel {
        /// User pages may be accessed.
        user_ok: bool,
    },
}

impl Rights {
    pub(crate) fn of(mode: crate::mode::Mode) -> Self {
        Self::of_class(mode.tlb_class())
    }

    pub(crate) fn of_class(class: crate::mode::TlbClass) -> Self {
        match class {
            crate::mode::TlbClass::User => Self::User,
            crate::mode::TlbClass::Kernel => Self::Kernel { user_ok: false },
            crate::mode::TlbClass::KernelUser => Self::Kernel { user_ok: true },
        }
    }
}

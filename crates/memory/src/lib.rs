//! Guest physical memory.
//!
//! ```text
//!   guest virtual ──(guest page tables: the engine)──► guest physical ──(this crate)──► host virtual
//! ```
//!
//! Three address spaces never mix, so each has its own type: [`GuestVirtAddr`], [`GuestPhysAddr`] and
//! [`HostVirtAddr`].
//!
//! RAM is anonymous private memory, mapped once and not touched until the guest does. It is laid out as
//! on a PC: from 0 up to the hole below 4 GiB ([`layout`]), and the rest from 4 GiB on.
//!
//! Each page is in one of five states, which can be counted at any time (`states.rs`): what the kernel has behind a
//! page is asked of it (`pagemap.rs`), the rest Berth knows itself.
//!
//! Pages that the guest does not use can go to the cold store (`store/`), where they are compressed and equal ones kept
//! once, and come back when they are touched. `cold.rs` says which these are.
//!
//! Guest memory is never handed out as a Rust reference, because another vCPU or a device may write it at
//! any time: accesses copy, or go through raw pointers with volatile or atomic operations.

mod address;
mod bits;
mod cold;
pub mod layout;
mod pagemap;
mod ram;
mod states;
mod store;

pub use address::{GuestPhysAddr, GuestVirtAddr, HostVirtAddr, PAGE_SHIFT, PAGE_SIZE};
pub use cold::Ages;
pub use ram::{GuestMemory, MemoryError, RamRegion};
pub use states::{MemoryUsage, PageState, StateCounts, StateRange};
pub use store::{Evicted, Faults, Hold, Latency, StoreCounters, StoreError};

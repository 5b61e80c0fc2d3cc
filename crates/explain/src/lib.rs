//! Explains where an address of a guest leads, by looking without touching.
//!
//! ```text
//!   guest virtual ──walk: the guest's page tables──► guest physical ──RAM──► host virtual ──pagemap──► machine frame
//!        │  └─► fault that an access raises              └─► a device, or nothing
//!        └── of a vCPU, of any CR3, or of a process of a Linux guest (linux)
//! ```
//!
//! [`explain`] makes an [`Explanation`], which is plain data: JSON as it is, [`text::render`] for a terminal,
//! [`svg::render`] for a picture. [`memory_map`] does the same for all of guest memory, with [`map_text`] and
//! [`map_svg`].
//!
//! Nothing here depends on which engine runs: all that is used of a vCPU is its [`berth_cpu::CpuState`]. Page tables
//! and kernel structures are the guest's: whatever is in them, the answer is an explanation or an error.

mod access;
mod canvas;
mod explanation;
mod hex;
mod host;
mod linux;
mod map;
pub mod map_svg;
pub mod map_text;
mod paging;
pub mod svg;
#[cfg(test)]
mod tests;
pub mod text;
mod walk;
mod words;

pub use access::{Access, AccessKind, Denial, Fault, Privilege, check, fault};
pub use explanation::{
    AddressSpace, Device, ExplainError, Explanation, GuestProcess, HostView, LevelView, MachineView,
    PageView, Place, Question, Right, Space, Subject, explain,
};
pub use hex::{BadNumber, Hex};
pub use host::{HostPage, Pagemap, PagemapEntry};
pub use linux::{Process, ProcessError, find_process};
pub use map::{Counts, MapError, MapRegion, MemoryMap, STATES, memory_map};
pub use paging::{Paging, PagingMode};
pub use walk::{End, Level, Page, Step, Walk, read_virtual, translate, walk};

//! PCI: configuration space by ports and by ECAM, BAR windows, a host bridge, and the trait that functions have.
//!
//! ```text
//!   CF8/CFC ──┐                              ┌─ config_read / config_write
//!   ECAM ─────┴─► PciRoot ─► function of b:d.f ┤
//!   MMIO windows ─► BAR that is mapped there ┘─ bar_read / bar_write
//! ```

mod config;
mod host;
mod root;

pub use config::{BarKind, ConfigSpace, FunctionIds};
pub use host::HostBridge;
pub use root::PciRoot;

use berth_memory::layout::ports::PCI_INTX_GSI;

/// Why a PCI function cannot be made or put on the bus.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PciError {
    /// Device numbers are 0 to 31, function numbers 0 to 7.
    #[error("there is no PCI address 00:{device:02x}.{function}: devices are 0 to 31, functions 0 to 7")]
    BadAddress {
        /// Device number.
        device: u8,
        /// Function number.
        function: u8,
    },
    /// Two functions at one place.
    #[error("PCI address 00:{device:02x}.{function} is taken")]
    Taken {
        /// Device number.
        device: u8,
        /// Function number.
        function: u8,
    },
    /// A BAR that does not exist, is taken, or has a size that is not a power of two from 16 bytes on.
    #[error(
        "BAR {index} of {size:#x} bytes is not possible: 0 to 5, each once (64-bit ones take two), a power of two from 16 on"
    )]
    BadBar {
        /// Number of the BAR.
        index: u8,
        /// Size in bytes.
        size: u64,
    },
    /// No room for a capability.
    #[error("a capability of {len} bytes does not fit into the configuration space")]
    NoRoom {
        /// Length with its header, in bytes.
        len: usize,
    },
}

/// Where a BAR is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarRange {
    /// Number of the BAR, 0 to 5.
    pub bar: u8,
    /// First guest physical address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

/// A PCI function. Called from several vCPU threads at once: it locks inside.
///
/// Accesses have any length from 1 to 8 bytes and any alignment. `config_*` are within the 4096 bytes of a
/// configuration space, `bar_*` within the BAR.
pub trait PciFunction: Send + Sync {
    /// What it is, for people.
    fn name(&self) -> String;
    /// A load from configuration space.
    fn config_read(&self, offset: u16, data: &mut [u8]);
    /// A store to configuration space. The root asks for [`Self::bars`] after each one that may move BARs.
    fn config_write(&self, offset: u16, data: &[u8]);
    /// The memory BARs that are mapped now: none while memory decoding is off.
    fn bars(&self) -> Vec<BarRange>;
    /// A load `offset` bytes into BAR `bar`.
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]);
    /// A store `offset` bytes into BAR `bar`.
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]);
}

/// The interrupt of pin `pin` (0 for INTA# to 3 for INTD#) of device `device`, as the ACPI tables say.
pub fn intx_gsi(device: u8, pin: u8) -> u8 {
    PCI_INTX_GSI + (device & 3).wrapping_add(pin & 3) % 4
}

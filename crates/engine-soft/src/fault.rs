//! Guest exceptions as values.

use berth_cpu::bits::vector;

/// An exception that the guest's current instruction raises. Nothing of the instruction has been committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Vector 0 to 31.
    pub vector: u8,
    /// Error code, for the vectors that push one.
    pub error: Option<u32>,
    /// The faulting linear address, for #PF.
    pub address: u64,
}

impl Fault {
    /// An exception without error code.
    pub const fn plain(vector: u8) -> Self {
        Self { vector, error: None, address: 0 }
    }
    /// An exception with error code.
    pub const fn with_error(vector: u8, error: u32) -> Self {
        Self { vector, error: Some(error), address: 0 }
    }
    /// #PF at linear `address` with the error code of SDM volume 3, 4.7.
    pub const fn page(address: u64, error: u32) -> Self {
        Self { vector: vector::PF, error: Some(error), address }
    }
    /// #GP(error).
    pub const fn gp(error: u32) -> Self {
        Self::with_error(vector::GP, error)
    }
    /// #UD.
    pub const fn ud() -> Self {
        Self::plain(vector::UD)
    }
}

/// Result of everything that can raise a guest exception.
pub type Guest<T> = Result<T, Fault>;

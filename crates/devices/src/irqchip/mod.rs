//! The interrupt controllers: a local APIC a vCPU, the I/O APIC, and two cascaded 8259 PICs.
//!
//! ```text
//!   IrqLine n ──┬──► PIC input n ──INTR──► LINT0 of every local APIC (ExtINT)
//!               └──► IOAPIC pin n (IRQ 0: pin 2) ──► Message ─┐
//!   PCI device ──────────────────────── MSI ──► Message ─────┼──► local APICs ──kick──► vCPU
//!   guest ──────────── ICR of its local APIC ──► Message ────┘
//! ```

mod chips;
pub mod ioapic;
pub mod lapic;
mod message;
pub mod pic;

pub use chips::{ChipsError, InterruptChips};
pub use lapic::Lapic;
pub use message::{DeliveryMode, Message};

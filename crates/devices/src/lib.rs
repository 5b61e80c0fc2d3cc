//! The devices of the machine.
//!
//! ```text
//!   vCPU ──► MachineBus ──► register cores (PIT, serial, CMOS, i8042, ACPI PM, PCI, PIC, IOAPIC)
//!                                │ IrqLine                         │ Timer           │ PowerSink
//!                                ▼                                 ▼                 ▼
//!                         InterruptChips ──kick──► vCPU      NAME/timer thread    the machine
//! ```
//!
//! The [`virtio`] devices are on PCI and have threads of their own.
//!
//! A device is a register core (plain `Clone` data that takes the time as an argument and touches nothing outside
//! itself) inside a thin shim that locks it, drives its [`irq::IrqLine`] and arms its [`timer::Timer`].
//!
//! # Lock order
//! A thread that holds a lock takes only locks further down:
//! 1. a device's own core,
//! 2. [`irqchip`]: the lines, then the PIC, then the IOAPIC,
//! 3. one local APIC's registers (never two at once),
//! 4. the timer queue.
//!
//! Messages to local APICs, and so `VcpuHandle::kick`, leave after 2 and 3 were released. A device may hold 1
//! while it drives its line, so a kick can run under the core lock of the device that interrupts: `kick` takes
//! none of these locks and does not block (its contract), and an engine never calls a device while it holds a
//! lock that `kick` takes. Timer callbacks run with no lock held.

pub mod acpi_pm;
pub mod bus;
mod bytes;
pub mod cmos;
pub mod debug_exit;
pub mod i8042;
pub mod irq;
pub mod irqchip;
pub mod pci;
pub mod pit;
pub mod power;
pub mod pvpanic;
pub mod serial;
mod thread_name;
pub mod timer;
pub mod virtio;

pub use thread_name::thread_name;

#[cfg(test)]
mod random_access;

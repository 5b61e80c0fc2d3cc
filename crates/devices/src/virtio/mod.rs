//! Virtio devices (Virtual I/O Device specification, version 1.2) on PCI.
//!
//! ```text
//!   vCPU ──BAR access──► VirtioPci: registers, capabilities, MSI-X          (pci, transport, msix)
//!                           │ status DRIVER_OK: start │ doorbell (eventfd)
//!                           ▼                         ▼
//!                      VirtioDevice ◄──────── thread NAME/DEVICE: Virtqueue::pop ─► work ─► push, signal
//!                                                     │ Dma                │ MsiSink or IrqLine
//!                                                     ▼                    ▼
//!                                               guest memory       interrupt controllers
//! ```
//!
//! - A device is a [`VirtioDevice`]: its features, its configuration, and what its threads do with the queues. It
//!   knows neither PCI nor the engine.
//! - A notification by the driver is a write to an eventfd, and all work is done on the device's threads: a vCPU
//!   never waits for a disk. Threads wait in epoll; an idle device uses no CPU.
//! - All that a driver writes is checked where it is read: rings and buffers must lie in RAM, a chain is bounded by
//!   the queue's size, a length is bounded by its buffers. What no driver may do sets DEVICE_NEEDS_RESET
//!   ([`Virtqueue`]), and the queue stands still until the driver resets the device.
//! - Writes to guest memory go through [`Dma`], which tells the engine of them.
//!
//! Only split queues: `virtio-queue` has no packed ones. Event index and indirect descriptors are offered.

pub mod balloon;
pub mod block;
mod chain;
pub mod console;
mod device;
mod dma;
mod doorbells;
mod events;
mod msix;
pub mod net;
mod pci;
mod queue;
pub mod rng;
mod status;
mod transport;
mod vectors;
pub mod vsock;

pub use chain::{Buffer, Buffers, Chain};
pub use device::{ConfigSignal, DeviceKind, DeviceState, Session, StateError, VirtioDevice};
pub use dma::Dma;
pub use pci::{PciWiring, VirtioPci, VirtioPciError, VirtioPciState};
pub use queue::Virtqueue;

#[cfg(test)]
mod restore_tests;
#[cfg(any(test, feature = "test-driver"))]
pub mod testing;
#[cfg(test)]
mod tests;

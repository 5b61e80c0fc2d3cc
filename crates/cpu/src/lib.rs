//! What an x86-64 CPU is, without any engine: registers, control bits, the CPUID model, MSR numbers, and the
//! engine-neutral state that snapshots and engine changes use.
//!
//! Bit and register names are those of the Intel SDM; each table names its section.

pub mod apic;
pub mod bits;
pub mod cpuid;
pub mod msr;
pub mod state;

pub use apic::ApicState;
pub use state::{
    BadCpuState, CpuState, MpState, PendingEvents, PendingException, Segment, TableRegister, XSAVE_AREA_SIZE,
    XsaveArea,
};

/// Number of a vCPU in its VM, from 0. It is also the APIC ID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VcpuId(pub u8);

impl std::fmt::Display for VcpuId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// Most vCPUs that a VM may have.
pub const MAX_VCPUS: u8 = 64;

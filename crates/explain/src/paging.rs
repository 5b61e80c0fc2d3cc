//! What the control registers say about paging.

use std::fmt;

use berth_cpu::CpuState;
use berth_cpu::bits::{cr0, cr4, efer};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The paging mode (SDM volume 3, 4.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum PagingMode {
    /// CR0.PG is clear: linear addresses are guest physical.
    #[serde(rename = "off")]
    Off,
    /// Two tables of 1024 entries of 4 bytes.
    #[serde(rename = "32-bit")]
    Bits32,
    /// A table of 4 entries, then two of 512 entries of 8 bytes; 32-bit linear addresses.
    #[serde(rename = "PAE")]
    Pae,
    /// Four tables of 512 entries of 8 bytes; 48-bit linear addresses.
    #[serde(rename = "4-level")]
    FourLevel,
}

impl fmt::Display for PagingMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "no paging",
            Self::Bits32 => "32-bit paging",
            Self::Pae => "PAE paging",
            Self::FourLevel => "4-level paging",
        })
    }
}

/// All of a CPU's state that the meaning of page tables depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paging {
    /// The mode.
    pub mode: PagingMode,
    /// CR3.
    pub cr3: u64,
    /// CR4.PSE: 4 MiB pages in 32-bit paging.
    pub pse: bool,
    /// EFER.NXE: bit 63 of entries forbids execution; else it is reserved.
    pub nxe: bool,
    /// CR0.WP: the supervisor may not write read-only pages either.
    pub wp: bool,
    /// CR4.SMEP: the supervisor may not execute user pages.
    pub smep: bool,
    /// CR4.SMAP: the supervisor may not access user pages while RFLAGS.AC is clear.
    pub smap: bool,
    /// CR4.PGE: entries may be global.
    pub pge: bool,
    /// MAXPHYADDR of CPUID leaf 0x80000008: bits of entries from this one to 51 are reserved.
    pub physical_bits: u8,
}

impl Paging {
    /// What `state` says, for a CPU whose physical addresses have `physical_bits` bits.
    pub fn of(state: &CpuState, physical_bits: u8) -> Self {
        let set = |register: u64, bit: u64| register & bit != 0;
        let mode = if !set(state.cr0, cr0::PG) {
            PagingMode::Off
        } else if set(state.efer, efer::LMA) {
            PagingMode::FourLevel
        } else if set(state.cr4, cr4::PAE) {
            PagingMode::Pae
        } else {
            PagingMode::Bits32
        };
        Self {
            mode,
            cr3: state.cr3,
            pse: set(state.cr4, cr4::PSE),
            nxe: mode != PagingMode::Bits32 && set(state.efer, efer::NXE),
            wp: set(state.cr0, cr0::WP),
            smep: set(state.cr4, cr4::SMEP),
            smap: set(state.cr4, cr4::SMAP),
            pge: set(state.cr4, cr4::PGE),
            physical_bits: physical_bits.clamp(32, 52),
        }
    }

    /// The control bits that are set and bear on rights, by name.
    pub fn controls(&self) -> Vec<&'static str> {
        let all = [
            (self.wp, "CR0.WP"),
            (self.pse && self.mode == PagingMode::Bits32, "CR4.PSE"),
            (self.pge, "CR4.PGE"),
            (self.smep, "CR4.SMEP"),
            (self.smap, "CR4.SMAP"),
            (self.nxe, "EFER.NXE"),
        ];
        all.into_iter().filter_map(|(set, name)| set.then_some(name)).collect()
    }

    /// Bits of a linear address.
    pub fn linear_bits(&self) -> u32 {
        if self.mode == PagingMode::FourLevel { 48 } else { 32 }
    }

    /// The address bits of an entry of 8 bytes, and of CR3.
    pub(crate) fn address_mask(&self) -> u64 {
        ((1 << self.physical_bits) - 1) & !0xfff
    }
}

//! Looking at a VM: where an address leads, and where memory is.

use berth_explain::{AccessKind, Hex, Privilege};
use serde::Deserialize;
use utoipa::IntoParams;

/// Parameters of `GET /explain`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ExplainQuery {
    /// The address.
    pub address: Hex,
    /// It is in the address space of this process of the guest, which must be a 64-bit Linux.
    pub pid: Option<u32>,
    /// It goes through the page tables that this value of CR3 leads to.
    pub cr3: Option<Hex>,
    /// It is guest physical. [default: false]
    #[serde(default)]
    #[param(default = false)]
    pub physical: bool,
    /// The vCPU whose control registers hold. [default: 0]
    #[serde(default)]
    #[param(default = 0)]
    pub vcpu: u8,
    /// The access that may fault. [default: read]
    #[serde(default)]
    #[param(inline)]
    pub access: AccessKind,
    /// Who accesses. [default: the user below the middle of a 64-bit address space, else the supervisor]
    #[param(inline)]
    pub privilege: Option<Privilege>,
}

impl ExplainQuery {
    /// What comes after the path.
    pub fn to_query(&self) -> String {
        let Self { address, pid, cr3, physical, vcpu, access, privilege } = self;
        let mut query = format!("address={address}&physical={physical}&vcpu={vcpu}&access={}", access.verb());
        if let Some(pid) = pid {
            query += &format!("&pid={pid}");
        }
        if let Some(cr3) = cr3 {
            query += &format!("&cr3={cr3}");
        }
        if let Some(privilege) = privilege {
            query += &format!("&privilege={}", privilege.name());
        }
        query
    }
}

/// Parameters of `GET /map`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct MapQuery {
    /// Size of a chunk in bytes, a power of two of at least a page. [default: so that there are at most 2048]
    #[param(minimum = 4096, maximum = 1125899906842624u64)]
    pub chunk_bytes: Option<u64>,
}

impl MapQuery {
    /// Largest chunk in bytes: more than any VM has.
    pub const MAX_CHUNK: u64 = 1 << 50;
}

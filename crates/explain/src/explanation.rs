//! The whole way of one address, as data: what `berth explain` shows and its JSON has.

use berth_cpu::CpuState;
use berth_memory::{GuestMemory, GuestPhysAddr, GuestVirtAddr, HostVirtAddr, PageState};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::access::{Access, AccessKind, Fault, Privilege, check, fault};
use crate::hex::Hex;
use crate::host::HostPage;
use crate::linux::{Process, ProcessError, find_process};
use crate::paging::{Paging, PagingMode};
use crate::walk::{End, Level, Page, Step, walk};
use crate::words;

/// Whose address it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Space {
    /// A linear address in the address space that the vCPU is in.
    #[default]
    Vcpu,
    /// A linear address through the page tables that this value of CR3 leads to.
    Cr3(Hex),
    /// A linear address of this process of a Linux guest.
    Process(u32),
    /// A guest physical address.
    Physical,
}

/// What is asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Question {
    /// The address.
    pub address: Hex,
    /// Whose it is.
    pub space: Space,
    /// The access that may fault.
    pub access: AccessKind,
    /// By whom; `None`: by the user below the middle of a 64-bit address space, else by the supervisor.
    pub privilege: Option<Privilege>,
}

/// What is looked at: one vCPU, at an instruction boundary, and the memory that it sees.
pub struct Subject<'a> {
    /// Name of the VM.
    pub vm: &'a str,
    /// The vCPU.
    pub vcpu: u8,
    /// Its state.
    pub state: &'a CpuState,
    /// Bits of its physical addresses, as CPUID shows them.
    pub physical_bits: u8,
    /// The memory of the VM, which is in this process.
    pub memory: &'a GuestMemory,
    /// The rest of the machine.
    pub machine: &'a dyn MachineView,
}

/// What the machine knows of guest physical addresses.
pub trait MachineView {
    /// The device whose registers are at `at`.
    fn device_at(&self, at: GuestPhysAddr) -> Option<Device>;
}

/// A range of guest physical addresses that a device answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Device {
    /// The device.
    pub name: String,
    /// First guest physical address of the range.
    pub start: Hex,
    /// Length in bytes.
    pub len: u64,
}

/// Why an address cannot be explained.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExplainError {
    /// The process.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The address has too many bits.
    #[error("{address} is no address of this guest: {what} have {bits} bits")]
    TooWide {
        /// The address.
        address: Hex,
        /// Addresses of which kind.
        what: String,
        /// How many bits they have.
        bits: u32,
    },
}

impl ExplainError {
    /// Whether something was named that there is not.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Process(ProcessError::NoProcess { .. } | ProcessError::KernelThread { .. }))
    }
}

/// The whole way of an address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Explanation {
    /// Name of the VM.
    pub vm: String,
    /// The vCPU whose control registers hold.
    pub vcpu: u8,
    /// The address that was asked about.
    pub address: Hex,
    /// Where the address belongs; `null` for a guest physical one.
    pub space: Option<AddressSpace>,
    /// The guest's page tables on the way, from the root on.
    pub levels: Vec<LevelView>,
    /// The page, if the tables lead to one.
    pub page: Option<PageView>,
    /// The access that was asked about; `null` for a guest physical address.
    pub access: Option<Access>,
    /// The fault that the access raises.
    pub fault: Option<Fault>,
    /// The guest physical address.
    pub physical: Option<Hex>,
    /// What is there.
    pub place: Option<Place>,
    /// The host's side, if RAM is there.
    pub host: Option<HostView>,
}

/// A linear address space of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AddressSpace {
    /// The paging mode.
    pub mode: PagingMode,
    /// CR3.
    pub cr3: Hex,
    /// Control bits that are set and bear on rights.
    pub controls: Vec<String>,
    /// The process of the guest whose it is, if one was asked for.
    pub process: Option<GuestProcess>,
}

/// A process of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestProcess {
    /// Its number.
    pub pid: u32,
    /// Name of its program.
    pub name: String,
}

/// One level of page tables.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LevelView {
    /// Which table.
    pub level: Level,
    /// Guest physical address of the table.
    pub table: Hex,
    /// Which entry.
    pub index: u16,
    /// How many entries the table has.
    pub entries: u16,
    /// Guest physical address of the entry.
    pub entry_address: Hex,
    /// The entry.
    pub entry: Hex,
    /// Its flags in words.
    pub flags: Vec<String>,
    /// Bytes of the address space that an entry covers.
    pub covers: u64,
}

/// The page that page tables lead to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PageView {
    /// First guest physical address.
    pub base: Hex,
    /// Size in bytes.
    pub size: u64,
    /// Which accesses it allows.
    pub rights: Vec<Right>,
}

/// Whether a page allows an access.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Right {
    /// The access.
    #[serde(flatten)]
    pub access: Access,
    /// Whether it is allowed.
    pub allowed: bool,
    /// Why not, in a word or two.
    pub why_not: Option<String>,
}

/// What is at a guest physical address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Place {
    /// RAM.
    Ram {
        /// First guest physical address of the region.
        start: Hex,
        /// Length of the region in bytes.
        len: u64,
        /// The state of the page (untouched, resident, shared, stored or released); `null` when the host does not say.
        #[schema(value_type = Option<String>)]
        state: Option<PageState>,
    },
    /// Registers of a device.
    Device(Device),
    /// Nothing: loads give ones, stores are dropped.
    Nothing,
}

/// A page of RAM in the VM's process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostView {
    /// The VM's process.
    pub pid: u32,
    /// Host virtual address.
    pub address: Hex,
    /// What the host's kernel says of the page; `null` when it cannot be read.
    pub page: Option<HostPage>,
    /// Machine address, where the caller may know it.
    pub machine: Option<Hex>,
}

impl HostView {
    /// Looks at `address` of process `pid` with the rights of this process. A pagemap that cannot be read leaves that
    /// part empty.
    pub fn of(pid: u32, address: HostVirtAddr) -> Self {
        let page = HostPage::read(pid, address).ok();
        let machine = page.as_ref().and_then(|p| p.machine_address(address.page_offset()));
        Self { pid, address: Hex(address.0), page, machine }
    }

    /// The same, looked at again with the rights of this process, if those show more.
    pub fn seen_by_this_process(self) -> Self {
        if self.machine.is_some() {
            return self;
        }
        let again = Self::of(self.pid, HostVirtAddr(self.address.0));
        if again.page.is_some() { again } else { self }
    }
}

/// Explains the address of `question`.
///
/// # Errors
/// [`ExplainError`].
pub fn explain(subject: &Subject<'_>, question: &Question) -> Result<Explanation, ExplainError> {
    let paging = Paging::of(subject.state, subject.physical_bits);
    let empty = Explanation {
        vm: subject.vm.to_owned(),
        vcpu: subject.vcpu,
        address: question.address,
        space: None,
        levels: Vec::new(),
        page: None,
        access: None,
        fault: None,
        physical: None,
        place: None,
        host: None,
    };
    let (paging, process) = match question.space {
        Space::Physical => {
            let bits = u32::from(paging.physical_bits);
            check_width(question.address, bits, "guest physical addresses")?;
            return Ok(at_physical(empty, subject, GuestPhysAddr(question.address.0)));
        }
        Space::Vcpu => (paging, None),
        Space::Cr3(cr3) => (Paging { cr3: cr3.0, ..paging }, None),
        Space::Process(pid) => {
            let process = find_process(subject.memory, &paging, pid)?;
            (Paging { cr3: process.cr3, ..paging }, Some(process))
        }
    };
    if paging.mode != PagingMode::FourLevel {
        let what = format!("linear addresses with {}", paging.mode);
        check_width(question.address, paging.linear_bits(), &what)?;
    }
    let virt = GuestVirtAddr(question.address.0);
    let walk = walk(subject.memory, &paging, virt);
    let access = Access {
        kind: question.access,
        privilege: question.privilege.unwrap_or_else(|| default_privilege(&paging, virt)),
    };
    let filled = Explanation {
        space: Some(AddressSpace {
            mode: paging.mode,
            cr3: Hex(paging.cr3),
            controls: paging.controls().into_iter().map(str::to_owned).collect(),
            process: process.map(|Process { pid, name, .. }| GuestProcess { pid, name }),
        }),
        levels: walk.steps.iter().map(|step| level_view(step, &paging)).collect(),
        page: if let End::Page(page) = &walk.end { Some(page_view(page, &paging)) } else { None },
        access: Some(access),
        fault: fault(&walk, &paging, access),
        ..empty
    };
    Ok(match walk.physical() {
        Some(physical) => at_physical(filled, subject, physical),
        None => filled,
    })
}

fn check_width(address: Hex, bits: u32, what: &str) -> Result<(), ExplainError> {
    if address.0 >> bits != 0 {
        return Err(ExplainError::TooWide { address, what: what.to_owned(), bits });
    }
    Ok(())
}

/// Programs have the lower half of a 64-bit address space, by the convention of every system.
fn default_privilege(paging: &Paging, virt: GuestVirtAddr) -> Privilege {
    if paging.mode == PagingMode::FourLevel && virt.0 >> 63 == 0 {
        Privilege::User
    } else {
        Privilege::Supervisor
    }
}

fn level_view(step: &Step, paging: &Paging) -> LevelView {
    LevelView {
        level: step.level,
        table: Hex(step.table.0),
        index: step.index,
        entries: step.entries,
        entry_address: Hex(step.at.0),
        entry: Hex(step.value),
        flags: words::entry_words(step, paging),
        covers: step.covers,
    }
}

fn page_view(page: &Page, paging: &Paging) -> PageView {
    let all = [Privilege::User, Privilege::Supervisor]
        .into_iter()
        .flat_map(|privilege| AccessKind::ALL.map(|kind| Access { kind, privilege }));
    let right = |access| {
        let denial = check(page, paging, access).err();
        Right { access, allowed: denial.is_none(), why_not: denial.map(|d| d.short().to_owned()) }
    };
    PageView { base: Hex(page.base.0), size: page.size, rights: all.map(right).collect() }
}

/// Fills in what is at `physical`.
fn at_physical(so_far: Explanation, subject: &Subject<'_>, physical: GuestPhysAddr) -> Explanation {
    let region = subject.memory.regions().iter().find(|r| r.start <= physical && physical < r.end());
    let (place, host) = match (subject.machine.device_at(physical), region) {
        (Some(device), _) => (Place::Device(device), None),
        (None, None) => (Place::Nothing, None),
        (None, Some(region)) => {
            let host = HostView::of(std::process::id(), region.host + (physical - region.start));
            let state = page_state(subject.memory, physical);
            (Place::Ram { start: Hex(region.start.0), len: region.len, state }, Some(host))
        }
    };
    Explanation { physical: Some(Hex(physical.0)), place: Some(place), host, ..so_far }
}

/// The state of the page that holds `at`, if the host says so.
fn page_state(memory: &GuestMemory, at: GuestPhysAddr) -> Option<PageState> {
    let mut state = None;
    let visited = memory.for_each_state(|range| {
        if range.start <= at && at.0 - range.start.0 < range.len {
            state = Some(range.state);
        }
    });
    visited.ok().and(state)
}

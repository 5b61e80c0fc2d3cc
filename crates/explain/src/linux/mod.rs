//! Finds a process of a Linux guest: which page tables it has.
//!
//! ```text
//!   kernel image ──scan──► BTF: where the members of task_struct and mm_struct are
//!                ──scan──► init_task, known by its name "swapper" and by what must hold of it
//!   init_task.tasks ──► … ──► task with this tgid ──mm──► mm_struct.pgd ──page tables──► CR3
//! ```
//! All that is used is in the guest's memory: no symbols, no agent, and it does not matter where KASLR has put the
//! kernel. It needs a 64-bit Linux with type information (`CONFIG_DEBUG_INFO_BTF`), as distributions build it.
//!
//! The guest may write anything there. Every number is checked, lists are followed only while they are consistent,
//! and what is found is an address space to explain, no more.

mod btf;
#[cfg(test)]
mod tests;

use berth_memory::{GuestMemory, GuestVirtAddr, PAGE_SIZE};

use crate::paging::{Paging, PagingMode};
use crate::walk::{End, read_virtual, translate, walk};
use btf::{Btf, MAGIC};

/// Where x86-64 kernels are mapped (the kernel's Documentation/arch/x86/x86_64/mm.rst).
const IMAGE_START: u64 = 0xffff_ffff_8000_0000;
/// With KASLR the image is anywhere in the first GiB.
const IMAGE_END: u64 = 0xffff_ffff_c000_0000;
/// Bit of CR3 by which page-table isolation tells a process's two roots apart; the kernel's has it clear.
const PTI_USER: u64 = 1 << 12;
/// Most processes that a Linux can have (PID_MAX_LIMIT).
const MAX_TASKS: usize = 4 << 20;
/// Length of task_struct.comm.
const NAME_LEN: usize = 16;
/// How many places that look like type information are looked at: a guest may have filled its memory with them.
const MAX_TRIES: usize = 16;
/// The list of tasks changes while it is followed, if the guest runs.
const ATTEMPTS: usize = 5;

/// A process of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its number in the guest's first PID namespace.
    pub pid: u32,
    /// Name of its program, as `ps` shows it; at most 15 bytes.
    pub name: String,
    /// What CR3 has while the kernel runs for it: its page tables.
    pub cr3: u64,
}

/// Why a process is not found. The texts are for people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProcessError {
    /// The vCPU is in another mode.
    #[error(
        "processes are found only in a 64-bit Linux that has started, and the vCPU is not in 4-level paging"
    )]
    NotLongMode,
    /// No BTF.
    #[error(
        "there is no Linux kernel with type information (CONFIG_DEBUG_INFO_BTF) in the guest's memory: it is another \
         system, has not started yet, or was built without; name the process's page tables by --cr3"
    )]
    NoTypes,
    /// The type information lacks something.
    #[error("the guest kernel's type information has no {what}: is it a Linux?")]
    NoMember {
        /// A structure and its member.
        what: &'static str,
    },
    /// No task that looks like the first one.
    #[error("the guest kernel's first task was not found: it has not started yet, or the kernel is unusual")]
    NoInitTask,
    /// The list is damaged.
    #[error("the guest kernel's list of tasks is not consistent: try again, or pause the VM first")]
    Inconsistent,
    /// No such process.
    #[error("the guest has no process {pid} (of {count})")]
    NoProcess {
        /// The number.
        pid: u32,
        /// How many there are.
        count: usize,
    },
    /// A thread of the kernel.
    #[error("{pid} ({name}) is a thread of the guest's kernel, which has no address space of its own")]
    KernelThread {
        /// Its number.
        pid: u32,
        /// Its name.
        name: String,
    },
}

/// Finds process `pid` of a Linux guest. `paging` is any of its vCPUs'; `pid` counts as in its first PID namespace.
///
/// # Errors
/// [`ProcessError`].
pub fn find_process(memory: &GuestMemory, paging: &Paging, pid: u32) -> Result<Process, ProcessError> {
    if paging.mode != PagingMode::FourLevel {
        return Err(ProcessError::NotLongMode);
    }
    // With page-table isolation the kernel is not mapped while a program runs, but its own tables are next door.
    let kernel = Paging { cr3: paging.cr3 & !PTI_USER, ..*paging };
    let kernel = [*paging, kernel].into_iter().map(|paging| Kernel { memory, paging });
    let (kernel, btf) = kernel
        .filter_map(|k| Some((k.find_types()?, k)))
        .map(|(b, k)| (k, b))
        .next()
        .ok_or(ProcessError::NoTypes)?;
    let offsets = Offsets::of(&btf)?;
    let init = kernel.find_init_task(&offsets).ok_or(ProcessError::NoInitTask)?;
    (1..ATTEMPTS).fold(kernel.find_task(&offsets, init, pid), |result, _| match result {
        Err(ProcessError::Inconsistent) => kernel.find_task(&offsets, init, pid),
        done => done,
    })
}

/// Where members are in their structures, in bytes.
#[derive(Clone, Copy, Debug)]
struct Offsets {
    tasks: u64,
    pid: u64,
    tgid: u64,
    group_leader: u64,
    comm: u64,
    mm: u64,
    pgd: u64,
    next: u64,
    prev: u64,
}

impl Offsets {
    fn of(btf: &Btf) -> Result<Self, ProcessError> {
        let task = btf.structure("task_struct").ok_or(ProcessError::NoMember { what: "task_struct" })?;
        let mm = btf.structure("mm_struct").ok_or(ProcessError::NoMember { what: "mm_struct" })?;
        let list = btf.structure("list_head").ok_or(ProcessError::NoMember { what: "list_head" })?;
        let member = |of, name, what| btf.offset(of, name).ok_or(ProcessError::NoMember { what });
        Ok(Self {
            tasks: member(task, "tasks", "task_struct.tasks")?,
            pid: member(task, "pid", "task_struct.pid")?,
            tgid: member(task, "tgid", "task_struct.tgid")?,
            group_leader: member(task, "group_leader", "task_struct.group_leader")?,
            comm: member(task, "comm", "task_struct.comm")?,
            mm: member(task, "mm", "task_struct.mm")?,
            pgd: member(mm, "pgd", "mm_struct.pgd")?,
            next: member(list, "next", "list_head.next")?,
            prev: member(list, "prev", "list_head.prev")?,
        })
    }
}

/// The guest's kernel through its own page tables.
struct Kernel<'a> {
    memory: &'a GuestMemory,
    paging: Paging,
}

impl Kernel<'_> {
    fn read(&self, at: u64, data: &mut [u8]) -> Option<()> {
        let read = read_virtual(self.memory, &self.paging, GuestVirtAddr(at), data);
        (read == data.len()).then_some(())
    }

    /// The word `offset` bytes after `at`; a sum that wraps is only another address.
    fn u64(&self, at: u64, offset: u64) -> Option<u64> {
        let mut bytes = [0; 8];
        self.read(at.wrapping_add(offset), &mut bytes)?;
        Some(u64::from_le_bytes(bytes))
    }

    fn u32(&self, at: u64, offset: u64) -> Option<u32> {
        let mut bytes = [0; 4];
        self.read(at.wrapping_add(offset), &mut bytes)?;
        Some(u32::from_le_bytes(bytes))
    }

    /// Calls `look` for the kernel image, a page at a time with its address and up to `overlap` bytes of what follows
    /// it, until that returns something.
    fn scan<T>(&self, overlap: usize, mut look: impl FnMut(u64, &[u8]) -> Option<T>) -> Option<T> {
        let mut at = IMAGE_START;
        let mut data = vec![0; PAGE_SIZE as usize + overlap];
        while at < IMAGE_END {
            let walk = walk(self.memory, &self.paging, GuestVirtAddr(at));
            let covers = match walk.end {
                End::Page(page) => page.size,
                _ => walk.steps.last().map_or(PAGE_SIZE, |s| s.covers),
            };
            let end = (at | (covers - 1)).saturating_add(1);
            if walk.physical().is_none() {
                at = end;
                continue;
            }
            while at < end {
                let read = read_virtual(self.memory, &self.paging, GuestVirtAddr(at), &mut data);
                if let Some(found) = look(at, &data[..read]) {
                    return Some(found);
                }
                at += PAGE_SIZE;
            }
        }
        None
    }

    /// The kernel's type information.
    fn find_types(&self) -> Option<Btf> {
        let mut tries = 0..MAX_TRIES;
        self.scan(MAGIC.len(), |at, page| {
            let starts = (0..page.len().saturating_sub(MAGIC.len())).step_by(4);
            starts.filter(|&s| page[s..].starts_with(&MAGIC)).find_map(|s| {
                tries.next()?;
                let btf = Btf::read(|offset, data| self.read((at + s as u64).checked_add(offset)?, data))?;
                // A page that only looks like the start of it.
                btf.structure("task_struct").map(|_| btf)
            })
        })
    }

    /// The task that every Linux starts with, and that is part of its image.
    fn find_init_task(&self, offsets: &Offsets) -> Option<u64> {
        self.scan(NAME_LEN, |at, page| {
            let named = (0..page.len().saturating_sub(NAME_LEN)).step_by(8);
            let named = named.filter(|&s| page[s..].starts_with(b"swapper"));
            // `comm` need not be aligned to 8 bytes, but it is in every kernel so far: it follows pointers.
            named
                .map(|s| (at + s as u64).wrapping_sub(offsets.comm))
                .find(|&task| self.is_init_task(offsets, task).unwrap_or(false))
        })
    }

    fn is_init_task(&self, offsets: &Offsets, task: u64) -> Option<bool> {
        let list = task.wrapping_add(offsets.tasks);
        let (next, prev) = (self.u64(list, offsets.next)?, self.u64(list, offsets.prev)?);
        Some(
            self.u32(task, offsets.pid)? == 0
                && self.u32(task, offsets.tgid)? == 0
                && self.u64(task, offsets.group_leader)? == task
                && self.u64(task, offsets.mm)? == 0
                && self.u64(next, offsets.prev)? == list
                && self.u64(prev, offsets.next)? == list,
        )
    }

    /// Follows the list of processes from `init` on to the one with number `pid`.
    fn find_task(&self, offsets: &Offsets, init: u64, pid: u32) -> Result<Process, ProcessError> {
        let head = init.wrapping_add(offsets.tasks);
        let mut node = head;
        for count in 0..MAX_TASKS {
            let next = self.u64(node, offsets.next).ok_or(ProcessError::Inconsistent)?;
            // A list whose links all have a link back cannot lead into a circle that leaves out its head.
            if self.u64(next, offsets.prev) != Some(node) {
                return Err(ProcessError::Inconsistent);
            }
            if next == head {
                return Err(ProcessError::NoProcess { pid, count });
            }
            let task = next.wrapping_sub(offsets.tasks);
            if self.u32(task, offsets.tgid) == Some(pid) {
                return self.process(offsets, task, pid);
            }
            node = next;
        }
        Err(ProcessError::Inconsistent)
    }

    fn process(&self, offsets: &Offsets, task: u64, pid: u32) -> Result<Process, ProcessError> {
        let found = || {
            let mut name = [0; NAME_LEN];
            self.read(task.wrapping_add(offsets.comm), &mut name)?;
            let len = name.iter().position(|&b| b == 0).unwrap_or(NAME_LEN);
            let name = String::from_utf8_lossy(&name[..len]).escape_debug().to_string();
            let mm = self.u64(task, offsets.mm)?;
            if mm == 0 {
                return Some(Err(ProcessError::KernelThread { pid, name }));
            }
            let pgd = self.u64(mm, offsets.pgd)?;
            let cr3 = translate(self.memory, &self.paging, GuestVirtAddr(pgd))?.0;
            Some(Ok(Process { pid, name, cr3 }))
        };
        found().unwrap_or(Err(ProcessError::Inconsistent))
    }
}

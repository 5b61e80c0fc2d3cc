//! The page walk: guest linear to guest physical (SDM volume 3, chapter 4).
//!
//! Accessed and dirty bits are set with a compare-exchange on the entry, so that a vCPU never overwrites what
//! another one just wrote there.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use berth_cpu::bits::{cr0, cr4, efer, pf_error};
use berth_memory::GuestPhysAddr;

use super::tlb::Translation;
use super::{Access, Rights};
use crate::cpu::Cpu;
use crate::fault::{Fault, Guest};

const P: u64 = 1 << 0;
const W: u64 = 1 << 1;
const U: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const G: u64 = 1 << 8;
const NX: u64 = 1 << 63;

/// One paging structure level.
#[derive(Clone, Copy)]
struct Level {
    /// log2 of what one entry maps.
    shift: u32,
    /// An entry with PS maps a page here.
    may_be_page: bool,
}

const FOUR_LEVEL: [Level; 4] = [
    Level { shift: 39, may_be_page: false },
    Level { shift: 30, may_be_page: true },
    Level { shift: 21, may_be_page: true },
    Level { shift: 12, may_be_page: false },
];

/// How a walk failed.
enum Stop {
    NotPresent,
    Reserved,
}

impl Cpu {
    /// Translates `lin` for an access of the given kind and rights, from the second-level TLB or by a walk.
    ///
    /// # Errors
    /// #PF with the error code of SDM volume 3, 4.7.
    pub(crate) fn translate(&mut self, lin: u64, access: Access, rights: Rights) -> Guest<Translation> {
        if self.s.cr0 & cr0::PG == 0 {
            return Ok(Translation {
                gpa: lin & 0xffff_f000,
                writable: true,
                user: true,
                dirty: true,
                size_shift: 12,
                ..Translation::default()
            });
        }
        if let Some(t) = self.second_level(lin)
            && self.permitted(&t, access, rights)
            && (access != Access::Write || t.dirty)
        {
            return Ok(t);
        }
        self.counters().walks.add(1);
        let write = access == Access::Write;
        let t = match self.walk(lin, access, rights) {
            Ok(t) => t,
            Err(stop) => {
                let error = match stop {
                    Stop::NotPresent => 0,
                    Stop::Reserved => pf_error::PRESENT | pf_error::RESERVED,
                };
                return Err(Fault::page(lin, error | self.error_bits(write, access, rights)));
            }
        };
        if !self.permitted(&t, access, rights) {
            return Err(Fault::page(lin, pf_error::PRESENT | self.error_bits(write, access, rights)));
        }
        self.set_second_level(lin, t);
        Ok(t)
    }

    fn error_bits(&self, write: bool, access: Access, rights: Rights) -> u32 {
        let fetch_shown =
            self.s.cr4 & cr4::SMEP != 0 || self.s.cr4 & cr4::PAE != 0 && self.s.efer & efer::NXE != 0;
        (if write { pf_error::WRITE } else { 0 })
            | (if rights == Rights::User { pf_error::USER } else { 0 })
            | (if access == Access::Execute && fetch_shown { pf_error::FETCH } else { 0 })
    }

    /// SDM volume 3, 4.6.
    fn permitted(&self, t: &Translation, access: Access, rights: Rights) -> bool {
        let nx = t.no_execute && self.s.efer & efer::NXE != 0;
        match (rights, access) {
            (Rights::User, Access::Read) => t.user,
            (Rights::User, Access::Write) => t.user && t.writable,
            (Rights::User, Access::Execute) => t.user && !nx,
            (Rights::Kernel { .. }, Access::Execute) => !(nx || t.user && self.s.cr4 & cr4::SMEP != 0),
            (Rights::Kernel { user_ok }, Access::Read) => !t.user || user_ok,
            (Rights::Kernel { user_ok }, Access::Write) => {
                (!t.user || user_ok) && (t.writable || self.s.cr0 & cr0::WP == 0)
            }
        }
    }

    /// Walks the tables and, if the access is permitted, sets accessed and dirty bits.
    fn walk(&mut self, lin: u64, access: Access, rights: Rights) -> Result<Translation, Stop> {
        if self.s.cr4 & cr4::PAE == 0 {
            return self.walk_32(lin, access, rights);
        }
        let (levels, mut table) = if self.s.is_long() {
            (&FOUR_LEVEL[..], self.s.cr3 & self.vm.phys_mask & !0xfff)
        } else {
            // The four PDPTEs of PAE paging have no rights and no accessed bit.
            let pdpte = self.entry64(self.s.cr3 & 0xffff_ffe0, lin >> 30 & 3).ok_or(Stop::NotPresent)?;
            let value = load(pdpte);
            if value & P == 0 {
                return Err(Stop::NotPresent);
            }
            if value & (!self.vm.phys_mask | 0x1e6) != 0 {
                return Err(Stop::Reserved);
            }
            (&FOUR_LEVEL[2..], value & self.vm.phys_mask & !0xfff)
        };
        let nxe = self.s.efer & efer::NXE != 0;
        let reserved_high =
            (!self.vm.phys_mask & !NX & if self.s.is_long() { 0x000f_ffff_ffff_ffff } else { u64::MAX })
                | if nxe { 0 } else { NX };
        let mut t = Translation { writable: true, user: true, ..Translation::default() };
        let mut upper: [Option<&AtomicU64>; 4] = [None; 4];
        for (depth, level) in levels.iter().enumerate() {
            let index = lin >> level.shift & 0x1ff;
            let entry = self.entry64(table, index).ok_or(Stop::NotPresent)?;
            let value = load(entry);
            if value & P == 0 {
                return Err(Stop::NotPresent);
            }
            let page = level.shift == 12 || value & PS != 0;
            let misaligned = if page && level.shift > 12 { (1u64 << level.shift) - (1 << 13) } else { 0 };
            let bad_ps = if page && level.shift > 12 && !level.may_be_page { PS } else { 0 };
            if value & (reserved_high | misaligned | bad_ps) != 0 {
                return Err(Stop::Reserved);
            }
            t.writable &= value & W != 0;
            t.user &= value & U != 0;
            t.no_execute |= value & NX != 0;
            if !page {
                upper[depth] = Some(entry);
                table = value & self.vm.phys_mask & !0xfff;
                continue;
            }
            t.size_shift = level.shift as u8;
            let within = (1u64 << level.shift) - 1;
            t.gpa = (value & self.vm.phys_mask & !within & !0xfff) | (lin & within & !0xfff);
            t.global = value & G != 0 && self.s.cr4 & cr4::PGE != 0;
            if !self.permitted(&t, access, rights) {
                return Ok(t);
            }
            for entry in upper.into_iter().flatten() {
                if set_bits(entry, A) {
                    self.vm.mark_host(entry.as_ptr() as u64);
                }
            }
            let set = if access == Access::Write { A | D } else { A };
            // Between reading the entry and marking it the guest may have changed it: start again.
            if !mark(entry, value, set) {
                return self.walk(lin, access, rights);
            }
            if value & set != set {
                self.vm.mark_host(entry.as_ptr() as u64);
            }
            t.dirty = (value | set) & D != 0;
            return Ok(t);
        }
        Err(Stop::NotPresent)
    }

    /// 32-bit paging (SDM volume 3, 4.3), with 4 MiB pages if CR4.PSE.
    fn walk_32(&mut self, lin: u64, access: Access, rights: Rights) -> Result<Translation, Stop> {
        let directory = self.s.cr3 & 0xffff_f000;
        let pde = self.entry32(directory, lin >> 22 & 0x3ff).ok_or(Stop::NotPresent)?;
        let value = pde.load(Ordering::Acquire);
        if u64::from(value) & P == 0 {
            return Err(Stop::NotPresent);
        }
        let mut t = Translation {
            writable: u64::from(value) & W != 0,
            user: u64::from(value) & U != 0,
            size_shift: 12,
            ..Translation::default()
        };
        let (leaf, leaf_value, upper) = if u64::from(value) & PS != 0 && self.s.cr4 & cr4::PSE != 0 {
            if value & 1 << 21 != 0 {
                return Err(Stop::Reserved);
            }
            // PSE-36: bits 20 to 13 are bits 39 to 32 of the address.
            let base = u64::from(value & 0xffc0_0000) | u64::from(value >> 13 & 0xff) << 32;
            if base & !self.vm.phys_mask != 0 {
                return Err(Stop::Reserved);
            }
            t.gpa = base | lin & 0x003f_f000;
            t.size_shift = 22;
            (pde, value, None)
        } else {
            let pte =
                self.entry32(u64::from(value & 0xffff_f000), lin >> 12 & 0x3ff).ok_or(Stop::NotPresent)?;
            let leaf = pte.load(Ordering::Acquire);
            if u64::from(leaf) & P == 0 {
                return Err(Stop::NotPresent);
            }
            t.writable &= u64::from(leaf) & W != 0;
            t.user &= u64::from(leaf) & U != 0;
            t.gpa = u64::from(leaf & 0xffff_f000);
            (pte, leaf, Some(pde))
        };
        t.global = u64::from(leaf_value) & G != 0 && self.s.cr4 & cr4::PGE != 0;
        if !self.permitted(&t, access, rights) {
            return Ok(t);
        }
        if let Some(pde) = upper
            && u64::from(pde.load(Ordering::Relaxed)) & A == 0
        {
            pde.fetch_or(A as u32, Ordering::AcqRel);
            self.vm.mark_host(pde.as_ptr() as u64);
        }
        let set = if access == Access::Write { A | D } else { A } as u32;
        if leaf_value & set != set
            && leaf
                .compare_exchange(leaf_value, leaf_value | set, Ordering::AcqRel, Ordering::Relaxed)
                .is_err()
        {
            return self.walk_32(lin, access, rights);
        }
        if leaf_value & set != set {
            self.vm.mark_host(leaf.as_ptr() as u64);
        }
        t.dirty = u64::from(leaf_value | set) & D != 0;
        Ok(t)
    }

    /// Entry `index` of the table at guest physical `table`, if it is RAM.
    fn entry64(&self, table: u64, index: u64) -> Option<&'static AtomicU64> {
        let host = self.vm.host_map.host(GuestPhysAddr(table + index * 8))?;
        // SAFETY: `host` is in guest RAM, which stays mapped as long as the VM; the address is a multiple of 8
        // because `table` is at least 32-byte aligned. Guest RAM is only ever accessed through raw or atomic
        // accesses. The reference does not outlive the walk, although its type says 'static.
        Some(unsafe { AtomicU64::from_ptr(host as *mut u64) })
    }

    /// As [`Self::entry64`] for 32-bit entries.
    fn entry32(&self, table: u64, index: u64) -> Option<&'static AtomicU32> {
        let host = self.vm.host_map.host(GuestPhysAddr(table + index * 4))?;
        // SAFETY: as in `entry64`; the address is a multiple of 4.
        Some(unsafe { AtomicU32::from_ptr(host as *mut u32) })
    }
}

fn load(entry: &AtomicU64) -> u64 {
    entry.load(Ordering::Acquire)
}

/// Sets `bits` if they are not set; returns whether it did.
fn set_bits(entry: &AtomicU64, bits: u64) -> bool {
    let missing = entry.load(Ordering::Relaxed) & bits != bits;
    if missing {
        entry.fetch_or(bits, Ordering::AcqRel);
    }
    missing
}

/// Sets `bits` in an entry that still is `value`; false if it has changed.
fn mark(entry: &AtomicU64, value: u64, bits: u64) -> bool {
    value & bits == bits
        || entry.compare_exchange(value, value | bits, Ordering::AcqRel, Ordering::Relaxed).is_ok()
}

//! Loads and stores for helpers: everything that translated code does not do itself.

use std::sync::atomic::{Ordering, fence};

use berth_memory::{GuestPhysAddr, PAGE_SIZE};

use super::{Access, Rights};
use crate::cpu::Cpu;
use crate::fault::{Fault, Guest};
use crate::state::Seg;

/// Up to two pieces of guest physical memory that a linear range covers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pieces {
    pub(super) first: GuestPhysAddr,
    pub(super) first_len: usize,
    pub(super) second: GuestPhysAddr,
}

impl Cpu {
    /// Translates `len` bytes (at most 4096) at `lin`, both pages if it crosses, the lower page first.
    pub(super) fn pieces(&mut self, lin: u64, len: usize, access: Access, rights: Rights) -> Guest<Pieces> {
        let room = (PAGE_SIZE - (lin & 0xfff)) as usize;
        let offset = lin & 0xfff;
        let first = GuestPhysAddr(self.translate(lin, access, rights)?.gpa | offset);
        if len <= room {
            return Ok(Pieces { first, first_len: len, second: GuestPhysAddr(0) });
        }
        let mut next = (lin & !0xfff).wrapping_add(PAGE_SIZE);
        if !self.s.is_64bit() {
            next &= 0xffff_ffff;
        }
        let second = GuestPhysAddr(self.translate(next, access, rights)?.gpa);
        Ok(Pieces { first, first_len: room, second })
    }

    /// Reads guest physical memory or a device. `data` lies in one page.
    pub(super) fn read_physical(&mut self, addr: GuestPhysAddr, data: &mut [u8]) {
        if let Some(host) = self.vm.host_map.host(addr) {
            debug_assert!(addr.page_offset() as usize + data.len() <= PAGE_SIZE as usize);
            copy_from_guest(host, data);
        } else if let Some(offset) = self.apic_offset(addr) {
            self.apic.mmio_read(offset, data);
        } else {
            for_device(data.len(), addr, |at, range| self.bus().mmio_read(at, &mut data[range]));
        }
    }

    /// Writes guest physical memory or a device. `data` lies in one page. Translations made from it are
    /// dropped.
    pub(super) fn write_physical(&mut self, addr: GuestPhysAddr, data: &[u8]) {
        if let Some(host) = self.vm.host_map.host(addr) {
            debug_assert!(addr.page_offset() as usize + data.len() <= PAGE_SIZE as usize);
            copy_to_guest(host, data);
            self.vm.dirty.mark(addr);
            // Another vCPU that marks the page now reads it afterwards: either it sees our bytes, or we its mark.
            fence(Ordering::SeqCst);
            if self.vm.code_pages.has_code(addr) {
                self.code_written(addr, data.len() as u64);
            }
        } else if let Some(offset) = self.apic_offset(addr) {
            self.apic.mmio_write(offset, data);
        } else {
            for_device(data.len(), addr, |at, range| self.bus().mmio_write(at, &data[range]));
        }
    }

    /// Offset in the local APIC's register page, if `addr` is there.
    fn apic_offset(&self, addr: GuestPhysAddr) -> Option<u16> {
        // Most accesses are not even near: spare them the virtual call.
        if addr.0 < 0x8000_0000 {
            return None;
        }
        let base = self.apic.mmio_base()?;
        (addr.page_base() == base).then(|| addr.page_offset() as u16)
    }

    fn read_pieces(&mut self, p: Pieces, data: &mut [u8]) {
        let (low, high) = data.split_at_mut(p.first_len.min(data.len()));
        self.read_physical(p.first, low);
        if !high.is_empty() {
            self.read_physical(p.second, high);
        }
    }

    fn write_pieces(&mut self, p: Pieces, data: &[u8]) {
        let (low, high) = data.split_at(p.first_len.min(data.len()));
        self.write_physical(p.first, low);
        if !high.is_empty() {
            self.write_physical(p.second, high);
        }
    }

    fn check_alignment(&self, lin: u64, alignment: usize) -> Guest<()> {
        if self.s.mode.has(crate::mode::Mode::ALIGN) && lin & (alignment as u64 - 1) != 0 {
            return Err(Fault::with_error(berth_cpu::bits::vector::AC, 0));
        }
        Ok(())
    }

    /// Checks the start of an operand of `len` bytes as RFLAGS.AC asks: `alignment` is 2, 4 or 8, that of the operand's
    /// parts (SDM volume 3, table 6-7).
    ///
    /// # Errors
    /// #AC(0), and what the segment raises.
    pub fn require_aligned(
        &mut self,
        seg: Seg,
        offset: u64,
        len: usize,
        access: Access,
        alignment: usize,
    ) -> Guest<()> {
        let lin = self.linear(seg, offset, len, access)?;
        self.check_alignment(lin, alignment)
    }

    fn load_linear(&mut self, lin: u64, size: usize, rights: Rights) -> Guest<u64> {
        let mut bytes = [0; 8];
        let p = self.pieces(lin, size, Access::Read, rights)?;
        self.watch(lin, size, Access::Read);
        self.read_pieces(p, &mut bytes[..size]);
        Ok(u64::from_le_bytes(bytes))
    }

    fn store_linear(&mut self, lin: u64, size: usize, value: u64, rights: Rights) -> Guest<()> {
        let p = self.pieces(lin, size, Access::Write, rights)?;
        self.watch(lin, size, Access::Write);
        self.write_pieces(p, &value.to_le_bytes()[..size]);
        Ok(())
    }

    /// Loads 1, 2, 4 or 8 bytes from `offset` in `seg` as the current privilege level.
    ///
    /// # Errors
    /// What the access raises: #GP(0), #SS(0), #AC(0) or #PF.
    pub fn load(&mut self, seg: Seg, offset: u64, size: usize) -> Guest<u64> {
        let lin = self.linear(seg, offset, size, Access::Read)?;
        self.check_alignment(lin, size)?;
        self.load_linear(lin, size, Rights::of(self.s.mode))
    }

    /// Stores the low `size` (1, 2, 4 or 8) bytes of `value` at `offset` in `seg`.
    ///
    /// # Errors
    /// As [`Self::load`]; nothing was written then.
    pub fn store(&mut self, seg: Seg, offset: u64, size: usize, value: u64) -> Guest<()> {
        let lin = self.linear(seg, offset, size, Access::Write)?;
        self.check_alignment(lin, size)?;
        self.store_linear(lin, size, value, Rights::of(self.s.mode))
    }

    /// Loads up to 4096 bytes, all or none.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_bytes(&mut self, seg: Seg, offset: u64, data: &mut [u8]) -> Guest<()> {
        let lin = self.linear(seg, offset, data.len(), Access::Read)?;
        let p = self.pieces(lin, data.len(), Access::Read, Rights::of(self.s.mode))?;
        self.watch(lin, data.len(), Access::Read);
        self.read_pieces(p, data);
        Ok(())
    }

    /// Stores up to 4096 bytes, all or none.
    ///
    /// # Errors
    /// As [`Self::store`].
    pub fn store_bytes(&mut self, seg: Seg, offset: u64, data: &[u8]) -> Guest<()> {
        let lin = self.linear(seg, offset, data.len(), Access::Write)?;
        let p = self.pieces(lin, data.len(), Access::Write, Rights::of(self.s.mode))?;
        self.watch(lin, data.len(), Access::Write);
        self.write_pieces(p, data);
        Ok(())
    }

    /// Checks that `len` bytes (at most 4096) could be written, and sets the dirty bits as a store would.
    ///
    /// # Errors
    /// As [`Self::store`].
    pub fn probe_write(&mut self, seg: Seg, offset: u64, len: usize) -> Guest<()> {
        let lin = self.linear(seg, offset, len, Access::Write)?;
        self.pieces(lin, len, Access::Write, Rights::of(self.s.mode)).map(drop)
    }

    /// Implicit supervisor load by linear address: descriptor tables, TSS (SDM volume 3, 4.6.1).
    ///
    /// # Errors
    /// #PF; #GP(0) for a non-canonical address.
    pub fn sys_load(&mut self, lin: u64, size: usize) -> Guest<u64> {
        let lin = self.system_linear(lin)?;
        self.load_linear(lin, size, self.implicit_rights())
    }

    /// Implicit supervisor store by linear address.
    ///
    /// # Errors
    /// As [`Self::sys_load`].
    pub fn sys_store(&mut self, lin: u64, size: usize, value: u64) -> Guest<()> {
        let lin = self.system_linear(lin)?;
        self.store_linear(lin, size, value, self.implicit_rights())
    }

    fn system_linear(&self, lin: u64) -> Guest<u64> {
        if !self.s.is_long() {
            Ok(lin & 0xffff_ffff)
        } else if super::segment::is_canonical(lin) {
            Ok(lin)
        } else {
            Err(Fault::gp(0))
        }
    }

    /// SMAP applies to implicit supervisor accesses whatever RFLAGS.AC is.
    fn implicit_rights(&self) -> Rights {
        Rights::Kernel { user_ok: self.s.cr4 & berth_cpu::bits::cr4::SMAP == 0 }
    }

    fn rights_of_cpl(&self, cpl: u8) -> Rights {
        if cpl == 3 {
            Rights::User
        } else {
            let ac = self.s.rflags_rest & berth_cpu::bits::rflags::AC != 0;
            Rights::Kernel { user_ok: ac || self.s.cr4 & berth_cpu::bits::cr4::SMAP == 0 }
        }
    }

    /// Stores by linear address with the rights of `cpl` (stack switches).
    ///
    /// # Errors
    /// #PF; #SS(0) for a non-canonical address.
    pub fn store_as(&mut self, cpl: u8, lin: u64, size: usize, value: u64) -> Guest<()> {
        let lin = self.stack_linear(lin)?;
        self.store_linear(lin, size, value, self.rights_of_cpl(cpl))
    }

    /// Checks that [`Self::store_as`] of `len` bytes (at most 4096) would succeed.
    ///
    /// # Errors
    /// As [`Self::store_as`].
    pub fn probe_write_as(&mut self, cpl: u8, lin: u64, len: usize) -> Guest<()> {
        let lin = self.stack_linear(lin)?;
        let rights = self.rights_of_cpl(cpl);
        self.pieces(lin, len, Access::Write, rights).map(drop)
    }

    fn stack_linear(&self, lin: u64) -> Guest<u64> {
        if !self.s.is_long() {
            Ok(lin & 0xffff_ffff)
        } else if super::segment::is_canonical(lin) {
            Ok(lin)
        } else {
            Err(Fault::with_error(berth_cpu::bits::vector::SS, 0))
        }
    }

    /// The host address of `lin` for the current privilege level, for work on many bytes of one page.
    /// `None`: MMIO, watched, or (for writes) a page with translations; then access it piece by piece.
    ///
    /// # Errors
    /// #PF.
    pub fn page_pointer(&mut self, lin: u64, access: Access) -> Guest<Option<*mut u8>> {
        let gpa = self.translate(lin, access, Rights::of(self.s.mode))?.gpa | lin & 0xfff;
        let addr = GuestPhysAddr(gpa);
        let watched = self.s.mode.has(crate::mode::Mode::WATCHED);
        if access == Access::Write {
            // Before the test: a vCPU that marks the page from now on asks us to look at it again.
            self.vm.code_pages.note_writer(addr, self.id);
            // As in `slow.rs`: helpers run with the execution lock held.
            self.vm.dirty.mark(addr);
        }
        if watched || access == Access::Write && self.vm.code_pages.has_code(addr) {
            return Ok(None);
        }
        Ok(self.vm.host_map.host(addr).map(|host| host as *mut u8))
    }

    /// Notes data breakpoints that an access of `len` bytes at `lin` hits (SDM volume 3, 18.2.5).
    pub(super) fn watch(&mut self, lin: u64, len: usize, access: Access) {
        if self.s.dr[7] & 0xff == 0 {
            return;
        }
        for i in 0..4 {
            let enabled = self.s.dr[7] >> (i * 2) & 3 != 0;
            let kind = self.s.dr[7] >> (16 + i * 4) & 3;
            let length = [1, 2, 8, 4][(self.s.dr[7] >> (18 + i * 4) & 3) as usize];
            let fits = kind == 3 || kind == 1 && access == Access::Write;
            let start = self.s.dr[i] & !(length - 1);
            let overlaps = lin < start.wrapping_add(length) && start < lin.wrapping_add(len as u64);
            if enabled && fits && overlaps {
                self.pending_debug |= 1 << i;
            }
        }
    }
}

/// Splits a device access at `addr` into naturally sized parts of at most 8 bytes.
fn for_device(
    len: usize,
    addr: GuestPhysAddr,
    mut access: impl FnMut(GuestPhysAddr, std::ops::Range<usize>),
) {
    let mut done = 0;
    while done < len {
        let at = addr + done as u64;
        let mut size = [8, 4, 2, 1].into_iter().find(|&s| s <= len - done).unwrap_or(1);
        while at.0 & (size as u64 - 1) != 0 {
            size /= 2;
        }
        access(at, done..done + size);
        done += size;
    }
}

/// Copies from guest memory; 1, 2, 4 and 8 aligned bytes are read in one access.
fn copy_from_guest(host: u64, data: &mut [u8]) {
    let p = host as *const u8;
    match data.len() {
        // SAFETY: of all branches: the caller found `host` in guest RAM with `data.len()` bytes left in its page.
        // The memory may change under us, hence volatile reads; each branch reads exactly `data.len()` bytes and
        // the typed ones are aligned.
        1 => data[0] = unsafe { p.read_volatile() },
        // SAFETY: see above.
        2 if host & 1 == 0 => data.copy_from_slice(&unsafe { p.cast::<u16>().read_volatile() }.to_le_bytes()),
        // SAFETY: see above.
        4 if host & 3 == 0 => data.copy_from_slice(&unsafe { p.cast::<u32>().read_volatile() }.to_le_bytes()),
        // SAFETY: see above.
        8 if host & 7 == 0 => data.copy_from_slice(&unsafe { p.cast::<u64>().read_volatile() }.to_le_bytes()),
        n => {
            for (i, byte) in data.iter_mut().enumerate().take(n) {
                // SAFETY: see above; `i < data.len()`.
                *byte = unsafe { p.add(i).read_volatile() };
            }
        }
    }
}

/// Copies to guest memory; 1, 2, 4 and 8 aligned bytes are written in one access.
fn copy_to_guest(host: u64, data: &[u8]) {
    let p = host as *mut u8;
    match *data {
        // SAFETY: of all branches: the caller found `host` in guest RAM with `data.len()` bytes left in its page;
        // each branch writes exactly that many and the typed ones are aligned.
        [a] => unsafe { p.write_volatile(a) },
        // SAFETY: see above.
        [a, b] if host & 1 == 0 => unsafe { p.cast::<u16>().write_volatile(u16::from_le_bytes([a, b])) },
        [a, b, c, d] if host & 3 == 0 => {
            let value = u32::from_le_bytes([a, b, c, d]);
            // SAFETY: see above.
            unsafe { p.cast::<u32>().write_volatile(value) }
        }
        [a, b, c, d, e, f, g, h] if host & 7 == 0 => {
            let value = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
            // SAFETY: see above.
            unsafe { p.cast::<u64>().write_volatile(value) }
        }
        _ => {
            for (i, byte) in data.iter().enumerate() {
                // SAFETY: see above; `i < data.len()`.
                unsafe { p.add(i).write_volatile(*byte) };
            }
        }
    }
}

//! What translated code calls when its TLB check fails.
//!
//! [`Cpu::slow_access`] gives translated code a host address to use instead. Where guest memory has none that
//! may simply be used, the address is that of the bounce buffer (filled beforehand if the instruction reads),
//! and after a store [`Cpu::slow_finish`] carries its contents to where they belong.

use berth_cpu::bits::vector;
use berth_memory::GuestPhysAddr;

use super::access::Pieces;
use super::tlb::TlbTable;
use super::{Access, Rights};
use crate::cpu::Cpu;
use crate::fault::{Fault, Guest};
use crate::mode::Mode;
use crate::state::Seg;

/// What an instruction does with its memory operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Loads.
    Read,
    /// Stores all of it.
    Write,
    /// Loads and stores.
    Modify,
}

impl Kind {
    pub(crate) fn access(self) -> Access {
        if self == Kind::Read { Access::Read } else { Access::Write }
    }
}

/// Where translated code finds the operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Guest memory itself; the page may have been installed in the TLB.
    Direct(u64),
    /// Use this address, and call [`Cpu::slow_finish`] after a store.
    Special(u64),
    /// Execute the instruction again while no other vCPU runs.
    Alone,
}

/// What is left to do after a store.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Post {
    None,
    /// The store went to a page with translations.
    Code {
        addr: GuestPhysAddr,
        len: usize,
    },
    /// The bounce buffer holds what goes to these pieces.
    Bounce {
        offset: usize,
        pieces: Pieces,
        len: usize,
    },
}

impl Cpu {
    /// Resolves an access of `size` bytes at `offset` in a segment whose checks are not trivial.
    pub(crate) fn slow_segmented(
        &mut self,
        seg: Seg,
        offset: u64,
        size: usize,
        kind: Kind,
        checks: bool,
    ) -> Guest<Place> {
        // A read-modify-write needs both rights; writable data segments are always readable.
        let lin = self.linear(seg, offset, size, kind.access())?;
        self.slow_linear(lin, size, kind, checks)
    }

    /// Resolves an access of `size` bytes at linear `lin`. `stack`: through SS by default, for non-canonical
    /// addresses. `checks`: #AC applies; instructions that need alignment anyway raise #GP by themselves.
    pub(crate) fn slow_access(
        &mut self,
        lin: u64,
        size: usize,
        kind: Kind,
        stack: bool,
        checks: bool,
    ) -> Guest<Place> {
        if self.s.is_64bit() {
            let last = lin.wrapping_add(size as u64 - 1);
            if !super::segment::is_canonical(lin) || !super::segment::is_canonical(last) {
                return Err(if stack { Fault::with_error(vector::SS, 0) } else { Fault::gp(0) });
            }
        }
        self.slow_linear(lin, size, kind, checks)
    }

    fn slow_linear(&mut self, lin: u64, size: usize, kind: Kind, checks: bool) -> Guest<Place> {
        self.counters().slow_accesses.add(1);
        let mode = self.s.mode;
        if checks && mode.has(Mode::ALIGN) && lin & (alignment(size) - 1) != 0 {
            return Err(Fault::with_error(vector::AC, 0));
        }
        let rights = Rights::of(mode);
        let offset = lin & 0xfff;
        if offset + size as u64 > 4096 {
            if kind == Kind::Modify && self.vm.vcpus > 1 && !self.is_alone {
                return Ok(Place::Alone);
            }
            let pieces = self.pieces(lin, size, kind.access(), rights)?;
            self.watch(lin, size, kind.access());
            return Ok(self.bounce(lin, pieces, size, kind));
        }
        let t = self.translate(lin, kind.access(), rights)?;
        let addr = GuestPhysAddr(t.gpa | offset);
        self.watch(lin, size, kind.access());
        let Some(host) = self.vm.host_map.host(addr) else {
            let pieces = Pieces { first: addr, first_len: size, second: GuestPhysAddr(0) };
            return Ok(self.bounce(lin, pieces, size, kind));
        };
        if kind != Kind::Read {
            // This vCPU holds the execution lock until the store is done, so the log is not taken in between.
            self.vm.dirty.mark(addr);
        }
        if kind != Kind::Read && self.vm.code_pages.has_code(addr) {
            self.mem.post = Post::Code { addr, len: size };
            return Ok(Place::Special(host));
        }
        if !mode.has(Mode::WATCHED) && !mode.has(Mode::ALIGN) && !mode.has(Mode::SEGMENTED) {
            let write = kind != Kind::Read;
            if write {
                self.vm.code_pages.note_writer(addr, self.id);
            }
            self.install(lin, TlbTable::new(mode.tlb_class(), write), host & !0xfff, t.global);
            // A translation of this page by another vCPU may have begun between the test above and now: it
            // sets the page's bit first and then asks us to drop the entry, so testing again is enough.
            if write && self.vm.code_pages.has_code(addr) {
                self.drop_write_entries(host & !0xfff);
                self.mem.post = Post::Code { addr, len: size };
                return Ok(Place::Special(host));
            }
        }
        Ok(Place::Direct(host))
    }

    /// Sets up the bounce buffer. It keeps the guest address's alignment, on which instructions may fault.
    fn bounce(&mut self, lin: u64, pieces: Pieces, len: usize, kind: Kind) -> Place {
        let offset = (lin & 63) as usize;
        if kind != Kind::Write {
            let mut data = [0; 64];
            let (low, high) = data[..len].split_at_mut(pieces.first_len.min(len));
            self.read_physical(pieces.first, low);
            if !high.is_empty() {
                self.read_physical(pieces.second, high);
            }
            self.s.bounce.0[offset..offset + len].copy_from_slice(&data[..len]);
        }
        self.mem.post = if kind == Kind::Read { Post::None } else { Post::Bounce { offset, pieces, len } };
        Place::Special(self.s.bounce.0[offset..].as_ptr() as u64)
    }

    /// Finishes a store that [`Place::Special`] was given for.
    pub(crate) fn slow_finish(&mut self) {
        match std::mem::replace(&mut self.mem.post, Post::None) {
            Post::None => {}
            Post::Code { addr, len } => self.code_written(addr, len as u64),
            Post::Bounce { offset, pieces, len } => {
                let mut data = [0; 64];
                data[..len].copy_from_slice(&self.s.bounce.0[offset..offset + len]);
                let (low, high) = data[..len].split_at(pieces.first_len.min(len));
                self.write_physical(pieces.first, low);
                if !high.is_empty() {
                    self.write_physical(pieces.second, high);
                }
            }
        }
    }
}

/// The alignment that #AC asks for, in bytes (SDM volume 3, table 6-7; for vectors what AMD's Zen 3 does: 16 bytes
/// for operands of 16 and 32).
fn alignment(size: usize) -> u64 {
    match size {
        10 => 8,
        32 => 16,
        n if n.is_power_of_two() => n as u64,
        _ => 1,
    }
}

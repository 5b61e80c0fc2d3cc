//! A vCPU with RAM, descriptor tables and page tables for the tests of this module.
//!
//! ```text
//!   0x1000 GDT │ 0x2000 IDT │ 0x3000 TSS │ 0x8000 user stack │ 0xa000 kernel stack │ 0xb000 IST1 │ 0x10000 page tables
//! ```
//! The first 2 MiB are mapped to themselves with 4 KiB pages, for user and kernel.

use std::ptr::NonNull;

use berth_cpu::bits::{cr0, cr4, efer, gpr};
use berth_cpu::{Segment, TableRegister};
use berth_engine::Bus;
use berth_memory::GuestPhysAddr;
use iced_x86::{Decoder, DecoderOptions};

use crate::code::Flow;
use crate::cpu::Cpu;
use crate::fault::{Fault, Guest};
use crate::memory::Flush;
use crate::state::Seg;
use crate::test_support::NoBus;

pub const GDT: u64 = 0x1000;
pub const IDT: u64 = 0x2000;
pub const TSS: u64 = 0x3000;
pub const USER_STACK: u64 = 0x8ff0;
pub const KERNEL_STACK: u64 = 0xaff0;
pub const IST1: u64 = 0xbff8;
const TABLES: u64 = 0x10000;
/// Where programs pretend to be.
pub const CODE: u64 = 0x6000;
/// Where handlers pretend to be.
pub const HANDLER: u64 = 0x7000;

pub const KERNEL_CODE64: u16 = 0x08;
pub const KERNEL_DATA: u16 = 0x10;
pub const USER_CODE32: u16 = 0x1b;
pub const USER_DATA: u16 = 0x23;
pub const USER_CODE64: u16 = 0x2b;
pub const TSS_SELECTOR: u16 = 0x30;
pub const KERNEL_CODE32: u16 = 0x40;
pub const CONFORMING_CODE32: u16 = 0x48;
pub const CALL_GATE: u16 = 0x50;
pub const SMALL_STACK16: u16 = 0x60;
const GDT_LIMIT: u16 = 0x7f;

pub struct Machine {
    pub cpu: Cpu,
}

fn descriptor(base: u64, limit: u64, attr: u64) -> u64 {
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | attr << 40
        | (limit >> 16 & 0xf) << 48
        | (base >> 24 & 0xff) << 56
}

impl Machine {
    fn new() -> Self {
        let mut m = Self { cpu: Cpu::for_tests(4 << 20) };
        let bus: &'static dyn Bus = &NoBus;
        m.cpu.bus = Some(NonNull::from(bus));
        let data = 0xc093;
        for (selector, value) in [
            (KERNEL_CODE64, descriptor(0, 0xf_ffff, 0xa09b)),
            (KERNEL_DATA, descriptor(0, 0xf_ffff, data)),
            (USER_CODE32, descriptor(0, 0xf_ffff, 0xc0fb)),
            (USER_DATA, descriptor(0, 0xf_ffff, data | 0x60)),
            (USER_CODE64, descriptor(0, 0xf_ffff, 0xa0fb)),
            (TSS_SELECTOR, descriptor(TSS, 0x67, 0x89)),
            (TSS_SELECTOR + 8, 0),
            (KERNEL_CODE32, descriptor(0, 0xf_ffff, 0xc09b)),
            (CONFORMING_CODE32, descriptor(0, 0xf_ffff, 0xc09f)),
            (SMALL_STACK16, descriptor(0x9000, 0xff, 0x0093)),
        ] {
            m.write(GDT + u64::from(selector & !7), 8, value);
        }
        m.cpu.s.gdtr = TableRegister { base: GDT, limit: GDT_LIMIT };
        m.cpu.s.idtr = TableRegister { base: IDT, limit: 0xfff };
        m.cpu.s.rip = CODE;
        m.cpu.s.set_rflags(0x202);
        m
    }

    /// Real mode with CS = 0, interrupt vectors at 0x2000.
    pub fn real() -> Self {
        let mut m = Self::new();
        for seg in Seg::ALL {
            *m.cpu.s.seg_mut(seg) = Segment::real_mode(0);
        }
        m.cpu.s.cr0 = cr0::ET;
        m.cpu.s.gpr[gpr::RSP] = USER_STACK;
        m.cpu.mode_changed();
        m
    }

    /// 32-bit protected mode without paging at privilege level 0 or 3.
    pub fn protected(cpl: u8) -> Self {
        let mut m = Self::new();
        m.cpu.s.cr0 = cr0::ET | cr0::PE;
        let (code, data) = if cpl == 0 { (KERNEL_CODE32, KERNEL_DATA) } else { (USER_CODE32, USER_DATA) };
        m.set_segments(code, data);
        m.set_tss();
        m.write(TSS + 4, 4, KERNEL_STACK);
        m.write(TSS + 8, 4, u64::from(KERNEL_DATA));
        m
    }

    /// 64-bit mode at privilege level 0 or 3.
    pub fn long(cpl: u8) -> Self {
        let mut m = Self::new();
        let s = &mut m.cpu.s;
        s.cr0 = cr0::ET | cr0::PE | cr0::PG | cr0::WP;
        s.cr4 = cr4::PAE | cr4::PGE;
        s.efer = efer::LME | efer::LMA | efer::SCE | efer::NXE;
        s.cr3 = TABLES;
        for level in 0..3 {
            m.write(TABLES + level * 0x1000, 8, (TABLES + (level + 1) * 0x1000) | 7);
        }
        for page in 0..512 {
            m.write(TABLES + 0x3000 + page * 8, 8, page << 12 | 0x67);
        }
        let (code, data) = if cpl == 0 { (KERNEL_CODE64, KERNEL_DATA) } else { (USER_CODE64, USER_DATA) };
        m.set_segments(code, data);
        m.set_tss();
        m.write(TSS + 4, 8, KERNEL_STACK);
        m.write(TSS + 36, 8, IST1);
        m
    }

    fn set_segments(&mut self, code: u16, data: u16) {
        for seg in Seg::ALL {
            let selector = if seg == Seg::Cs { code } else { data };
            let raw = self.read(GDT + u64::from(selector & !7), 8);
            let attr = (raw >> 40) as u16 & 0xf0ff;
            *self.cpu.s.seg_mut(seg) = Segment { base: 0, limit: u32::MAX, attr, selector };
        }
        let user = code & 3 == 3;
        self.cpu.s.gpr[gpr::RSP] = if user { USER_STACK } else { KERNEL_STACK };
        self.cpu.mode_changed();
    }

    fn set_tss(&mut self) {
        self.cpu.s.tr = Segment { base: TSS, limit: 0x67, attr: 0x8b, selector: TSS_SELECTOR };
    }

    /// Writes guest physical memory.
    pub fn write(&mut self, at: u64, size: usize, value: u64) {
        self.cpu.vm.memory.write(GuestPhysAddr(at), &value.to_le_bytes()[..size]).unwrap();
    }

    /// Reads guest physical memory.
    pub fn read(&self, at: u64, size: usize) -> u64 {
        let mut bytes = [0; 8];
        self.cpu.vm.memory.read(GuestPhysAddr(at), &mut bytes[..size]).unwrap();
        u64::from_le_bytes(bytes)
    }

    /// `count` values of `size` bytes from the current stack pointer up.
    pub fn stack(&self, size: usize, count: u64) -> Vec<u64> {
        let top = super::frame::pointer(&self.cpu.s) + self.cpu.s.seg(Seg::Ss).base;
        (0..count).map(|n| self.read(top + n * size as u64, size)).collect()
    }

    /// A 64-bit interrupt gate with DPL `dpl` to [`HANDLER`].
    pub fn gate64(&mut self, vector: u8, ist: u64, dpl: u64) {
        let low = HANDLER | u64::from(KERNEL_CODE64) << 16 | ist << 32 | (0x8e | dpl << 5) << 40;
        self.write(IDT + u64::from(vector) * 16, 8, low);
        self.write(IDT + u64::from(vector) * 16 + 8, 8, 0);
    }

    /// A 32-bit gate of type `kind` (14: interrupt, 15: trap) with DPL `dpl` to [`HANDLER`].
    pub fn gate32(&mut self, vector: u8, kind: u64, dpl: u64) {
        let gate = HANDLER | u64::from(KERNEL_CODE32) << 16 | (0x80 | kind | dpl << 5) << 40;
        self.write(IDT + u64::from(vector) * 8, 8, gate);
    }

    /// Makes the page at `lin` not present (64-bit mode).
    pub fn unmap(&mut self, lin: u64) {
        self.write(TABLES + 0x3000 + (lin >> 12) * 8, 8, 0);
        self.cpu.flush_tlb(Flush::All);
    }

    /// Executes the one instruction in `code`, as if it were at CS:RIP. What does not decode is #UD, as in the
    /// run loop.
    pub fn run(&mut self, code: &[u8]) -> Guest<Flow> {
        let bitness = self.cpu.s.mode.bitness();
        let mut decoder = Decoder::with_ip(bitness, code, self.cpu.s.rip, DecoderOptions::NONE);
        let insn = decoder.decode();
        if insn.is_invalid() {
            return Err(Fault::ud());
        }
        assert_eq!(insn.len(), code.len(), "the test's code is one instruction");
        let flow = super::execute(&mut self.cpu, &insn)?;
        if flow != Flow::Jump {
            self.cpu.s.rip = insn.next_ip();
        }
        Ok(flow)
    }
}

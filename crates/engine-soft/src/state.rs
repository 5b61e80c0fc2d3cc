//! The state block of one vCPU: what translated code reaches through the host's GS segment.
//!
//! While translated code runs, guest registers are in host registers ([`crate::code::regs`] has the map) and
//! `gpr` here is stale except for r11, r13 and r15, which always live here. In every Rust function all of `gpr`,
//! `rip`, `flags`, `ymm` and `mxcsr` are exact. x87 state stays in the host's x87 registers: Rust code does not
//! touch them.

use berth_cpu::bits::{cr0, rflags};
use berth_cpu::{Segment, TableRegister};

use crate::code::calls::CallStack;
use crate::memory::slots::Slots;
use crate::memory::tlb::Tlb;
use crate::mode::Mode;

/// Arithmetic flags as `lahf; seto al` leaves them in AX: OF in bit 0; SF ZF AF PF CF in bits 15 to 8.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct SavedFlags(pub u16);

impl SavedFlags {
    /// From the arithmetic bits of RFLAGS.
    pub const fn from_rflags(value: u64) -> Self {
        Self(((value & 0xd5) << 8) as u16 | (value >> 11 & 1) as u16)
    }
    /// As bits of RFLAGS.
    pub const fn to_rflags(self) -> u64 {
        (self.0 >> 8) as u64 & 0xd5 | ((self.0 & 1) as u64) << 11
    }
}

/// Index of a segment register in [`State::segments`], in encoding order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
#[repr(usize)]
pub enum Seg {
    Es,
    Cs,
    Ss,
    Ds,
    Fs,
    Gs,
}

impl Seg {
    /// All, in encoding order.
    pub const ALL: [Seg; 6] = [Seg::Es, Seg::Cs, Seg::Ss, Seg::Ds, Seg::Fs, Seg::Gs];
}

/// Entries in a vCPU's jump cache.
pub const JUMP_CACHE_ENTRIES: usize = 8192;

/// One entry of the jump cache: where translated code for a guest virtual address is.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct JumpCacheEntry {
    /// Guest virtual address (RIP including the code segment's base).
    pub va: u64,
    /// [`State::jump_key`] that the entry was made under; 0 never matches.
    pub key: u64,
    /// Host address of the block's entry for flags in memory.
    pub entry: u64,
    /// Keeps the size a power of two.
    pub reserved: u64,
}

/// What translated code and the stubs use; offsets are taken with `offset_of!`.
#[repr(C, align(64))]
pub struct State {
    /// Guest registers in encoding order.
    pub gpr: [u64; 16],
    /// Guest RIP. Exact in Rust code: the instruction that is being executed (helpers) or comes next (else).
    pub rip: u64,
    /// Host stack pointer of the Rust frame that entered translated code.
    pub host_rsp: u64,
    /// Compared with [`JumpCacheEntry::key`]: translation generation and mode.
    pub jump_key: u64,
    /// Guest arithmetic flags while they are not in the host's flags.
    pub flags: SavedFlags,
    /// RFLAGS.IF, 0 or 1.
    pub interrupt_flag: u8,
    /// RFLAGS.DF, 0 or 1. The host's DF is always clear.
    pub direction: u8,
    /// 1 if an interrupt waits for IF to be set.
    pub interrupt_waiting: u8,
    /// Guest MXCSR while Rust code runs.
    pub mxcsr: u32,
    /// MXCSR for Rust code.
    pub host_mxcsr: u32,
    /// Every other bit of RFLAGS (IOPL, NT, RF, VM, AC, VIF, VIP, ID, TF).
    pub rflags_rest: u64,
    /// General spill places for templates.
    pub scratch: [u64; 4],
    /// Operands of instructions whose flags are not saved: two sets of two.
    pub flag_operands: [u64; 4],
    /// Argument or result of stubs: why translated code was left, and with which value.
    pub exit_reason: u64,
    /// Second word of the exit: link number, host PC, …
    pub exit_value: u64,
    /// Address of the indirect branch that last missed the jump cache.
    pub branch: u64,
    /// Calls of the refill stubs.
    pub slot_misses: u64,
    /// Segment registers in encoding order.
    pub segments: [Segment; 6],
    /// Guest vector registers while Rust code runs (the low 16 bytes are XMM).
    pub ymm: [[u8; 32]; 16],
    /// Where accesses go that have no host address: MMIO, page-crossing, watched. 64-byte aligned.
    pub bounce: Bounce,
    /// Software TLBs.
    pub tlb: Tlb,
    /// The slots of memory accesses.
    pub slots: Slots,
    /// The host's stack while translated code runs.
    pub calls: CallStack,
    /// The jump cache, by hash of the virtual address.
    pub jump_cache: [JumpCacheEntry; JUMP_CACHE_ENTRIES],
    /// PAUSEs until the next call of [`crate::exec::pv::pause`].
    pub pauses_left: u64,

    // From here on only Rust code uses it.
    /// The `Cpu` that owns this block; first argument of helpers.
    pub cpu: *mut crate::cpu::Cpu,
    /// Current mode, the part of the block key that is not an address.
    pub mode: Mode,
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table register.
    pub gdtr: TableRegister,
    /// Interrupt descriptor table register.
    pub idtr: TableRegister,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3 without bit 63.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// XCR0.
    pub xcr0: u64,
    /// DR0 to DR3, DR6, DR7.
    pub dr: [u64; 8],
    /// The next instruction is in the shadow of STI or MOV SS: no interrupt before it is done.
    pub interrupt_shadow: bool,
    /// The shadow is MOV SS's or POP SS's: debug traps wait too (SDM volume 3, 6.8.3).
    pub shadow_blocks_debug: bool,
    /// NMI delivery is blocked until IRET.
    pub nmi_blocked: bool,
}

/// A cache-line aligned buffer.
#[repr(C, align(64))]
pub struct Bounce(pub [u8; 192]);

impl State {
    /// RFLAGS as PUSHF would see it, with every bit.
    pub fn rflags(&self) -> u64 {
        self.rflags_rest
            | self.flags.to_rflags()
            | u64::from(self.interrupt_flag) << 9
            | u64::from(self.direction) << 10
            | rflags::ONE
    }

    /// Sets every bit of RFLAGS, without any check of privilege. The caller calls
    /// [`crate::cpu::Cpu::mode_changed`] if TF, VM or AC changed.
    pub fn set_rflags(&mut self, value: u64) {
        self.flags = SavedFlags::from_rflags(value);
        self.interrupt_flag = (value >> 9 & 1) as u8;
        self.direction = (value >> 10 & 1) as u8;
        self.rflags_rest = value
            & (rflags::TF
                | rflags::IOPL
                | rflags::NT
                | rflags::RF
                | rflags::VM
                | rflags::AC
                | rflags::VIF
                | rflags::VIP
                | rflags::ID);
    }

    /// A segment register.
    pub fn seg(&self, seg: Seg) -> &Segment {
        &self.segments[seg as usize]
    }

    /// A segment register, to be changed. The caller calls [`crate::cpu::Cpu::mode_changed`].
    pub fn seg_mut(&mut self, seg: Seg) -> &mut Segment {
        &mut self.segments[seg as usize]
    }

    /// Current privilege level: DPL of SS, 0 in real mode, 3 in virtual-8086 mode.
    pub fn cpl(&self) -> u8 {
        if self.cr0 & cr0::PE == 0 {
            0
        } else if self.is_v86() {
            3
        } else {
            self.seg(Seg::Ss).dpl()
        }
    }

    /// Whether CR0.PE is set.
    pub fn is_protected(&self) -> bool {
        self.cr0 & cr0::PE != 0
    }

    /// Whether RFLAGS.VM is set.
    pub fn is_v86(&self) -> bool {
        self.rflags_rest & rflags::VM != 0
    }

    /// Whether EFER.LMA is set (64-bit or compatibility mode).
    pub fn is_long(&self) -> bool {
        self.efer & berth_cpu::bits::efer::LMA != 0
    }

    /// Whether 64-bit code runs.
    pub fn is_64bit(&self) -> bool {
        self.is_long() && self.seg(Seg::Cs).attr & Segment::L != 0
    }

    /// I/O privilege level, 0 to 3.
    pub fn iopl(&self) -> u8 {
        (self.rflags_rest >> 12 & 3) as u8
    }
}

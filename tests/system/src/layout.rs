//! Where things are in a guest, and the numbers of its ports. Everything below [`MAPPED_END`] is mapped at its
//! own address in every mode with paging.

/// Global descriptor table; selectors are in [`selector`].
pub const GDT: u64 = 0x1000;
/// Number of descriptors that the table has room for.
pub const GDT_ENTRIES: u64 = 64;
/// A local descriptor table, empty until a case fills it.
pub const LDT: u64 = 0x1800;
/// Interrupt descriptor table.
pub const IDT: u64 = 0x2000;
/// Task state segment.
pub const TSS: u64 = 0x3000;
/// Offset of the I/O permission bitmap in the TSS.
pub const IO_MAP: u64 = 0x68;
/// Handlers: each vector below [`STUBS_COUNT`] has one that ends the run.
pub const STUBS: u64 = 0x4000;
/// Number of vectors that have a handler.
pub const STUBS_COUNT: u64 = 64;
/// Bytes of one handler.
pub const STUB_SIZE: u64 = 8;
/// Top of the stack for privilege level 0 in the TSS.
pub const KERNEL_STACK: u64 = 0x6000;
/// Top of the stack that the guest starts with.
pub const STACK: u64 = 0x7000;
/// Top of the first IST stack.
pub const IST_STACK: u64 = 0x8000;
/// Assembled code starts here, unless a case says otherwise.
pub const CODE: u64 = 0x8000;
/// Two pages of data, zero at first.
pub const DATA: u64 = 0xe000;
/// Page tables are made from here on.
pub const TABLES: u64 = 0x1_0000;
/// End of the space for page tables.
pub const TABLES_END: u64 = 0x8_0000;
/// Free memory, up to [`MAPPED_END`].
pub const ARENA: u64 = 0x10_0000;
/// End of what is mapped.
pub const MAPPED_END: u64 = 0x40_0000;
/// RAM of a guest in bytes; what is above [`MAPPED_END`] is free for cases that map it.
pub const RAM: u64 = 16 << 20;
/// Guest physical address of a page with a device: it keeps what is written, and logs every access.
pub const MMIO: u64 = 0xd000_0000;
/// The vector that [`crate::asm::Kit::user_done`] raises; level 3 may.
pub const DONE_VECTOR: u8 = 0x30;

/// Ports. Level 3 may use those from 0xd0 to 0xff.
pub mod port {
    /// This plus the vector ends the run: what the handlers write to.
    pub const VECTOR: u16 = 0x80;
    /// A byte written is the vector of an interrupt for vCPU 0.
    pub const INTERRUPT: u16 = 0xd0;
    /// Any write is an NMI for vCPU 0.
    pub const NMI: u16 = 0xd1;
    /// Four ports that keep what is written.
    pub const SCRATCH: u16 = 0xd8;
    /// A dword written is appended to the log.
    pub const LOG: u16 = 0xe0;
    /// A write calls the hook of the case.
    pub const HOOK: u16 = 0xe8;
    /// Any write ends the run.
    pub const DONE: u16 = 0xf0;
}

/// Selectors in the GDT, without RPL. All segments are flat; the 16-bit ones end at 64 KiB.
pub mod selector {
    /// 64-bit code, level 0.
    pub const CODE64: u16 = 0x08;
    /// Data, level 0.
    pub const DATA: u16 = 0x10;
    /// 32-bit code, level 3.
    pub const USER_CODE32: u16 = 0x18;
    /// Data, level 3.
    pub const USER_DATA: u16 = 0x20;
    /// 64-bit code, level 3.
    pub const USER_CODE64: u16 = 0x28;
    /// 32-bit code, level 0.
    pub const CODE32: u16 = 0x30;
    /// 16-bit code, level 0.
    pub const CODE16: u16 = 0x38;
    /// 16-bit data, level 0.
    pub const DATA16: u16 = 0x40;
    /// The TSS, which takes two entries in long mode.
    pub const TSS: u16 = 0x48;
    /// The LDT, which takes two entries in long mode.
    pub const LDT: u16 = 0x58;
    /// The first of the free entries.
    pub const FREE: u16 = 0x68;
}

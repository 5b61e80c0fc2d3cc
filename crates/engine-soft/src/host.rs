//! The few things that only the host CPU or kernel can do: the GS base of the thread, the x87 registers and the
//! time-stamp counter.

use std::io;

/// x87 and MMX state in FXSAVE form.
#[repr(C, align(16))]
pub(crate) struct X87(pub [u8; 512]);

impl X87 {
    /// After FNINIT.
    pub(crate) fn reset() -> Self {
        let mut area = [0; 512];
        area[0..2].copy_from_slice(&0x37f_u16.to_le_bytes());
        area[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
        Self(area)
    }
}

/// Makes `address` the base of GS of this thread. Neither Rust nor the C library use GS on x86-64 Linux.
pub(crate) fn set_gs_base(address: u64) -> io::Result<()> {
    const ARCH_SET_GS: libc::c_long = 0x1001;
    // SAFETY: sets a register that nothing else in this process uses.
    if unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, address) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Loads the x87 registers. MXCSR and the XMM registers keep their values.
pub(crate) fn load_x87(image: &X87) {
    let mut both = X87([0; 512]);
    // SAFETY: the image is 512 aligned bytes; only the x87 part comes from it, the rest is what the CPU has now,
    // so FXRSTOR changes nothing that Rust code relies on. Its MXCSR field is the current one and valid.
    unsafe {
        std::arch::asm!("fxsave64 [{}]", in(reg) both.0.as_mut_ptr(), options(nostack));
        both.0[0..24].copy_from_slice(&image.0[0..24]);
        both.0[32..160].copy_from_slice(&image.0[32..160]);
        std::arch::asm!("fxrstor64 [{}]", in(reg) both.0.as_ptr(), options(nostack));
    }
}

/// Stores the x87 registers.
pub(crate) fn save_x87(image: &mut X87) {
    // SAFETY: writes 512 bytes to an aligned buffer.
    unsafe { std::arch::asm!("fxsave64 [{}]", in(reg) image.0.as_mut_ptr(), options(nostack)) };
}

/// The time-stamp counter.
pub(crate) fn ticks() -> u64 {
    // SAFETY: every x86-64 CPU has RDTSC, and Linux lets user code execute it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

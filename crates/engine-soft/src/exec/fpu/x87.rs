//! The guest's x87 registers, which stay in the host's x87 registers while Rust code runs.

use std::arch::asm;

/// FCW after FNINIT: all exceptions masked, 64-bit precision (SDM volume 1, 8.1.5).
const FCW_INITIAL: u16 = 0x37f;
/// Exception flags of FSW, and their masks in FCW.
const EXCEPTIONS: u16 = 0x3f;
/// FSW.ES and FSW.B: an unmasked exception waits.
const ES_AND_B: u16 = 0x8080;

/// x87 state without the addresses and opcode of the last instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct X87 {
    /// Control word.
    pub fcw: u16,
    /// Status word.
    pub fsw: u16,
    /// Abridged tag word: bit i is set if physical register i is not empty (SDM volume 1, 10.5.1.1).
    pub ftw: u8,
    /// ST(0) to ST(7).
    pub st: [[u8; 10]; 8],
}

/// The area of FXSAVE (SDM volume 1, table 10-2).
#[repr(C, align(16))]
struct Area([u8; 512]);

/// Offset of ST(0) in the area, and the distance to the next.
const ST: usize = 32;
const ST_STEP: usize = 16;

impl Default for X87 {
    /// The state after FNINIT, with all registers zero.
    fn default() -> Self {
        Self { fcw: FCW_INITIAL, fsw: 0, ftw: 0, st: [[0; 10]; 8] }
    }
}

fn host_area() -> Area {
    let mut area = Area([0; 512]);
    // SAFETY: FXSAVE64 writes at most the 512 bytes of `area`, which is 16-byte aligned, and changes no register.
    // It raises no pending x87 exception.
    unsafe { asm!("fxsave64 [{}]", in(reg) &raw mut area, options(nostack, preserves_flags)) };
    area
}

/// The bits of MXCSR that the host's CPU has (SDM volume 1, 11.6.6).
pub fn mxcsr_mask() -> u32 {
    let area = host_area().0;
    match u32::from_le_bytes([area[28], area[29], area[30], area[31]]) {
        0 => 0xffbf,
        mask => mask,
    }
}

impl X87 {
    /// The guest's state, out of the host's registers.
    pub fn host() -> Self {
        Self::parse(&host_area().0)
    }

    /// Puts this state into the host's registers, for the guest.
    pub fn load(&self) {
        // SSE registers and MXCSR are loaded with what they hold.
        let mut area = host_area();
        self.write(&mut area.0);
        // SAFETY: FXRSTOR64 reads the 512 bytes of `area`, which is 16-byte aligned. MXCSR is loaded with the
        // value that `host_area` found, so it is valid and does not change; XMM registers may have changed since
        // and are declared as clobbered. The x87 registers belong to the guest: Rust code uses none of them.
        unsafe {
            asm!("fxrstor64 [{}]", in(reg) &raw const area, options(nostack, preserves_flags, readonly),
                out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
                out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
                out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
                out("mm0") _, out("mm1") _, out("mm2") _, out("mm3") _,
                out("mm4") _, out("mm5") _, out("mm6") _, out("mm7") _);
        }
    }

    /// From the first 160 bytes of an FXSAVE or XSAVE image; shorter ones count as zero.
    pub fn parse(image: &[u8]) -> Self {
        let byte = |at: usize| image.get(at).copied().unwrap_or(0);
        let word = |at| u16::from_le_bytes([byte(at), byte(at + 1)]);
        let register = |i: usize| std::array::from_fn(|b| byte(ST + i * ST_STEP + b));
        Self { fcw: word(0), fsw: word(2), ftw: byte(4), st: std::array::from_fn(register) }
    }

    /// Into the first 160 bytes of an FXSAVE or XSAVE image, except MXCSR and its mask in bytes 24 to 31.
    pub fn write(&self, image: &mut [u8; 512]) {
        image[..24].fill(0);
        image[0..2].copy_from_slice(&self.fcw.to_le_bytes());
        image[2..4].copy_from_slice(&self.fsw.to_le_bytes());
        image[4] = self.ftw;
        for (slot, st) in image[ST..ST + 8 * ST_STEP].chunks_exact_mut(ST_STEP).zip(&self.st) {
            slot[..10].copy_from_slice(st);
            slot[10..].fill(0);
        }
    }

    /// Whether nothing differs from the state after FNINIT with all registers zero.
    pub fn is_initial(&self) -> bool {
        *self == Self::default()
    }

    /// TOP: which physical register ST(0) is.
    pub fn top(&self) -> usize {
        usize::from(self.fsw >> 11 & 7)
    }

    /// Whether the next waiting x87 instruction raises #MF.
    pub fn exception_waits(&self) -> bool {
        self.fsw & ES_AND_B & 0xff != 0
    }

    /// Makes the summary bits of the status word fit its flags and the control word's masks.
    pub fn update_summary(&mut self) {
        let waits = self.fsw & !self.fcw & EXCEPTIONS != 0;
        self.fsw = if waits { self.fsw | ES_AND_B } else { self.fsw & !ES_AND_B };
    }

    /// Masks all exceptions.
    pub fn mask_exceptions(&mut self) {
        self.fcw |= EXCEPTIONS;
        self.update_summary();
    }

    /// MM0 to MM7: the low 64 bits of the physical registers (SDM volume 1, 9.2.2).
    pub fn mmx(&self, n: usize) -> u64 {
        let st = &self.st[n.wrapping_sub(self.top()) & 7];
        let [a, b, c, d, e, f, g, h, ..] = *st;
        u64::from_le_bytes([a, b, c, d, e, f, g, h])
    }

    /// What every MMX instruction but EMMS does: TOP becomes 0, all registers count as used (SDM volume 1, 9.5.1).
    pub fn enter_mmx(&mut self) {
        // ST(i) is physical register TOP + i: the order of the image follows TOP.
        let top = self.top();
        self.st.rotate_right(top);
        self.fsw &= !(7 << 11);
        self.ftw = 0xff;
    }

    /// The full tag word, two bits a physical register: valid, zero, special, empty (SDM volume 1, 8.1.7).
    pub fn full_tags(&self) -> u16 {
        (0..8usize).fold(0, |tags, physical| {
            let st = &self.st[physical.wrapping_sub(self.top()) & 7];
            let tag = if self.ftw >> physical & 1 == 0 { 3 } else { tag(st) };
            tags | tag << (2 * physical)
        })
    }

    /// Sets the abridged tag word from a full one.
    pub fn set_full_tags(&mut self, tags: u16) {
        self.ftw = (0..8).fold(0, |ftw, n| ftw | u8::from(tags >> (2 * n) & 3 != 3) << n);
    }
}

fn tag(st: &[u8; 10]) -> u16 {
    let [significand @ .., low, high] = *st;
    let significand = u64::from_le_bytes(significand);
    match u16::from_le_bytes([low, high]) & 0x7fff {
        0 if significand == 0 => 1,
        0 | 0x7fff => 2,
        _ if significand >> 63 == 0 => 2,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: [u8; 10] = [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f];
    const INFINITY: [u8; 10] = [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x7f];

    #[test]
    fn what_is_loaded_is_in_the_registers() {
        let before = X87::host();
        let mut state = X87 { fcw: 0x27f, fsw: 3 << 11, ftw: 0b1000, ..X87::default() };
        state.st[0] = ONE;
        state.load();
        let back = X87::host();
        before.load();
        assert_eq!(back, state);
    }

    #[test]
    fn images_hold_no_addresses() {
        let mut image = [0xaa; 512];
        X87::default().write(&mut image);
        assert_eq!(image[..6], [0x7f, 3, 0, 0, 0, 0]);
        assert!(image[6..24].iter().all(|&b| b == 0));
        assert!(image[24..32].iter().all(|&b| b == 0xaa), "MXCSR is not x87's");
        assert_eq!(X87::parse(&image), X87::default());
    }

    #[test]
    fn full_tags_follow_the_physical_registers() {
        let mut state = X87 { fsw: 6 << 11, ftw: 0b1100_0001, ..X87::default() };
        state.st[0] = ONE; // physical 6
        state.st[1] = INFINITY; // physical 7
        state.st[2] = [0; 10]; // physical 0
        assert_eq!(state.full_tags(), 0b10_00_11_11_11_11_11_01);
        let tags = state.full_tags();
        state.ftw = 0;
        state.set_full_tags(tags);
        assert_eq!(state.ftw, 0b1100_0001);
    }

    #[test]
    fn mmx_registers_are_physical() {
        let mut state = X87 { fsw: 7 << 11, ..X87::default() };
        state.st[1][0] = 5;
        assert_eq!(state.mmx(0), 5);
        state.enter_mmx();
        assert_eq!((state.top(), state.ftw, state.mmx(0), state.st[0][0]), (0, 0xff, 5, 5));
    }

    #[test]
    fn the_summary_follows_flags_and_masks() {
        let mut state = X87 { fcw: 0x37f & !4, fsw: 4, ..X87::default() };
        state.update_summary();
        assert!(state.exception_waits());
        state.mask_exceptions();
        assert!(!state.exception_waits() && state.fsw == 4);
    }
}

//! Random states: registers that are worth computing with, and pointers to the areas.

use berth_cpu::XsaveArea;
use berth_cpu::bits::{gpr, rflags};
use fastrand::Rng;

use crate::case::CodeMode;
use crate::layout::{CODE, CODE_LEN, CONST, CONST_LEN, DATA, DATA_LEN, STACK, STACK_LEN};

/// A register that points to an area.
#[derive(Clone, Copy, Debug)]
pub struct Pointer {
    /// Number of the register.
    pub register: usize,
    /// What must be added to the register for the address.
    pub bias: i32,
}

/// Registers, and what they are good for in memory operands.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Size of code.
    pub mode: CodeMode,
    /// General-purpose registers.
    pub gpr: [u64; 16],
    /// RFLAGS.
    pub rflags: u64,
    /// x87, SSE and AVX.
    pub fpu: XsaveArea,
    /// Registers that point to areas.
    pub pointers: Vec<Pointer>,
    /// Registers with small values, good as an index.
    pub small: Vec<usize>,
}

/// How much goes wrong on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Risk {
    /// Bad addresses and unmasked exceptions are part of it: single instructions.
    Usual,
    /// Few, so that a sequence gets far.
    Low,
}

/// What the instruction needs of particular registers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Needs {
    /// rSI and rDI are pointers, rCX is a count.
    pub strings: bool,
    /// The dividend is small.
    pub division: bool,
    /// rBP points to the stack.
    pub frame: bool,
}

/// An integer that is worth computing with.
pub fn integer(rng: &mut Rng) -> u64 {
    let edge = [
        0,
        1,
        2,
        0x7f,
        0x80,
        0xff,
        0x7fff,
        0x8000,
        0xffff,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        0x1_0000_0000,
        i64::MAX as u64,
        i64::MIN as u64,
        u64::MAX,
        u64::MAX - 1,
    ];
    match rng.u8(..8) {
        0..3 => edge[rng.usize(..edge.len())],
        3 => rng.u64(..64),
        4 => u64::from(rng.u32(..)),
        5 => (-rng.i64(0..1000)) as u64,
        _ => rng.u64(..),
    }
}

/// An address for a memory operand.
pub fn address(rng: &mut Rng, risk: Risk) -> u64 {
    let bad = match risk {
        Risk::Usual => rng.u8(..100) < 14,
        Risk::Low => rng.u8(..100) < 1,
    };
    if bad {
        return match rng.u8(..10) {
            // The last bytes before the hole.
            0..4 => DATA + DATA_LEN - rng.u64(0..40),
            4..6 => CONST + rng.u64(..CONST_LEN),
            6 => CODE + rng.u64(..CODE_LEN),
            7 => 0x10 + rng.u64(..0x1000),
            8 => 0x8000_0000_0000_0000 | rng.u64(..0x7fff_0000_0000_0000),
            _ => 0xffff_f000_0000_0000 + rng.u64(..0x1000),
        };
    }
    match rng.u8(..16) {
        0..9 => DATA + 0x400 + rng.u64(..DATA_LEN - 0x800) / 64 * 64,
        9..12 => DATA + 0x400 + rng.u64(..DATA_LEN - 0x800),
        // Across a page boundary, perhaps.
        12..14 => DATA + rng.u64(1..4) * 4096 - rng.u64(..40),
        _ => STACK + 0x400 + rng.u64(..STACK_LEN - 0x800) / 16 * 16,
    }
}

impl Setup {
    /// A random state.
    pub fn random(rng: &mut Rng, mode: CodeMode, risk: Risk, needs: Needs) -> Self {
        let count = mode.registers();
        let mut gpr: [u64; 16] = std::array::from_fn(|_| integer(rng));
        let mut free: Vec<usize> = (0..count).filter(|&r| r != gpr::RSP).collect();
        rng.shuffle(&mut free);
        let mut pointers = Vec::new();
        if needs.strings || rng.u8(..4) == 0 {
            for register in [gpr::RSI, gpr::RDI] {
                pointers.push(Pointer { register, bias: 0 });
            }
        }
        let mut wanted = rng.usize(2..5);
        while let Some(register) = free.pop() {
            if wanted == 0 {
                free.push(register);
                break;
            }
            let taken = pointers.iter().any(|p| p.register == register);
            if taken || needs.strings && register == gpr::RCX || needs.frame && register == gpr::RBP {
                continue;
            }
            let bias = match rng.u8(..10) {
                0 => i32::from(rng.i8(..)),
                1 => rng.i32(..),
                _ => 0,
            };
            pointers.push(Pointer { register, bias });
            wanted -= 1;
        }
        for p in &pointers {
            gpr[p.register] = address(rng, risk).wrapping_sub(p.bias as i64 as u64);
        }
        let small: Vec<usize> = free.iter().copied().take(2).collect();
        for &register in &small {
            gpr[register] = match rng.u8(..4) {
                0 => rng.u64(..48),
                1 => (-rng.i64(0..8) * 8) as u64,
                _ => rng.u64(..4) * 16,
            };
        }
        gpr[gpr::RSP] =
            STACK + STACK_LEN / 2 + rng.u64(..64) * 8 + if rng.u8(..16) == 0 { rng.u64(..8) } else { 0 };
        if needs.strings && rng.u8(..10) < 9 {
            gpr[gpr::RCX] = rng.u64(..80);
        }
        if needs.division && rng.u8(..10) < 7 {
            let negative = rng.u8(..4) == 0;
            gpr[gpr::RDX] = if negative { u64::MAX } else { rng.u64(..4) };
            if rng.bool() {
                gpr[gpr::RAX] = rng.u64(..) >> 8 & !0xff00;
            }
        }
        if needs.frame && rng.u8(..4) != 0 {
            gpr[gpr::RBP] = STACK + STACK_LEN / 2 + rng.u64(..64) * 8;
        }
        if mode == CodeMode::Bits32 {
            gpr.iter_mut().for_each(|r| *r &= 0xffff_ffff);
            gpr[8..].fill(0);
        }
        let direction = if rng.u8(..10) == 0 { rflags::DF } else { 0 };
        let rare = match (risk, rng.u8(..64)) {
            (Risk::Usual, 0) => rflags::AC,
            (Risk::Usual, 1) => rflags::TF,
            _ => 0,
        };
        let rflags = rflags::ONE | rflags::IF | rng.u64(..) & rflags::ARITH | direction | rare;
        Self { mode, gpr, rflags, fpu: fpu(rng, risk), pointers, small }
    }
}

fn float64(rng: &mut Rng) -> u64 {
    match rng.u8(..10) {
        0 => 0,
        1 => f64::INFINITY.to_bits() | (rng.u64(..) & 1 << 63),
        2 => f64::NAN.to_bits() | rng.u64(..) >> 13,
        3 => rng.u64(..) >> 14,                         // denormal
        4 => 0x7ff0_0000_0000_0001 | rng.u64(..0x1000), // signalling
        5 => f64::from(rng.i32(-1000..1000)).to_bits(),
        6 => rng.u64(..),
        _ => (rng.f64() * 2000.0 - 1000.0).to_bits(),
    }
}

fn float32(rng: &mut Rng) -> u32 {
    match rng.u8(..10) {
        0 => 0,
        1 => f32::INFINITY.to_bits() | (rng.u32(..) & 1 << 31),
        2 => 0x7f80_0001 | rng.u32(..) >> 9,
        3 => rng.u32(..) >> 10,
        4 => (rng.i16(..) as f32).to_bits(),
        5 => rng.u32(..),
        _ => (rng.f32() * 200.0 - 100.0).to_bits(),
    }
}

/// A vector register: 32 bytes of one kind of element.
fn vector(rng: &mut Rng) -> [u8; 32] {
    let mut bytes = [0; 32];
    let kind = rng.u8(..6);
    for slot in bytes.chunks_exact_mut(8) {
        let value = match kind {
            0 => float64(rng),
            1 => u64::from(float32(rng)) | u64::from(float32(rng)) << 32,
            2 => rng.u64(..256),
            3 => (u64::from(rng.u8(..16)) << 2) | u64::from(rng.u8(..16)) << 34,
            4 => integer(rng),
            _ => rng.u64(..),
        };
        slot.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

/// An 80-bit register: significand, then sign and exponent.
fn extended(rng: &mut Rng) -> [u8; 10] {
    let (significand, top): (u64, u16) = match rng.u8(..12) {
        0 => (0, 0),
        1 => (1 << 63, 0x7fff),
        2 => (rng.u64(..) | 3 << 62, 0x7fff),
        3 => (rng.u64(1..) >> 1, 0),
        4 => (rng.u64(..), rng.u16(..) & 0x7fff), // perhaps not a valid encoding
        5 => (rng.u64(..) | 1 << 63, 16383 + rng.u16(..64)),
        6 => (u64::from(rng.u16(1..)) << 48 | 1 << 63, 16383 + rng.u16(..16)),
        _ => (rng.u64(..) | 1 << 63, 16383 - 40 + rng.u16(..80)),
    };
    let top = top | if rng.bool() { 0x8000 } else { 0 };
    let mut bytes = [0; 10];
    bytes[..8].copy_from_slice(&significand.to_le_bytes());
    bytes[8..].copy_from_slice(&top.to_le_bytes());
    bytes
}

fn fpu(rng: &mut Rng, risk: Risk) -> XsaveArea {
    let mut area = XsaveArea::default();
    let unmasked = |rng: &mut Rng| risk == Risk::Usual && rng.u8(..12) == 0;
    let masks: u16 = if unmasked(rng) { rng.u16(..0x40) } else { 0x3f };
    let control: u16 = if rng.u8(..10) < 6 { 0x0340 } else { 0x40 | rng.u16(..16) << 8 };
    let top = rng.u16(..8);
    let flags = if masks == 0x3f && rng.u8(..4) == 0 { rng.u16(..0x40) } else { 0 };
    let status: u16 = top << 11 | rng.u16(..8) << 8 | (rng.u16(..2) << 14) | flags;
    let tags: u8 = if rng.u8(..10) < 7 { 0xff } else { rng.u8(..) };
    area.0[0..2].copy_from_slice(&(control | masks).to_le_bytes());
    area.0[2..4].copy_from_slice(&status.to_le_bytes());
    area.0[4] = tags;
    let sse_masks: u32 = if unmasked(rng) { rng.u32(..0x40) << 7 } else { 0x1f80 };
    let sse_rest: u32 = if rng.u8(..10) < 6 { 0 } else { rng.u32(..) & 0xe07f };
    area.0[24..28].copy_from_slice(&(sse_masks | sse_rest).to_le_bytes());
    for i in 0..8 {
        area.0[32 + i * 16..][..10].copy_from_slice(&extended(rng));
    }
    for i in 0..16 {
        let bytes = vector(rng);
        area.0[160 + i * 16..][..16].copy_from_slice(&bytes[..16]);
        area.0[576 + i * 16..][..16].copy_from_slice(&bytes[16..]);
    }
    area.0[512] = 7;
    area
}

//! Copies and string functions of the C library, which uses the CPU's widest registers for them.

use std::ffi::CStr;
use std::hint::black_box;

use crate::{Outcome, Stop, Task, expect};

const MIB: usize = 1 << 20;
const SMALLEST_PIECE: usize = 16;
const LARGEST_PIECE: usize = 64 << 10;
const LINE: usize = 64;

pub fn copy(task: &Task) -> Outcome {
    let mut random = fastrand::Rng::with_seed(4);
    let from: Vec<u8> = (0..MIB).map(|_| random.u8(..)).collect();
    let mut to = vec![0; MIB];
    for round in 0..task.count {
        let (mut at, mut piece) = (0, SMALLEST_PIECE);
        while at < MIB {
            let len = piece.min(MIB - at);
            black_box(&mut to[at..at + len]).copy_from_slice(black_box(&from[at..at + len]));
            at += len;
            piece = if piece >= LARGEST_PIECE { SMALLEST_PIECE } else { piece * 2 };
        }
        if round == 0 || round == task.count - 1 {
            expect("the copy's equality", to == from, true)?;
        }
        to[round as usize % MIB] ^= 1;
    }
    Ok(())
}

pub fn strings(task: &Task) -> Outcome {
    // Lines of 63 characters and a 0, each with its number at the end.
    let mut text = Vec::with_capacity(MIB);
    for number in 0..MIB / LINE {
        text.extend_from_slice(format!("{:x<55}{number:08}\0", "").as_bytes());
    }
    let text = black_box(&text);
    for _ in 0..task.count {
        let mut before = &[b'x', 0][..];
        for (number, line) in text.chunks_exact(LINE).enumerate() {
            let length = CStr::from_bytes_until_nul(line).map_err(|e| Stop::Failed(e.to_string()))?;
            expect("the length of a line", length.count_bytes(), LINE - 1)?;
            let digit = b'0' + (number % 10) as u8;
            // SAFETY: both strings and the searched bytes end inside the slices, which outlive the calls.
            let (order, last, found) = unsafe {
                (
                    libc::strcmp(line.as_ptr().cast(), before.as_ptr().cast()),
                    libc::memrchr(line.as_ptr().cast(), digit.into(), LINE),
                    libc::strstr(line.as_ptr().cast(), c"x0".as_ptr()),
                )
            };
            // Each line is greater than the one before; the first is longer than what it is compared with.
            expect("the order of two lines", order > 0, true)?;
            expect("the place of the last digit", last.addr(), line.as_ptr().addr() + LINE - 2)?;
            expect("the place of the number", found.addr(), line.as_ptr().addr() + 54)?;
            before = line;
        }
        // SAFETY: as above; there is no such byte, so all are looked at.
        let absent = unsafe { libc::memchr(text.as_ptr().cast(), i32::from(b'y'), text.len()) };
        expect("the absence of a byte", absent.is_null(), true)?;
    }
    Ok(())
}

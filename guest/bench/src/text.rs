//! Numbers as text, and a language for it.

use std::hint::black_box;

use crate::processes::program;
use crate::{Outcome, Stop, Task, expect};

pub fn printf(task: &Task) -> Outcome {
    let mut random = fastrand::Rng::with_seed(6);
    for _ in 0..task.count {
        for _ in 0..1000 {
            let (number, real) = (random.i32(..), random.f64() * 1e6);
            let mut text = [0u8; 96];
            // SAFETY: the format fits the arguments, and no more than the length of `text` is written, the 0
            // included.
            let len = unsafe {
                libc::snprintf(
                    text.as_mut_ptr().cast(),
                    text.len(),
                    c"%.17g %s %d %08x".as_ptr(),
                    black_box(real),
                    c"and".as_ptr(),
                    number,
                    number,
                )
            };
            let mut end = std::ptr::null_mut();
            // SAFETY: the text ends with a 0.
            let back = unsafe { libc::strtod(text.as_ptr().cast(), &mut end) };
            expect("the number read", back.to_bits(), real.to_bits())?;
            let rest = usize::try_from(len)
                .ok()
                .and_then(|len| text.get(end.addr() - text.as_ptr().addr()..len))
                .ok_or_else(|| Stop::Failed(format!("snprintf gave {len}")))?;
            // Compared without formatting again, which would be most of the time.
            expect("the text between the numbers", rest.get(..5), Some(&b" and "[..]))?;
            let hexadecimal = rest.last_chunk::<8>().and_then(|digits| str::from_utf8(digits).ok());
            let hexadecimal = hexadecimal.and_then(|digits| u32::from_str_radix(digits, 16).ok());
            expect("the hexadecimal number", hexadecimal, Some(number as u32))?;
        }
    }
    Ok(())
}

pub fn awk(task: &Task) -> Outcome {
    let loops = u64::from(task.count) * 1000;
    let script = format!("BEGIN {{ for (i = 0; i < {loops}; i++) x += i * 0.5; printf \"%.1f\", x }}");
    // 0.5 times 0 + 1 + … + (loops - 1)
    let twice = loops * (loops - 1) / 2;
    let right = format!("{}.{}", twice / 2, if twice % 2 == 0 { 0 } else { 5 });
    expect("the sum", program(task.busybox, &["awk", &script])?, right)
}

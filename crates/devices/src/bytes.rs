//! Registers as the bytes of an access. An access may have any length and begin anywhere in a register.

/// The first bytes of an access as a little-endian number; bytes past the eighth are dropped.
pub(crate) fn value(data: &[u8]) -> u64 {
    data.iter().take(8).enumerate().fold(0, |v, (i, &b)| v | u64::from(b) << (8 * i))
}

/// Fills an access that begins `offset` bytes into a register of `size` (up to 8) bytes that holds `value`. Bytes
/// past the register read as zero.
pub(crate) fn fill(data: &mut [u8], value: u64, offset: usize, size: usize) {
    let bytes = value.to_le_bytes();
    for (i, byte) in data.iter_mut().enumerate() {
        let at = offset.saturating_add(i);
        *byte = if at < size.min(8) { bytes[at] } else { 0 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_inside_across_and_past_a_register() {
        let mut data = [0; 4];
        fill(&mut data, 0x4433_2211, 2, 4);
        assert_eq!(data, [0x33, 0x44, 0, 0]);
        assert_eq!(value(&[1, 2, 3, 4, 5, 6, 7, 8, 9]), 0x0807_0605_0403_0201);
    }
}

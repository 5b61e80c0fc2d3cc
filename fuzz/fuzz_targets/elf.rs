//! ELF files, 32-bit and 64-bit, with and without a PVH note.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let class = data.first().map_or(1, |b| 1 + (b & 1));
    berth_fuzz::load(data, &[(0, &[0x7f, b'E', b'L', b'F', class, 1, 1])]);
});

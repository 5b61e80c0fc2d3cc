//! Multiboot 1 kernels: ELF files and files that say where to load them.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let word = |at: usize| data.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes);
    let (choice, flags) = (word(0), word(4) & 0x1_0007);
    let magic = 0x1bad_b002_u32;
    let checksum = 0_u32.wrapping_sub(magic).wrapping_sub(flags);
    let header = [magic, flags, checksum].map(u32::to_le_bytes).concat();
    // Behind the program headers of a small ELF file.
    let header = (0x100, header.as_slice());
    match choice & 3 {
        0 => berth_fuzz::load(data, &[header]),
        class @ (1 | 2) => {
            berth_fuzz::load(data, &[(0, &[0x7f, b'E', b'L', b'F', class as u8, 1, 1]), header])
        }
        _ => berth_fuzz::load(data, &[(0, header.1)]),
    }
});

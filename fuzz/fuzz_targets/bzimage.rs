//! Linux's bzImage.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    berth_fuzz::load(
        data,
        &[(0x1fe, &[0x55, 0xaa]), (0x201, &[0x6a]), (0x202, b"HdrS"), (0x206, &[0x0f, 0x02])],
    );
});

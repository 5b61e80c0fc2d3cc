//! Virtio devices: registers, configuration space, queues and requests.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    berth_fuzz::virtio::drive(data);
});

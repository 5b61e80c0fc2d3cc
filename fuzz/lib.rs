//! What the fuzz targets share: here the loaders, in [`virtio`] the devices.
//!
//! Run one with `cargo +nightly fuzz run bzimage` (or `elf`, `multiboot`, `virtio`) in the repository's root. Each target
//! puts the magic numbers of its format into the input, so that the fuzzer need not find them, and loads the
//! result. The input is the kernel; its last bytes are the initrd. A finding is a panic, a hang, or memory use
//! without bound: every other answer is right.

pub mod virtio;

use std::io::Cursor;
use std::sync::LazyLock;

use berth_boot::{Images, Platform, Source, load_from};
use berth_memory::GuestMemory;

/// RAM of the VM: small, so that what does not fit is tried often.
const MEMORY_SIZE: u64 = 8 << 20;

/// One memory for all runs: loading again into used memory is what a reset does.
static MEMORY: LazyLock<GuestMemory> =
    LazyLock::new(|| GuestMemory::new(MEMORY_SIZE).expect("8 MiB can be had"));

/// Loads `data` after `patches` (offset and bytes) were put into it.
pub fn load(data: &[u8], patches: &[(usize, &[u8])]) {
    let split = data.len() - data.len() / 8;
    let (kernel, initrd) = data.split_at(split);
    let mut kernel = kernel.to_vec();
    for (offset, bytes) in patches {
        if let Some(place) = kernel.get_mut(*offset..offset + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }
    let mut kernel = Cursor::new(kernel);
    let mut initrd = Cursor::new(initrd);
    let initrd: (&mut dyn Source, &str) = (&mut initrd, "initrd");
    let images = Images { kernel: &mut kernel, kernel_name: "kernel", initrd: Some(initrd) };
    if let Ok(booted) = load_from(&MEMORY, images, "console=ttyS0", &Platform { vcpus: 1 }) {
        // Vcpu 0 must start inside RAM.
        let mut code = [0];
        let entry = berth_memory::GuestPhysAddr(booted.state.rip);
        MEMORY.read(entry, &mut code).expect("the entry is in RAM");
    }
}

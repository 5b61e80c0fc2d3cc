//! Guest memory as devices see it.

use std::sync::{Arc, OnceLock};

use berth_engine::Engine;
use berth_memory::{GuestMemory, GuestPhysAddr, Hold, MemoryError};
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::Buffer;

/// Guest memory, with the engine that must know when a device has written to it. Cheap to clone.
#[derive(Clone)]
pub struct Dma {
    memory: GuestMemory,
    engine: Arc<OnceLock<Arc<dyn Engine>>>,
}

impl Dma {
    /// Access to `memory`. Until [`Self::connect`] nobody is told of writes.
    pub fn new(memory: GuestMemory) -> Self {
        Self { memory, engine: Arc::default() }
    }

    /// Tells `engine` of all later writes through this and its clones. Only the first call counts.
    pub fn connect(&self, engine: Arc<dyn Engine>) {
        let _ = self.engine.set(engine);
    }

    /// The engine, once it is connected.
    pub(super) fn engine(&self) -> Option<&Arc<dyn Engine>> {
        self.engine.get()
    }

    /// The memory itself. Whoever writes to it by other means than [`Self::write`] calls [`Self::written`].
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Keeps buffers in memory while a system call works on [`Self::iovecs`] or [`Self::slices`] of them: the cold store
    /// takes none of them, and what it has comes back first.
    pub fn hold(&self, buffers: &[Buffer]) -> Hold {
        self.memory.hold(buffers.iter().map(|b| (b.start, b.len.into())))
    }

    /// Fills `data` from `start`.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`] when not all of it is RAM.
    pub fn read(&self, start: GuestPhysAddr, data: &mut [u8]) -> Result<(), MemoryError> {
        self.memory.read(start, data)
    }

    /// Copies `data` to `start`.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`] when not all of it is RAM.
    pub fn write(&self, start: GuestPhysAddr, data: &[u8]) -> Result<(), MemoryError> {
        let result = self.memory.write(start, data);
        // A part may have been written.
        self.written(start, data.len() as u64);
        result
    }

    /// Says that a device has written to memory.
    pub fn written(&self, start: GuestPhysAddr, len: u64) {
        if let Some(engine) = self.engine.get() {
            engine.memory_written(start, len);
        }
    }

    /// Gives pages back to the host; they read as zero then.
    ///
    /// # Errors
    /// As [`GuestMemory::discard`].
    pub fn discard(&self, start: GuestPhysAddr, len: u64) -> Result<(), MemoryError> {
        self.memory.discard(start, len)?;
        self.written(start, len);
        Ok(())
    }

    /// Whether a buffer is RAM of one region.
    pub fn contains(&self, buffer: &Buffer) -> bool {
        self.memory.host_address(buffer.start, buffer.len.into()).is_some()
    }

    /// Buffers of a chain as slices. Those that are not RAM, of which a [`super::Chain`] has none, are left out.
    pub fn slices<'a>(&'a self, buffers: &[Buffer]) -> Vec<VolatileSlice<'a>> {
        let slice = |b: &Buffer| self.memory.map().get_slice(GuestAddress(b.start.0), b.len as usize).ok();
        buffers.iter().filter_map(slice).collect()
    }

    /// Buffers of a chain as the host's system calls take them, with the same omission as [`Self::slices`]. Guest
    /// memory stays mapped as long as this `Dma` or a clone lives.
    pub fn iovecs(&self, buffers: &[Buffer]) -> Vec<libc::iovec> {
        let iovec = |b: &Buffer| {
            let host = self.memory.host_address(b.start, b.len.into())?;
            Some(libc::iovec { iov_base: host.0 as *mut libc::c_void, iov_len: b.len as usize })
        };
        buffers.iter().filter_map(iovec).collect()
    }
}

//! A chain of descriptors, checked (virtio 1.2, 2.7.5 and 2.7.13).

use std::ops::Deref;

use berth_memory::GuestPhysAddr;
use virtio_bindings::bindings::virtio_ring::VRING_DESC_F_NEXT;
use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, GuestMemory};

use super::Dma;

/// A piece of guest memory that a descriptor names: inside RAM, and not empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// First guest physical address.
    pub start: GuestPhysAddr,
    /// Length in bytes.
    pub len: u32,
}

/// The buffers of one direction, in order. Taking bytes from either end shortens it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Buffers(Vec<Buffer>);

impl Buffers {
    /// Bytes that are left.
    pub fn len(&self) -> u64 {
        self.0.iter().map(|b| u64::from(b.len)).sum()
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The pieces.
    pub fn as_slice(&self) -> &[Buffer] {
        &self.0
    }

    /// Takes the first `len` bytes, or what there is.
    pub fn take(&mut self, len: u64) -> Self {
        let mut left = len;
        let mut taken = Vec::new();
        let mut whole = 0;
        for buffer in &mut self.0 {
            if u64::from(buffer.len) <= left {
                left -= u64::from(buffer.len);
                taken.push(*buffer);
                whole += 1;
                continue;
            }
            if left > 0 {
                // Less than a buffer's length: 32 bits.
                taken.push(Buffer { start: buffer.start, len: left as u32 });
                *buffer = Buffer { start: buffer.start + left, len: buffer.len - left as u32 };
            }
            break;
        }
        self.0.drain(..whole);
        Self(taken)
    }

    /// Takes the last `len` bytes, or what there is.
    pub fn take_last(&mut self, len: u64) -> Self {
        let first = self.take(self.len().saturating_sub(len));
        std::mem::replace(self, first)
    }

    /// Fills `data` from the first bytes, and takes those; returns how many there were.
    pub fn read(&mut self, dma: &Dma, data: &mut [u8]) -> usize {
        let mut done = 0;
        for buffer in self.take(data.len() as u64).as_slice() {
            let part = &mut data[done..done + buffer.len as usize];
            // Chains lie in RAM, which does not go away.
            if dma.read(buffer.start, part).is_err() {
                break;
            }
            done += part.len();
        }
        done
    }

    /// Copies `data` to the first bytes, and takes those; returns how many there was room for.
    pub fn write(&mut self, dma: &Dma, data: &[u8]) -> usize {
        let mut done = 0;
        for buffer in self.take(data.len() as u64).as_slice() {
            let part = &data[done..done + buffer.len as usize];
            if dma.write(buffer.start, part).is_err() {
                break;
            }
            done += part.len();
        }
        done
    }
}

impl FromIterator<Buffer> for Buffers {
    fn from_iter<I: IntoIterator<Item = Buffer>>(buffers: I) -> Self {
        Self(buffers.into_iter().filter(|b| b.len > 0).collect())
    }
}

/// A request of the driver: first what the device reads, then what it writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Index of its first descriptor, which names it.
    pub head: u16,
    /// What the device reads.
    pub readable: Buffers,
    /// What the device writes.
    pub writable: Buffers,
}

/// Why a chain is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// A table, a descriptor or a link that leads nowhere, or in a circle.
    #[error("a descriptor chain that does not end")]
    Broken,
    /// A buffer outside of RAM.
    #[error("a buffer of {len} bytes at {start}, where there is no RAM")]
    NotRam {
        /// First address.
        start: GuestPhysAddr,
        /// Length in bytes.
        len: u32,
    },
    /// The order of virtio 1.2, 2.7.4.2.
    #[error("a buffer to read behind one to write")]
    Order,
    /// More descriptors than the queue has.
    #[error("a descriptor chain longer than the queue")]
    Long,
}

impl Chain {
    /// Reads a chain and checks all of it.
    pub(super) fn read<M>(
        mut chain: DescriptorChain<M>,
        queue_size: u16,
        dma: &Dma,
    ) -> Result<Self, ChainError>
    where
        M: Deref,
        M::Target: GuestMemory,
    {
        let head = chain.head_index();
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        let mut last: Option<Descriptor> = None;
        let mut count = 0;
        // The iterator ends silently at whatever is wrong: then the last descriptor promises another one.
        for descriptor in chain.by_ref() {
            last = Some(descriptor);
            count += 1;
            if count > queue_size {
                return Err(ChainError::Long);
            }
            let buffer =
                Buffer { start: GuestPhysAddr(descriptor.addr().raw_value()), len: descriptor.len() };
            if buffer.len == 0 {
                continue;
            }
            if !dma.contains(&buffer) {
                return Err(ChainError::NotRam { start: buffer.start, len: buffer.len });
            }
            if descriptor.is_write_only() {
                writable.push(buffer);
            } else if writable.is_empty() {
                readable.push(buffer);
            } else {
                return Err(ChainError::Order);
            }
        }
        match last {
            Some(descriptor) if u32::from(descriptor.flags()) & VRING_DESC_F_NEXT == 0 => {
                Ok(Self { head, readable: Buffers(readable), writable: Buffers(writable) })
            }
            _ => Err(ChainError::Broken),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_memory::GuestMemory;

    fn buffers(lens: &[u32]) -> Buffers {
        let mut start = GuestPhysAddr(0x1000);
        lens.iter()
            .map(|&len| {
                let buffer = Buffer { start, len };
                start = start + 0x100;
                buffer
            })
            .collect()
    }

    #[test]
    fn taking_from_both_ends() {
        let mut b = buffers(&[16, 0, 4, 8]);
        assert_eq!(b.len(), 28);
        assert_eq!(b.take_last(9).len(), 9);
        assert_eq!(b.as_slice().last(), Some(&Buffer { start: GuestPhysAddr(0x1200), len: 3 }));
        assert_eq!(b.take(5).as_slice(), [Buffer { start: GuestPhysAddr(0x1000), len: 5 }]);
        assert_eq!(b.as_slice()[0], Buffer { start: GuestPhysAddr(0x1005), len: 11 });
        assert_eq!(b.take(100).len(), 14);
        assert!(b.is_empty() && b.take_last(1).is_empty());
    }

    #[test]
    fn data_goes_through_in_order() {
        let dma = Dma::new(GuestMemory::new(1 << 20).unwrap());
        let whole = buffers(&[3, 5]);
        assert_eq!(whole.clone().write(&dma, b"abcdefghij"), 8);
        let (mut back, mut rest) = ([0; 4], [0; 10]);
        let mut b = whole;
        assert_eq!((b.read(&dma, &mut back), &back), (4, b"abcd"));
        assert_eq!(b.read(&dma, &mut rest), 4);
        assert_eq!(&rest[..4], b"efgh");
    }
}

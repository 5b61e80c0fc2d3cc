//! Vectors whose messages the engine sends by itself when an eventfd is written to.
//!
//! The vCPU that programs a vector tells the engine; device threads then only write to the eventfd, and a kernel can do
//! it in their place.

use berth_engine::MessageEvent;

use crate::irq::MsiSink;

/// One vector.
#[derive(Default)]
struct Vector {
    event: Option<Box<dyn MessageEvent>>,
    /// Address and data that the engine has, if it took them.
    message: Option<(u64, u32)>,
    /// What it was offered last.
    offered: Option<(u64, u32)>,
}

/// The vectors of one function.
pub struct Vectors(Vec<Vector>);

impl Vectors {
    pub fn new(count: usize) -> Self {
        Self((0..count).map(|_| Vector::default()).collect())
    }

    /// Vector `index` sends this message from now on, or none. The first message makes the eventfd.
    pub fn set(&mut self, index: usize, message: Option<(u64, u32)>, sink: &dyn MsiSink) {
        let Some(vector) = self.0.get_mut(index) else { return };
        // A vector that is masked keeps its route: it is likely to come back.
        let Some((address, data)) = message.filter(|_| vector.offered != message) else { return };
        vector.offered = message;
        if vector.event.is_none() {
            vector.event = sink.message_event();
        }
        let taken = vector.event.as_ref().is_some_and(|event| event.set(address, data));
        vector.message = message.filter(|_| taken);
    }

    /// Sends the message of vector `index`, if the engine has exactly this one.
    pub fn send(&self, index: usize, address: u64, data: u32) -> bool {
        let vector = self.0.get(index).filter(|vector| vector.message == Some((address, data)));
        let event = vector.and_then(|vector| vector.event.as_ref());
        event.is_some_and(|event| event.event().write(1).is_ok())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parking_lot::Mutex;
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;

    /// An engine that takes messages for 0xfee00000 only.
    struct Event(EventFd, Arc<Mutex<Vec<(u64, u32)>>>);

    impl MessageEvent for Event {
        fn set(&self, address: u64, data: u32) -> bool {
            self.1.lock().push((address, data));
            address == 0xfee0_0000
        }
        fn event(&self) -> &EventFd {
            &self.0
        }
    }

    #[derive(Default)]
    struct Sink(Arc<Mutex<Vec<(u64, u32)>>>);

    impl MsiSink for Sink {
        fn send_msi(&self, _address: u64, _data: u32) {}
        fn message_event(&self) -> Option<Box<dyn MessageEvent>> {
            Some(Box::new(Event(EventFd::new(EFD_NONBLOCK).unwrap(), self.0.clone())))
        }
    }

    #[test]
    fn only_what_the_engine_took_goes_by_the_eventfd() {
        let sink = Sink::default();
        let mut vectors = Vectors::new(2);
        assert!(!vectors.send(0, 0xfee0_0000, 0x41));
        vectors.set(0, Some((0xfee0_0000, 0x41)), &sink);
        vectors.set(0, Some((0xfee0_0000, 0x41)), &sink);
        vectors.set(0, None, &sink);
        assert!(vectors.send(0, 0xfee0_0000, 0x41));
        assert!(!vectors.send(0, 0xfee0_0000, 0x42) && !vectors.send(1, 0xfee0_0000, 0x41));
        vectors.set(0, Some((0, 0x41)), &sink);
        assert!(!vectors.send(0, 0, 0x41));
        vectors.set(7, Some((0, 0)), &sink);
        assert_eq!(*sink.0.lock(), [(0xfee0_0000, 0x41), (0, 0x41)]);
    }

    #[test]
    fn a_sink_without_eventfds_is_no_error() {
        struct Plain;
        impl MsiSink for Plain {
            fn send_msi(&self, _address: u64, _data: u32) {}
        }
        let mut vectors = Vectors::new(1);
        vectors.set(0, Some((0xfee0_0000, 0x41)), &Plain);
        assert!(!vectors.send(0, 0xfee0_0000, 0x41));
    }
}

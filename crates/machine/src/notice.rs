//! What happens to a machine, for whoever wants to know: a bounded record that can be read from any place on.
//!
//! Nobody waits for a reader: who reads too late finds that events are missing.

use std::collections::VecDeque;
use std::fmt;
use std::time::SystemTime;

use parking_lot::Mutex;

use crate::status::MachineState;

/// How many events are kept.
const KEPT: usize = 1024;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The machine is in another state.
    State(MachineState),
    /// It was reset.
    Reset {
        /// By its guest, and not by its owner.
        by_guest: bool,
    },
    /// The guest's kernel has panicked.
    GuestPanic {
        /// It writes a dump and starts again.
        crash_loaded: bool,
    },
    /// The balloon's size or target has changed.
    Balloon {
        /// What the guest was asked to give back, in bytes.
        target: u64,
        /// What it has given back, in bytes.
        actual: u64,
    },
    /// A device could not do what its driver asked for.
    IoError {
        /// Its id.
        device: String,
        /// For people.
        message: String,
    },
}

/// A [`Notice`] in the order of all.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// Counts from 1.
    pub number: u64,
    /// When.
    pub at: SystemTime,
    /// What.
    pub notice: Notice,
}

type Listener = Box<dyn Fn() + Send + Sync>;

/// The last events of a machine.
#[derive(Default)]
pub struct Notices(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    last: u64,
    kept: VecDeque<Recorded>,
    listeners: Vec<Listener>,
}

impl Notices {
    /// Records what happened now, and tells the listeners.
    pub fn add(&self, notice: Notice) {
        let mut inner = self.0.lock();
        inner.last += 1;
        let recorded = Recorded { number: inner.last, at: SystemTime::now(), notice };
        if inner.kept.len() == KEPT {
            inner.kept.pop_front();
        }
        inner.kept.push_back(recorded);
        inner.listeners.iter().for_each(|listener| listener());
    }

    /// What is kept of the events after the one with the number `after`. The first number shows how many are missing.
    pub fn after(&self, after: u64) -> Vec<Recorded> {
        self.0.lock().kept.iter().filter(|r| r.number > after).cloned().collect()
    }

    /// Calls `listener` after each event from now on, until the machine is gone. It must return soon, and add no event.
    pub fn on_each(&self, listener: impl Fn() + Send + Sync + 'static) {
        self.0.lock().listeners.push(Box::new(listener));
    }
}

impl fmt::Debug for Notices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Notices").field("last", &self.0.lock().last).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn the_last_events_are_kept_in_order() {
        let (notices, told) = (Notices::default(), Arc::new(AtomicUsize::new(0)));
        let count = told.clone();
        notices.on_each(move || {
            count.fetch_add(1, Ordering::Relaxed);
        });
        for _ in 0..KEPT + 10 {
            notices.add(Notice::Reset { by_guest: true });
        }
        let all = notices.after(0);
        assert_eq!((all.len(), all[0].number), (KEPT, 11));
        assert_eq!(notices.after(KEPT as u64 + 9).len(), 1);
        assert!(notices.after(u64::MAX).is_empty());
        assert_eq!(told.load(Ordering::Relaxed), KEPT + 10);
    }
}

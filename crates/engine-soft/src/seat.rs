//! On which host CPU a vCPU's thread is, or was last: read from memory that the kernel writes whenever the thread goes on
//! (restartable sequences, rseq(2)). The C library registers it for each thread (glibc 2.35 and later); without it nothing
//! is known, and only the number of threads tells whether all can run.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;

/// Offset of `cpu_id` in struct rseq (include/uapi/linux/rseq.h).
const CPU_ID: isize = 4;
/// `cpu_id` of a thread that is not registered, and after a registration that failed.
const UNKNOWN: [u32; 2] = [u32::MAX, u32::MAX - 1];

/// Where the kernel writes the number of a thread's host CPU.
#[derive(Clone, Copy, Debug)]
struct Place(*const AtomicU32);

// SAFETY: the word is atomic; that it exists is `Seat`'s part.
unsafe impl Send for Place {}

/// The host CPU of a vCPU's thread.
#[derive(Debug, Default)]
pub(crate) struct Seat(Mutex<State>);

#[derive(Clone, Copy, Debug, Default)]
enum State {
    /// No thread runs the vCPU.
    #[default]
    Empty,
    /// One does; the place is that of this living thread.
    Taken(Option<Place>),
}

/// What is known of a vCPU whose thread is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seated {
    /// The host CPU on which it is, or was last.
    pub host_cpu: Option<u32>,
}

impl Seat {
    /// This thread runs the vCPU from now on, until it calls [`Self::leave`].
    pub(crate) fn take(&self) {
        *self.0.lock() = State::Taken(this_thread());
    }

    /// This thread runs the vCPU no more.
    pub(crate) fn leave(&self) {
        *self.0.lock() = State::Empty;
    }

    /// None while no thread runs the vCPU.
    pub(crate) fn look(&self) -> Option<Seated> {
        // The lock is held while the word is read: its thread cannot leave, and so not end, meanwhile.
        let state = self.0.lock();
        let State::Taken(place) = *state else { return None };
        // SAFETY: it is a word of the thread's own memory, and the thread lives, see above.
        let cpu = place.map(|place| unsafe { (*place.0).load(Ordering::Relaxed) });
        Some(Seated { host_cpu: cpu.filter(|cpu| !UNKNOWN.contains(cpu)) })
    }
}

/// The word of this thread, if the C library has registered one.
fn this_thread() -> Option<Place> {
    static OFFSET: OnceLock<Option<isize>> = OnceLock::new();
    let offset = (*OFFSET.get_or_init(offset))?;
    let thread: *const u8;
    // SAFETY: reads the thread pointer, which the ABI of x86-64 keeps at FS:0; nothing is written.
    unsafe {
        std::arch::asm!("mov {}, fs:[0]", out(reg) thread, options(nostack, readonly, preserves_flags));
    }
    Some(Place(thread.wrapping_offset(offset + CPU_ID).cast()))
}

/// Where struct rseq is from the thread pointer (glibc's manual, Restartable Sequences).
fn offset() -> Option<isize> {
    // SAFETY: the names are C strings; a symbol that is not there gives a null pointer.
    let (offset, size) = unsafe {
        (
            libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr()),
            libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_size".as_ptr()),
        )
    };
    if offset.is_null() || size.is_null() {
        return None;
    }
    // SAFETY: both are constants of the C library after its start: `const ptrdiff_t` and `const unsigned int`.
    let (offset, size) = unsafe { (*offset.cast::<isize>(), *size.cast::<u32>()) };
    // 0: the registration failed.
    (size > 0).then_some(offset)
}

/// Host CPUs that the process's threads may run on (sched_getaffinity(2)), as it was when this was first asked.
pub(crate) fn host_cpus() -> usize {
    static COUNT: OnceLock<usize> = OnceLock::new();
    *COUNT.get_or_init(|| {
        // SAFETY: all zeroes is the empty set.
        let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        // SAFETY: it fills the set, whose size it is told.
        let known = unsafe { libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) } == 0;
        // SAFETY: counts in a set that is whole.
        let count = usize::try_from(unsafe { libc::CPU_COUNT(&set) }).unwrap_or(0);
        // More CPUs than such a set has: as many as anybody wants.
        if known && count > 0 { count } else { usize::MAX }
    })
}

/// Whether one of the threads that want to run (their host CPUs) has none, as far as that can be told; `host_cpus` is how
/// many there are for them.
pub(crate) fn somebody_lacks_a_cpu(wanting: &[Seated], host_cpus: usize) -> bool {
    if wanting.len() > host_cpus {
        return true;
    }
    let mut seen = wanting.iter().filter_map(|seated| seated.host_cpu).collect::<Vec<_>>();
    seen.sort_unstable();
    seen.windows(2).any(|two| two[0] == two[1])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_lack_a_cpu_when_two_are_on_one_or_they_are_too_many() {
        let on = |cpus: &[u32]| cpus.iter().map(|&cpu| Seated { host_cpu: Some(cpu) }).collect::<Vec<_>>();
        assert!(!somebody_lacks_a_cpu(&on(&[0, 1]), 2));
        assert!(somebody_lacks_a_cpu(&on(&[1, 1]), 2));
        assert!(somebody_lacks_a_cpu(&on(&[4, 0, 1, 4]), 8));
        assert!(somebody_lacks_a_cpu(&on(&[0, 1, 2]), 2));
        let unknown = [Seated { host_cpu: None }; 2];
        assert!(!somebody_lacks_a_cpu(&unknown, 2) && somebody_lacks_a_cpu(&unknown, 1));
        assert!(!somebody_lacks_a_cpu(&[], 1));
    }

    #[test]
    fn a_seat_tells_where_its_thread_is() {
        let seat = Seat::default();
        assert_eq!(seat.look(), None);
        seat.take();
        let Some(Seated { host_cpu: Some(_) }) = seat.look() else {
            assert_eq!(offset(), None, "the C library has it");
            return;
        };
        // The thread may move between the two looks, but not each time.
        let agree = (0..100).any(|_| {
            // SAFETY: a call without arguments.
            let cpu = unsafe { libc::sched_getcpu() };
            seat.look() == Some(Seated { host_cpu: u32::try_from(cpu).ok() })
        });
        assert!(agree);
        seat.leave();
        assert_eq!(seat.look(), None);
    }
}

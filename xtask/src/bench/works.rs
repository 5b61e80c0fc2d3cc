//! What is measured, in groups, and what each group is meant to reach.

/// Work of one kind. A group's figure is the geometric mean over its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// Loops, sorting, tables.
    Integer,
    /// Scalar and vector arithmetic, x87, copies, ciphers.
    Vector,
    /// Calls, jumps through tables, formatting, interpreters.
    Calls,
    /// What the kernel does for programs.
    System,
    /// A compiler, a Python script.
    Programs,
    /// Code that is generated and rewritten.
    Generated,
    /// Two threads.
    Threads,
    /// Threads and processes with two vCPUs.
    Parallel,
    /// Two independent threads against one.
    Scaling,
    /// From the start of the VM to the first user program, and to the end.
    Boot,
    /// A guest that waits.
    Idle,
}

/// At least so many times as fast; none if there is no aim.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Target {
    /// As the host itself.
    pub native: Option<f64>,
    /// As QEMU's translator.
    pub tcg: Option<f64>,
}

impl Group {
    /// All, in the order of reports.
    pub const ALL: [Self; 11] = [
        Self::Integer,
        Self::Vector,
        Self::Calls,
        Self::System,
        Self::Programs,
        Self::Generated,
        Self::Threads,
        Self::Parallel,
        Self::Scaling,
        Self::Boot,
        Self::Idle,
    ];

    /// For people.
    pub fn title(self) -> &'static str {
        match self {
            Self::Integer => "integer compute",
            Self::Vector => "floating point, SIMD, crypto",
            Self::Calls => "calls, formatting, interpreters",
            Self::System => "system calls, faults, processes",
            Self::Programs => "real programs",
            Self::Generated => "generated code",
            Self::Threads => "two threads, 1 vCPU",
            Self::Parallel => "threads and processes, 2 vCPUs",
            Self::Scaling => "two independent threads",
            Self::Boot => "boot",
            Self::Idle => "idle guest of 256 MiB",
        }
    }

    /// What its geometric mean is to reach.
    pub fn target(self) -> Target {
        let (native, tcg) = match self {
            Self::Integer => (Some(0.55), Some(3.0)),
            Self::Vector => (Some(0.70), Some(12.0)),
            Self::Calls => (Some(0.40), Some(3.5)),
            Self::Programs => (Some(0.40), Some(3.0)),
            Self::System => (Some(0.35), Some(2.5)),
            Self::Generated => (Some(0.10), Some(5.0)),
            // CPU time to the first user program: half of TCG's.
            Self::Boot => (None, Some(2.0)),
            Self::Threads | Self::Parallel | Self::Scaling | Self::Idle => (None, None),
        };
        Target { native, tcg }
    }

    /// vCPUs of the guests that do its work.
    pub fn cpus(self) -> u32 {
        if self == Self::Parallel { 2 } else { 1 }
    }
}

/// Two independent compute threads are to be so many times as fast as one.
pub const SCALING_TARGET: f64 = 1.9;
/// vCPUs of the guests in which that is measured.
pub const SCALING_CPUS: [u32; 2] = [2, 4];
/// Name for what is measured there, and the work that one thread and two threads do.
pub const SCALING: &str = "scaling";
pub const SCALING_WORK: [&str; 2] = ["compute-1", "compute-2"];
/// Name for everything that [`Group::Boot`] has.
pub const BOOT: &str = "boot";
/// Name for the boot of a distribution to its login.
pub const LOGIN: &str = "login";
/// Name for everything that [`Group::Idle`] has.
pub const IDLE: &str = "idle";

/// Work for `guest/bench`, which says what the counts are counts of (`--list`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// Its name there.
    pub name: &'static str,
    pub group: Group,
    /// How much of it Berth does, and what the reported times of all sides are for.
    pub count: u32,
    /// The host does so many times as much, where it would be done too soon to be measured well.
    pub native: u32,
    /// TCG does the so manieth part, where it would take more than a few seconds.
    pub tcg: u32,
}

const fn work(group: Group, name: &'static str, count: u32, native: u32, tcg: u32) -> Work {
    Work { name, group, count, native, tcg }
}

/// All work of programs.
pub const WORK: &[Work] = &[
    work(Group::Integer, "coremark", 6000, 1, 1),
    work(Group::Integer, "sieve", 80, 1, 1),
    work(Group::Integer, "sort", 100, 1, 1),
    work(Group::Integer, "hash-table", 16, 1, 1),
    work(Group::Integer, "pointer-chase", 12, 1, 1),
    work(Group::Vector, "n-body", 4000, 1, 5),
    work(Group::Vector, "matrix-scalar", 90, 1, 2),
    work(Group::Vector, "matrix-avx2", 1500, 1, 60),
    work(Group::Vector, "x87", 400, 1, 5),
    work(Group::Vector, "memcpy", 7500, 1, 10),
    work(Group::Vector, "strings", 150, 1, 1),
    work(Group::Vector, "sha256-plain", 60, 1, 1),
    work(Group::Vector, "sha256-ni", 400, 1, 1),
    work(Group::Vector, "aes-plain", 80, 1, 1),
    work(Group::Vector, "aes-ni", 4000, 1, 10),
    work(Group::Calls, "interpreter", 100, 1, 1),
    work(Group::Calls, "recursion", 500, 1, 1),
    work(Group::Calls, "virtual-calls", 50, 1, 1),
    work(Group::Calls, "printf", 200, 1, 1),
    work(Group::Calls, "awk", 1000, 1, 4),
    work(Group::Calls, "sqlite", 5, 1, 1),
    work(Group::Calls, "lua", 3, 1, 1),
    work(Group::Programs, "gcc", 1, 1, 1),
    work(Group::Programs, "python", 8, 1, 1),
    work(Group::System, "syscalls", 1000, 2, 1),
    work(Group::System, "dd", 300, 2, 1),
    work(Group::System, "signals", 50, 2, 1),
    work(Group::System, "page-faults", 60, 2, 1),
    work(Group::System, "write-faults", 30, 2, 1),
    work(Group::System, "mmap", 3, 4, 1),
    work(Group::System, "ping-pong", 20, 4, 1),
    work(Group::System, "switches", 40, 4, 1),
    work(Group::System, "fork-exec", 2, 4, 1),
    work(Group::Generated, "jit-generate", 50, 2, 4),
    work(Group::Generated, "jit-rewrite", 50, 40, 1),
    work(Group::Threads, "mmap-threads", 2, 2, 1),
    work(Group::Threads, "mutex", 300, 1, 1),
    work(Group::Threads, "atomics", 300, 1, 1),
    work(Group::Threads, "futex", 20, 2, 1),
    work(Group::Parallel, "mmap-threads", 2, 2, 1),
    work(Group::Parallel, "mutex", 300, 1, 1),
    work(Group::Parallel, "atomics", 300, 1, 1),
    work(Group::Parallel, "futex", 20, 2, 1),
    work(Group::Parallel, "ping-pong", 20, 4, 1),
    work(Group::Parallel, "switches", 40, 4, 1),
    work(Group::Parallel, "fork-exec", 2, 4, 1),
    work(Group::Scaling, SCALING_WORK[0], 100, 1, 1),
    work(Group::Scaling, SCALING_WORK[1], 100, 1, 1),
];

/// Work with programs that are in a Debian root file system.
const NEED_DEBIAN: [&str; 4] = ["sqlite", "lua", "gcc", "python"];

/// What is to be measured.
pub struct Selection(Option<Vec<String>>);

impl Selection {
    /// Only `names`, or everything if there are none.
    ///
    /// # Errors
    /// A text when there is nothing with such a name.
    pub fn new(names: &[String]) -> Result<Self, String> {
        let mut known: Vec<&str> =
            WORK.iter().filter(|w| w.group != Group::Scaling).map(|w| w.name).collect();
        known.extend([SCALING, BOOT, LOGIN, IDLE]);
        match names.iter().find(|name| !known.contains(&name.as_str())) {
            Some(name) => {
                let mut seen = Vec::new();
                known.retain(|name| {
                    !seen.contains(name) && {
                        seen.push(*name);
                        true
                    }
                });
                Err(format!("there is nothing named {name:?} to measure; there are {}", known.join(", ")))
            }
            None => Ok(Self((!names.is_empty()).then(|| names.to_vec()))),
        }
    }

    /// Whether what has this name is measured.
    pub fn has(&self, name: &str) -> bool {
        self.0.as_ref().is_none_or(|names| names.iter().any(|n| n == name))
    }

    /// Whether something needs a Debian.
    pub fn needs_debian(&self) -> bool {
        self.has(LOGIN) || NEED_DEBIAN.iter().any(|name| self.has(name))
    }

    /// The work for guests with so many vCPUs, that of [`Group::Scaling`] not included.
    pub fn work(&self, cpus: u32) -> Vec<Work> {
        let all = WORK.iter().filter(|w| w.group != Group::Scaling && w.group.cpus() == cpus);
        all.filter(|w| self.has(w.name)).copied().collect()
    }

    /// The work of [`Group::Scaling`].
    pub fn scaling(&self) -> Vec<Work> {
        WORK.iter().filter(|w| w.group == Group::Scaling && self.has(SCALING)).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selection_has_what_was_named() {
        let all = Selection::new(&[]).unwrap();
        assert_eq!(
            all.work(1).len() + all.work(2).len() + all.scaling().len(),
            WORK.len(),
            "all work is for one of the guests"
        );
        assert!(all.has(BOOT) && all.has(IDLE));
        let one = Selection::new(&["mutex".to_owned()]).unwrap();
        let names = |work: Vec<Work>| work.iter().map(|w| w.name).collect::<Vec<_>>();
        assert_eq!(names(one.work(1)), ["mutex"]);
        assert_eq!(names(one.work(2)), ["mutex"]);
        assert!(one.scaling().is_empty() && !one.has(BOOT));
    }

    #[test]
    fn an_unknown_name_is_an_error_that_lists_the_known_ones() {
        let error = Selection::new(&["sieves".to_owned()]).err().unwrap();
        assert!(error.contains("\"sieves\"") && error.contains("sieve,"), "{error}");
        assert_eq!(error.matches("mutex").count(), 1, "{error}");
    }

    #[test]
    fn no_work_is_twice_in_a_group() {
        for (i, a) in WORK.iter().enumerate() {
            assert!(WORK[i + 1..].iter().all(|b| (a.name, a.group) != (b.name, b.group)), "{}", a.name);
        }
    }
}

//! Names of translated blocks for profilers.
//!
//! `perf` looks for the names of code that is in no file in `/tmp/perf-PID.map`, a line `START SIZE NAME` each, in
//! hexadecimal (tools/perf/Documentation/jit-interface.txt of Linux). A block is named `guest-RIP`, with `u` or `k` for
//! who executes it. Lines are never taken back: after an eviction addresses are used again, and the last line counts.

use std::fs::OpenOptions;
use std::io::{self, LineWriter, Write};
use std::os::unix::fs::OpenOptionsExt;

use super::cache::Key;

/// The file of this process.
pub(crate) struct PerfMap(LineWriter<std::fs::File>);

impl PerfMap {
    /// Makes the file anew.
    pub(crate) fn create() -> io::Result<Self> {
        let path = format!("/tmp/perf-{}.map", std::process::id());
        // Of a process with the same number that is gone. It may be anything, as everybody may write to /tmp: it is
        // removed and never followed.
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
        Ok(Self(LineWriter::new(file)))
    }

    /// Names `len` bytes of host code at `start`.
    pub(crate) fn name(&mut self, start: u64, len: u32, name: &str) -> io::Result<()> {
        writeln!(self.0, "{start:x} {len:x} {name}")
    }

    /// Names the block for `key`.
    pub(crate) fn name_block(&mut self, start: u64, len: u32, key: &Key) -> io::Result<()> {
        let who = if key.mode.cpl() == 3 { 'u' } else { 'k' };
        self.name(start, len, &format!("guest-{:x}-{who}", key.rip))
    }
}

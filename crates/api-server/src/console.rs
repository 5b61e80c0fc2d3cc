//! The console of a VM: what its guest prints goes to all who read, and to a log.
//!
//! ```text
//!   guest ──► ConsoleWriter ──► mirror (standard output of `berth run`)
//!                           ├─► log file, bounded: console.log, console.log.1
//!                           └─► ring of the last bytes ──► readers, each at its own place
//! ```
//! The guest never waits for a reader: one that is too slow misses bytes and is told so. It does wait for the mirror,
//! as a program waits for its terminal.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tracing::warn;

/// Bytes that are kept for readers.
const RING: usize = 256 << 10;
/// Bytes that a new reader sees of what was printed before, at most.
const REPLAY: u64 = 64 << 10;
/// Size in bytes at which the log is begun anew; the one before is kept.
const LOG: u64 = 1 << 20;

/// What the guest prints, for several readers.
pub struct Console {
    inner: Mutex<Inner>,
    printed: Notify,
}

struct Inner {
    ring: VecDeque<u8>,
    /// Bytes printed since the start.
    total: u64,
    closed: bool,
    log: Option<Log>,
}

/// The file with what was printed last.
struct Log {
    path: PathBuf,
    file: File,
    len: u64,
}

/// A place in what is printed.
#[derive(Clone, Copy, Debug)]
pub struct Place(u64);

/// What a reader gets.
#[derive(Debug, PartialEq, Eq)]
pub enum Chunk {
    /// The next bytes.
    Bytes(Vec<u8>),
    /// This many bytes are lost.
    Lost(u64),
    /// Nothing more yet.
    Nothing,
    /// Nothing more will come.
    End,
}

impl Console {
    /// A console whose log is at `log`, if it has one.
    ///
    /// # Errors
    /// What the host says when it refuses the file.
    pub fn new(log: Option<PathBuf>) -> io::Result<Arc<Self>> {
        let open =
            |path: PathBuf| -> io::Result<Log> { Ok(Log { file: File::create(&path)?, path, len: 0 }) };
        let log = log.map(open).transpose()?;
        let inner = Inner { ring: VecDeque::new(), total: 0, closed: false, log };
        Ok(Arc::new(Self { inner: Mutex::new(inner), printed: Notify::new() }))
    }

    /// Nothing more will be printed: readers end.
    pub fn close(&self) {
        self.inner.lock().closed = true;
        self.printed.notify_waiters();
    }

    fn print(&self, data: &[u8]) {
        let mut inner = self.inner.lock();
        let kept = data.get(data.len().saturating_sub(RING)..).unwrap_or_default();
        let surplus = (inner.ring.len() + kept.len()).saturating_sub(RING);
        inner.ring.drain(..surplus);
        inner.ring.extend(kept);
        inner.total += data.len() as u64;
        if let Some(log) = &mut inner.log
            && let Err(e) = log.write(data)
        {
            warn!("{} is not written any more: {e}", log.path.display());
            inner.log = None;
        }
        drop(inner);
        self.printed.notify_waiters();
    }

    /// The place of a new reader.
    pub(crate) fn place(&self) -> Place {
        let inner = self.inner.lock();
        Place(inner.total - (inner.ring.len() as u64).min(REPLAY))
    }

    /// What is at `place`, at most `most` bytes, and moves it behind that.
    pub(crate) fn read(&self, place: &mut Place, most: usize) -> Chunk {
        let inner = self.inner.lock();
        let first = inner.total - inner.ring.len() as u64;
        if place.0 < first {
            let lost = first - place.0;
            place.0 = first;
            return Chunk::Lost(lost);
        }
        // At most the length of the ring.
        let skip = (place.0 - first) as usize;
        let bytes: Vec<u8> = inner.ring.iter().skip(skip).take(most).copied().collect();
        place.0 += bytes.len() as u64;
        match bytes.is_empty() {
            false => Chunk::Bytes(bytes),
            true if inner.closed => Chunk::End,
            true => Chunk::Nothing,
        }
    }

    /// Waits for the next bytes after `place`, or the end.
    pub(crate) async fn next(&self, place: &mut Place, most: usize) -> Chunk {
        loop {
            // Made before it is looked, so that nothing printed in between is missed.
            let printed = self.printed.notified();
            match self.read(place, most) {
                Chunk::Nothing => printed.await,
                chunk => return chunk,
            }
        }
    }
}

impl Log {
    fn write(&mut self, data: &[u8]) -> io::Result<()> {
        if self.len + data.len() as u64 > LOG && self.len > 0 {
            let mut older = self.path.clone().into_os_string();
            older.push(".1");
            fs::rename(&self.path, older)?;
            self.file = File::create(&self.path)?;
            self.len = 0;
        }
        self.len += data.len() as u64;
        self.file.write_all(data)
    }
}

/// Where the machine prints to.
pub struct ConsoleWriter {
    console: Arc<Console>,
    mirror: Option<Box<dyn Write + Send>>,
}

impl ConsoleWriter {
    /// Prints to `console` and to `mirror`, whose errors end its use and nothing else.
    pub fn new(console: Arc<Console>, mirror: Option<Box<dyn Write + Send>>) -> Self {
        Self { console, mirror }
    }
}

impl Write for ConsoleWriter {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.console.print(data);
        if let Some(mirror) = &mut self.mirror
            && let Err(e) = mirror.write_all(data)
        {
            warn!("the console's output does not go to standard output any more: {e}");
            self.mirror = None;
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.mirror.as_mut().map_or(Ok(()), |mirror| mirror.flush())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_reader_sees_what_was_printed_last() {
        let console = Console::new(None).unwrap();
        console.print(&vec![b'a'; 2 * REPLAY as usize]);
        console.print(b"end");
        let mut place = console.place();
        let Chunk::Bytes(bytes) = console.read(&mut place, usize::MAX) else { panic!("there is something") };
        assert_eq!(bytes.len() as u64, REPLAY);
        assert!(bytes.ends_with(b"aend"));
        assert_eq!(console.read(&mut place, 10), Chunk::Nothing);
        console.print(b"more");
        assert_eq!(console.read(&mut place, 3), Chunk::Bytes(b"mor".to_vec()));
        console.close();
        assert_eq!(console.read(&mut place, 3), Chunk::Bytes(b"e".to_vec()));
        assert_eq!(console.read(&mut place, 3), Chunk::End);
    }

    #[test]
    fn a_slow_reader_is_told_what_it_missed() {
        let console = Console::new(None).unwrap();
        let mut place = console.place();
        console.print(&vec![0; RING + 7]);
        assert_eq!(console.read(&mut place, 1), Chunk::Lost(7));
        assert_eq!(console.read(&mut place, 1), Chunk::Bytes(vec![0]));
    }

    #[test]
    fn the_log_is_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console.log");
        let console = Console::new(Some(path.clone())).unwrap();
        for i in 0..40_u8 {
            console.print(&vec![i; 100_000]);
        }
        let (new, old) = (fs::read(&path).unwrap(), fs::read(path.with_extension("log.1")).unwrap());
        assert!(new.len() as u64 <= LOG && old.len() as u64 <= LOG && old.len() > 900_000);
        assert_eq!((new.last(), old.last().unwrap() + 1), (Some(&39), new[0]));
    }
}

//! Where compressed contents lie: in segments that are filled one after the other.
//!
//! ```text
//!   full segments                          the one that is filled
//!   [ a | - | b | c ]   [ d | - | - | e ]   [ f | g |          ]        -: released
//! ```
//!
//! Nothing is lost to size classes, and a segment is never changed once it is written. Released records leave holes;
//! when these make up more than a quarter, the emptiest segments are written again, without them, and given back to
//! the host. An empty part of the last segment is not resident.
//!
//! A full segment may move to a file ([`Log::oldest`], [`Log::move_to_file`]). There holes cost less, and are allowed up
//! to half of the file.

use std::io;
use std::sync::Arc;

use super::file::Slot;
use super::map::AnonMap;

/// Size of a segment in bytes.
pub(super) const SEGMENT: usize = 256 << 10;
/// So many bytes of holes are always allowed.
const HOLES: u64 = SEGMENT as u64;

/// Where a record is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Place {
    pub segment: u32,
    pub offset: u32,
    pub len: u32,
}

/// Where a segment is.
enum Data {
    Memory(Arc<AnonMap>),
    File(Slot),
}

struct Segment {
    data: Data,
    /// Larger than those of segments that were begun before.
    age: u64,
    used: usize,
    live: usize,
    /// The owners of its records, in the order of writing. Some may have gone.
    owners: Vec<u32>,
}

/// The segments.
#[derive(Default)]
pub(super) struct Log {
    segments: Vec<Option<Segment>>,
    free: Vec<u32>,
    current: Option<u32>,
    begun: u64,
    memory: Tier,
    file: Tier,
}

/// What is in memory, or in the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tier {
    /// Bytes of all records.
    pub live: u64,
    /// Bytes of all records and of the holes between them.
    pub used: u64,
}

/// A segment that can move to the file.
pub(super) struct Movable {
    number: u32,
    data: Arc<AnonMap>,
    used: usize,
}

impl Movable {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.data.bytes()[..self.used]
    }
}

impl Log {
    /// What is in memory.
    pub(super) fn memory(&self) -> Tier {
        self.memory
    }

    /// What is in the file.
    pub(super) fn file(&self) -> Tier {
        self.file
    }

    fn tier(&mut self, number: u32) -> &mut Tier {
        match self.segment(number).map(|s| &s.data) {
            Some(Data::File(_)) => &mut self.file,
            _ => &mut self.memory,
        }
    }

    /// Writes a record of at most [`SEGMENT`] bytes for `owner`.
    pub(super) fn append(&mut self, data: &[u8], owner: u32) -> io::Result<Place> {
        let fits = |segment: &Segment| segment.used + data.len() <= SEGMENT;
        let current = self.current.filter(|&n| self.segment(n).is_some_and(fits));
        let number = match current {
            Some(number) => number,
            None => self.new_segment()?,
        };
        let Some(Some(segment)) = self.segments.get_mut(number as usize) else {
            return Err(io::Error::other("a segment that was just made is not there"));
        };
        let place = Place { segment: number, offset: segment.used as u32, len: data.len() as u32 };
        // Nobody else has the segment that is filled: only full ones are moved.
        let Data::Memory(map) = &mut segment.data else {
            return Err(io::Error::other("a full segment is filled"));
        };
        let map = Arc::get_mut(map).ok_or_else(|| io::Error::other("a segment that is moved is filled"))?;
        map.bytes_mut()[segment.used..segment.used + data.len()].copy_from_slice(data);
        segment.used += data.len();
        segment.live += data.len();
        segment.owners.push(owner);
        self.memory.live += data.len() as u64;
        self.memory.used += data.len() as u64;
        Ok(place)
    }

    /// The record at `place`, and whether it was read from the file, into `buffer`.
    pub(super) fn get<'a>(&'a self, place: Place, buffer: &'a mut Vec<u8>) -> io::Result<(&'a [u8], bool)> {
        let start = place.offset as usize;
        match self.segment(place.segment).map(|s| &s.data) {
            Some(Data::Memory(map)) => Ok((&map.bytes()[start..start + place.len as usize], false)),
            Some(Data::File(slot)) => {
                buffer.resize(place.len as usize, 0);
                slot.read(place.offset, buffer)?;
                Ok((buffer, true))
            }
            None => Err(io::Error::other("a segment is not there")),
        }
    }

    /// The full segment in memory that was begun first.
    pub(super) fn oldest(&self) -> Option<Movable> {
        let all = self.segments.iter().enumerate().filter_map(|(n, s)| Some((n as u32, s.as_ref()?)));
        let full = all.filter(|(n, _)| self.current != Some(*n)).filter_map(|(number, s)| match &s.data {
            Data::Memory(data) => Some((s.age, Movable { number, data: data.clone(), used: s.used })),
            Data::File(_) => None,
        });
        full.min_by_key(|(age, _)| *age).map(|(_, movable)| movable)
    }

    /// The segment that is filled counts as full from now on.
    pub(super) fn close(&mut self) {
        self.current = None;
    }

    /// The segment is in `slot` now, unless it has gone meanwhile: `false`.
    pub(super) fn move_to_file(&mut self, movable: &Movable, slot: Slot) -> bool {
        let Some(Some(segment)) = self.segments.get_mut(movable.number as usize) else { return false };
        if !matches!(&segment.data, Data::Memory(data) if Arc::ptr_eq(data, &movable.data)) {
            return false;
        }
        segment.data = Data::File(slot);
        let (live, used) = (segment.live as u64, segment.used as u64);
        self.memory = Tier { live: self.memory.live - live, used: self.memory.used - used };
        self.file = Tier { live: self.file.live + live, used: self.file.used + used };
        true
    }

    /// Has the host read what is in the file.
    pub(super) fn will_be_read(&self) {
        for segment in self.segments.iter().flatten() {
            if let Data::File(slot) = &segment.data {
                slot.will_be_read();
            }
        }
    }

    /// The record at `place` is not needed any more.
    pub(super) fn release(&mut self, place: Place) {
        let Some(Some(segment)) = self.segments.get_mut(place.segment as usize) else { return };
        segment.live -= place.len as usize;
        let (live, used) = (segment.live, segment.used as u64);
        let tier = self.tier(place.segment);
        tier.live -= u64::from(place.len);
        if live == 0 {
            tier.used -= used;
            if self.current == Some(place.segment) {
                self.current = None;
            }
            self.segments[place.segment as usize] = None;
            self.free.push(place.segment);
        }
    }

    /// The owners of records in the segment that is to be written again now, if there are too many holes. The caller
    /// appends and releases each record that is still there.
    pub(super) fn emptiest(&self) -> Option<(u32, Vec<u32>)> {
        let in_memory = self.memory.used - self.memory.live > HOLES + self.memory.live / 3;
        let in_file = self.file.used - self.file.live > HOLES + self.file.live;
        if !in_memory && !in_file {
            return None;
        }
        let full = self.segments.iter().enumerate().filter_map(|(n, s)| Some((n as u32, s.as_ref()?)));
        let (number, segment) = full
            .filter(|(n, s)| self.current != Some(*n) && matches!(s.data, Data::Memory(_)) == in_memory)
            .min_by_key(|(_, s)| s.live * 64 / s.used.max(1))?;
        Some((number, segment.owners.clone()))
    }

    fn segment(&self, number: u32) -> Option<&Segment> {
        self.segments.get(number as usize)?.as_ref()
    }

    fn new_segment(&mut self) -> io::Result<u32> {
        let data = Data::Memory(Arc::new(AnonMap::new(SEGMENT)?));
        self.begun += 1;
        let segment = Segment { data, age: self.begun, used: 0, live: 0, owners: Vec::new() };
        let number = match self.free.pop() {
            Some(number) => {
                self.segments[number as usize] = Some(segment);
                number
            }
            None => {
                self.segments.push(Some(segment));
                // Far fewer than 2^32: each has 256 KiB.
                (self.segments.len() - 1) as u32
            }
        };
        self.current = Some(number);
        Ok(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::file::StoreFile;

    #[test]
    fn records_come_back_and_empty_segments_go() {
        let mut log = Log::default();
        let places: Vec<Place> = (0..300u32).map(|n| log.append(&vec![n as u8; 2000], n).unwrap()).collect();
        assert_eq!(log.memory(), Tier { live: 600_000, used: 600_000 });
        assert_eq!(log.segments.len(), 3);
        let mut buffer = Vec::new();
        assert!(
            places.iter().zip(0..).all(|(p, n)| log.get(*p, &mut buffer).unwrap().0 == vec![n as u8; 2000])
        );
        let (first, rest) = places.split_at(131);
        first.iter().for_each(|p| log.release(*p));
        assert!(log.segments[0].is_none());
        assert_eq!(log.memory().used, rest.len() as u64 * 2000);
        assert!(log.emptiest().is_none());
    }

    #[test]
    fn segments_move_to_a_file_the_oldest_first() {
        let directory = tempfile::tempdir().unwrap();
        let file = Arc::new(StoreFile::create(directory.path()).unwrap());
        let mut log = Log::default();
        let places: Vec<Place> = (0..300u32).map(|n| log.append(&vec![n as u8; 2000], n).unwrap()).collect();
        // The third is being filled.
        for number in 0..2 {
            let movable = log.oldest().unwrap();
            assert_eq!(movable.number, number);
            assert!(log.move_to_file(&movable, file.write(movable.bytes()).unwrap()));
        }
        assert!(log.oldest().is_none());
        assert_eq!((log.memory().used, log.file().used), (38 * 2000, 262 * 2000));
        let mut buffer = Vec::new();
        for (place, n) in places.iter().zip(0..300u32) {
            assert_eq!(log.get(*place, &mut buffer).unwrap(), (&vec![n as u8; 2000][..], n < 262));
        }
        // One that has gone while it was written is not moved.
        log.close();
        let movable = log.oldest().unwrap();
        places.iter().for_each(|p| log.release(*p));
        assert!(!log.move_to_file(&movable, file.write(movable.bytes()).unwrap()));
        assert_eq!((log.memory(), log.file()), (Tier::default(), Tier::default()));
    }

    #[test]
    fn segments_with_holes_are_named_for_writing_again() {
        let mut log = Log::default();
        let places: Vec<Place> = (0..1024u32).map(|n| log.append(&[7; 2048], n).unwrap()).collect();
        for (n, place) in places.iter().enumerate() {
            if n % 2 == 0 || (128..256).contains(&n) && n != 129 {
                log.release(*place);
            }
        }
        let (number, owners) = log.emptiest().unwrap();
        assert_eq!(number, 1);
        assert!(owners.contains(&129));
    }
}

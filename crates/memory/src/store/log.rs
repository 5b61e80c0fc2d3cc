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

use std::io;

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

struct Segment {
    data: AnonMap,
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
    live: u64,
    used: u64,
}

impl Log {
    /// Bytes of all records.
    pub(super) fn live(&self) -> u64 {
        self.live
    }

    /// Bytes of all records and of the holes between them.
    pub(super) fn used(&self) -> u64 {
        self.used
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
        segment.data.bytes_mut()[segment.used..segment.used + data.len()].copy_from_slice(data);
        segment.used += data.len();
        segment.live += data.len();
        segment.owners.push(owner);
        self.live += data.len() as u64;
        self.used += data.len() as u64;
        Ok(place)
    }

    /// The record at `place`.
    pub(super) fn get(&self, place: Place) -> &[u8] {
        let start = place.offset as usize;
        self.segment(place.segment).map_or(&[], |s| &s.data.bytes()[start..start + place.len as usize])
    }

    /// The record at `place` is not needed any more.
    pub(super) fn release(&mut self, place: Place) {
        let Some(Some(segment)) = self.segments.get_mut(place.segment as usize) else { return };
        segment.live -= place.len as usize;
        self.live -= u64::from(place.len);
        if segment.live == 0 {
            self.used -= segment.used as u64;
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
        if self.used - self.live <= HOLES + self.live / 3 {
            return None;
        }
        let full = self.segments.iter().enumerate().filter_map(|(n, s)| Some((n as u32, s.as_ref()?)));
        let (number, segment) = full
            .filter(|(n, _)| self.current != Some(*n))
            .min_by_key(|(_, s)| s.live * 64 / s.used.max(1))?;
        Some((number, segment.owners.clone()))
    }

    fn segment(&self, number: u32) -> Option<&Segment> {
        self.segments.get(number as usize)?.as_ref()
    }

    fn new_segment(&mut self) -> io::Result<u32> {
        let segment = Segment { data: AnonMap::new(SEGMENT)?, used: 0, live: 0, owners: Vec::new() };
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

    #[test]
    fn records_come_back_and_empty_segments_go() {
        let mut log = Log::default();
        let places: Vec<Place> = (0..300u32).map(|n| log.append(&vec![n as u8; 2000], n).unwrap()).collect();
        assert_eq!((log.live(), log.used(), log.segments.len()), (600_000, 600_000, 3));
        assert!(places.iter().zip(0..).all(|(p, n)| log.get(*p) == vec![n as u8; 2000]));
        let (first, rest) = places.split_at(131);
        first.iter().for_each(|p| log.release(*p));
        assert!(log.segments[0].is_none());
        assert_eq!(log.used(), rest.len() as u64 * 2000);
        assert!(log.emptiest().is_none());
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

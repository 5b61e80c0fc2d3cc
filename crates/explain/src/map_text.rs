//! A map of guest memory as text: a character for each chunk.

use std::fmt::Write;

use berth_memory::PageState;

use crate::map::{Counts, MemoryMap, STATES};
use crate::words::size;

/// Chunks in a row.
const ROW: usize = 64;

/// A state's character, and what it means.
fn legend(state: PageState) -> (char, &'static str) {
    match state {
        PageState::Resident => ('R', "resident: in memory of its own"),
        PageState::Shared => ('S', "shared: with a file or another VM until it is written"),
        PageState::Stored => ('C', "stored: in the cold store or the host's swap"),
        PageState::Released => ('F', "released: free, given back by the guest"),
        PageState::Untouched => ('.', "untouched: never written"),
    }
}

/// The map for a terminal, with a line end after each line.
pub fn render(map: &MemoryMap) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "guest physical memory of VM {}: {}, a character is {}",
        map.vm,
        size(map.size_bytes),
        size(map.chunk_bytes)
    );
    for region in &map.regions {
        let _ = writeln!(text);
        for (row, chunks) in region.chunks.chunks(ROW).enumerate() {
            let at = region.start.0 + (row * ROW) as u64 * map.chunk_bytes;
            let line: String = chunks.iter().map(character).collect();
            let _ = writeln!(text, "{at:#014x}  {line}");
        }
    }
    let _ = writeln!(text);
    for state in STATES {
        let ((c, meaning), bytes) = (legend(state), map.bytes.bytes_in(state));
        let mib = bytes as f64 / f64::from(1 << 20);
        let percent = 100.0 * bytes as f64 / map.size_bytes.max(1) as f64;
        let _ = writeln!(text, "{c}  {mib:>10.1} MiB  {percent:>5.1} %  {meaning}");
    }
    let _ =
        writeln!(text, "A small letter: less than half of the chunk, and most of what was touched in it.");
    text
}

/// The state that most of what was touched is in; small if that is less than half of the chunk.
fn character(chunk: &Counts) -> char {
    let touched = STATES.into_iter().filter(|s| *s != PageState::Untouched);
    // The first of equals: `max_by_key` would take the last.
    let most = touched.rev().max_by_key(|s| chunk.bytes_in(*s));
    let Some((state, bytes)) = most.map(|s| (s, chunk.bytes_in(s))).filter(|(_, bytes)| *bytes > 0) else {
        return legend(PageState::Untouched).0;
    };
    let c = legend(state).0;
    if bytes * 2 >= chunk.total() { c } else { c.to_ascii_lowercase() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hex::Hex;
    use crate::map::MapRegion;

    #[test]
    fn a_chunk_shows_most_of_what_was_touched() {
        let of = |resident, shared, untouched| {
            character(&Counts { resident, shared, untouched, ..Counts::default() })
        };
        assert_eq!(
            [of(0, 0, 8), of(1, 0, 7), of(4, 0, 4), of(1, 2, 5), of(2, 2, 4)],
            ['.', 'r', 'R', 's', 'r']
        );
    }

    #[test]
    fn rows_begin_with_their_address() {
        let chunk = Counts { resident: 4096, ..Counts::default() };
        let bytes = Counts { resident: 65 * 4096, ..Counts::default() };
        let region = MapRegion { start: Hex(1 << 32), len: 65 * 4096, chunks: vec![chunk; 65] };
        let map = MemoryMap {
            vm: "web".to_owned(),
            size_bytes: 65 * 4096,
            chunk_bytes: 4096,
            bytes,
            regions: vec![region],
        };
        let text = render(&map);
        assert!(
            text.contains(&format!("\n0x000100000000  {}\n0x000100040000  R\n", "R".repeat(64))),
            "{text}"
        );
        assert!(text.contains("R         0.3 MiB  100.0 %  resident"), "{text}");
    }
}

//! A map of guest memory as a picture: a square for each chunk, filled from below with the states of its pages.

use berth_memory::PageState;

use crate::canvas::{Anchor, Canvas};
use crate::map::{MemoryMap, STATES};
use crate::words::size;

const WIDTH: f64 = 1120.0;
const LEFT: f64 = 30.0;
/// Where the squares begin, right of the addresses.
const GRID: f64 = 150.0;
/// Chunks in a row, and the size of a chunk's square with the gap after it.
const ROW: usize = 64;
const CELL: f64 = 14.5;
const GAP: f64 = 1.5;

/// The class of a state in the style sheet of [`Canvas`].
fn class(state: PageState) -> &'static str {
    match state {
        PageState::Untouched => "untouched",
        PageState::Resident => "resident",
        PageState::Shared => "shared",
        PageState::Stored => "stored",
        PageState::Released => "released",
    }
}

/// The map as an SVG file.
pub fn render(map: &MemoryMap) -> String {
    let mut c = Canvas::new(WIDTH);
    let title = format!("guest physical memory of VM {}", map.vm);
    c.text("title", (LEFT, 36.0), Anchor::Start, &title);
    let note = format!("{} in squares of {}", size(map.size_bytes), size(map.chunk_bytes));
    c.text("small", (WIDTH - LEFT, 36.0), Anchor::End, note);
    sums(&mut c, map);
    let mut y = 128.0;
    for region in &map.regions {
        for (row, chunks) in region.chunks.chunks(ROW).enumerate() {
            let at = region.start.0 + (row * ROW) as u64 * map.chunk_bytes;
            c.text("mono small", (GRID - 12.0, y + 10.5), Anchor::End, format!("{at:#x}"));
            for (i, chunk) in chunks.iter().enumerate() {
                let (x, side) = (GRID + CELL * i as f64, CELL - GAP);
                c.rect("untouched", (x, y), (side, side), 1.5);
                let mut bottom = y + side;
                for state in STATES.into_iter().filter(|s| *s != PageState::Untouched) {
                    let height = side * chunk.bytes_in(state) as f64 / chunk.total().max(1) as f64;
                    if height > 0.0 {
                        bottom -= height;
                        c.rect(class(state), (x, bottom), (side, height), 0.0);
                    }
                }
            }
            y += CELL;
        }
        y += CELL;
    }
    c.finish(y + 8.0, &title)
}

/// A bar with each state's share, and what the colours mean.
fn sums(c: &mut Canvas, map: &MemoryMap) {
    let width = WIDTH - 2.0 * LEFT;
    let mut x = LEFT;
    for (i, state) in STATES.into_iter().enumerate() {
        let bytes = map.bytes.bytes_in(state) as f64;
        let share = bytes / map.size_bytes.max(1) as f64;
        c.rect(class(state), (x, 54.0), (width * share, 18.0), 0.0);
        x += width * share;
        let at = LEFT + width / STATES.len() as f64 * i as f64;
        c.rect(class(state), (at, 86.0), (12.0, 12.0), 2.0);
        let mib = bytes / f64::from(1 << 20);
        c.text("", (at + 20.0, 97.0), Anchor::Start, format!("{}  {mib:.1} MiB", class(state)));
    }
}

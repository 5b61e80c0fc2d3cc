//! An explanation as a picture: the fields of the address, the table and entry that each leads to, and what comes
//! after the page tables.

use crate::canvas::{Anchor, Canvas};
use crate::explanation::{Explanation, LevelView, PageView, Place};
use crate::hex::Hex;
use crate::words::{self, size};

const WIDTH: f64 = 1120.0;
const LEFT: f64 = 30.0;
/// Distance of two tables, and their size.
const STEP: f64 = 208.0;
const TABLE: (f64, f64) = (182.0, 170.0);
/// Height of a row of a table.
const ROW: f64 = 22.0;

/// The explanation as an SVG file.
pub fn render(e: &Explanation) -> String {
    let mut c = Canvas::new(WIDTH);
    let title = title(e);
    c.text("title", (LEFT, 36.0), Anchor::Start, &title);
    let mut y = 60.0;
    if e.space.is_some() {
        subtitle(&mut c, e);
        y = 84.0;
    }
    if !e.levels.is_empty() {
        fields(&mut c, e, y);
        y = tables(&mut c, e, y + 96.0);
    }
    if let Some(fault) = &e.fault {
        y = fault_card(&mut c, fault, &e.access.map(|a| a.to_string()).unwrap_or_default(), y);
    }
    if e.physical.is_some() {
        y = cards(&mut c, e, y);
    }
    c.finish(y + 10.0, &title)
}

fn title(e: &Explanation) -> String {
    let what = if e.space.is_some() { "guest virtual" } else { "guest physical" };
    format!("{what} {}", e.address)
}

fn subtitle(c: &mut Canvas, e: &Explanation) {
    let Some(space) = &e.space else { return };
    let whose = match &space.process {
        Some(p) => format!("process {} ({})", p.pid, p.name),
        None => format!("vCPU {}", e.vcpu),
    };
    let mut text = format!("VM {}, {whose}, {}", e.vm, space.mode);
    if !space.controls.is_empty() {
        text.push_str(" with ");
        text.push_str(&space.controls.join(", "));
    }
    c.text("small", (LEFT, 58.0), Anchor::Start, text);
}

/// log2 of what an entry of the level covers: where its field of the address begins.
fn shift(level: &LevelView) -> u32 {
    level.covers.trailing_zeros()
}

fn table_x(i: usize) -> f64 {
    LEFT + 80.0 + STEP * i as f64
}

/// The fields of the address: an index for each table that was looked at, and the rest.
fn fields(c: &mut Canvas, e: &Explanation, y: f64) {
    let mut high = if e.levels[0].covers >= 1 << 39 { 48 } else { 32 };
    for (i, level) in e.levels.iter().enumerate() {
        let low = shift(level);
        let x = table_x(i);
        c.rect("virtual", (x, y), (TABLE.0, 34.0), 4.0);
        c.text(
            "white",
            (x + TABLE.0 / 2.0, y + 22.0),
            Anchor::Middle,
            format!("{} index {}", level.level.name(), level.index),
        );
        c.text("faint", (x + TABLE.0 / 2.0, y + 50.0), Anchor::Middle, format!("bits {} to {low}", high - 1));
        c.line("line", (x + TABLE.0 / 2.0, y + 56.0), (x + TABLE.0 / 2.0, y + 88.0));
        high = low;
    }
    // The last table's field ends where the offset begins; below the page size no table is asked.
    let x = table_x(e.levels.len());
    let offset = e.address.0 & ((1 << high) - 1);
    let width = (WIDTH - LEFT - x).min(TABLE.0);
    // Without a page the address leads no further than to the last table.
    if e.page.is_some() {
        c.rect("physical", (x, y), (width, 34.0), 4.0);
        c.text("white", (x + width / 2.0, y + 22.0), Anchor::Middle, format!("offset {offset:#x}"));
        c.text("faint", (x + width / 2.0, y + 50.0), Anchor::Middle, format!("bits {} to 0", high - 1));
    }
}

/// The tables side by side; returns where the next row of the picture begins.
fn tables(c: &mut Canvas, e: &Explanation, y: f64) -> f64 {
    let cr3 = e.space.as_ref().map_or(Hex(0), |s| s.cr3);
    c.rect("virtual", (LEFT - 10.0, y + 10.0), (62.0, 26.0), 13.0);
    c.text("white", (LEFT + 21.0, y + 27.0), Anchor::Middle, "CR3");
    c.text("mono small", (LEFT - 10.0, y + 52.0), Anchor::Start, cr3);
    c.arrow("way", (LEFT + 52.0, y + 23.0), (table_x(0), y + 23.0));
    let mut lowest = y + TABLE.1;
    for (i, level) in e.levels.iter().enumerate() {
        let last = i + 1 == e.levels.len();
        let x = table_x(i);
        let row_y = table(c, level, (x, y), last && e.page.is_none());
        if !last {
            c.arrow("way", (x + TABLE.0, row_y), (table_x(i + 1), y + 23.0));
        } else if let Some(page) = &e.page {
            let to = table_x(i + 1);
            c.arrow("way-physical", (x + TABLE.0, row_y), (to, y + 23.0));
            page_box(c, page, e.physical.unwrap_or_default(), (to, y));
        }
        let lines = wrap(&level.flags, 30);
        c.lines("small", (x, y + TABLE.1 + 18.0), &lines);
        lowest = lowest.max(y + TABLE.1 + 18.0 + 15.0 * lines.len() as f64);
    }
    lowest + 18.0
}

/// One table with its entry at the height that its index has; returns the height of the entry's middle.
fn table(c: &mut Canvas, level: &LevelView, (x, y): (f64, f64), ends_here: bool) -> f64 {
    let entries = f64::from(level.entries);
    c.rect("box", (x, y), TABLE, 6.0);
    c.text("strong", (x + 10.0, y + 18.0), Anchor::Start, level.level.name());
    c.text("mono small", (x + TABLE.0 - 10.0, y + 18.0), Anchor::End, level.table);
    let (top, room) = (y + 30.0, TABLE.1 - 30.0 - ROW - 6.0);
    let row = top + room * f64::from(level.index) / (entries - 1.0);
    let class = if ends_here { "fault" } else { "virtual" };
    c.rect(class, (x + 1.0, row), (TABLE.0 - 2.0, ROW), 2.0);
    c.text("white", (x + 10.0, row + 15.0), Anchor::Start, level.index);
    c.text("white mono", (x + TABLE.0 - 8.0, row + 15.0), Anchor::End, level.entry);
    if row - top > 16.0 {
        c.text("faint", (x + 10.0, top + 10.0), Anchor::Start, "0");
    }
    if top + room - row > 16.0 {
        c.text("faint", (x + 10.0, y + TABLE.1 - 8.0), Anchor::Start, entries - 1.0);
    }
    row + ROW / 2.0
}

/// The page, with a mark where the address is in it.
fn page_box(c: &mut Canvas, page: &PageView, physical: Hex, (x, y): (f64, f64)) {
    let width = (WIDTH - LEFT - x).min(TABLE.0);
    c.rect("card-physical", (x, y), (width, TABLE.1), 6.0);
    c.text("strong", (x + 10.0, y + 18.0), Anchor::Start, format!("{} page", size(page.size)));
    c.text("mono small", (x + 10.0, y + 34.0), Anchor::Start, page.base);
    let offset = physical.0.wrapping_sub(page.base.0) as f64 / page.size as f64;
    c.rect("physical", (x + 1.0, y + 44.0 + (TABLE.1 - 52.0) * offset), (width - 2.0, 4.0), 2.0);
}

fn fault_card(c: &mut Canvas, fault: &crate::Fault, access: &str, y: f64) -> f64 {
    c.rect("card-fault", (LEFT, y), (WIDTH - 2.0 * LEFT, 66.0), 8.0);
    let words = fault.error_words.join(", ");
    let code = format!("error code {} ({words})", fault.error_code);
    let cr2 = fault.cr2.map(|cr2| format!(", CR2 {cr2}")).unwrap_or_default();
    c.text("strong big", (LEFT + 16.0, y + 26.0), Anchor::Start, format!("{}: {access}", fault.name));
    c.text("", (LEFT + 16.0, y + 50.0), Anchor::Start, format!("{}; {code}{cr2}", fault.why));
    y + 66.0 + 24.0
}

/// What follows the page tables: guest physical, host virtual, machine.
fn cards(c: &mut Canvas, e: &Explanation, y: f64) -> f64 {
    let (width, gap, height) = ((WIDTH - 2.0 * LEFT - 2.0 * 44.0) / 3.0, 44.0, 118.0);
    let x = |i: f64| LEFT + i * (width + gap);
    let physical = e.physical.unwrap_or_default();
    card(c, "physical", ("guest physical", physical.to_string()), (x(0.0), y), (width, height));
    let mut notes = Vec::new();
    if let Some(page) = e.page.as_ref().filter(|_| !e.levels.is_empty()) {
        notes.push(format!(
            "offset {:#x} in a page of {}",
            physical.0.wrapping_sub(page.base.0),
            size(page.size)
        ));
    }
    match &e.place {
        Some(Place::Ram { start, len, state }) => {
            notes.push(format!("RAM of {}, page {}", size(*len), state.map_or("unknown", words::state_word)));
            let bar = (x(0.0) + 16.0, y + height - 20.0);
            let length = width - 32.0;
            c.rect("untouched", bar, (length, 8.0), 4.0);
            let at = bar.0 + length * physical.0.wrapping_sub(start.0) as f64 / *len as f64;
            c.rect("physical", (at - 2.0, bar.1 - 4.0), (4.0, 16.0), 2.0);
        }
        Some(Place::Device(device)) => {
            notes.push(format!("registers of {}", device.name));
            notes.push(format!(
                "offset {:#x} of {}",
                physical.0.wrapping_sub(device.start.0),
                size(device.len)
            ));
        }
        Some(Place::Nothing) => notes.push("nothing is there".to_owned()),
        None => {}
    }
    c.lines("", (x(0.0) + 16.0, y + 66.0), &notes);
    let Some(host) = &e.host else { return y + height + 20.0 };
    let middle = y + height / 2.0;
    c.arrow("line", (x(0.0) + width, middle), (x(1.0), middle));
    card(c, "host", ("host virtual", host.address.to_string()), (x(1.0), y), (width, height));
    c.lines("", (x(1.0) + 16.0, y + 66.0), &[format!("process {}", host.pid)]);
    c.arrow("line", (x(1.0) + width, middle), (x(2.0), middle));
    let page = host.page.as_ref();
    let machine = match (host.machine, page) {
        (Some(machine), _) => machine.to_string(),
        (None, Some(page)) if page.present => "hidden from you".to_owned(),
        (None, Some(page)) if page.swapped => "in the host's swap".to_owned(),
        (None, Some(_)) => "no frame".to_owned(),
        (None, None) => "unknown".to_owned(),
    };
    card(c, "machine", ("machine", machine), (x(2.0), y), (width, height));
    if let Some(page) = page.filter(|p| p.present) {
        let mut notes = vec![if page.shared { "shared" } else { "private" }.to_owned()];
        if let Some(frame) = page.frame {
            notes[0] = format!("frame {frame}, {}", notes[0]);
        }
        if let Some(mapped) = page.mapped {
            notes.push(format!("mapped {mapped} time{}", if mapped == 1 { "" } else { "s" }));
        }
        notes.push(page.frame_flags.join(", "));
        c.lines("", (x(2.0) + 16.0, y + 66.0), &notes);
    }
    y + height + 20.0
}

fn card(c: &mut Canvas, kind: &str, (name, value): (&str, String), at: (f64, f64), size: (f64, f64)) {
    c.rect(&format!("card-{kind}"), at, size, 8.0);
    c.text("small", (at.0 + 16.0, at.1 + 22.0), Anchor::Start, name);
    c.text("mono strong big", (at.0 + 16.0, at.1 + 43.0), Anchor::Start, value);
}

/// Words in lines of about `width` characters.
fn wrap(words: &[String], width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in words {
        match lines.last_mut() {
            Some(line) if line.len() + 2 + word.len() <= width => {
                line.push_str(", ");
                line.push_str(word);
            }
            _ => lines.push(word.clone()),
        }
    }
    lines
}

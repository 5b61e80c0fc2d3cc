//! An explanation as text with aligned columns.

use std::fmt::Write;

use crate::access::{AccessKind, Privilege};
use crate::explanation::{Explanation, HostView, PageView, Place};
use crate::hex::Hex;
use crate::words::{self, size};

/// Width of the column of names.
const NAMES: usize = 16;

/// The explanation for a terminal, with a line end after each line.
pub fn render(e: &Explanation) -> String {
    let mut text = String::new();
    head(&mut text, e);
    levels(&mut text, e);
    if let Some(page) = &e.page {
        rights(&mut text, page);
    }
    if let (Some(access), Some(_)) = (e.access, &e.space) {
        fault(&mut text, e, &access.to_string());
    }
    physical(&mut text, e);
    if let Some(h) = &e.host {
        host(&mut text, h);
    }
    text
}

// Writing to a String cannot fail.
fn row(text: &mut String, name: &str, value: &str, note: &str) {
    let line = format!("{name:<NAMES$}  {value:<18}  {note}");
    let _ = writeln!(text, "{}", line.trim_end());
}

fn head(text: &mut String, e: &Explanation) {
    let Some(space) = &e.space else {
        return row(text, "guest physical", &e.address.to_string(), &format!("of VM {}", e.vm));
    };
    let whose = match &space.process {
        Some(p) => format!("process {} ({})", p.pid, p.name),
        None => format!("vCPU {}", e.vcpu),
    };
    row(text, "guest virtual", &e.address.to_string(), &format!("of VM {}, {whose}", e.vm));
    if space.mode == crate::PagingMode::Off {
        return row(text, "no paging", "", "CR0.PG is clear: linear addresses are guest physical");
    }
    let note = format!("{}; {}", space.mode, space.controls.join(" "));
    row(text, "CR3", &space.cr3.to_string(), note.trim_end_matches("; "));
}

fn levels(text: &mut String, e: &Explanation) {
    if e.levels.is_empty() {
        return;
    }
    let _ = writeln!(text, "\n{:<7}{:>5}  {:<18}  {:<18}  flags", "level", "index", "entry at", "entry");
    for l in &e.levels {
        let entry = format!("{:#018x}", l.entry.0);
        let (level, at, flags) = (l.level.name(), l.entry_address.to_string(), l.flags.join(", "));
        let _ = writeln!(text, "{level:<7}{:>5}  {at:<18}  {entry:<18}  {flags}", l.index);
    }
    let _ = writeln!(text);
}

fn rights(text: &mut String, page: &PageView) {
    for privilege in [Privilege::User, Privilege::Supervisor] {
        let of = |kind: AccessKind| {
            let right = page.rights.iter().find(|r| r.access.privilege == privilege && r.access.kind == kind);
            match right.and_then(|r| r.why_not.as_deref()) {
                Some(why) => format!("no {} ({why})", kind.verb()),
                None => kind.verb().to_owned(),
            }
        };
        row(text, "allowed", privilege.name(), &AccessKind::ALL.map(of).join(", "));
    }
}

fn fault(text: &mut String, e: &Explanation, access: &str) {
    let Some(fault) = &e.fault else { return row(text, "fault", "none", access) };
    let name = format!("{} (vector {})", fault.name, fault.vector);
    row(text, "fault", &name, &format!("{access}: {}", fault.why));
    row(text, "  error code", &fault.error_code.to_string(), &fault.error_words.join(", "));
    if let Some(cr2) = fault.cr2 {
        row(text, "  CR2", &cr2.to_string(), "");
    }
}

fn physical(text: &mut String, e: &Explanation) {
    let Some(physical) = e.physical else { return };
    let within = e.page.as_ref().filter(|_| !e.levels.is_empty()).map(|page| {
        format!(
            "offset {:#x} in the page of {} at {}",
            physical.0.wrapping_sub(page.base.0),
            size(page.size),
            page.base
        )
    });
    if e.space.is_some() {
        row(text, "guest physical", &physical.to_string(), within.as_deref().unwrap_or(""));
    }
    match &e.place {
        Some(Place::Ram { start, len, state }) => {
            let state = state.map_or("in an unknown state", words::state_word);
            let note = format!("of {start} to {:#x}; the page is {state}", start.0.saturating_add(len - 1));
            row(text, "  there", "RAM", &note);
        }
        Some(Place::Device(device)) => {
            let offset = Hex(physical.0.wrapping_sub(device.start.0));
            let note = format!("offset {offset} in its {} at {}", size(device.len), device.start);
            row(text, "  there", "device", &format!("{}, {note}", device.name));
        }
        Some(Place::Nothing) => row(text, "  there", "nothing", "loads give ones, stores are dropped"),
        None => {}
    }
}

fn host(text: &mut String, h: &HostView) {
    row(text, "host virtual", &h.address.to_string(), &format!("of process {}", h.pid));
    let Some(page) = &h.page else {
        return row(text, "machine", "unknown", "its pagemap may not be read");
    };
    if page.swapped {
        return row(text, "machine", "none", "the page is in the host's swap");
    }
    if !page.present {
        return row(text, "machine", "none", "the host has no frame for it");
    }
    let mut notes = vec![if page.shared { "shared" } else { "private" }.to_owned()];
    let flags = [
        (page.file_or_shared, "file or shared memory"),
        (page.exclusive, "mapped only here"),
        (page.soft_dirty, "soft-dirty"),
    ];
    notes.extend(flags.iter().filter(|(set, _)| *set).map(|(_, word)| (*word).to_owned()));
    match (h.machine, page.frame) {
        (Some(machine), Some(frame)) => {
            row(text, "machine", &machine.to_string(), &format!("frame {frame}: {}", notes.join(", ")));
        }
        _ => row(text, "machine", "hidden", &format!("only root may know the frame: {}", notes.join(", "))),
    }
    if let Some(mapped) = page.mapped {
        let times = if mapped == 1 { "once".to_owned() } else { format!("{mapped} times") };
        row(text, "  frame", &format!("mapped {times}"), &page.frame_flags.join(", "));
    }
}

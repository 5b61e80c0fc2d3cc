//! `berth top --once` and `--json`.

use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use super::placement::Placement;
use super::rates::Rates;
use super::sample::Sample;
use super::table::{self, COLUMNS, Choice, Row};
use super::{TICK, TopError, cpus};

/// Prints what happens within `interval`.
///
/// # Errors
/// [`TopError`].
pub fn print(interval: Duration, json: bool) -> Result<ExitCode, TopError> {
    let first = Sample::take()?;
    let mut placement = Placement::default();
    let end = Instant::now() + interval;
    while Instant::now() < end {
        placement.look(&first);
        thread::sleep(TICK.min(end.saturating_duration_since(Instant::now())));
    }
    let rates = Rates::between(&first, &Sample::take()?);
    let text = if json {
        // Its keys are strings and its numbers finite: this cannot fail.
        serde_json::to_string_pretty(&rates).unwrap_or_default() + "\n"
    } else {
        let choice = Choice { threads: true, ..Choice::default() };
        text(&table::rows(&rates.vms, &choice)) + "\n" + &cpu_text(&rates, &placement)
    };
    Ok(crate::print(&text))
}

/// The table as text; the first column is as wide as its names.
fn text(rows: &[Row]) -> String {
    let titles = Row { cells: COLUMNS.each_ref().map(|c| c.title.to_owned()), is_vm: true };
    let all = || std::iter::once(&titles).chain(rows);
    let name = all().map(|row| row.cells[0].chars().count()).max().unwrap_or(0);
    let line = |row: &Row| {
        let cells = row.cells.iter().zip(&COLUMNS).enumerate().map(|(i, (cell, column))| {
            let width = if i == 0 { name } else { column.width.into() };
            if i < 2 { format!("{cell:width$}") } else { format!("{cell:>width$}") }
        });
        cells.collect::<Vec<_>>().join(" ").trim_end().to_owned() + "\n"
    };
    all().map(line).collect()
}

fn cpu_text(rates: &Rates, placement: &Placement) -> String {
    let rows = cpus::rows(rates, placement, "");
    let line = |row: &cpus::CpuRow| {
        let busy = super::format::percent(row.busy_percent);
        format!("{:>4} {busy:>6} {}", row.cpu, row.threads()).trim_end().to_owned() + "\n"
    };
    " CPU  BUSY% vCPU threads\n".to_owned() + &rows.iter().map(line).collect::<String>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::top::testing::{sample, vm};

    #[test]
    fn the_text_has_aligned_columns() {
        let rates = Rates::of_first(&sample(vec![vm("a-name-that-is-long", 1.0, 1.0)]));
        let text = text(&table::rows(&rates.vms, &Choice::default()));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[0],
            "NAME                STATE     CPU% STEAL%  ON   MEM   RES STORE DISKR DISKW NETRX NETTX"
        );
        assert_eq!(
            lines[1],
            "a-name-that-is-long running      -      -  x2  512M  100M   64M     -     -     -     -"
        );
    }

    #[test]
    fn the_json_names_units() {
        let json = serde_json::to_value(Rates::of_first(&sample(vec![vm("a", 1.0, 1.0)]))).unwrap();
        assert_eq!(json["vms"][0]["memory_bytes"], 512 << 20);
        assert_eq!(json["vms"][0]["vcpus"][1]["host_cpu"], 1);
        assert!(json["vms"][0]["cpu_percent"].is_null());
    }
}

//! A report as Markdown, which people can read as it is, and as JSON.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::report::{Bound, Mean, Report, Unit, Values};
use super::sides::SideName;
use super::works::Group;

/// What a document has around the part that is replaced by a report.
const BEGIN: &str = "<!-- begin: cargo xtask bench -->\n";
const END: &str = "<!-- end: cargo xtask bench -->\n";

/// For people.
pub fn markdown(report: &Report) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    for (what, value) in &report.about {
        let _ = writeln!(text, "- {what}: {value}");
    }
    groups(report, &mut text);
    rows(report, &mut text);
    for (title, lines) in [
        ("Not done", &report.skipped),
        ("Failed and done again", &report.again),
        ("Failed", &report.failures),
    ] {
        if !lines.is_empty() {
            let _ = writeln!(text, "\n{title}:\n");
            lines.iter().for_each(|line| {
                let _ = writeln!(text, "- {line}");
            });
        }
    }
    text
}

fn groups(report: &Report, text: &mut String) {
    let means: Vec<_> = Group::ALL
        .into_iter()
        .map(|group| (group, [SideName::Native, SideName::Tcg].map(|side| report.mean(group, side))))
        .filter(|(_, means)| means.iter().any(Option::is_some))
        .collect();
    if means.is_empty() {
        return;
    }
    let _ =
        writeln!(text, "\n| group | share of native | target | times TCG | target |\n|---|---|---|---|---|");
    for (group, [native, tcg]) in means {
        let cell = |mean: Option<Mean>| match mean {
            Some(Mean { mean, rows, target }) => {
                let verdict = match target {
                    Some(target) if mean >= target => format!("≥ {target}: met"),
                    Some(target) => format!("≥ {target}: missed"),
                    None => String::new(),
                };
                format!("{mean:.2} (of {rows}) | {verdict}")
            }
            None => " | ".to_owned(),
        };
        let _ = writeln!(text, "| {} | {} | {} |", group.title(), cell(native), cell(tcg));
    }
}

fn rows(report: &Report, text: &mut String) {
    let sides = report.sides();
    let compared: Vec<_> = sides.iter().copied().filter(|side| *side != SideName::Berth).collect();
    if sides.is_empty() {
        return;
    }
    let names = sides.iter().map(SideName::to_string);
    let ratios = compared.iter().map(|side| format!("Berth : {side}"));
    let heads: Vec<_> = names.chain(ratios).collect();
    for group in Group::ALL {
        if report.rows(group).next().is_none() {
            continue;
        }
        let _ = writeln!(
            text,
            "\n| {} | {} |\n|---|{}",
            group.title(),
            heads.join(" | "),
            "---|".repeat(heads.len())
        );
        for values in report.rows(group) {
            let own = sides.iter().map(|side| cell(values, *side));
            let ratios = compared
                .iter()
                .map(|side| values.ratio(*side).map_or_else(String::new, |ratio| format!("{ratio:.2}")));
            let cells: Vec<_> = own.chain(ratios).collect();
            let _ = writeln!(text, "| {} | {} |", values.row.name, cells.join(" | "));
        }
    }
    let _ = writeln!(
        text,
        "\nMedian (least to most). Ratios say how many times as good as the other Berth is; 1 is equal."
    );
}

/// A median with its spread, and for Berth whether it keeps the bound.
fn cell(values: &Values, side: SideName) -> String {
    let Some(spread) = values.spread(side) else { return String::new() };
    let unit = match values.row.unit {
        Unit::Seconds => " s",
        Unit::Megabytes => " MB",
        Unit::Percent => " %",
        Unit::Times => "",
    };
    let mut text = format!("{}{unit}", number(spread.median));
    if spread.count > 1 {
        let _ = write!(text, " ({}–{})", number(spread.least), number(spread.most));
    }
    if let (SideName::Berth, Some(bound)) = (side, values.row.bound) {
        let verdict = if bound.met(spread.median) { "met" } else { "missed" };
        let _ = match bound {
            Bound::AtLeast(value) => write!(text, "; ≥ {value}: {verdict}"),
            Bound::AtMost(value) => write!(text, "; ≤ {value}: {verdict}"),
        };
    }
    text
}

/// Three digits at least.
fn number(value: f64) -> String {
    match value {
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v if v >= 1.0 => format!("{v:.2}"),
        v => format!("{v:.3}"),
    }
}

/// For programs.
pub fn json(report: &Report) -> String {
    let about: Map<_, _> =
        report.about.iter().map(|(what, value)| ((*what).to_owned(), json!(value))).collect();
    let groups: Vec<Value> = Group::ALL
        .into_iter()
        .filter(|group| report.rows(*group).next().is_some())
        .map(|group| {
            let rows: Vec<_> = report.rows(group).map(row_json).collect();
            json!({
                "group": group.title(),
                "berth_to_native": report.mean(group, SideName::Native),
                "berth_to_tcg": report.mean(group, SideName::Tcg),
                "work": rows,
            })
        })
        .collect();
    let all = json!({
        "about": about,
        "groups": groups,
        "skipped": report.skipped,
        "done_again": report.again,
        "failures": report.failures,
    });
    format!("{all:#}")
}

fn row_json(values: &Values) -> Value {
    let sides: Map<_, _> = values
        .of
        .iter()
        .map(|(side, all)| (side.to_string(), json!({ "spread": values.spread(*side), "values": all })))
        .collect();
    json!({
        "name": values.row.name,
        "unit": values.row.unit,
        "counts_for_group": values.row.counts,
        "bound": values.row.bound,
        "sides": sides,
        "berth_to_native": values.ratio(SideName::Native),
        "berth_to_tcg": values.ratio(SideName::Tcg),
    })
}

/// `document` with `text` between its two marks.
///
/// # Errors
/// A text when it does not have them, each once and in this order.
pub fn replace_in(document: &str, text: &str) -> Result<String, String> {
    let parts = document.split_once(BEGIN).and_then(|(before, rest)| Some((before, rest.split_once(END)?)));
    match parts {
        Some((before, (old, after)))
            if ![before, old, after].iter().any(|p| p.contains(BEGIN) || p.contains(END)) =>
        {
            Ok(format!("{before}{BEGIN}\n{text}\n{END}{after}"))
        }
        _ => Err(format!("it must have the lines\n{BEGIN}{END}once each, in this order")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::Row;
    use super::super::report::tests::row;
    use super::*;

    fn report() -> Report {
        let mut report = Report::default();
        report.about.push(("rounds", "2".to_owned()));
        for (side, values) in
            [(SideName::Native, [0.5, 0.5]), (SideName::Tcg, [3.0, 5.0]), (SideName::Berth, [1.0, 1.0])]
        {
            for value in values {
                report.add(row("sieve", Group::Integer, Unit::Seconds), side, value);
            }
        }
        let memory = Row {
            counts: false,
            bound: Some(Bound::AtMost(80.0)),
            ..row("resident", Group::Idle, Unit::Megabytes)
        };
        report.add(memory, SideName::Berth, 91.25);
        report.skipped.push("sha256-ni: TCG: none".to_owned());
        report
    }

    #[test]
    fn tables_show_means_targets_and_spreads() {
        let text = markdown(&report());
        for line in [
            "- rounds: 2",
            "| integer compute | 0.50 (of 1) | ≥ 0.55: missed | 4.00 (of 1) | ≥ 3: met |",
            "| integer compute | native | TCG | Berth | Berth : native | Berth : TCG |",
            "| sieve | 0.500 s (0.500–0.500) | 4.00 s (3.00–5.00) | 1.00 s (1.00–1.00) | 0.50 | 4.00 |",
            "| resident |  |  | 91.2 MB; ≤ 80: missed |  |  |",
            "- sha256-ni: TCG: none",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\nis not in\n{text}");
        }
        assert!(!text.contains("Failed"));
    }

    #[test]
    fn json_has_all_values() {
        let value: Value = serde_json::from_str(&json(&report())).unwrap();
        let group = &value["groups"][0];
        assert_eq!(group["berth_to_tcg"]["target"], 3.0);
        assert_eq!(group["work"][0]["sides"]["TCG"]["values"], json!([3.0, 5.0]));
        assert_eq!(group["work"][0]["sides"]["TCG"]["spread"]["median"], 4.0);
        assert_eq!(value["groups"][1]["work"][0]["bound"]["at_most"], 80.0);
        assert_eq!(value["groups"][1]["berth_to_native"], Value::Null);
    }

    #[test]
    fn a_report_replaces_the_one_before_in_a_document() {
        let old = format!("# Title\n{BEGIN}old\n{END}end\n");
        let new = replace_in(&old, "new").unwrap();
        assert_eq!(new, format!("# Title\n{BEGIN}\nnew\n{END}end\n"));
        assert_eq!(replace_in(&new, "new").unwrap(), new);
        for document in ["", BEGIN, &format!("{END}{BEGIN}"), &format!("{old}{old}")] {
            assert!(replace_in(document, "new").is_err(), "{document:?}");
        }
    }
}

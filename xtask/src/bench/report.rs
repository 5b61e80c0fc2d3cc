//! Medians, ratios and tables.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;

use serde_json::{Value, json};

use super::guest::Files;
use super::measure::{self, Side, Unit, Work};

/// What was measured so far.
pub struct Report {
    sides: Vec<String>,
    /// By work's name and side's name.
    values: BTreeMap<(&'static str, String), Vec<f64>>,
    about: BTreeMap<&'static str, String>,
}

impl Report {
    /// An empty report that says what is measured where.
    pub fn new(sides: &[Side], rounds: u32, files: &Files) -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let lines_of = |key: &str| cpuinfo.lines().filter(|l| l.starts_with(key)).count();
        let cpu = cpuinfo.lines().find_map(|l| l.strip_prefix("model name")?.split_once(": "));
        let cpu = cpu.map_or_else(|| "unknown CPU".to_owned(), |(_, name)| name.to_owned());
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let mut about = BTreeMap::from([
            ("host CPU", format!("{cpu}, {} online", lines_of("processor"))),
            ("host kernel", kernel.trim().to_owned()),
            ("guest kernel", files.kernel_release.clone()),
            ("Berth", files.berth_revision.clone()),
            ("rounds", rounds.to_string()),
            ("load before", load()),
        ]);
        for side in sides {
            if let Side::Qemu { version, .. } = side {
                about.insert("QEMU", version.clone());
            }
        }
        Self { sides: sides.iter().map(Side::to_string).collect(), values: BTreeMap::new(), about }
    }

    /// One more value.
    pub fn add(&mut self, work: impl std::borrow::Borrow<Work>, side: &Side, value: f64) {
        self.values.entry((work.borrow().name, side.to_string())).or_default().push(value);
    }

    /// Nothing more will be measured.
    pub fn finish(&mut self) {
        self.about.insert("load after", load());
    }

    fn spread(&self, work: Work, side: &str) -> Option<Spread> {
        Spread::of(self.values.get(&(work.name, side.to_owned()))?)
    }

    /// How many times as good as `other` Berth is.
    fn ratio(&self, work: Work, other: &str) -> Option<f64> {
        let (berth, other) = (self.spread(work, "Berth")?.median, self.spread(work, other)?.median);
        let ratio = if work.unit == Unit::PerSecond { berth / other } else { other / berth };
        ratio.is_finite().then_some(ratio)
    }

    /// For people, in Markdown.
    pub fn tables(&self) -> String {
        let mut text = String::new();
        for (what, value) in &self.about {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "- {what}: {value}");
        }
        let _ = writeln!(text, "\n| work | {} | Berth : native | Berth : TCG |", self.sides.join(" | "));
        let _ = writeln!(text, "|---|{}---|---|", "---|".repeat(self.sides.len()));
        for work in measure::all() {
            let values = self.sides.iter().map(|side| show(self.spread(work, side), work.unit));
            let ratios = ["native", "TCG"]
                .map(|side| self.ratio(work, side).map_or_else(String::new, |ratio| format!("{ratio:.2}")));
            let cells: Vec<_> = values.chain(ratios).collect();
            if cells.iter().any(|c| !c.is_empty()) {
                let _ = writeln!(text, "| {} | {} |", work.name, cells.join(" | "));
            }
        }
        text.push_str(
            "\nMedian (least to most). Ratios: how many times as good as that Berth is; 1 is equal.",
        );
        text
    }

    /// For programs.
    ///
    /// # Errors
    /// Never in practice: a text if it cannot be written as JSON.
    pub fn json(&self) -> Result<String, String> {
        let works: Vec<Value> = measure::all().into_iter().map(|work| self.work_json(work)).collect();
        serde_json::to_string_pretty(&json!({ "about": self.about, "work": works }))
            .map_err(|e| e.to_string())
    }

    fn work_json(&self, work: Work) -> Value {
        let sides: BTreeMap<_, _> = self
            .sides
            .iter()
            .filter_map(|side| {
                let s = self.spread(work, side)?;
                Some((
                    side,
                    json!({ "median": s.median, "least": s.least, "most": s.most, "count": s.count }),
                ))
            })
            .collect();
        json!({
            "name": work.name,
            "unit": unit(work.unit),
            "values": sides,
            "berth_to_native": self.ratio(work, "native"),
            "berth_to_tcg": self.ratio(work, "TCG"),
        })
    }
}

/// The host's load averages over 1, 5 and 15 minutes.
pub fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().take(3).collect::<Vec<_>>().join(" ")
}

/// What several measurements of the same thing gave.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The one in the middle.
    pub median: f64,
    /// The least.
    pub least: f64,
    /// The most.
    pub most: f64,
    /// How many values there are.
    pub count: usize,
}

impl Spread {
    /// Of `values`; none if there are none.
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (least, most) = (*sorted.first()?, *sorted.last()?);
        let (low, high) = (sorted.get((sorted.len() - 1) / 2)?, sorted.get(sorted.len() / 2)?);
        Some(Self { median: (low + high) / 2.0, least, most, count: sorted.len() })
    }
}

fn unit(unit: Unit) -> &'static str {
    match unit {
        Unit::Seconds => "s",
        Unit::PerSecond => "1/s",
        Unit::MiB => "MiB",
        Unit::Percent => "%",
    }
}

fn show(spread: Option<Spread>, of: Unit) -> String {
    let Some(s) = spread else { return String::new() };
    let number = |v: f64| if v >= 100.0 { format!("{v:.0}") } else { format!("{v:.2}") };
    let range =
        if s.count > 1 { format!(" ({}–{})", number(s.least), number(s.most)) } else { String::new() };
    format!("{} {}{range}", number(s.median), unit(of))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_and_even_counts() {
        assert_eq!(Spread::of(&[3.0, 1.0, 2.0]).unwrap().median, 2.0);
        let even = Spread::of(&[4.0, 1.0, 2.0, 3.0]).unwrap();
        assert_eq!((even.median, even.least, even.most), (2.5, 1.0, 4.0));
        assert_eq!(Spread::of(&[]), None);
    }

    #[test]
    fn ratios_say_how_good_berth_is() {
        let mut report = Report {
            sides: vec!["TCG".into(), "Berth".into()],
            values: BTreeMap::new(),
            about: BTreeMap::new(),
        };
        let tcg = Side::Qemu { program: "qemu".into(), version: String::new() };
        let rate = Work { name: "rate", unit: Unit::PerSecond };
        let time = Work { name: "time", unit: Unit::Seconds };
        for (work, berth, other) in [(rate, 20.0, 10.0), (time, 1.0, 4.0)] {
            report.add(work, &Side::Berth, berth);
            report.add(work, &tcg, other);
        }
        assert_eq!(report.ratio(rate, "TCG"), Some(2.0));
        assert_eq!(report.ratio(time, "TCG"), Some(4.0));
        assert_eq!(report.ratio(time, "native"), None);
    }
}

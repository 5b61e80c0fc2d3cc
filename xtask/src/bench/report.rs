//! What was measured so far, and what it says about the targets.

use std::collections::BTreeMap;

use super::sides::SideName;
use super::statistics::{Spread, geometric_mean};
use super::works::{Group, Work};

/// How a value is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub enum Unit {
    /// Less is better.
    #[serde(rename = "s")]
    Seconds,
    /// Millions of bytes; less is better.
    #[serde(rename = "MB")]
    Megabytes,
    /// Of one core; less is better.
    #[serde(rename = "%")]
    Percent,
    /// How many times as fast as something else; more is better.
    #[serde(rename = "times")]
    Times,
}

/// What Berth's own median is to reach.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

impl Bound {
    pub fn met(self, value: f64) -> bool {
        match self {
            Self::AtLeast(bound) => value >= bound,
            Self::AtMost(bound) => value <= bound,
        }
    }
}

/// Something that has values: a line of the report.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub group: Group,
    pub name: String,
    pub unit: Unit,
    /// Whether it counts for its group's geometric mean.
    pub counts: bool,
    /// None if only the comparison with others matters.
    pub bound: Option<Bound>,
}

impl Row {
    /// The row of a piece of work, in seconds.
    pub fn of(work: &Work) -> Self {
        Self { group: work.group, name: work.name.to_owned(), unit: Unit::Seconds, counts: true, bound: None }
    }
}

/// The values of a row.
pub struct Values {
    pub row: Row,
    /// In the order in which they were measured.
    pub of: BTreeMap<SideName, Vec<f64>>,
}

impl Values {
    pub fn spread(&self, side: SideName) -> Option<Spread> {
        Spread::of(self.of.get(&side)?)
    }

    /// How many times as good as `other` Berth is.
    pub fn ratio(&self, other: SideName) -> Option<f64> {
        let (berth, other) = (self.spread(SideName::Berth)?.median, self.spread(other)?.median);
        let ratio = if self.row.unit == Unit::Times { berth / other } else { other / berth };
        (ratio.is_finite() && ratio > 0.0).then_some(ratio)
    }
}

/// A group's geometric mean beside its target.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Mean {
    /// How many times as good as the other side Berth is.
    pub mean: f64,
    /// Of so many pieces of work.
    pub rows: usize,
    /// None if there is no target.
    pub target: Option<f64>,
}

/// Everything that was measured.
#[derive(Default)]
pub struct Report {
    /// What was measured where: names and texts.
    pub about: Vec<(&'static str, String)>,
    rows: Vec<Values>,
    /// Who could not do which work and why, each once.
    pub skipped: Vec<String>,
    /// What went wrong and was tried once more.
    pub again: Vec<String>,
    /// What went wrong.
    pub failures: Vec<String>,
}

impl Report {
    /// Without values.
    pub fn new(about: Vec<(&'static str, String)>) -> Self {
        Self { about, ..Self::default() }
    }

    /// One more value.
    pub fn add(&mut self, row: Row, side: SideName, value: f64) {
        let index = self.rows.iter().position(|known| known.row == row).unwrap_or_else(|| {
            self.rows.push(Values { row, of: BTreeMap::new() });
            self.rows.len() - 1
        });
        self.rows[index].of.entry(side).or_default().push(value);
    }

    /// `side` cannot do `work`.
    pub fn skip(&mut self, side: SideName, work: &Work, reason: &str) {
        let text = format!("{}: {side}: {reason}", work.name);
        if !self.skipped.contains(&text) {
            self.skipped.push(text);
        }
    }

    /// The sides that have values.
    pub fn sides(&self) -> Vec<SideName> {
        let all = [SideName::Native, SideName::Tcg, SideName::Berth];
        all.into_iter().filter(|side| self.rows.iter().any(|values| values.of.contains_key(side))).collect()
    }

    /// The rows of a group.
    pub fn rows(&self, group: Group) -> impl Iterator<Item = &Values> {
        self.rows.iter().filter(move |values| values.row.group == group)
    }

    /// How a group does beside another side; none if nothing was measured on both.
    pub fn mean(&self, group: Group, other: SideName) -> Option<Mean> {
        let rows = self.rows(group).filter(|values| values.row.counts);
        let ratios: Vec<_> = rows.filter_map(|values| values.ratio(other)).collect();
        let target = if other == SideName::Native { group.target().native } else { group.target().tcg };
        Some(Mean { mean: geometric_mean(&ratios)?, rows: ratios.len(), target })
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub fn row(name: &str, group: Group, unit: Unit) -> Row {
        Row { group, name: name.to_owned(), unit, counts: true, bound: None }
    }

    #[test]
    fn ratios_say_how_good_berth_is() {
        let mut report = Report::default();
        for (unit, berth, other) in [(Unit::Times, 20.0, 10.0), (Unit::Seconds, 1.0, 4.0)] {
            report.add(row("work", Group::Integer, unit), SideName::Berth, berth);
            report.add(row("work", Group::Integer, unit), SideName::Tcg, other);
        }
        let ratios = |side| report.rows(Group::Integer).map(|v| v.ratio(side)).collect::<Vec<_>>();
        assert_eq!(ratios(SideName::Tcg), [Some(2.0), Some(4.0)]);
        assert_eq!(ratios(SideName::Native), [None, None]);
    }

    #[test]
    fn a_group_is_the_geometric_mean_of_what_counts_and_both_sides_did() {
        let mut report = Report::default();
        let measured = [("a", 1.0, Some(2.0)), ("b", 1.0, Some(8.0)), ("c", 1.0, None)];
        for (name, berth, tcg) in measured {
            report.add(row(name, Group::Calls, Unit::Seconds), SideName::Berth, berth);
            if let Some(tcg) = tcg {
                report.add(row(name, Group::Calls, Unit::Seconds), SideName::Tcg, tcg);
            }
        }
        let aside = Row { counts: false, ..row("d", Group::Calls, Unit::Seconds) };
        report.add(aside.clone(), SideName::Berth, 1.0);
        report.add(aside, SideName::Tcg, 1000.0);
        let mean = report.mean(Group::Calls, SideName::Tcg).unwrap();
        assert!((mean.mean - 4.0).abs() < 1e-12);
        assert_eq!((mean.rows, mean.target), (2, Some(3.5)));
        assert_eq!(report.mean(Group::Calls, SideName::Native), None);
        assert_eq!(report.sides(), [SideName::Tcg, SideName::Berth]);
    }

    #[test]
    fn a_reason_is_kept_once() {
        let mut report = Report::default();
        let work = Work { name: "sha256-ni", group: Group::Vector, count: 1, native: 1, tcg: 1 };
        (0..3).for_each(|_| report.skip(SideName::Tcg, &work, "no SHA"));
        assert_eq!(report.skipped, ["sha256-ni: TCG: no SHA"]);
    }
}

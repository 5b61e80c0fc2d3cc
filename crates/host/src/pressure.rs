//! Pressure stall information: the share of time in which tasks waited for a resource (the kernel's
//! `Documentation/accounting/psi.rst`).

use std::path::Path;

use serde::Serialize;

use crate::read;

/// Pressure on each resource.
#[derive(Clone, Debug, Serialize)]
pub struct Pressure {
    /// Waiting for a CPU.
    pub cpu: Option<PressureSome>,
    /// Waiting for memory.
    pub memory: Option<PressureSome>,
    /// Waiting for storage.
    pub io: Option<PressureSome>,
}

/// Percent of the time in which at least one task waited.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PressureSome {
    /// Over the last 10 seconds.
    pub avg10: f64,
    /// Over the last 60 seconds.
    pub avg60: f64,
    /// Since the host started, in microseconds.
    pub total_micros: u64,
}

impl Pressure {
    /// Reads `/proc/pressure` below `root`; `None` where there is nothing to read.
    pub fn read(root: &Path) -> Option<Self> {
        let of = |name: &str| parse(&read::text(root, &format!("proc/pressure/{name}"))?);
        let pressure = Self { cpu: of("cpu"), memory: of("memory"), io: of("io") };
        (pressure.cpu.is_some() || pressure.memory.is_some() || pressure.io.is_some()).then_some(pressure)
    }
}

fn parse(text: &str) -> Option<PressureSome> {
    let line = text.lines().find_map(|l| l.strip_prefix("some "))?;
    let text = |name: &str| line.split_whitespace().find_map(|w| w.strip_prefix(name));
    let field = |name: &str| text(name)?.parse::<f64>().ok().filter(|v| v.is_finite());
    let total_micros = text("total=")?.parse().ok()?;
    Some(PressureSome { avg10: field("avg10=")?, avg60: field("avg60=")?, total_micros })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_some_counts() {
        let text =
            "some avg10=1.50 avg60=0.25 avg300=0.00 total=5\nfull avg10=9.00 avg60=9.00 avg300=9 total=9";
        assert_eq!(parse(text), Some(PressureSome { avg10: 1.5, avg60: 0.25, total_micros: 5 }));
        assert_eq!(parse("some avg10=NaN avg60=0 total=5"), None);
        assert_eq!(parse(""), None);
    }
}

//! What a rehearsal prints and writes.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use berth_agent_protocol::load::Kind;
use berth_machine::options::size;
use clap::ValueEnum;
use serde::Serialize;

use super::knee::{Judgement, advice, judge, millis};
use super::measure::{Step, host_cpus, host_memory};
use super::{Ended, RehearseArguments, RehearseError, chart};

/// The page.
pub const HTML: &str = "rehearsal.html";
const SVG: &str = "rehearsal.svg";
const JSON: &str = "rehearsal.json";

/// A host of which others use a larger part is not quiet.
const QUIET: f64 = 0.05;

/// Makes the directory `out`.
///
/// # Errors
/// [`RehearseError::Write`].
pub fn prepare(out: &Path) -> Result<(), RehearseError> {
    fs::create_dir_all(out).map_err(|source| RehearseError::Write { path: out.to_owned(), source })
}

/// A rehearsal.
#[derive(Debug, Serialize)]
pub struct Report {
    /// When it ended, UTC.
    date: String,
    /// Berth's version.
    version: &'static str,
    host_cpus: f64,
    host_memory_bytes: Option<u64>,
    host_kernel: String,
    #[serde(serialize_with = "display")]
    load: Kind,
    /// What a unit of throughput is.
    unit: &'static str,
    engine: String,
    cpus_per_vm: u8,
    memory_per_vm_bytes: u64,
    /// Why there are no more steps, if not all were made.
    ended: Option<String>,
    /// VMs at the knee.
    knee_vms: Option<u16>,
    /// Most VMs before something got bad.
    good_vms: Option<u16>,
    /// What to do.
    advice: String,
    /// What was measured, from few VMs to many.
    steps: Vec<Step>,
    #[serde(skip)]
    judgement: Judgement,
}

fn display<S: serde::Serializer>(value: &impl std::fmt::Display, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

impl Report {
    /// Of these steps.
    pub fn new(arguments: &RehearseArguments, steps: Vec<Step>, ended: &Ended) -> Self {
        let judgement = judge(&steps, f64::from(arguments.latency) / 1000.0);
        let vms = |i: Option<usize>| Some(steps.get(i?)?.vms);
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let engine = arguments.engine.to_possible_value();
        Self {
            date: time::OffsetDateTime::now_utc().date().to_string(),
            version: env!("CARGO_PKG_VERSION"),
            host_cpus: host_cpus(),
            host_memory_bytes: host_memory(),
            host_kernel: kernel.trim().to_owned(),
            load: arguments.load,
            unit: arguments.load.unit(),
            engine: engine.map_or_else(String::new, |value| value.get_name().to_owned()),
            cpus_per_vm: arguments.cpus_per_vm,
            memory_per_vm_bytes: arguments.memory_per_vm,
            ended: match ended {
                Ended::Complete => None,
                Ended::NoMemory(reason) | Ended::Failed(reason) => Some(reason.clone()),
                Ended::Interrupted => Some("interrupted".to_owned()),
            },
            knee_vms: vms(judgement.knee),
            good_vms: vms(judgement.good),
            advice: advice(&steps, &judgement, arguments.load),
            steps,
            judgement,
        }
    }

    /// For programs.
    pub fn json(&self) -> String {
        // It has string keys only and no numbers that JSON does not have, so it cannot fail.
        serde_json::to_string_pretty(self).map(|text| text + "\n").unwrap_or_default()
    }

    /// What was rehearsed, in a line.
    fn title(&self) -> String {
        let s = if self.cpus_per_vm == 1 { "" } else { "s" };
        let memory = self.host_memory_bytes.map_or_else(|| "unknown memory".to_owned(), size::show);
        format!(
            "VMs of {} vCPU{s} and {} with the load {}, on {} host CPUs and {memory}",
            self.cpus_per_vm,
            size::show(self.memory_per_vm_bytes),
            self.load,
            self.host_cpus,
        )
    }

    fn unit_line(&self) -> String {
        format!("Throughput is in {} a second.", self.unit)
    }

    /// What the reader must know of the host, if it was not quiet.
    fn noise(&self) -> Option<String> {
        let most = self.steps.iter().filter_map(|step| step.others_cpus).reduce(f64::max)?;
        (most > QUIET * self.host_cpus).then(|| {
            format!(
                "The host was not quiet: up to {most:.1} of its {} CPUs worked for others.",
                self.host_cpus
            )
        })
    }

    /// What went not as planned.
    fn remarks(&self) -> Vec<String> {
        let ended = self.ended.as_ref().map(|why| format!("It ended early: {why}."));
        self.noise().into_iter().chain(ended).collect()
    }

    /// For people.
    pub fn table(&self) -> String {
        let rows = self.rows();
        let all = || std::iter::once(&HEADINGS.map(str::to_owned)).chain(&rows).cloned().collect::<Vec<_>>();
        let mut widths = [0; HEADINGS.len()];
        for row in all() {
            for (width, cell) in widths.iter_mut().zip(&row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut text = format!("{}\n\n", self.title());
        for row in all() {
            let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:>width$}"));
            text.push_str(&cells.collect::<Vec<_>>().join("  "));
            text.push('\n');
        }
        // Writing to a String cannot fail.
        let _ = writeln!(text, "\n{}\n{}", self.unit_line(), self.advice);
        for remark in self.remarks() {
            let _ = writeln!(text, "{remark}");
        }
        text
    }

    fn rows(&self) -> Vec<[String; HEADINGS.len()]> {
        self.steps.iter().enumerate().map(|(i, step)| self.row(i, step)).collect()
    }

    fn row(&self, i: usize, step: &Step) -> [String; HEADINGS.len()] {
        let percent = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |v| format!("{v:.1}"));
        let marks = [(self.judgement.knee, "knee"), (self.judgement.good, "last good")];
        let marks: Vec<_> =
            marks.into_iter().filter(|(at, _)| *at == Some(i)).map(|(_, name)| name).collect();
        [
            step.vms.to_string(),
            format!("{:.1}", step.cpu_ratio),
            format!("{:.2}", step.memory_ratio),
            rate(step.total_per_second),
            rate(step.vm_per_second),
            format!("{} to {}", rate(step.least_per_second), rate(step.most_per_second)),
            millis(step.latency_p50_seconds),
            millis(step.latency_p99_seconds),
            percent(step.steal_percent),
            percent(step.pressure_cpu_percent),
            percent(step.pressure_memory_percent),
            size::show(step.resident_bytes),
            size::show(step.stored_bytes),
            marks.join(", "),
        ]
    }

    /// Writes page, picture and JSON into the directory `out`.
    ///
    /// # Errors
    /// [`RehearseError::Write`], [`RehearseError::Draw`].
    pub fn write(&self, out: &Path) -> Result<(), RehearseError> {
        let picture = chart::draw(&self.steps, &self.judgement).map_err(RehearseError::Draw)?;
        let files = [(SVG, picture.clone()), (HTML, self.html(&picture)), (JSON, self.json())];
        for (name, content) in files {
            let path = out.join(name);
            fs::write(&path, content)
                .map_err(|source| RehearseError::Write { path: path.clone(), source })?;
        }
        Ok(())
    }

    fn html(&self, picture: &str) -> String {
        let cells = |tag: &str, row: &[String]| {
            row.iter().map(|cell| format!("<{tag}>{}</{tag}>", escape(cell))).collect::<String>()
        };
        let head = cells("th", &HEADINGS.map(str::to_owned));
        let rows: String = self
            .rows()
            .iter()
            .enumerate()
            .map(|(i, row)| {
                let class = if self.judgement.knee == Some(i) { " class=\"knee\"" } else { "" };
                format!("<tr{class}>{}</tr>\n", cells("td", row))
            })
            .collect();
        let remarks: String =
            self.remarks().iter().map(|text| format!("<p>{}</p>\n", escape(text))).collect();
        format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<title>Rehearsal: {title}</title>\n\
             <style>{STYLE}</style>\n</head>\n<body>\n<h1>Rehearsal</h1>\n<p>{title}.</p>\n\
             <p class=\"advice\">{advice}</p>\n{remarks}{picture}\n<table>\n<tr>{head}</tr>\n{rows}</table>\n\
             <p>{unit} Latency is that of a small request to each VM, 20 times a second. Steal: percent of the time in \
             which a vCPU waited for a host CPU. PSI: percent of the time in which something on the host waited. Knee: \
             the first step whose throughput is within 10 % of the best.</p>\n\
             <p>{date}, Berth {version}, engine {engine}, host kernel {kernel}, {seconds} s a step.</p>\n\
             </body>\n</html>\n",
            title = escape(&self.title()),
            advice = escape(&self.advice),
            unit = escape(&self.unit_line()),
            date = escape(&self.date),
            version = self.version,
            engine = escape(&self.engine),
            kernel = escape(&self.host_kernel),
            seconds = self.steps.first().map_or(0.0, |step| step.seconds.round()),
        )
    }
}

const HEADINGS: [&str; 14] = [
    "VMs",
    "vCPU:CPU",
    "memory ratio",
    "total/s",
    "each/s",
    "least to most",
    "p50",
    "p99",
    "steal %",
    "PSI CPU %",
    "PSI memory %",
    "resident",
    "stored",
    "",
];

const STYLE: &str = "body{font:16px sans-serif;margin:2em auto;max-width:72em;padding:0 1em;color:#222}\
    table{border-collapse:collapse;font-size:14px}td,th{padding:.3em .7em;text-align:right;border-bottom:1px solid #ddd}\
    .knee{background:#fff3d6}.advice{font-weight:bold}svg{max-width:100%;height:auto}";

/// A rate with three digits that count.
fn rate(value: f64) -> String {
    match value {
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

/// Text for HTML (HTML, 13.1.2.3).
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::super::knee::tests::step;
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    fn arguments(more: &[&str]) -> RehearseArguments {
        let all = ["berth", "rehearse"].iter().chain(more);
        match Cli::try_parse_from(all).unwrap().command {
            Command::Rehearse(arguments) => arguments,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_report_has_all_steps_in_all_forms() {
        let mut steps = vec![step(1, 50.0, 0.001), step(2, 99.0, 0.002), step(4, 100.0, 0.3)];
        steps[1].others_cpus = Some(1e3);
        let ended = Ended::Failed("rehearse-1-4 ended <badly>".to_owned());
        let report = Report::new(&arguments(&["--load", "cpu"]), steps, &ended);
        let table = report.table();
        let lines: Vec<_> = table.lines().collect();
        assert!(lines[0].contains("2 vCPUs and 256 MiB with the load cpu"), "{table}");
        assert!(lines[4].ends_with("knee, last good") && lines[5].contains("300 ms"), "{table}");
        assert!(table.contains("ended <badly>") && table.contains("up to 1000.0 of its"), "{table}");

        let json: serde_json::Value = serde_json::from_str(&report.json()).unwrap();
        assert_eq!((&json["knee_vms"], &json["good_vms"]), (&2.into(), &2.into()));
        assert_eq!(json["steps"][2]["latency_p99_seconds"], 0.3);
        assert_eq!(json["load"], "cpu");

        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("a/b");
        prepare(&out).unwrap();
        report.write(&out).unwrap();
        let html = fs::read_to_string(out.join(HTML)).unwrap();
        assert!(html.contains("&lt;badly&gt;") && html.contains("<svg") && html.contains("class=\"knee\""));
        assert!(fs::read_to_string(out.join(SVG)).unwrap().contains("knee"));
        assert_eq!(fs::read_to_string(out.join(JSON)).unwrap(), report.json());
    }

    #[test]
    fn a_directory_that_cannot_be_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = prepare(&file.path().join("x")).unwrap_err().to_string();
        assert!(error.contains(file.path().to_str().unwrap()), "{error}");
    }

    #[test]
    fn arguments_that_make_no_sense_are_refused() {
        for (option, value) in [
            ("--vms", "4..1"),
            ("--cpus-per-vm", "0"),
            ("--memory-per-vm", "1M"),
            ("--load", "disk"),
            ("--seconds", "0"),
            ("--latency", "0"),
            ("--engine", "bochs"),
        ] {
            let error = Cli::try_parse_from(["berth", "rehearse", option, value]).unwrap_err().to_string();
            assert!(error.contains(value), "{error}");
        }
        let given = arguments(&["--vms", "2,3", "--latency", "5"]);
        assert_eq!((given.vms.steps(), given.latency, given.memory_per_vm), (&[2, 3][..], 5, 256 << 20));
    }
}

//! The report.

use super::{Results, Side};
use crate::bench::statistics::Spread;

/// Prints a table: medians with least and most, and how many times as good as QEMU Berth is.
pub fn print(results: &Results) {
    let mut jobs: Vec<&str> = results.keys().map(|(job, _)| job.as_str()).collect();
    jobs.dedup();
    println!("| job | QEMU | Berth | Berth : QEMU | CPU, QEMU | CPU, Berth | Berth : QEMU |");
    println!("|---|---|---|---|---|---|---|");
    for job in jobs {
        let figures = |side| results.get(&(job.to_owned(), side));
        let (qemu, berth) = (figures(Side::Qemu), figures(Side::Berth));
        let rates = [qemu, berth].map(|f| f.and_then(|f| Spread::of(&f.rates)));
        let costs = [qemu, berth].map(|f| f.and_then(|f| Spread::of(&f.costs)));
        let (rate_unit, cost_unit) =
            if job.starts_with("disk") { ("1/s", "µs") } else { ("Mbit/s", "µs/MB") };
        println!(
            "| {job} | {} | {} | {} | {} | {} | {} |",
            show(rates[0], rate_unit),
            show(rates[1], rate_unit),
            ratio(rates[1], rates[0]),
            show(costs[0], cost_unit),
            show(costs[1], cost_unit),
            ratio(costs[0], costs[1]),
        );
    }
    println!("\nMedian (least to most). CPU time is that of the VM's process, for each request or megabyte.");
}

fn show(spread: Option<Spread>, unit: &str) -> String {
    let number = |n: f64| if n < 100.0 { format!("{n:.1}") } else { format!("{n:.0}") };
    spread.map_or_else(String::new, |s| {
        format!("{} {unit} ({}–{})", number(s.median), number(s.least), number(s.most))
    })
}

/// How many times as good the first is, where more is better.
fn ratio(ours: Option<Spread>, theirs: Option<Spread>) -> String {
    match (ours, theirs) {
        (Some(ours), Some(theirs)) if theirs.median > 0.0 => format!("{:.2}", ours.median / theirs.median),
        _ => String::new(),
    }
}

//! Where more VMs bring no more work, and where they begin to do harm.

use berth_agent_protocol::load::Kind;

use super::measure::Step;

/// Throughput within this part of the best counts as just as good: as much as two runs differ by.
const AS_GOOD: f64 = 0.9;
/// Percent of the time in which something waited for memory from which on the host is short of it.
const MEMORY_PRESSURE: f64 = 10.0;

/// What the steps say.
#[derive(Clone, Debug, PartialEq)]
pub struct Judgement {
    /// The first step whose throughput is as good as the best. None if it still grows at the last.
    pub knee: Option<usize>,
    /// The last step at which nothing is bad. None if there is none.
    pub good: Option<usize>,
    /// What is bad at the next.
    pub bad: Option<String>,
}

/// Judges steps, from few VMs to many; `latency` is the longest that 99 of 100 requests may take, in seconds.
pub fn judge(steps: &[Step], latency: f64) -> Judgement {
    let best = steps.iter().map(|step| step.total_per_second).fold(0.0, f64::max);
    let first_as_good = steps.iter().position(|step| step.total_per_second >= best * AS_GOOD);
    let still_grows = first_as_good.is_some_and(|i| i + 1 == steps.len());
    let harms: Vec<Option<String>> =
        steps.iter().enumerate().map(|(i, step)| harm(steps, i, step, latency)).collect();
    // What is bad at a step and not with more VMs came from something else.
    let good = harms.iter().rposition(Option::is_none);
    let next = good.map_or(0, |i| i + 1);
    Judgement {
        knee: first_as_good.filter(|_| !still_grows && best > 0.0),
        good,
        bad: harms.into_iter().nth(next).flatten(),
    }
}

fn harm(steps: &[Step], i: usize, step: &Step, latency: f64) -> Option<String> {
    if step.errors > 0 {
        return Some(format!("guests have seen {} wrong results", step.errors));
    }
    // A step is only worse than those with fewer VMs.
    let before = steps.iter().take(i).map(|s| s.total_per_second).fold(0.0, f64::max);
    if step.total_per_second < before * AS_GOOD {
        let percent = 100.0 - step.total_per_second / before * 100.0;
        return Some(format!("all VMs together do {percent:.0} % less than fewer VMs did"));
    }
    if step.latency_p99_seconds > latency {
        return Some(format!("one of 100 requests takes longer than {}", millis(step.latency_p99_seconds)));
    }
    let pressure = step.pressure_memory_percent.filter(|p| *p > MEMORY_PRESSURE);
    pressure.map(|p| format!("something waits for memory in {p:.0} % of the time"))
}

/// Seconds as people read them.
pub fn millis(seconds: f64) -> String {
    match seconds * 1000.0 {
        ms if ms < 10.0 => format!("{ms:.2} ms"),
        ms if ms < 1000.0 => format!("{ms:.0} ms"),
        ms => format!("{:.1} s", ms / 1000.0),
    }
}

/// `n` VMs and their ratio.
fn at(step: &Step) -> String {
    let s = if step.vms == 1 { "" } else { "s" };
    format!("{} VM{s} ({:.1} vCPUs for each host CPU)", step.vms, step.cpu_ratio)
}

/// What to do, in a few sentences.
pub fn advice(steps: &[Step], judgement: &Judgement, load: Kind) -> String {
    let Some(last) = steps.last() else { return "Nothing was measured.".to_owned() };
    let knee = match judgement.knee.and_then(|i| steps.get(i)) {
        Some(step) => {
            format!("The knee is at {}: more VMs do no more work, and each gets less. ", at(step))
        }
        None => format!("There is no knee up to {}: with more VMs more work is done. ", at(last)),
    };
    let good = judgement.good.and_then(|i| steps.get(i));
    match (good, &judgement.bad) {
        (Some(good), None) => format!(
            "{knee}Up to {}, where it ended, the host does as much as ever and 99 of 100 requests take at most {}: \
             for guests with the load {load} this ratio is safe here, and what each gets is what must be enough.",
            at(good),
            millis(good.latency_p99_seconds),
        ),
        (Some(good), Some(bad)) => {
            let worse = judgement.good.and_then(|i| steps.get(i + 1)).unwrap_or(last);
            format!(
                "{knee}At {} {bad}: for guests with the load {load} stay at {} or below on this host.",
                at(worse),
                at(good)
            )
        }
        (None, bad) => {
            let bad = bad.as_deref().unwrap_or("nothing works");
            format!(
                "{knee}With {} already {bad}: this host has no room for guests with the load {load}.",
                at(steps.first().unwrap_or(last))
            )
        }
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub fn step(vms: u16, total: f64, p99: f64) -> Step {
        Step {
            vms,
            cpu_ratio: f64::from(vms),
            memory_ratio: f64::from(vms) / 100.0,
            seconds: 10.0,
            total_per_second: total,
            vm_per_second: total / f64::from(vms),
            least_per_second: total / f64::from(vms) * 0.9,
            most_per_second: total / f64::from(vms) * 1.1,
            latency_p50_seconds: p99 / 4.0,
            latency_p99_seconds: p99,
            requests: 200,
            steal_percent: Some(f64::from(vms)),
            pressure_cpu_percent: Some(50.0),
            pressure_memory_percent: None,
            pressure_io_percent: Some(0.0),
            resident_bytes: u64::from(vms) << 26,
            stored_bytes: 0,
            others_cpus: Some(0.0),
            errors: 0,
        }
    }

    #[test]
    fn the_knee_is_where_throughput_ends_to_grow() {
        let steps = [step(1, 50.0, 0.001), step(2, 95.0, 0.002), step(4, 100.0, 0.01), step(8, 98.0, 0.05)];
        let judgement = judge(&steps, 0.1);
        assert_eq!(judgement, Judgement { knee: Some(1), good: Some(3), bad: None });
        let text = advice(&steps, &judgement, Kind::Cpu);
        assert!(text.contains("knee is at 2 VMs (2.0") && text.contains("Up to 8 VMs"), "{text}");
    }

    #[test]
    fn throughput_that_still_grows_has_no_knee() {
        let steps = [step(1, 50.0, 0.001), step(2, 100.0, 0.001)];
        let judgement = judge(&steps, 0.1);
        assert_eq!((judgement.knee, judgement.good), (None, Some(1)));
        assert!(advice(&steps, &judgement, Kind::Idle).contains("no knee up to 2 VMs"));
        assert_eq!(judge(&[step(1, 5.0, 0.1)], 1.0).knee, None, "one step tells nothing");
    }

    #[test]
    fn what_is_bad_ends_what_is_good() {
        let slow = [step(1, 50.0, 0.001), step(2, 50.0, 0.05), step(4, 50.0, 0.2)];
        let judgement = judge(&slow, 0.1);
        assert_eq!((judgement.knee, judgement.good), (Some(0), Some(1)));
        let text = advice(&slow, &judgement, Kind::Mixed);
        assert!(text.contains("At 4 VMs") && text.contains("200 ms") && text.contains("stay at 2"), "{text}");

        let less = [step(1, 50.0, 0.001), step(2, 100.0, 0.001), step(4, 80.0, 0.001)];
        let judgement = judge(&less, 0.1);
        assert_eq!(judgement.good, Some(1));
        assert!(judgement.bad.unwrap().contains("20 % less"));

        let mut short = [step(1, 50.0, 0.001), step(2, 100.0, 0.001)];
        short[1].pressure_memory_percent = Some(30.0);
        assert!(judge(&short, 0.1).bad.unwrap().contains("30 %"));
        short[0].errors = 1;
        let judgement = judge(&short, 0.1);
        assert_eq!(judgement.good, None);
        assert!(judgement.bad.as_ref().unwrap().contains("1 wrong"));
        assert!(advice(&short, &judgement, Kind::Memory).contains("no room"));
        assert_eq!(advice(&[], &judge(&[], 0.1), Kind::Cpu), "Nothing was measured.");
    }

    #[test]
    fn what_is_bad_only_with_fewer_vms_is_noise() {
        let steps = [step(1, 50.0, 0.5), step(2, 100.0, 0.01), step(4, 100.0, 0.5), step(8, 100.0, 0.6)];
        let judgement = judge(&steps, 0.1);
        assert_eq!(judgement.good, Some(1));
        assert!(judgement.bad.unwrap().contains("500 ms"));
    }

    #[test]
    fn times_are_readable() {
        assert_eq!([0.0001, 0.0123, 0.9, 2.34].map(millis), ["0.10 ms", "12 ms", "900 ms", "2.3 s"]);
    }
}

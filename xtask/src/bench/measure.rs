//! How the values come about: guests and programs are run, and their lines are read with the times at which they
//! came.
//!
//! Guests with one vCPU are measured in CPU time: of the whole VM process, and on the host of the program and its
//! children, which stay on one CPU. Other than elapsed time it hardly depends on what else the host does. Where
//! there are more vCPUs, elapsed time counts.

use std::thread;
use std::time::{Duration, Instant};

use super::debian::Debian;
use super::guest::Files;
use super::process::{Interrupt, Line, Process, Times};
use super::sides::{Emulator, Side};
use super::works::Work;

/// So long a guest is left alone before its memory and CPU time are looked at.
const SETTLING: Duration = Duration::from_secs(5);
/// So long an idle guest's CPU time is counted.
const IDLE: Duration = Duration::from_secs(10);
/// What the guest prints when its first user program has run.
const READY: &str = "bench end ready";
/// What Debian's login begins with.
const ISSUE: &str = "Debian GNU/Linux";

/// How a piece of work went.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Seconds for as much as [`Work::count`] says.
    Took(f64),
    /// This side cannot do it, and need not.
    Skipped(String),
    /// It went wrong and is tried once more.
    Again(String),
    /// It went wrong.
    Failed(String),
}

/// What a line of `guest/bench` says.
#[derive(Debug, PartialEq)]
enum Said<'a> {
    Begin(&'a str),
    /// With the CPU time that the program itself has seen.
    End(&'a str, f64),
    Skipped(&'a str, &'a str),
    Failed(&'a str, &'a str),
}

fn parse(line: &str) -> Option<Said<'_>> {
    let (what, rest) = line.strip_prefix("bench ")?.split_once(' ')?;
    match what {
        "begin" => Some(Said::Begin(rest)),
        "end" => {
            let (name, seconds) = rest.split_once(' ')?;
            Some(Said::End(name, seconds.parse().ok().filter(|s: &f64| s.is_finite())?))
        }
        "skipped" => rest.split_once(": ").map(|(name, reason)| Said::Skipped(name, reason)),
        "failed" => rest.split_once(": ").map(|(name, reason)| Said::Failed(name, reason)),
        _ => None,
    }
}

/// Does `work` with so many CPUs; `record` gets each outcome as it comes. Work that ends the guest, or keeps it
/// silent, has failed, and the rest is done in another guest. QEMU gets a second chance: on a busy host its guests
/// were seen silent for minutes in work that they usually do in seconds, which is not what is measured.
///
/// # Errors
/// A text when a guest or program cannot be started, does nothing, or ends badly after all work.
pub fn work(
    side: &Side,
    cpus: u32,
    work: &[Work],
    files: &Files,
    interrupt: &Interrupt,
    record: &mut dyn FnMut(&Work, Outcome),
) -> Result<(), String> {
    let mut todo = work.to_vec();
    let mut again: Vec<Work> = Vec::new();
    while !todo.is_empty() {
        let before = todo.len();
        let mut process = Process::start(&mut side.program(files, cpus, &todo), interrupt)?;
        let mut begun: Option<(Work, Times)> = None;
        let ending = loop {
            let line = match process.line() {
                Ok(Some(line)) => line,
                Ok(None) => break process.end().map(|_| ()),
                Err(reason) => break Err(reason),
            };
            if let Some((work, outcome)) = heard(side, cpus, &line, &todo, &mut begun) {
                todo.retain(|w| *w != work);
                record(&work, outcome);
            }
        };
        if interrupt.requested() {
            return ending.and(Err("interrupted".to_owned()));
        }
        if let Some((work, _)) = begun {
            let reason = ending.as_ref().err().cloned();
            let reason = reason.unwrap_or_else(|| "the guest ended during it".to_owned());
            if matches!(side, Side::Guest(Emulator::Qemu { .. })) && !again.contains(&work) {
                record(&work, Outcome::Again(reason));
                again.push(work);
                continue;
            }
            todo.retain(|w| *w != work);
            record(&work, Outcome::Failed(reason));
        } else if todo.is_empty() || todo.len() == before {
            ending?;
        }
        if todo.len() == before {
            return Err("no work was done".to_owned());
        }
    }
    Ok(())
}

/// Takes account of a line; gives the outcome if it ends a piece of work.
fn heard(
    side: &Side,
    cpus: u32,
    line: &Line,
    todo: &[Work],
    begun: &mut Option<(Work, Times)>,
) -> Option<(Work, Outcome)> {
    let known = |name: &str| todo.iter().find(|w| w.name == name).copied();
    match parse(&line.text)? {
        Said::Begin(name) => {
            *begun = known(name).map(|work| (work, line.times));
            None
        }
        Said::End(name, own) => {
            let (work, since) = begun.take().filter(|(work, _)| work.name == name)?;
            let seconds = match side {
                _ if cpus > 1 => line.times.wall - since.wall,
                Side::Native => own,
                Side::Guest(_) => line.times.cpu - since.cpu,
            };
            let times_as_much = f64::from(side.count(&work)) / f64::from(work.count);
            Some((work, Outcome::Took(seconds / times_as_much)))
        }
        Said::Skipped(name, reason) => {
            *begun = None;
            Some((known(name)?, Outcome::Skipped(reason.to_owned())))
        }
        Said::Failed(name, reason) => {
            *begun = None;
            Some((known(name)?, Outcome::Failed(reason.to_owned())))
        }
    }
}

/// Boots a guest that does nothing: the times when its first program ran, and at its end.
///
/// # Errors
/// A text when no program runs, or the guest does not end well.
pub fn boot(emulator: &Emulator, files: &Files, interrupt: &Interrupt) -> Result<(Times, Times), String> {
    let mut process = Process::start(&mut emulator.program(files, 1, "ready=1"), interrupt)?;
    let mut ready = None;
    while let Some(line) = process.line()? {
        if line.text.starts_with(READY) {
            ready = Some(line.times);
        }
    }
    let end = process.end()?;
    Ok((ready.ok_or("no user program was started")?, end))
}

/// Boots Debian from its disk: the times when it shows its login.
///
/// # Errors
/// A text when it does not get there.
pub fn login(emulator: &Emulator, debian: &Debian, interrupt: &Interrupt) -> Result<Times, String> {
    let mut process = Process::start(&mut emulator.debian(debian), interrupt)?;
    loop {
        match process.line()? {
            // What getty prints before it asks for a name (agetty(8), issue(5)).
            Some(line) if line.text.starts_with(ISSUE) && line.text.ends_with("ttyS0") => {
                return Ok(line.times);
            }
            Some(_) => {}
            None => return Err("Debian ended before it showed its login".to_owned()),
        }
    }
}

/// Boots the default guest as it is to its shell and leaves it alone: resident memory in MB, CPU time in percent
/// of a core.
///
/// # Errors
/// A text when it does not come up.
pub fn idle(emulator: &Emulator, files: &Files, interrupt: &Interrupt) -> Result<[f64; 2], String> {
    let mut process = Process::start(&mut emulator.default_guest(files), interrupt)?;
    loop {
        match process.line()? {
            // Its init says so before it starts the shell.
            Some(line) if line.text.starts_with("Berth guest: Linux") => break,
            Some(_) => {}
            None => return Err("no user program was started".to_owned()),
        }
    }
    wait(SETTLING, interrupt)?;
    let (before, since) = (process.cpu()?, Instant::now());
    wait(IDLE, interrupt)?;
    let cpu = (process.cpu()? - before) / since.elapsed().as_secs_f64();
    Ok([process.resident()? / 1e6, cpu * 100.0])
}

fn wait(time: Duration, interrupt: &Interrupt) -> Result<(), String> {
    let begun = Instant::now();
    while begun.elapsed() < time {
        if interrupt.requested() {
            return Err("interrupted".to_owned());
        }
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::works::Group;
    use super::*;

    const SIEVE: Work = Work { name: "sieve", group: Group::Integer, count: 10, native: 4, tcg: 5 };

    fn line(text: &str, wall: f64, cpu: f64) -> Line {
        Line { text: text.to_owned(), times: Times { wall, cpu } }
    }

    #[test]
    fn lines_of_the_program_are_understood_and_others_ignored() {
        assert_eq!(parse("bench begin sieve"), Some(Said::Begin("sieve")));
        assert_eq!(parse("bench end sieve 1.250000"), Some(Said::End("sieve", 1.25)));
        let skipped = parse("bench skipped sha256-ni: the CPU has no SHA extensions");
        assert_eq!(skipped, Some(Said::Skipped("sha256-ni", "the CPU has no SHA extensions")));
        assert_eq!(
            parse("bench failed dd: dd: exit status: 1"),
            Some(Said::Failed("dd", "dd: exit status: 1"))
        );
        for other in
            ["", "bench", "bench end sieve", "bench end sieve soon", "bench end sieve inf", "[ 1.0] x"]
        {
            assert_eq!(parse(other), None, "{other:?}");
        }
    }

    #[test]
    fn seconds_are_for_the_same_count_on_all_sides() {
        let tcg = Side::Guest(Emulator::Qemu { program: "qemu".into(), version: String::new() });
        let berth =
            Emulator::Berth { program: "berth".into(), revision: String::new(), engine: "soft".to_owned() };
        let berth = Side::Guest(berth);
        // 40 at the host, 2 at TCG, 10 at Berth, which the seconds are for.
        let expected = [
            (Side::Native, 1, 0.5),
            (Side::Native, 2, 1.0),
            (tcg.clone(), 1, 15.0),
            (tcg, 2, 20.0),
            (berth, 1, 3.0),
        ];
        for (side, cpus, seconds) in expected {
            let mut begun = None;
            let begin = heard(&side, cpus, &line("bench begin sieve", 1.0, 1.0), &[SIEVE], &mut begun);
            assert_eq!((begin, begun.is_some()), (None, true));
            let end = heard(&side, cpus, &line("bench end sieve 2.0", 5.0, 4.0), &[SIEVE], &mut begun);
            assert_eq!((end, begun.is_some()), (Some((SIEVE, Outcome::Took(seconds))), false));
        }
    }

    #[test]
    fn what_was_not_ordered_or_did_not_begin_has_no_time() {
        let mut begun = None;
        for text in ["bench end sieve 2.0", "bench begin sort", "bench end sort 1.0", "bench failed sort: x"]
        {
            let outcome = heard(&Side::Native, 1, &line(text, 1.0, 1.0), &[SIEVE], &mut begun);
            assert_eq!((outcome, begun.is_some()), (None, false), "{text}");
        }
    }

    /// Ends during the sieve; does everything else that its last argument orders.
    const CRASHES: &str = r#"#!/bin/sh
for last; do :; done
for order in $last; do
    case $order in
        *sieve=*) echo "bench begin sieve"; exit 3 ;;
        *sort=*) echo "bench begin sort"; echo "bench end sort 0.5" ;;
    esac
done
"#;

    fn outcomes(
        side: &Side,
        files: &Files,
        all: &[Work],
    ) -> (Result<(), String>, Vec<(&'static str, Outcome)>) {
        let mut outcomes = Vec::new();
        let mut record = |work: &Work, outcome| outcomes.push((work.name, outcome));
        let result = work(side, 1, all, files, &Interrupt::default(), &mut record);
        (result, outcomes)
    }

    #[test]
    fn work_that_ends_the_guest_has_failed_and_the_rest_is_done() {
        let sort = Work { name: "sort", native: 1, ..SIEVE };
        let files = Files::with_script(CRASHES);
        let program = files.program.clone();
        let berth =
            Emulator::Berth { program: program.clone(), revision: String::new(), engine: "soft".into() };
        let (result, outcomes_of_berth) = outcomes(&Side::Guest(berth), &files, &[SIEVE, sort]);
        assert_eq!(result, Ok(()));
        let [("sieve", Outcome::Failed(reason)), ("sort", Outcome::Took(_))] = &outcomes_of_berth[..] else {
            panic!("{outcomes_of_berth:?}");
        };
        assert!(reason.contains("exit status: 3"), "{reason}");

        let qemu = Side::Guest(Emulator::Qemu { program, version: String::new() });
        let (result, outcomes_of_qemu) = outcomes(&qemu, &files, &[SIEVE, sort]);
        assert_eq!(result, Ok(()));
        assert!(
            matches!(
                outcomes_of_qemu[..],
                [("sieve", Outcome::Again(_)), ("sieve", Outcome::Failed(_)), ("sort", Outcome::Took(_))]
            ),
            "{outcomes_of_qemu:?}"
        );
    }

    #[test]
    fn a_guest_that_does_nothing_is_an_error() {
        let files = Files::with_script("#!/bin/sh\nexit 0\n");
        let (result, outcomes) = outcomes(&Side::Native, &files, &[SIEVE]);
        assert_eq!((result, outcomes.len()), (Err("no work was done".to_owned()), 0));
    }
}

//! The long random mode: single forms and sequences from ever new seeds, on several threads.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fastrand::Rng;
use iced_x86::Code;

use crate::case::CodeMode;
use crate::report::{CaseId, Factory, check};
use crate::runner::{Runner, RunnerError, Verdict};

/// What to do.
#[derive(Clone, Copy, Debug)]
pub struct FuzzOptions {
    /// When to stop.
    pub duration: Duration,
    /// Seed of everything.
    pub seed: u64,
    /// Number of threads, at least 1.
    pub jobs: usize,
    /// Stop after this many failures.
    pub most_failures: usize,
}

/// What was done so far.
#[derive(Debug, Default)]
struct Counters {
    cases: AtomicU64,
    undecided: AtomicU64,
    completed: AtomicU64,
}

/// Sums up a run.
#[derive(Clone, Debug, Default)]
pub struct FuzzReport {
    /// Cases that were compared.
    pub cases: u64,
    /// Cases that the host gives no repeatable outcome for.
    pub undecided: u64,
    /// Cases that came to their end (INT3) instead of a fault.
    pub completed: u64,
    /// Texts of the differences.
    pub failures: Vec<String>,
}

/// Runs random cases until the time is over. `print`: gets progress lines and failures.
///
/// # Errors
/// [`RunnerError`] when the host cannot run cases.
pub fn fuzz(options: &FuzzOptions, print: &(dyn Fn(&str) + Sync)) -> Result<FuzzReport, RunnerError> {
    let factory = Factory::default();
    let forms64 = factory.catalogue.compared(CodeMode::Bits64);
    let forms32 = factory.catalogue.compared(CodeMode::Bits32);
    let counters = Counters::default();
    let failures = Mutex::new(Vec::new());
    let end = AtomicBool::new(false);
    let start = Instant::now();
    // All children are made before there are threads.
    let runners = (0..options.jobs.max(1)).map(|_| Runner::new()).collect::<Result<Vec<_>, _>>()?;
    std::thread::scope(|scope| {
        for (job, mut runner) in runners.into_iter().enumerate() {
            let (factory, counters, failures, end) = (&factory, &counters, &failures, &end);
            let (forms64, forms32) = (&forms64, &forms32);
            scope.spawn(move || {
                let mut rng = Rng::with_seed(options.seed.wrapping_add(job as u64));
                while !end.load(Ordering::Relaxed) {
                    let id = random_id(&mut rng, forms64, forms32);
                    let Some(case) = factory.make(&id) else { continue };
                    counters.cases.fetch_add(1, Ordering::Relaxed);
                    match check(&mut runner, &id, &case) {
                        Ok(Verdict::Same(vector)) => {
                            let done = u64::from(vector == berth_cpu::bits::vector::BP);
                            counters.completed.fetch_add(done, Ordering::Relaxed);
                        }
                        Ok(_) => {
                            counters.undecided.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(text) => {
                            print(&text);
                            let Ok(mut list) = failures.lock() else { return };
                            list.push(text);
                            if list.len() >= options.most_failures {
                                end.store(true, Ordering::Relaxed);
                            }
                        }
                    }
                }
            });
        }
        let mut next = Duration::from_secs(10);
        while !end.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(100));
            let now = start.elapsed();
            if now >= options.duration {
                end.store(true, Ordering::Relaxed);
            }
            if now >= next {
                next += Duration::from_secs(10);
                let cases = counters.cases.load(Ordering::Relaxed);
                let failed = failures.lock().map_or(0, |f| f.len());
                let rate = cases / now.as_secs().max(1);
                print(&format!(
                    "{:>5} s  seed {}  {cases} cases ({rate}/s), {} to the end, {} undecided, {failed} different",
                    now.as_secs(),
                    options.seed,
                    counters.completed.load(Ordering::Relaxed),
                    counters.undecided.load(Ordering::Relaxed),
                ));
            }
        }
    });
    Ok(FuzzReport {
        cases: counters.cases.into_inner(),
        undecided: counters.undecided.into_inner(),
        completed: counters.completed.into_inner(),
        failures: failures.into_inner().unwrap_or_default(),
    })
}

fn random_id(rng: &mut Rng, forms64: &[Code], forms32: &[Code]) -> CaseId {
    let mode = if rng.u8(..5) == 0 { CodeMode::Bits32 } else { CodeMode::Bits64 };
    let forms = if mode == CodeMode::Bits64 { forms64 } else { forms32 };
    let form = (rng.u8(..3) == 0).then(|| forms.get(rng.usize(..forms.len().max(1))).copied()).flatten();
    CaseId { form: form.map(|f| (f, rng.bool())), mode, seed: rng.u64(..) }
}

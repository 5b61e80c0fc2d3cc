//! `berth rehearse` with guests that boot: what it measures, what it writes, and that no guest outlives it.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use berth_guest_image::GuestImageError;
use serde_json::Value;

/// Generous: the tests may share a small machine with others.
const LIMIT: Duration = Duration::from_secs(120);

/// The command, and a runtime directory for its VMs. `None`: the host cannot do this test, and was told so.
struct User {
    berth: PathBuf,
    directory: tempfile::TempDir,
}

impl User {
    fn new() -> Option<Self> {
        let cache = berth_guest_image::cache_directory().unwrap();
        match berth_guest_image::default_guest(&cache) {
            Ok(_) => {}
            Err(e @ GuestImageError::NoApt { .. }) => {
                println!("skipped: {e}");
                return None;
            }
            Err(e) => panic!("{e}"),
        }
        let berth = berth_tests_boot::berth().unwrap_or_else(|e| panic!("{e}"));
        Some(Self { berth, directory: tempfile::tempdir().unwrap() })
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.berth);
        command.args(arguments).env("XDG_RUNTIME_DIR", self.directory.path()).stdin(Stdio::null());
        command
    }

    fn rehearse(&self, arguments: &[&str]) -> Child {
        let fixed = ["rehearse", "--engine", "soft", "--memory-per-vm", "128M", "--json"];
        let mut command = self.command(&[&fixed[..], arguments].concat());
        command.arg("--out").arg(self.out());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    fn out(&self) -> PathBuf {
        self.directory.path().join("report")
    }

    /// Names of the VMs that live.
    fn vms(&self) -> Vec<String> {
        let output = self.command(&["ps", "--json"]).output().unwrap();
        let list: Value = serde_json::from_slice(&output.stdout).unwrap();
        let names = list.as_array().unwrap().iter().map(|vm| vm["name"].as_str().unwrap().to_owned());
        names.collect()
    }
}

/// Reads what `child` says until a line has `text`.
fn wait_for_line(child: &mut Child, text: &str) -> impl Read + use<> {
    let mut said = BufReader::new(child.stderr.take().unwrap());
    let mut all = String::new();
    while !all.lines().last().unwrap_or_default().contains(text) {
        assert!(said.read_line(&mut all).unwrap() > 0, "it ended without {text:?}: {all}");
    }
    said
}

fn signal(child: &Child, signal: &str) {
    let status = Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
    assert!(status.success());
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn steps_are_measured_and_an_interrupt_leaves_their_report_and_no_guest() {
    let Some(user) = User::new() else { return };
    let mut rehearsal = user.rehearse(&["--vms", "1,2,3", "--seconds", "2", "--load", "lock"]);
    let _stderr = wait_for_line(&mut rehearsal, "step 3 of 3");
    signal(&rehearsal, "-INT");
    let mut printed = String::new();
    rehearsal.stdout.take().unwrap().read_to_string(&mut printed).unwrap();
    assert_eq!(rehearsal.wait().unwrap().code(), Some(130));
    assert_eq!(user.vms(), Vec::<String>::new());

    let report: Value = serde_json::from_str(&printed).unwrap();
    assert_eq!(report, read_json(&user.out().join("rehearsal.json")));
    assert_eq!(report["ended"], "interrupted");
    let steps = report["steps"].as_array().unwrap();
    assert_eq!(steps.len(), 2, "{printed}");
    for (step, vms) in steps.iter().zip([1_u64, 2]) {
        let number = |name: &str| step[name].as_f64().unwrap_or_else(|| panic!("{name}: {printed}"));
        assert_eq!(step["vms"], vms);
        assert_eq!(step["errors"], 0, "{printed}");
        assert!(number("least_per_second") > 0.0 && number("seconds") >= 2.0, "{printed}");
        assert!(number("total_per_second") >= number("most_per_second"), "{printed}");
        assert!(number("requests") > 0.0 && number("latency_p50_seconds") > 0.0, "{printed}");
        assert!(number("latency_p99_seconds") >= number("latency_p50_seconds"), "{printed}");
        // A guest that has booted has touched some of its memory, and no more than all.
        let resident = number("resident_bytes") / vms as f64;
        assert!((32e6..400e6).contains(&resident), "{printed}");
    }
    let page = std::fs::read_to_string(user.out().join("rehearsal.html")).unwrap();
    assert!(page.contains("<svg") && page.contains("interrupted"));
}

#[test]
fn guests_die_with_a_rehearsal_that_is_killed() {
    let Some(user) = User::new() else { return };
    let mut rehearsal = user.rehearse(&["--vms", "1", "--seconds", "600", "--load", "cpu"]);
    let _stderr = wait_for_line(&mut rehearsal, "measuring");
    assert_eq!(user.vms().len(), 1);
    signal(&rehearsal, "-KILL");
    rehearsal.wait().unwrap();
    let deadline = Instant::now() + LIMIT;
    while !user.vms().is_empty() {
        assert!(Instant::now() < deadline, "the guest lives on");
        thread::sleep(Duration::from_millis(50));
    }
}

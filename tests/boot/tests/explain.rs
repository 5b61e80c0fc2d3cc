//! `berth explain` and `berth map` beside what the guest's own kernel says.

use std::collections::HashMap;
use std::process::Command;
use std::time::Duration;

use berth_tests_boot::{Guest, Setup, set_up_or_skip};
use serde_json::Value;

/// Generous: the tests may share a small machine with others.
const LIMIT: Duration = Duration::from_secs(150);
const MEMORY: u64 = 256 << 20;

/// `None`: the host cannot do this test, and was told so.
fn setup() -> Option<Setup> {
    set_up_or_skip(env!("CARGO_TARGET_TMPDIR"), &[])
}

/// What `berth` prints; it must succeed.
fn berth(setup: &Setup, arguments: &[&str]) -> String {
    let output = Command::new(&setup.berth).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{arguments:?}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn json(setup: &Setup, arguments: &[&str]) -> Value {
    serde_json::from_str(&berth(setup, &[arguments, &["--json"]].concat())).unwrap()
}

fn hex(value: &Value) -> u64 {
    let text = value.as_str().unwrap_or_else(|| panic!("{value} is no address"));
    u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap()
}

/// A page of the guest's program.
#[derive(Debug)]
struct Page {
    pid: String,
    address: String,
    frame: u64,
}

/// Runs `programs/pagemap.c` in a guest, and returns what it says of its pages by their names.
fn pages_of_program(guest: &mut Guest) -> HashMap<String, Page> {
    guest.wait_for_line("all said").unwrap_or_else(|e| panic!("{e}"));
    let lines = guest.lines().iter().filter_map(|l| l.strip_prefix("where: "));
    let pages = lines.map(|line| {
        let [what, _, pid, _, address, _, frame]: [&str; 7] =
            line.split_whitespace().collect::<Vec<_>>().try_into().unwrap();
        let frame = u64::from_str_radix(frame.trim_start_matches("0x"), 16).unwrap();
        (what.to_owned(), Page { pid: pid.to_owned(), address: address.to_owned(), frame })
    });
    pages.collect()
}

#[test]
fn explain_agrees_with_the_guests_own_pagemap() {
    let Some(setup) = setup() else { return };
    // Other tests have VMs of the same user.
    let name = format!("explained-{}", std::process::id());
    let arguments = ["--name", &name, "--cpus", "2", "--memory", "256M"];
    let mut guest = Guest::start(&setup.berth, setup.initrd.path(), &arguments, "/tests/pagemap", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    let pages = pages_of_program(&mut guest);

    for what in ["data", "code"] {
        let page = &pages[what];
        assert_ne!(page.frame, 0, "{page:?}");
        let explain = ["explain", &name, &page.address, "--pid", &page.pid];
        let e = json(&setup, &explain);
        assert_eq!(hex(&e["physical"]) >> 12, page.frame, "{what}: {e:#}");
        assert_eq!(e["space"]["process"]["name"], "pagemap", "{e:#}");
        assert_eq!(e["levels"].as_array().map(Vec::len), Some(4), "{e:#}");
        assert_eq!(e["place"]["kind"], "ram", "{e:#}");
        assert_eq!(e["place"]["state"], "resident", "{e:#}");
        assert_eq!(e["fault"], Value::Null, "{e:#}");
        assert_eq!(e["host"]["pid"], guest.process(), "{e:#}");
        assert_eq!(e["host"]["page"]["present"], true, "{e:#}");
        // The same through its page tables, and a paused VM says the same.
        let cr3 = e["space"]["cr3"].as_str().unwrap();
        berth(&setup, &["pause", &name]);
        let by_cr3 = json(&setup, &["explain", &name, &page.address, "--cr3", cr3]);
        berth(&setup, &["resume", &name]);
        assert_eq!(by_cr3["physical"], e["physical"]);
        // What is not allowed is a fault.
        let (access, code) = if what == "data" { ("x", "0x15") } else { ("w", "0x7") };
        let e = json(&setup, &[&explain[..], &["--access", access]].concat());
        assert_eq!(e["fault"]["name"], "#PF", "{e:#}");
        assert_eq!(e["fault"]["error_code"], code, "{e:#}");
    }
    let page = &pages["nothing"];
    let e = json(&setup, &["explain", &name, &page.address, "--pid", &page.pid]);
    assert_eq!(e["physical"], Value::Null, "{e:#}");
    assert_eq!(e["fault"]["cr2"].as_str(), Some(page.address.as_str()), "{e:#}");

    // The kernel's own text, through whatever vCPU 1 has in CR3.
    let e = json(&setup, &["explain", &name, "0xffffffff81000000", "--vcpu", "1"]);
    assert_eq!(hex(&e["physical"]), 0x100_0000, "{e:#}");
    let e = json(&setup, &["explain", &name, "0xfec00000", "--physical"]);
    assert_eq!(e["place"]["kind"], "device", "{e:#}");

    let map = json(&setup, &["map", &name]);
    let sum: u64 = map["bytes"].as_object().unwrap().values().filter_map(Value::as_u64).sum();
    assert_eq!(sum, MEMORY, "{}", map["bytes"]);
    assert!(map["bytes"]["resident"].as_u64() > Some(16 << 20), "{}", map["bytes"]);
    for command in [&["explain", &name, "0xffffffff81000000"][..], &["map", &name]] {
        let svg = berth(&setup, &[command, &["--svg", "-"]].concat());
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"), "{svg}");
    }
}

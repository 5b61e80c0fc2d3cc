//! Memory of several VMs: freezing, the keeper, admission. The guests are a few instructions each.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use common::{ECHOES, SLEEPS, User};

mod common;

/// Generous: the tests may share a small machine with others.
const LIMIT: Duration = Duration::from_secs(150);

/// Writes 32 MiB from 2 MiB on (each word is its own address), prints `F`, and for each byte of the serial port verifies
/// all of it and prints `K`, or `B` if a word was wrong.
const FILLS: &[u8] = &[
    0xbf, 0x00, 0x00, 0x20, 0x00, // mov edi, 0x200000
    0xb9, 0x00, 0x00, 0x80, 0x00, // mov ecx, 0x800000
    0x89, 0x3f, 0x83, 0xc7, 0x04, 0x49, 0x75,
    0xf8, // fill: mov [edi], edi; add edi, 4; dec ecx; jnz fill
    0xb0, b'F', 0xba, 0xf8, 0x03, 0x00, 0x00, 0xee, // mov al, 'F'; mov edx, 0x3f8; out dx, al
    0xba, 0xfd, 0x03, 0x00, 0x00, // wait: mov edx, 0x3fd
    0xec, 0xa8, 0x01, 0x74, 0xfb, // poll: in al, dx; test al, 1; jz poll
    0xb2, 0xf8, 0xec, // mov dl, 0xf8; in al, dx
    0xbf, 0x00, 0x00, 0x20, 0x00, // mov edi, 0x200000
    0xb9, 0x00, 0x00, 0x80, 0x00, // mov ecx, 0x800000
    0xb0, b'K', // mov al, 'K'
    0x39, 0x3f, 0x74, 0x02, 0xb0, b'B', // check: cmp [edi], edi; je good; mov al, 'B'
    0x83, 0xc7, 0x04, 0x49, 0x75, 0xf4, // good: add edi, 4; dec ecx; jnz check
    0xee, 0xeb, 0xd8, // out dx, al; jmp wait
];
/// Writes 32 MiB from 2 MiB on, again and again.
const WRITES: &[u8] = &[
    0xbf, 0x00, 0x00, 0x20, 0x00, // again: mov edi, 0x200000
    0xb9, 0x00, 0x00, 0x80, 0x00, // mov ecx, 0x800000
    0x89, 0x3f, 0x83, 0xc7, 0x04, 0x49, 0x75,
    0xf8, // fill: mov [edi], edi; add edi, 4; dec ecx; jnz fill
    0xeb, 0xec, // jmp again
];
const MIB: u64 = 1 << 20;

/// What a VM's console has printed, once `done` says so of it.
fn console(user: &User, name: &str, done: impl Fn(&str) -> bool) -> String {
    let end = Instant::now() + LIMIT;
    loop {
        let printed = user.ok(&["logs", name]);
        if done(&printed) {
            return printed;
        }
        assert!(Instant::now() < end, "{name} prints {printed:?}; {}", user.ok(&["ps"]));
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn type_in(user: &User, name: &str, text: &str) {
    let mut typist = user.command(&["console", "--quit=1", name]);
    let mut typist = typist.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    typist.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    assert!(typist.wait().unwrap().success());
}

/// Freezes a VM; `false`: this host has no cold store, and was told so.
fn freeze(user: &User, name: &str) -> bool {
    let output = user.berth(&["freeze", name]);
    let said = String::from_utf8(output.stderr).unwrap();
    if !output.status.success() {
        assert!(said.contains("cold store needs userfaultfd"), "{said}");
        println!("skipped: {said}");
    }
    output.status.success()
}

/// Rss of a process in bytes.
fn resident(pid: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("Rss:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() << 10
}

/// What a VM says of its memory, beside /proc/PID/smaps_rollup; in all ways of saying it the states add up to the size.
fn agrees_with_the_kernel(user: &User, name: &str) {
    let stats = user.json(&["stats", "--json", name]);
    let pid = user.json(&["inspect", name])[0]["pid"].to_string();
    let memory = &stats["memory"];
    let number = |value: &serde_json::Value| value.as_u64().unwrap();
    let (said, is) = (number(&memory["resident_bytes"]), resident(&pid));
    assert!(said.abs_diff(is) * 100 <= is, "{said} resident, and the kernel says {is}: {stats:#}");
    assert!(number(&memory["guest"]["resident_bytes"]) <= is, "{stats:#}");
    let states = memory["guest"].as_object().unwrap();
    let sum: u64 = states.values().map(number).sum();
    assert_eq!(sum, number(&memory["size_bytes"]));
    let table = user.ok(&["ps", "--memory"]);
    assert!(table.contains("UNTOUCHED") && table.lines().nth(1).unwrap().starts_with(name), "{table}");
    let list = user.json(&["ps", "--json"]);
    assert_eq!(list[0]["stats"]["memory"]["guest"].as_object().unwrap().len(), states.len());
}

#[test]
fn a_frozen_vm_goes_on_when_it_is_used() {
    let user = User::new();
    let store = user.directory.path().join("store");
    fs::create_dir(&store).unwrap();
    user.start_with("one", FILLS, &["--memory", "64M", "--store-dir", store.to_str().unwrap()]);
    console(&user, "one", |printed| printed == "F");
    let memory = || user.json(&["stats", "--json", "one"])["memory"].clone();
    let resident = memory()["guest"]["resident_bytes"].as_u64().unwrap();
    assert!(resident > 32 * MIB);
    agrees_with_the_kernel(&user, "one");
    if !freeze(&user, "one") {
        return;
    }
    assert_eq!(user.state("one"), "frozen");
    let frozen = memory();
    assert!(frozen["guest"]["resident_bytes"].as_u64() < Some(MIB), "{frozen}");
    assert_eq!(frozen["before_freeze_bytes"].as_u64(), Some(resident));
    assert_eq!(frozen["store"]["memory_bytes"], 0, "{frozen}");
    assert!(frozen["store"]["file_bytes"].as_u64() > Some(0), "{frozen}");
    assert!(user.fails(1, &["freeze", "one"]).contains("only a running VM"));
    // Somebody types: the guest goes on where it was, with all that it had.
    type_in(&user, "one", "x");
    assert_eq!(console(&user, "one", |printed| printed.len() > 1), "FK");
    assert_eq!(user.state("one"), "running");
    assert_eq!(memory()["before_freeze_bytes"], serde_json::Value::Null);
    // What its owner has paused is not thawed.
    assert!(freeze(&user, "one"));
    user.ok(&["pause", "one"]);
    assert_eq!(user.state("one"), "paused");
    user.ok(&["thaw", "one"]);
    assert_eq!(user.state("one"), "paused");
    user.ok(&["resume", "one"]);
    assert!(freeze(&user, "one"));
    user.ok(&["thaw", "one"]);
    assert_eq!(user.state("one"), "running");
    // A reserve stays whatever happens.
    user.ok(&["set", "one", "memory.reserve=16M", "memory.priority=3", "memory.limit=48M"]);
    type_in(&user, "one", "x");
    assert_eq!(console(&user, "one", |printed| printed.len() > 2), "FKK");
    assert!(freeze(&user, "one"));
    let frozen = memory();
    let kept = frozen["guest"]["resident_bytes"].as_u64().unwrap();
    assert!((16 * MIB..17 * MIB).contains(&kept), "{frozen}");
    assert_eq!((frozen["priority"].as_u64(), frozen["limit_bytes"].as_u64()), (Some(3), Some(48 * MIB)));
    assert!(user.fails(1, &["set", "one", "memory.limit=1M"]).contains("less than the reserve"));
    user.ok(&["kill", "one"]);
    user.assert_clean();
    assert_eq!(fs::read_dir(store).unwrap().count(), 0);
}

#[test]
fn a_store_directory_must_be_usable() {
    let user = User::new();
    let kernel = common::kernel(&user.directory, SLEEPS);
    let arguments = ["run", "--name", "x", "--store-dir", "/nonexistent", "--kernel"];
    let said = user.fails(1, &[&arguments[..], &[kernel.to_str().unwrap()]].concat());
    assert!(said.contains("no file for guest memory can be made in /nonexistent"), "{said}");
}

/// A keeper that is killed when the test ends.
struct Keeper(Child);

impl Keeper {
    fn start(user: &User, arguments: &[&str], log: &Path) -> Self {
        let log = fs::File::options().create(true).append(true).open(log).unwrap();
        let mut command = user.command(&[&["keeper"], arguments].concat());
        let keeper = Self(command.stdout(log).spawn().unwrap());
        let end = Instant::now() + LIMIT;
        while !user.berth(&["keeper", "status"]).status.success() {
            assert!(Instant::now() < end, "the keeper does not start");
            std::thread::sleep(Duration::from_millis(50));
        }
        keeper
    }

    /// kill -9
    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn cost(vm: &serde_json::Value) -> u64 {
    vm["resident"].as_u64().unwrap() + vm["overhead"].as_u64().unwrap()
}

#[test]
fn the_keeper_takes_what_is_not_used_and_nothing_is_lost() {
    let user = User::new();
    let log = user.directory.path().join("keeper.log");
    let vms =
        [("low", "64M,priority=0"), ("kept", "64M,reserve=40M,priority=1"), ("high", "64M,priority=900")];
    for (name, memory) in vms {
        user.start_with(name, FILLS, &["--memory", memory]);
        console(&user, name, |printed| printed == "F");
    }
    if !freeze(&user, "low") {
        return;
    }
    user.ok(&["thaw", "low"]);
    type_in(&user, "low", "x");
    assert_eq!(console(&user, "low", |printed| printed.len() > 1), "FK");
    assert!(user.fails(1, &["keeper", "status"]).contains("no keeper runs"));

    // At first it only says what it would do.
    let mut keeper = Keeper::start(&user, &["--budget", "100M", "--dry-run"], &log);
    let status = || user.json(&["keeper", "status", "--json"]);
    let until = |what: &str, done: &dyn Fn(&serde_json::Value) -> bool| {
        let end = Instant::now() + LIMIT;
        loop {
            let status = status();
            if done(&status) {
                return status;
            }
            assert!(
                Instant::now() < end,
                "not so: {what}: {status:#}\n{}",
                fs::read_to_string(&log).unwrap()
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    let said = until("says something", &|s| !s["decisions"].as_array().unwrap().is_empty());
    assert!(user.fails(1, &["keeper"]).contains("a keeper runs already"));
    assert_eq!(said["seen"]["vms"].as_array().unwrap().len(), 3);
    let stored = said["seen"]["vms"][2]["stored"].as_u64().unwrap();
    assert_eq!(said["decisions"][0]["vm"], "low", "{said:#}");
    keeper.kill();
    assert!(user.fails(1, &["keeper", "status"]).contains("no keeper runs"));
    let after = user.json(&["stats", "--json", "low"]);
    assert!(after["memory"]["guest"]["stored_bytes"].as_u64().unwrap() <= stored, "{after}");

    // Then it does it.
    let mut keeper = Keeper::start(&user, &["--budget", "100M"], &log);
    let fits = |s: &serde_json::Value| {
        let vms = s["seen"]["vms"].as_array().unwrap();
        vms.len() == 3 && vms.iter().map(cost).sum::<u64>() <= 100 * MIB
    };
    let status_then = until("the budget is kept", &fits);
    let of = |s: &serde_json::Value, name: &str| {
        s["seen"]["vms"].as_array().unwrap().iter().find(|vm| vm["name"] == name).unwrap().clone()
    };
    assert!(of(&status_then, "kept")["resident"].as_u64() >= Some(32 * MIB), "{status_then:#}");
    assert!(of(&status_then, "low")["stored"].as_u64() > Some(10 * MIB), "{status_then:#}");
    let text = user.ok(&["keeper", "status"]);
    assert!(text.contains("VMs cost") && text.contains("low: cold: VMs cost"), "{text}");
    assert!(fs::read_to_string(&log).unwrap().contains("low: cold: VMs cost"));

    // It is killed: the VMs run on, and the next one knows what was done.
    keeper.kill();
    assert_ne!(user.state("high"), "killed");
    let keeper = Keeper::start(&user, &["--budget", "100M"], &log);
    assert!(!status()["decisions"].as_array().unwrap().is_empty());
    for (name, _) in vms {
        let before = user.ok(&["logs", name]).len();
        type_in(&user, name, "x");
        let printed = console(&user, name, |printed| printed.len() > before);
        assert!(printed.ends_with('K') && !printed.contains('B'), "{name}: {printed}");
    }
    drop(keeper);
    vms.iter().for_each(|(name, _)| _ = user.ok(&["kill", name]));
}

#[test]
fn the_keeper_freezes_what_matters_least_and_thaws_it_when_there_is_room() {
    let user = User::new();
    let log = user.directory.path().join("keeper.log");
    let store = user.directory.path().join("store");
    fs::create_dir(&store).unwrap();
    // Both use all that they have, all the time: nothing of it is cold.
    for (name, memory) in [("first", "64M,priority=200"), ("second", "64M,priority=1")] {
        user.start_with(name, WRITES, &["--memory", memory, "--store-dir", store.to_str().unwrap()]);
    }
    let until = |name: &str, state: &str| {
        let end = Instant::now() + LIMIT;
        while user.state(name) != state {
            let (log, table) = (fs::read_to_string(&log).unwrap(), user.ok(&["ps", "--memory"]));
            assert!(Instant::now() < end, "{name} is not {state}\n{log}\n{table}");
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    if !freeze(&user, "first") {
        return;
    }
    user.ok(&["thaw", "first"]);
    let keeper = Keeper::start(&user, &["--budget", "64M"], &log);
    until("second", "frozen");
    assert_eq!(user.state("first"), "running");
    // Whoever looks after the VMs next knows a frozen one, and thaws it when there is room.
    drop(keeper);
    assert_eq!(user.state("second"), "frozen");
    let keeper = Keeper::start(&user, &["--budget", "4G"], &log);
    until("second", "running");
    let said = fs::read_to_string(&log).unwrap();
    assert!(
        said.contains("second: freeze: VMs cost") && said.contains("second: thaw: there is room"),
        "{said}"
    );
    drop(keeper);
    // What its owner has paused stays so.
    user.ok(&["pause", "second"]);
    let keeper = Keeper::start(&user, &["--budget", "4G"], &log);
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!(user.state("second"), "paused");
    drop(keeper);
    ["first", "second"].iter().for_each(|name| _ = user.ok(&["kill", name]));
}

#[test]
fn promises_that_do_not_fit_are_refused() {
    let user = User::new();
    let config = user.directory.path().join("host.toml");
    fs::write(&config, "budget = '300M'\nmax-overcommit = 'memory=2'\n").unwrap();
    let kernel = common::kernel(&user.directory, ECHOES);
    let run = |name: &str, memory: &str, more: &[&str]| {
        let arguments = ["run", "-d", "--engine", "soft", "--name", name, "--memory", memory, "--kernel"];
        let mut command = user.command(&[&arguments[..], &[kernel.to_str().unwrap()], more].concat());
        let output = command.env("BERTH_HOST_CONFIG", &config).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let set = |name: &str, change: &str| {
        let output = user.command(&["set", name, change]).env("BERTH_HOST_CONFIG", &config).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    assert_eq!(run("a", "128M,reserve=100M", &[]).0, Some(0));
    assert_eq!(run("b", "128M,reserve=100M", &[]).0, Some(0));
    for more in [&[][..], &["--force"]] {
        let (code, said) = run("c", "128M,reserve=100M", more);
        assert_eq!(code, Some(3), "{said}");
        assert!(said.contains("2 other VMs") && said.contains("the budget of 300 MiB"), "{said}");
    }
    // What is no promise is a policy: 2 times the budget.
    let (code, said) = run("d", "400M", &[]);
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("a ratio of 2.19") && said.contains("allows 2"), "{said}");
    assert_eq!(run("d", "400M", &["--force"]).0, Some(0));
    // A promise is not made larger than there is room for; smaller it may be.
    let (code, said) = set("d", "memory.reserve=200M");
    assert!(code == Some(1) && said.contains("the budget of 300 MiB"), "{said}");
    assert_eq!(set("a", "memory.reserve=10M").0, Some(0));
    assert_eq!(set("d", "memory.reserve=100M").0, Some(0));
    fs::write(&config, "budgets = 1\n").unwrap();
    let (code, said) = run("e", "16M", &[]);
    assert!(code == Some(1) && said.contains("host.toml: line 1"), "{said}");
    ["a", "b", "d"].iter().for_each(|name| _ = user.ok(&["kill", name]));
    user.assert_clean();
}

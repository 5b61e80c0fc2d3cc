//! VMs in the background, and the commands that find and steer them. The guests are a few instructions each.

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{ECHOES, SLEEPS, User, kernel};

mod common;

const LIMIT: Duration = Duration::from_secs(60);
/// mov al, 0x10; out 0xf4, al, after about a second of a loop.
const ENDS_SOON: &[u8] = &[
    0xb9, 0x00, 0x00, 0x00, 0x20, // mov ecx, 0x20000000
    0x49, 0x75, 0xfd, // again: dec ecx; jnz again
    0xb0, 0x10, 0xe6, 0xf4, 0xf4, 0xeb, 0xfd, // mov al, 0x10; out 0xf4, al; hlt; jmp hlt
];

#[test]
fn a_vm_in_the_background_is_listed_described_and_stopped() {
    let user = User::new();
    user.start("one", SLEEPS);
    let table = user.ok(&["ps"]);
    assert!(table.lines().nth(1).unwrap().starts_with("one "), "{table}");
    assert!(table.contains("1 VM; vCPUs : host CPUs = 1 : "), "{table}");
    assert!(user.ok(&["ps", "--threads"]).contains("one/vcpu0"));
    let vm = &user.json(&["inspect", "one"])[0];
    assert_eq!((vm["state"].as_str(), vm["memory_bytes"].as_u64()), (Some("running"), Some(16 << 20)));
    assert_eq!(vm["engine"], "soft");
    let stats = user.json(&["stats", "--json", "one"]);
    let thread = &stats["vcpus"][0];
    let comm = format!("/proc/{}/task/{}/comm", vm["pid"], thread["tid"]);
    assert_eq!(std::fs::read_to_string(comm).unwrap(), "one/vcpu0\n");
    // The same name again.
    let kernel = kernel(&user.directory, SLEEPS);
    let said = user.fails(1, &["run", "-d", "--name", "one", "--kernel", kernel.to_str().unwrap()]);
    assert!(said.contains("runs already") && said.contains(&vm["pid"].to_string()), "{said}");
    // This guest has no ACPI: it is ended when its time is over.
    user.ok(&["stop", "--timeout", "1", "one"]);
    user.assert_clean();
    assert!(user.fails(1, &["stop", "one"]).contains("there is no VM one"));
}

#[test]
fn memory_goes_to_the_cold_store_on_request() {
    let user = User::new();
    user.start("one", SLEEPS);
    let guest = |memory: &serde_json::Value, state: &str| memory["guest"][state].as_u64().unwrap();
    let before = user.json(&["stats", "--json", "one"])["memory"].clone();
    let output = user.berth(&["reclaim", "--idle", "0", "one"]);
    if !output.status.success() {
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("cold store needs userfaultfd"), "{said}");
        println!("skipped: {said}");
        return;
    }
    let after = user.json(&["stats", "--json", "one"])["memory"].clone();
    assert!(guest(&after, "resident_bytes") < guest(&before, "resident_bytes"), "{before} {after}");
    assert!(guest(&after, "stored_bytes") > 0 && after["store"]["pages"].as_u64() > Some(0), "{after}");
    let sum: u64 = after["guest"].as_object().unwrap().values().map(|v| v.as_u64().unwrap()).sum();
    assert_eq!(sum, 16 << 20, "{after}");
    user.fails(2, &["reclaim", "--size", "much", "one"]);
    assert!(user.fails(1, &["reclaim", "two"]).contains("there is no VM two"));
}

#[test]
fn errors_of_the_start_are_those_of_the_command() {
    let user = User::new();
    let said = user.fails(1, &["run", "-d", "--name", "x", "--kernel", "/nonexistent"]);
    assert!(said.contains("/nonexistent: cannot be read"), "{said}");
    user.fails(2, &["run", "-d", "--memory", "0"]);
    user.assert_clean();
}

#[test]
fn a_killed_process_is_seen_and_its_name_can_be_used_again() {
    let user = User::new();
    user.start("victim", SLEEPS);
    let pid = user.json(&["inspect", "victim"])[0]["pid"].to_string();
    assert!(Command::new("kill").args(["-KILL", &pid]).status().unwrap().success());
    let end = Instant::now() + LIMIT;
    while user.state("victim") != "killed" {
        assert!(Instant::now() < end, "{}", user.state("victim"));
    }
    assert!(!user.ok(&["ps"]).contains("victim"));
    assert!(!user.home("victim").join("api.sock").exists(), "ps has not removed the socket");
    assert!(user.fails(1, &["pause", "victim"]).contains("was killed"));
    assert_eq!(user.json(&["inspect", "victim"])[0]["state"], "killed");
    user.start("victim", SLEEPS);
    assert_eq!(user.state("victim"), "running");
    user.ok(&["kill", "victim"]);
    user.assert_clean();
}

#[test]
fn rm_removes_what_a_killed_vm_left_and_spares_those_that_run() {
    let user = User::new();
    user.start("a", SLEEPS);
    assert!(user.fails(1, &["rm", "a"]).contains("runs already"));
    let pid = user.json(&["inspect", "a"])[0]["pid"].to_string();
    assert!(Command::new("kill").args(["-KILL", &pid]).status().unwrap().success());
    let end = Instant::now() + LIMIT;
    while user.state("a") != "killed" {
        assert!(Instant::now() < end);
    }
    user.ok(&["rm", "a"]);
    user.assert_clean();
    assert!(user.fails(1, &["rm", "a"]).contains("there is no VM a"));
}

#[test]
fn a_vm_that_ends_by_itself_leaves_its_exit_code() {
    let user = User::new();
    user.start("short", ENDS_SOON);
    assert_eq!(user.berth(&["wait", "short"]).status.code(), Some(0x21));
    // And again, of one that has ended.
    assert_eq!(user.berth(&["wait", "short"]).status.code(), Some(0x21));
    assert_eq!(user.state("short"), "ended");
    assert!(user.ok(&["ps", "--all"]).contains("ended (33)"));
    assert_eq!(user.json(&["inspect", "short"])[0]["ending"]["exit_code"], 0x21);
    user.ok(&["rm", "short"]);
    user.assert_clean();
}

#[test]
fn several_read_the_console_and_type_into_it() {
    let user = User::new();
    user.start("echo", ECHOES);
    let mut reader =
        user.command(&["console", "--read-only", "echo"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut typist = user.command(&["console", "--quit=1", "echo"]);
    let mut typist = typist.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    typist.stdin.take().unwrap().write_all(b"hello").unwrap();
    let typed = typist.wait_with_output().unwrap();
    assert_eq!((typed.status.code(), typed.stdout.as_slice()), (Some(0), b"hello".as_slice()));
    assert_eq!(user.ok(&["logs", "echo"]), "hello");
    // A new reader sees what was printed before; the end of the VM ends it.
    let mut late = user.command(&["console", "echo"]);
    let mut late = late.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut first = [0; 5];
    late.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    assert_eq!(&first, b"hello");
    late.stdin.take().unwrap().write_all(b"bye Q").unwrap();
    let mut seen = String::new();
    reader.stdout.take().unwrap().read_to_string(&mut seen).unwrap();
    assert_eq!(seen, "hellobye Q");
    assert!(reader.wait().unwrap().success() && late.wait().unwrap().success());
    assert_eq!(user.ok(&["logs", "--follow", "echo"]), "hellobye Q");
    assert_eq!(user.berth(&["wait", "echo"]).status.code(), Some(1));
    user.ok(&["rm", "echo"]);
    user.assert_clean();
}

#[test]
fn a_paused_vm_does_nothing_until_it_is_resumed() {
    let user = User::new();
    user.start("echo", ECHOES);
    user.ok(&["pause", "echo"]);
    assert_eq!(user.state("echo"), "paused");
    let mut typist = user.command(&["console", "--quit=1", "echo"]);
    let mut typist = typist.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    typist.stdin.take().unwrap().write_all(b"abc").unwrap();
    assert!(typist.wait_with_output().unwrap().stdout.is_empty(), "a paused guest has answered");
    let before = user.json(&["stats", "--json", "echo"])["vcpus"][0]["cpu_seconds"].clone();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(user.json(&["stats", "--json", "echo"])["vcpus"][0]["cpu_seconds"], before);
    user.ok(&["pause", "echo"]);
    user.ok(&["resume", "echo"]);
    assert_eq!(user.state("echo"), "running");
    let end = Instant::now() + LIMIT;
    while user.ok(&["logs", "echo"]) != "abc" {
        assert!(Instant::now() < end, "the guest does not go on");
    }
    let events = user.ok(&["events", "--json", "--no-follow", "echo"]);
    let states: Vec<serde_json::Value> =
        events.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let states: Vec<&str> = states.iter().filter_map(|e| e["state"].as_str()).collect();
    assert_eq!(states, ["running", "paused", "running"]);
    user.ok(&["pause", "echo"]);
    user.ok(&["reset", "echo"]);
    let end = Instant::now() + LIMIT;
    while user.state("echo") != "running" {
        assert!(Instant::now() < end, "a reset lets the guest go on");
    }
    user.ok(&["pause", "echo"]);
    user.ok(&["stop", "-t", "1", "echo"]);
    user.assert_clean();
}

#[test]
fn the_same_vm_starts_and_stops_again_and_again() {
    let user = User::new();
    for _ in 0..20 {
        user.start("again", SLEEPS);
        user.ok(&["kill", "again"]);
        user.assert_clean();
    }
}

#[test]
fn names_complete() {
    let user = User::new();
    user.start("complete-me", SLEEPS);
    for command in ["stop", "console", "logs", "wait", "inspect", "rm", "stats", "pause"] {
        let mut asked = user.command(&["--", "berth", command, "comp"]);
        let asked = asked.envs([("BERTH_COMPLETE", "fish"), ("_CLAP_COMPLETE_INDEX", "2")]).output().unwrap();
        assert_eq!(String::from_utf8(asked.stdout).unwrap().trim(), "complete-me", "{command}");
    }
}

#[test]
fn a_hundred_vms_come_and_go() {
    let user = User::new();
    let names: Vec<String> = (0..100).map(|i| format!("vm{i:02}")).collect();
    for name in &names {
        user.start(name, SLEEPS);
    }
    let listed = user.json(&["ps", "--json"]);
    let running: Vec<&str> = listed
        .as_array()
        .unwrap()
        .iter()
        .filter(|vm| {
            vm["state"] == "running" && vm["stats"]["vcpus"].as_array().is_some_and(|v| v.len() == 1)
        })
        .map(|vm| vm["name"].as_str().unwrap())
        .collect();
    assert_eq!(running, names);
    let pids: Vec<u64> = listed.as_array().unwrap().iter().map(|vm| vm["pid"].as_u64().unwrap()).collect();
    assert!(user.ok(&["ps"]).contains("100 VMs; vCPUs : host CPUs = 100 : "));
    let all: Vec<&str> = ["kill"].into_iter().chain(names.iter().map(String::as_str)).collect();
    user.ok(&all);
    user.assert_clean();
    let left: Vec<&u64> = pids.iter().filter(|pid| is_berth(**pid)).collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Whether this process number is that of a Berth of this test, and not of somebody who has got it since.
fn is_berth(pid: u64) -> bool {
    let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&command).contains("--background")
}

#[test]
fn another_user_is_turned_away_even_where_the_socket_is_open() {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;
    const NOBODY: u32 = 65_534;
    // SAFETY: it takes nothing and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        println!("skipped: only root can be somebody else");
        return;
    }
    let user = User::new();
    let open = |path: &std::path::Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    open(user.directory.path(), 0o755);
    let socket = user.directory.path().join("api.sock");
    let kernel = kernel(&user.directory, SLEEPS);
    let start = ["run", "-d", "--engine", "soft", "--memory", "16M", "--name", "mine", "--api-socket"];
    user.ok(&[&start[..], &[socket.to_str().unwrap(), "--kernel", kernel.to_str().unwrap()]].concat());
    open(&socket, 0o666);
    let ask = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); \
        s.sendall(b'GET /vm HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n'); print(s.recv(4096).decode())";
    let asked = |uid| {
        let mut python = Command::new("python3");
        python.args(["-c", ask]).arg(&socket).uid(uid).gid(uid).current_dir("/");
        python.output().map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
    };
    match asked(NOBODY) {
        Ok(answer) => {
            assert!(answer.starts_with("HTTP/1.1 403 ") && answer.contains("\"forbidden\""), "{answer}");
            assert!(asked(0).unwrap().starts_with("HTTP/1.1 200 "));
        }
        Err(e) => println!("skipped: python3 does not start: {e}"),
    }
    user.ok(&["kill", "mine"]);
    assert!(!socket.exists());
    user.assert_clean();
}

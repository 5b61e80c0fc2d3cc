//! Commands in a guest through its agent, by `berth exec`: one boot, many commands.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use berth_tests_boot::{Guest, set_up_or_skip};
use sha2::{Digest, Sha256};

/// Generous: the tests may share a small machine with others.
const LIMIT: Duration = Duration::from_secs(550);
/// Bytes that go in and out.
const TRANSFER: usize = 100 << 20;

struct Vm {
    berth: PathBuf,
    name: String,
    socket: PathBuf,
}

impl Vm {
    /// `berth exec` with options, then a command.
    fn command(&self, options: &[&str], words: &[&str]) -> Command {
        let mut command = Command::new(&self.berth);
        command.arg("exec").args(options).arg(&self.name).arg("--").args(words);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn exec(&self, options: &[&str], words: &[&str]) -> Output {
        self.command(options, words).output().unwrap()
    }

    /// What a shell script in the guest prints; it must succeed.
    fn sh(&self, script: &str) -> String {
        let output = self.exec(&[], &["sh", "-c", script]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{script}: {:?} {said}", output.status);
        String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
    }

    fn code(&self, words: &[&str]) -> Option<i32> {
        self.exec(&[], words).status.code()
    }

    /// Waits until a script prints something.
    fn wait_until(&self, what: &str, script: &str, printed: &str) {
        let end = Instant::now() + LIMIT / 5;
        while self.sh(script) != printed {
            assert!(Instant::now() < end, "not so: {what}");
            thread::sleep(Duration::from_millis(50));
        }
    }
}

fn sha256(data: &[u8]) -> String {
    Sha256::digest(data).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes of all values that do not repeat soon (xorshift64).
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(len).collect()
}

#[test]
fn commands_run_in_the_guest() {
    let Some(setup) = set_up_or_skip(env!("CARGO_TARGET_TMPDIR"), &[]) else { return };
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("vsock");
    let name = format!("exec-{}", std::process::id());
    let arguments = ["--name", &name, "--engine", "soft", "--cpus", "2", "--vsock", socket.to_str().unwrap()];
    let guest = Guest::start(&setup.berth, setup.initrd.path(), &arguments, "sleep 100000", LIMIT);
    let guest = guest.unwrap_or_else(|e| panic!("{e}"));
    let vm = Vm { berth: setup.berth.clone(), name, socket };

    // The first command waits for the guest, which has only begun to boot.
    let mut waited = None;
    while waited.is_none() {
        let output = vm.exec(&["--timeout", "300"], &["uname", "-s"]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        // Its process may not have come so far that it has a name.
        if !said.contains("there is no VM") {
            assert!(output.status.success(), "{said}");
            waited = Some(output.stdout);
        }
    }
    assert_eq!(waited.unwrap(), b"Linux\n");

    codes_and_streams(&vm);
    users_directories_and_variables(&vm);
    one_hundred_megabytes(&vm);
    a_terminal(&vm);
    signals(&vm);
    a_slow_reader(&vm);
    twenty_at_once(&vm);
    clients_that_go(&vm);
    garbage(&vm);
    a_paused_vm(&vm);
    drop(guest);
    assert_eq!(vm.code(&["true"]), Some(125));
}

fn codes_and_streams(vm: &Vm) {
    let output = vm.exec(&[], &["sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!(output.status.code(), Some(7));
    assert_eq!((&*output.stdout, &*output.stderr), (&b"out\n"[..], &b"err\n"[..]));
    assert_eq!(vm.code(&["sh", "-c", "kill -9 $$"]), Some(137));
    assert_eq!(vm.code(&["sh", "-c", "kill -TERM $$"]), Some(143));
    assert_eq!(vm.code(&["/etc/passwd"]), Some(126));
    let missing = vm.exec(&[], &["no-such-program"]);
    assert_eq!(missing.status.code(), Some(127));
    let said = String::from_utf8_lossy(&missing.stderr).into_owned();
    assert!(said.starts_with("berth: error: cannot run no-such-program"), "{said}");
    // Without -i there is no input, and with it an end of it.
    assert_eq!(vm.sh("cat; echo end"), "end");
    assert_eq!(vm.exec(&["-i"], &["cat"]).stdout, b"");
}

fn users_directories_and_variables(vm: &Vm) {
    let options = ["-u", "nobody:nogroup", "-w", "/proc", "-e", "A=b c"];
    let output = vm.exec(&options, &["sh", "-c", "id -u; id -g; id -G; pwd; echo $A $HOME $USER"]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "65534\n65534\n65534\n/proc\nb c / nobody\n");
    assert_eq!(vm.exec(&["-u", "nobody"], &["cat", "/proc/1/environ"]).status.code(), Some(1));
    for (options, part) in [(["-u", "ann"], "no user ann"), (["-w", "/no"], "no directory /no")] {
        let output = vm.exec(&options, &["true"]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(125) && said.contains(part), "{said}");
    }
}

fn one_hundred_megabytes(vm: &Vm) {
    let data = noise(TRANSFER);
    let sum = sha256(&data);
    let mut client = vm.command(&["-i"], &["tee", "/tmp/copy"]).stdin(Stdio::piped()).spawn().unwrap();
    let mut input = client.stdin.take().unwrap();
    let writer = thread::spawn(move || input.write_all(&data).unwrap());
    let mut back = Vec::new();
    client.stdout.take().unwrap().read_to_end(&mut back).unwrap();
    writer.join().unwrap();
    assert!(client.wait().unwrap().success());
    assert_eq!((back.len(), sha256(&back)), (TRANSFER, sum.clone()));
    assert_eq!(vm.sh("sha256sum </tmp/copy; rm /tmp/copy"), format!("{sum}  -"));
}

/// In a terminal of `script` (bsdutils), which is where a person would be.
fn a_terminal(vm: &Vm) {
    if Command::new("script").arg("--version").output().is_err() {
        return println!("skipped: a terminal needs script, of the package bsdutils");
    }
    let in_guest = "stty size; test -t 0 && test -t 1 && test -t 2 && echo all; read x; echo got $x; exit 5";
    let here = format!(
        "stty cols 101 rows 37; before=$(stty -g); {} exec -it {} -- sh -c '{in_guest}'; echo code $?; \
         test \"$before\" = \"$(stty -g)\" && echo restored",
        vm.berth.display(),
        vm.name
    );
    let mut script = Command::new("script")
        .args(["--quiet", "--return", "--command", &here, "/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = script.stdout.take().unwrap();
    let mut seen = String::new();
    let mut buffer = [0; 1024];
    while !seen.contains("all") {
        let n = output.read(&mut buffer).unwrap();
        assert!(n > 0, "{seen}");
        seen.push_str(&String::from_utf8_lossy(&buffer[..n]));
    }
    script.stdin.take().unwrap().write_all(b"typed\n").unwrap();
    output.read_to_string(&mut seen).unwrap();
    script.wait().unwrap();
    for part in ["37 101\r\n", "got typed\r\n", "code 5\r\n", "restored\r\n"] {
        assert!(seen.contains(part), "{part:?} is not in {seen:?}");
    }
}

fn signals(vm: &Vm) {
    for (signal, name) in [(libc::SIGTERM, "TERM"), (libc::SIGINT, "INT"), (libc::SIGUSR1, "USR1")] {
        let script = format!("trap 'echo trapped; exit 9' {name}; echo ready; while :; do sleep 0.1; done");
        let mut client = vm.command(&[], &["sh", "-c", &script]).spawn().unwrap();
        let mut output = client.stdout.take().unwrap();
        let mut ready = [0; 6];
        output.read_exact(&mut ready).unwrap();
        // SAFETY: it takes numbers. The process is our child and not waited for, so the number is its own.
        unsafe { libc::kill(client.id() as libc::pid_t, signal) };
        let mut rest = String::new();
        output.read_to_string(&mut rest).unwrap();
        assert_eq!((rest.as_str(), client.wait().unwrap().code()), ("trapped\n", Some(9)), "{name}");
    }
}

/// The agent keeps nothing for a client that does not read, and answers others meanwhile.
fn a_slow_reader(vm: &Vm) {
    let mut client = vm.command(&[], &["sh", "-c", "head -c 30000000 /dev/zero; exit 4"]).spawn().unwrap();
    let mut first = [0];
    let mut output = client.stdout.take().unwrap();
    output.read_exact(&mut first).unwrap();
    let memory = vm.sh("grep RssAnon /proc/$(pidof berth-agent)/status | grep -o '[0-9]*'");
    assert!(memory.parse::<u64>().unwrap() < 1000, "the agent has {memory} KiB");
    let mut rest = Vec::new();
    output.read_to_end(&mut rest).unwrap();
    assert_eq!((rest.len(), client.wait().unwrap().code()), (29_999_999, Some(4)));
    // Whose reader goes away, ends.
    let mut client = vm.command(&[], &["yes"]).spawn().unwrap();
    client.stdout.take().unwrap().read_exact(&mut first).unwrap();
    assert_eq!(client.wait().unwrap().code(), Some(141));
}

fn twenty_at_once(vm: &Vm) {
    thread::scope(|scope| {
        for i in 0..20_u8 {
            scope.spawn(move || {
                let mut client = vm
                    .command(&["-i"], &["sh", "-c", &format!("cat; echo {i} >&2; exit {i}")])
                    .stdin(Stdio::piped())
                    .spawn()
                    .unwrap();
                let data = vec![i; 200_000];
                let mut input = client.stdin.take().unwrap();
                let sent = data.clone();
                let writer = thread::spawn(move || input.write_all(&sent).unwrap());
                let output = client.wait_with_output().unwrap();
                writer.join().unwrap();
                assert!(output.stdout == data, "{i}: {} bytes", output.stdout.len());
                assert_eq!(String::from_utf8_lossy(&output.stderr), format!("{i}\n"));
                assert_eq!(output.status.code(), Some(i.into()));
            });
        }
    });
}

/// A command whose client is killed gets SIGHUP; what does not mind goes on, and so does the agent.
fn clients_that_go(vm: &Vm) {
    for (script, left) in [("echo x; exec sleep 77777", "0"), ("trap '' HUP; echo x; exec sleep 77778", "1")]
    {
        let mut client = vm.command(&[], &["sh", "-c", script]).spawn().unwrap();
        client.stdout.take().unwrap().read_exact(&mut [0; 2]).unwrap();
        client.kill().unwrap();
        client.wait().unwrap();
        let count = format!("ps | grep -c '[s]leep {}'; true", &script[script.len() - 5..]);
        thread::sleep(Duration::from_millis(300));
        vm.wait_until(script, &count, left);
    }
    vm.sh("ps | grep '[s]leep 77778' | { read pid rest; kill $pid; }");
    vm.wait_until("no zombie is left", "ps -o stat,comm | grep -c '^Z'; true", "0");
}

/// Bytes at the agent's port that no client would send.
fn garbage(vm: &Vm) {
    for (round, len) in [0_usize, 1, 5, 100, 5000, 300_000].into_iter().enumerate() {
        let mut stream = UnixStream::connect(&vm.socket).unwrap();
        stream.set_read_timeout(Some(LIMIT / 5)).unwrap();
        stream.write_all(b"CONNECT 1024\n").unwrap();
        let mut answer = [0; 3];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"OK ");
        // The agent closes as soon as it sees what it is.
        let _ = stream.write_all(&noise(len + round)[round..]);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
    }
    assert_eq!(vm.sh("echo alive"), "alive");
}

fn a_paused_vm(vm: &Vm) {
    let steer = |verb: &str| {
        let output = Command::new(&vm.berth).args([verb, &vm.name]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    steer("pause");
    let output = vm.exec(&[], &["true"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    steer("resume");
    assert!(output.status.code() == Some(125) && said.contains("is paused"), "{said}");
    assert_eq!(vm.sh("echo on"), "on");
}

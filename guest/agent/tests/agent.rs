//! The agent on this host instead of in a guest: what it does with commands, and with hosts that do what they may not.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use berth_agent_protocol::{
    Decoder, Exec, Exit, FailureKind, Frame, FromGuest, FromHost, Stream, VERSION, WindowSize, data, hello,
    message,
};
use berth_guest_agent::{Listener, Server};

/// Nothing here takes long; whoever waits longer waits for ever.
const LIMIT: Duration = Duration::from_secs(60);

/// An agent of its own for each test. It ends with the test's process.
struct Agent(tempfile::TempDir);

impl Agent {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("agent")).unwrap();
        listener.set_nonblocking(true).unwrap();
        thread::spawn(|| Server::new(Listener::trusting(listener.into())).serve());
        Self(directory)
    }

    fn connect(&self) -> Client {
        let stream = UnixStream::connect(self.0.path().join("agent")).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        Client { stream, decoder: Decoder::default() }
    }

    /// Connects, greets, and starts a command.
    fn exec(&self, exec: Exec) -> Client {
        let mut client = self.connect();
        client.write(&hello(VERSION));
        client.say(FromHost::Exec(exec));
        assert_eq!(client.frame(), Some(Frame::Hello(VERSION)));
        client
    }

    /// All that `sh -c SCRIPT` gives, without input.
    fn sh(&self, script: &str) -> (Exit, String, String) {
        self.exec(sh(script)).all()
    }
}

fn sh(script: &str) -> Exec {
    let argv = ["sh", "-c", script].map(|a| a.as_bytes().to_vec()).to_vec();
    Exec { argv, output_credit: 1 << 20, ..Exec::default() }
}

struct Client {
    stream: UnixStream,
    decoder: Decoder,
}

impl Client {
    fn write(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    fn say(&mut self, m: FromHost) {
        self.write(&message(&m).unwrap());
    }

    /// The next frame; `None` when the agent closed the connection.
    fn frame(&mut self) -> Option<Frame<FromGuest>> {
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                return Some(frame);
            }
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer) {
                Ok(0) => return None,
                Ok(n) => self.decoder.feed(&buffer[..n]),
                // What the agent had not read yet when it closed.
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return None,
                Err(e) => panic!("the agent says nothing: {e}"),
            }
        }
    }

    fn started(&mut self) -> u32 {
        match self.frame() {
            Some(Frame::Message(FromGuest::Started { pid, .. })) => pid,
            other => panic!("{other:?}"),
        }
    }

    /// Output until `text` is among it.
    fn until(&mut self, text: &str) -> String {
        let mut seen = String::new();
        while !seen.contains(text) {
            match self.frame() {
                Some(Frame::Data(_, bytes)) => seen.push_str(&String::from_utf8_lossy(&bytes)),
                Some(Frame::Message(FromGuest::Started { .. })) => {}
                other => panic!("{other:?} after {seen:?}"),
            }
        }
        seen
    }

    /// How the command ended, and all that it printed.
    fn all(&mut self) -> (Exit, String, String) {
        let mut outputs = [Vec::new(), Vec::new()];
        loop {
            match self.frame() {
                Some(Frame::Data(stream, bytes)) => {
                    self.say(FromHost::Credit(stream, bytes.len() as u32));
                    outputs[usize::from(stream == Stream::Stderr)].extend(bytes);
                }
                Some(Frame::Message(FromGuest::Exited(exit))) => {
                    let [out, err] = outputs.map(|o| String::from_utf8_lossy(&o).into_owned());
                    return (exit, out, err);
                }
                Some(Frame::Message(FromGuest::Failed { text, .. })) => panic!("{text}"),
                Some(_) => {}
                None => panic!("the agent hung up"),
            }
        }
    }

    fn failure(&mut self) -> (FailureKind, String) {
        loop {
            match self.frame() {
                Some(Frame::Message(FromGuest::Failed { kind, text })) => return (kind, text),
                Some(Frame::Message(FromGuest::Exited(exit))) => panic!("{exit:?}"),
                Some(_) => {}
                None => panic!("the agent hung up"),
            }
        }
    }
}

/// Waits for something that will be so soon.
fn wait_until(what: &str, so: impl Fn() -> bool) {
    let end = Instant::now() + LIMIT;
    while !so() {
        assert!(Instant::now() < end, "not so: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Whether a process is there and no zombie.
fn runs(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|s| !s.contains(") Z "))
}

#[test]
fn exit_codes_and_both_outputs() {
    let agent = Agent::start();
    assert_eq!(agent.sh("echo out; echo err >&2; exit 7"), (Exit::Code(7), "out\n".into(), "err\n".into()));
    assert_eq!(agent.sh("kill -9 $$").0, Exit::Signal(9));
    assert_eq!(agent.sh("cat").1, "");
}

#[test]
fn a_connection_is_good_for_several_requests() {
    let agent = Agent::start();
    let mut client = agent.exec(sh("exit 3"));
    assert_eq!(client.all().0, Exit::Code(3));
    client.say(FromHost::Ping);
    assert_eq!(client.frame(), Some(Frame::Message(FromGuest::Pong)));
    client.say(FromHost::Info);
    match client.frame() {
        Some(Frame::Message(FromGuest::Info(info))) => {
            assert!(!info.kernel.is_empty() && info.uptime_ms > 0, "{info:?}");
        }
        other => panic!("{other:?}"),
    }
    client.say(FromHost::Exec(sh("exit 4")));
    assert_eq!(client.all().0, Exit::Code(4));
}

#[test]
fn a_command_starts_with_clean_signals_and_its_own_variables() {
    let agent = Agent::start();
    let script = "grep -E 'SigBlk|SigIgn' /proc/self/status; ls /proc/self/fd | wc -l; \
        echo $PWD $A ${CARGO:-none} $USER";
    // Descriptors that this process was started with itself, it passes on.
    let mine = std::process::Command::new("sh").args(["-c", script]).output().unwrap();
    let mine = String::from_utf8_lossy(&mine.stdout).into_owned();
    let mut exec = sh(script);
    exec.env = vec![(b"A".to_vec(), b"b c".to_vec())];
    exec.workdir = Some(b"/usr".to_vec());
    let (exit, out, err) = agent.exec(exec).all();
    assert_eq!((exit, err.as_str()), (Exit::Code(0), ""));
    let lines: Vec<&str> = out.lines().collect();
    let [blocked, ignored, descriptors, variables] = lines[..] else { panic!("{out}") };
    assert_eq!(blocked, "SigBlk:\t0000000000000000");
    // Above the 31 that programs use are the C library's own.
    let ignored = u64::from_str_radix(ignored.rsplit('\t').next().unwrap(), 16).unwrap();
    assert_eq!(ignored & 0x7fff_ffff, 0);
    assert_eq!(Some(descriptors), mine.lines().nth(2));
    let user = nix::unistd::User::from_uid(nix::unistd::Uid::effective()).unwrap().unwrap().name;
    assert_eq!(variables, format!("/usr b c none {user}"));
}

#[test]
fn what_cannot_run_says_why() {
    let agent = Agent::start();
    let with = |change: &dyn Fn(&mut Exec)| {
        let mut exec = sh("true");
        change(&mut exec);
        agent.exec(exec).failure()
    };
    let argv = |text: &str| vec![text.as_bytes().to_vec()];
    for (kind, part, change) in [
        (
            FailureKind::NotFound,
            "no-such-program",
            &(|e: &mut Exec| e.argv = argv("no-such-program")) as &dyn Fn(&mut Exec),
        ),
        (FailureKind::NotFound, "/no/such", &|e| e.argv = argv("/no/such")),
        (FailureKind::NotExecutable, "/etc/passwd", &|e| e.argv = argv("/etc/passwd")),
        (FailureKind::NotExecutable, "/etc", &|e| e.argv = argv("/etc")),
        (FailureKind::Invalid, "no program", &|e| e.argv = vec![]),
        (FailureKind::NotFound, "cannot run", &|e| e.argv = argv("")),
        (FailureKind::Invalid, "nul byte", &|e| e.argv = argv("a\0b")),
        (FailureKind::Invalid, "no user nobody-here", &|e| e.user = Some("nobody-here".into())),
        (FailureKind::Invalid, "no group wheels", &|e| e.user = Some("0:wheels".into())),
        (FailureKind::Invalid, "no directory /etc/passwd", &|e| e.workdir = Some(b"/etc/passwd".to_vec())),
        (FailureKind::Invalid, "no usable name", &|e| e.env = vec![(b"A=B".to_vec(), vec![])]),
    ] {
        let (said, text) = with(change);
        assert!(said == kind && text.contains(part), "{kind:?} {part}: {said:?} {text}");
    }
    assert_eq!(agent.sh("echo fine").1, "fine\n");
}

#[test]
fn input_goes_through_and_ends() {
    let agent = Agent::start();
    let mut client = agent.exec(Exec { stdin: true, ..sh("wc -c; echo done") });
    client.started();
    // As much as may be sent unasked.
    client.write(&data(Stream::Stdin, &[b'x'; 65536]));
    client.say(FromHost::CloseStdin);
    let (exit, out, _) = client.all();
    assert_eq!((exit, out.as_str()), (Exit::Code(0), "65536\ndone\n"));
}

#[test]
fn a_command_that_reads_no_input_tells() {
    let agent = Agent::start();
    let mut client = agent.exec(Exec { stdin: true, ..sh("exec <&-; echo closed; sleep 1000") });
    client.started();
    client.until("closed");
    client.write(&data(Stream::Stdin, b"for nobody"));
    assert_eq!(client.frame(), Some(Frame::Message(FromGuest::StdinClosed)));
    client.say(FromHost::Signal(15));
    assert_eq!(client.all().0, Exit::Signal(15));
}

#[test]
fn nothing_is_sent_without_credit() {
    let agent = Agent::start();
    let script = "(head -c 300000 /dev/zero; echo written >&2); echo err >&2; exit 5";
    let mut client = agent.exec(Exec { output_credit: 1000, ..sh(script) });
    client.started();
    let mut got = 0;
    while got < 1000 {
        match client.frame() {
            Some(Frame::Data(Stream::Stdout, bytes)) => got += bytes.len(),
            other => panic!("{other:?}"),
        }
    }
    // It says no more by itself, and answers all the same.
    client.say(FromHost::Ping);
    assert_eq!(client.frame(), Some(Frame::Message(FromGuest::Pong)));
    client.say(FromHost::Credit(Stream::Stdout, u32::MAX));
    let (exit, out, err) = client.all();
    assert_eq!((got + out.len(), exit, err.as_str()), (300_000, Exit::Code(5), "written\nerr\n"));
}

#[test]
fn a_host_that_takes_no_more_output_stops_the_command() {
    let agent = Agent::start();
    let mut client = agent.exec(sh("yes"));
    client.until("y\n");
    client.say(FromHost::CloseOutput(Stream::Stdout));
    // `sh` may be `yes` itself by now, or have waited for it.
    let exit = client.all().0;
    assert!(matches!(exit, Exit::Signal(13) | Exit::Code(141)), "{exit:?}");
}

#[test]
fn a_terminal_has_its_size_its_signals_and_its_end() {
    let agent = Agent::start();
    let tty = Some(WindowSize { columns: 101, rows: 37 });
    let script = "stty size; test -t 0 && test -t 1 && test -t 2 && tty; trap 'stty size; exit 3' WINCH; \
        echo ready; while :; do sleep 0.05; done";
    let mut client = agent.exec(Exec { tty, stdin: true, ..sh(script) });
    let said = client.until("ready\r\n");
    assert!(said.starts_with("37 101\r\n/dev/pts/"), "{said}");
    client.say(FromHost::WindowSize(WindowSize { columns: 60, rows: 20 }));
    let (exit, out, _) = client.all();
    assert_eq!((exit, out.as_str()), (Exit::Code(3), "20 60\r\n"));

    // Ctrl-C is a key.
    let mut client = agent.exec(Exec { tty, stdin: true, ..sh("echo ready; exec cat") });
    client.until("ready\r\n");
    client.write(&data(Stream::Stdin, b"\x03"));
    assert_eq!(client.all().0, Exit::Signal(2));
    let mut client = agent.exec(Exec { tty, stdin: true, ..sh("cat; echo over") });
    client.started();
    client.write(&data(Stream::Stdin, b"hi\n"));
    client.say(FromHost::CloseStdin);
    let (exit, out, _) = client.all();
    assert!(exit == Exit::Code(0) && out.ends_with("over\r\n") && out.contains("hi\r\nhi\r\n"), "{out:?}");
}

#[test]
fn what_a_command_leaves_running_does_not_hold_it_up() {
    let agent = Agent::start();
    let (exit, out, _) = agent.sh("echo before; sleep 1000 & echo $!");
    let pid: i32 = out.lines().nth(1).unwrap().parse().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL).unwrap();
    assert_eq!((exit, out.starts_with("before\n")), (Exit::Code(0), true));
}

#[test]
fn a_host_that_goes_takes_its_command_along() {
    let agent = Agent::start();
    for tty in [None, Some(WindowSize { columns: 80, rows: 24 })] {
        let mut client = agent.exec(Exec { tty, ..sh("echo ready; exec sleep 1000") });
        let pid = client.started();
        client.until("ready");
        drop(client);
        wait_until("the command is gone, and waited for", || !Path::new(&format!("/proc/{pid}")).exists());
        // What does not want to go stays.
        let mut client = agent.exec(Exec { tty, ..sh("trap '' HUP; echo ready; exec sleep 1000") });
        let pid = client.started();
        client.until("ready");
        drop(client);
        thread::sleep(Duration::from_millis(100));
        assert!(runs(pid));
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), nix::sys::signal::SIGKILL).unwrap();
        wait_until("it is waited for", || !Path::new(&format!("/proc/{pid}")).exists());
    }
}

#[test]
fn rules_that_are_broken_end_the_connection() {
    let agent = Agent::start();
    let messages = |list: &[FromHost]| list.iter().flat_map(|m| message(m).unwrap()).collect::<Vec<u8>>();
    let greeted = |rest: &[u8]| [&hello(1), rest].concat();
    let cat = || FromHost::Exec(Exec { stdin: true, ..sh("exec cat >/dev/null") });
    for (part, bytes) in [
        ("no greeting", messages(&[FromHost::Ping])),
        ("no version", hello(0)),
        ("a second greeting", greeted(&hello(1))),
        ("not Berth's", greeted(&[7, 0, 0, 0, 1, b'x', 0, 0, 0, 0, 0])),
        ("a frame of", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
        ("unknown kind 99", greeted(&[1, 0, 0, 0, 99])),
        ("cannot be understood", greeted(&[2, 0, 0, 0, 2, 99])),
        ("output from the host", greeted(&data(Stream::Stderr, b"x"))),
        ("a second command", greeted(&messages(&[cat(), cat()]))),
        ("more input", greeted(&[messages(&[cat()]), data(Stream::Stdin, &vec![0; 200_000])].concat())),
        (
            "after its end",
            greeted(&[messages(&[cat(), FromHost::CloseStdin]), data(Stream::Stdin, b"x")].concat()),
        ),
    ] {
        let mut client = agent.connect();
        // The agent may close before it has read all.
        let _ = client.stream.write_all(&bytes);
        let (kind, text) = client.failure();
        assert!(kind == FailureKind::Protocol && text.contains(part), "{part}: {kind:?} {text}");
        assert_eq!(client.frame(), None);
    }
    assert_eq!(agent.sh("echo alive").1, "alive\n");
}

#[test]
fn a_host_that_only_asks_and_never_reads_gets_no_memory() {
    let agent = Agent::start();
    let mut client = agent.connect();
    client.write(&hello(VERSION));
    client.stream.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    let pings = message(&FromHost::Info).unwrap().repeat(1000);
    let mut sent = 0;
    // Until the agent reads no more, because its answers are not read.
    while let Ok(n) = client.stream.write(&pings) {
        sent += n;
        assert!(sent < 64 << 20, "the agent reads on and on");
    }
    assert_eq!(agent.sh("echo alive").1, "alive\n");
    // When it reads, all answers come; half of a question may have been sent.
    let questions = sent / message(&FromHost::Info).unwrap().len();
    assert_eq!(client.frame(), Some(Frame::Hello(VERSION)));
    for _ in 0..questions {
        assert!(matches!(client.frame(), Some(Frame::Message(FromGuest::Info(_)))));
    }
}

#[test]
fn random_hosts_do_no_harm() {
    let agent = Agent::start();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    for round in 0..300 {
        let mut client = agent.connect();
        let mut bytes = hello(VERSION);
        for _ in 0..random(12) {
            let stream = [Stream::Stdin, Stream::Stdout, Stream::Stderr][random(3) as usize];
            bytes.extend(match random(8) {
                0 => message(&FromHost::Exec(Exec { stdin: random(2) == 0, ..sh("cat; echo x") })).unwrap(),
                1 => data(stream, &vec![b'z'; 1 + random(4000) as usize]),
                2 => message(&FromHost::CloseStdin).unwrap(),
                3 => message(&FromHost::CloseOutput(stream)).unwrap(),
                4 => message(&FromHost::Signal(random(256) as u8)).unwrap(),
                5 => message(&FromHost::Credit(stream, random(1 << 33) as u32)).unwrap(),
                6 => message(&FromHost::WindowSize(WindowSize { columns: 0, rows: 65535 })).unwrap(),
                _ => vec![random(256) as u8; random(20) as usize],
            });
        }
        if round % 2 == 0 && !bytes.is_empty() {
            let at = random(bytes.len() as u64) as usize;
            bytes[at] ^= 1 << random(8);
        }
        let _ = client.stream.write_all(&bytes);
        // Not more at a time than the agent takes.
        if round % 50 == 49 {
            assert_eq!(agent.sh("echo alive").1, "alive\n");
        }
    }
}

#[test]
fn many_at_once() {
    let agent = Agent::start();
    let mut clients: Vec<Client> =
        (0..20).map(|i| agent.exec(Exec { stdin: true, ..sh(&format!("cat; exit {i}")) })).collect();
    for (i, client) in clients.iter_mut().enumerate().rev() {
        client.write(&data(Stream::Stdin, format!("input {i}").as_bytes()));
        client.say(FromHost::CloseStdin);
        let (exit, out, _) = client.all();
        assert_eq!((exit, out), (Exit::Code(i as u8), format!("input {i}")));
    }
    // More than it takes: the last is told, and the others go on.
    let mut idle: Vec<Client> = (0..109).map(|_| agent.connect()).collect();
    assert_eq!(idle.last_mut().unwrap().failure().0, FailureKind::Busy);
    clients[0].say(FromHost::Ping);
    assert_eq!(clients[0].frame(), Some(Frame::Message(FromGuest::Pong)));
}

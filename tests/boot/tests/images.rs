//! An image of Debian from its packages to a login, and what a VM keeps.

use std::process::{Command, Output};
use std::time::Duration;

use berth_tests_boot::{Console, GuestError, berth};

/// Generous: the tests may share a small machine with others.
const LIMIT: Duration = Duration::from_secs(200);
/// What a shell prints when it is ready.
const PROMPT: &str = ":~# ";

/// What this host lacks to build an image, if anything.
fn lacking() -> Option<String> {
    let works = |program: &str, arguments: &[&str]| {
        Command::new(program).args(arguments).output().is_ok_and(|o| o.status.success())
    };
    if !works("mmdebstrap", &["--version"]) {
        Some("building an image needs mmdebstrap".to_owned())
    } else if !works("unshare", &["--mount", "true"])
        && !works("unshare", &["--map-root-user", "--mount", "true"])
    {
        Some("this host lets nobody mount anything, which building an image needs".to_owned())
    } else {
        None
    }
}

struct Setup {
    berth: std::path::PathBuf,
    data: tempfile::TempDir,
}

impl Setup {
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.berth);
        command.args(arguments).env("XDG_DATA_HOME", self.data.path());
        command
    }

    /// Runs a command that must succeed.
    fn run(&self, arguments: &[&str]) -> Output {
        let output = self.command(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        output
    }

    fn start(&self, arguments: &[&str]) -> Console {
        let arguments = [&["run", "--engine", "soft", "--image", "debian"], arguments].concat();
        Console::start(&mut self.command(&arguments), LIMIT).unwrap_or_else(|e| panic!("{e}"))
    }
}

/// Logs in on `tty` as the image's documentation says, types commands, and returns what each printed.
fn log_in_and_run(
    console: &mut Console,
    (name, tty): (&str, &str),
    commands: &[&str],
) -> Result<Vec<String>, GuestError> {
    // With a virtio console the terminal shows the serial port's login too, and what is typed goes to the former.
    console.expect(&format!("{name} {tty}"))?;
    console.expect(&format!("{name} login: "))?;
    console.type_line("root")?;
    console.expect(PROMPT)?;
    let run = |command: &&str| {
        console.type_line(command)?;
        // The terminal's echo, then what the command prints.
        console.expect("\r\n")?;
        console.expect(PROMPT)
    };
    commands.iter().map(run).collect()
}

#[test]
fn an_image_of_debian_boots_to_a_login_and_a_vm_keeps_what_it_writes() {
    if let Some(what) = lacking() {
        println!("skipped: {what}");
        return;
    }
    let berth = berth().unwrap_or_else(|e| panic!("{e}"));
    let data = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let setup = Setup { berth, data };
    setup.run(&["image", "build", "debian", "--size", "2G"]);

    // Without passt there is no network that needs no privilege.
    let network = Command::new("passt").arg("--version").output().is_ok();
    if !network {
        println!("the network is not tested: there is no passt");
    }
    let mut console = setup.start(&["--name", "web", &format!("--no-network={}", !network)]);
    let said = log_in_and_run(
        &mut console,
        ("web", "ttyS0"),
        &[
            "findmnt --noheadings --output SOURCE,FSTYPE /",
            "systemctl is-system-running --wait; systemctl --failed --no-legend --plain",
            "/lib/systemd/systemd-networkd-wait-online --any --timeout=60; ip -4 -brief address show scope global",
            "printf '#!/bin/sh\\necho kept: $(hostname)\\nexec systemctl poweroff -ff\\n' >/root/check; chmod +x /root/check",
        ],
    )
    .unwrap_or_else(|e| panic!("{e}"));
    let [root, state, addresses, _] = &said[..] else { panic!("{said:?}") };
    assert!(root.contains("/dev/vda") && root.contains("ext4"), "{root}");
    assert!(state.contains("running"), "{state}");
    assert!(!network || addresses.contains(" UP "), "{addresses}");
    // The agent is part of the image.
    let output =
        setup.command(&["exec", "web", "--", "sh", "-c", "hostname; id -un; exit 3"]).output().unwrap();
    assert_eq!((&*output.stdout, output.status.code()), (&b"web\nroot\n"[..], Some(3)), "{output:?}");
    console.type_line("poweroff").unwrap();
    let status = console.wait().unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(status.code(), Some(0));

    // The next start of the VM has it; one without the VM's disk has not.
    let mut console = setup.start(&["--name", "web", "--no-network", "--append", "init=/root/check"]);
    console.expect("kept: ").unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(console.wait().unwrap_or_else(|e| panic!("{e}")).code(), Some(0));
    let mut console =
        setup.start(&["--name", "web", "--ephemeral", "--no-network", "--append", "init=/bin/sh"]);
    console.expect("\n# ").unwrap_or_else(|e| panic!("{e}"));
    console.type_line("ls /root/check; exec systemctl poweroff -ff").unwrap();
    console.expect("'/root/check': No such file").unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(console.wait().unwrap_or_else(|e| panic!("{e}")).code(), Some(0));

    // The same by the virtio console.
    let mut console = setup.start(&["--name", "web", "--no-network", "--console", "virtio"]);
    let said = log_in_and_run(&mut console, ("web", "hvc0"), &["tty"]).unwrap_or_else(|e| panic!("{e}"));
    assert!(said[0].contains("/dev/hvc0"), "{said:?}");
    console.type_line("poweroff").unwrap();
    assert_eq!(console.wait().unwrap_or_else(|e| panic!("{e}")).code(), Some(0));

    let refused = setup.command(&["image", "rm", "debian"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("berth rm web"));
    setup.run(&["rm", "web"]);
    setup.run(&["image", "rm", "debian"]);
}

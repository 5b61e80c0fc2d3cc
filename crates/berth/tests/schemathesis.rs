//! The control API of a VM against its own OpenAPI document, by schemathesis, which makes requests of all kinds from the
//! document and looks whether the answers are what it says.
//!
//! schemathesis comes from PyPI into a virtual environment in the target directory, once.

use std::io;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use common::{ECHOES, kernel};

mod common;

const VERSION: &str = "4.32.5";

/// The program, or why this host cannot have it.
fn schemathesis() -> Result<PathBuf, String> {
    let environment = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("schemathesis-{VERSION}"));
    let program = environment.join("bin/schemathesis");
    if program.exists() {
        return Ok(program);
    }
    let run = |what: &str, command: &mut Command| match command.stdin(Stdio::null()).output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!("{what} fails: {}", String::from_utf8_lossy(&output.stderr).trim())),
        Err(e) => Err(format!("{what} fails: {e}")),
    };
    run("python3 -m venv", Command::new("python3").args(["-m", "venv"]).arg(&environment))?;
    let package = format!("schemathesis=={VERSION}");
    let pip = environment.join("bin/pip");
    run("pip install schemathesis", Command::new(pip).args(["--quiet", "install", &package]))?;
    Ok(program)
}

/// Leads connections to a TCP port to the socket, because schemathesis cannot connect to that. Returns the port.
fn forward(socket: PathBuf) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let Ok(vm) = UnixStream::connect(&socket) else { continue };
            let (from, to) = (client.try_clone().unwrap(), vm.try_clone().unwrap());
            thread::spawn(move || up(from, to));
            thread::spawn(move || down(vm, client));
        }
    });
    port
}

fn up(mut from: TcpStream, mut to: UnixStream) {
    let _ = io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Write);
}

fn down(mut from: UnixStream, mut to: TcpStream) {
    let _ = io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Both);
}

/// Ends the VM however the test ends.
struct Vm(tempfile::TempDir);

impl Vm {
    fn berth(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_berth"));
        command.args(arguments).env("XDG_RUNTIME_DIR", self.0.path()).stdin(Stdio::null());
        command
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.berth(&["kill", "api"]).output();
    }
}

#[test]
fn the_api_is_as_its_document_says() {
    let schemathesis = match schemathesis() {
        Ok(program) => program,
        Err(reason) => {
            println!("skipped: {reason}");
            return;
        }
    };
    let vm = Vm(tempfile::tempdir().unwrap());
    let disk = vm.0.path().join("disk.raw");
    std::fs::write(&disk, [0; 4096]).unwrap();
    let (kernel, disk) = (kernel(&vm.0, ECHOES), format!("{},id=data", disk.display()));
    let arguments = ["run", "-d", "--name", "api", "--engine", "soft", "--memory", "16M", "--balloon"];
    let mut start = vm.berth(&[&arguments[..], &["--disk", &disk, "--kernel"]].concat());
    assert!(start.arg(kernel).status().unwrap().success());

    let url = format!("http://127.0.0.1:{}", forward(vm.0.path().join("berth/api/api.sock")));
    let configuration = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/schemathesis.toml");
    let mut check = Command::new(schemathesis);
    check.args(["--config-file", configuration, "run", &format!("{url}/openapi.json"), "--url", &url]);
    // Those two end what is tested; tests of the commands use them.
    check.args(["--exclude-path", "/stop", "--exclude-path", "/kill"]);
    check.args(["--max-examples", "20", "--request-timeout", "60", "--seed", "1", "--no-color"]);
    // It writes a database of its own into the directory where it runs.
    let output = check.current_dir(vm.0.path()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let operations = said.lines().find_map(|line| line.trim().strip_prefix("Tested: "));
    assert!(operations.is_some_and(|n| n.parse::<u32>().is_ok_and(|n| n >= 11)), "{said}");
    // The VM has survived it all.
    let alive = vm.berth(&["inspect", "api"]).output().unwrap();
    assert!(alive.status.success() && String::from_utf8_lossy(&alive.stdout).contains("\"api\""));
}

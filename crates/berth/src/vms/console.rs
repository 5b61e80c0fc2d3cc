//! `berth console`: a terminal, or pipes, at a VM's console.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use berth_image::Name;
use clap::Args;

use super::{LiveVm, OneName, VmsError};
use crate::console::{Guest, Output, forward_input};
use crate::escape::{ATTACHED_HELP, EscapeFilter, Key};
use crate::log;
use crate::terminal::{self, RawTerminal};

/// How often it is looked whether the input has ended.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Arguments of `berth console`.
#[derive(Debug, Args)]
#[command(after_help = "\
The last 64 KiB that the console printed come first. Several may be attached: all see the same, and all may type.

Keys: Ctrl-A d detaches, Ctrl-A x ends the VM, Ctrl-A p presses its power button, Ctrl-A h lists all keys.

With standard input from a pipe all of it goes to the guest, and the keys mean nothing special. It ends when the VM \
ends, or with --quit at the end of its input.")]
pub struct ConsoleArguments {
    #[command(flatten)]
    name: OneName,
    /// Only look: nothing that is typed reaches the guest
    #[arg(short, long)]
    read_only: bool,
    /// End at the end of the input, once the guest has printed nothing for this many seconds
    #[arg(short, long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2", conflicts_with = "read_only")]
    quit: Option<u16>,
}

/// Until the VM ends, or the user detaches.
pub fn attach(arguments: &ConsoleArguments) -> Result<ExitCode, VmsError> {
    let vm = LiveVm::find(&arguments.name.name)?;
    let mut stream = vm.ask(berth_api::Client::console)?;
    let writer = stream.writer().map_err(VmsError::host("use the connection"))?;
    let at_end = Arc::new(AtomicBool::new(false));
    if arguments.quit.is_some() {
        writer.set_read_timeout(Some(LOOK_AGAIN)).map_err(VmsError::host("use the connection"))?;
    }
    let on_terminal = terminal::is_terminal() && !arguments.read_only;
    let raw = if on_terminal {
        if let Some((columns, rows)) = terminal::size() {
            vm.ask(|client| client.set_console_size(columns, rows))?;
        }
        log::message(&format!("{}: attached; Ctrl-A d detaches, Ctrl-A h lists keys", vm.name()));
        Some(RawTerminal::enter().map_err(VmsError::host("set the terminal up"))?)
    } else {
        None
    };
    if !arguments.read_only {
        let typist = Typist { vm_name: arguments.name.name.clone(), writer };
        type_on_thread(on_terminal, typist, at_end.clone())?;
    }
    let mut output = Output::new().map_err(VmsError::host("use standard output"))?;
    let mut buffer = [0; 16 << 10];
    let mut printed_at = Instant::now();
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => {
                printed_at = Instant::now();
                output.write_all(buffer.get(..n).unwrap_or_default()).map_err(VmsError::host("print"))?;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                let silence = arguments.quit.map_or(Duration::MAX, |s| Duration::from_secs(s.into()));
                if at_end.load(Ordering::Acquire) && printed_at.elapsed() >= silence {
                    break;
                }
            }
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => break,
            Err(e) => return Err(VmsError::host("read from the console")(e)),
        }
        if output.is_closed() {
            break;
        }
    }
    drop(raw);
    if on_terminal {
        eprintln!();
        let detached = vm.directory().is_alive();
        log::message(if detached { "detached; the VM goes on" } else { "the VM has ended" });
    }
    Ok(ExitCode::SUCCESS)
}

/// The thread ends with the process: nothing can interrupt its read.
fn type_on_thread(on_terminal: bool, mut typist: Typist, at_end: Arc<AtomicBool>) -> Result<(), VmsError> {
    let forward = move || {
        if let Err(e) = forward_input(on_terminal.then(EscapeFilter::attached), &mut typist) {
            log::message(&format!("no more input: {e}"));
        }
        // The guest is not told that there is no more input: a console has no end.
        at_end.store(true, Ordering::Release);
    };
    let thread = thread::Builder::new().name("input".to_owned()).spawn(forward);
    thread.map(drop).map_err(VmsError::host("start a thread"))
}

/// Types into the connection.
struct Typist {
    vm_name: Name,
    writer: UnixStream,
}

impl Typist {
    fn detach(&self) {
        // If it is gone already, so is what it would end.
        let _ = self.writer.shutdown(Shutdown::Both);
    }

    fn ask(&self, request: impl FnOnce(&berth_api::Client) -> Result<(), berth_api::ClientError>) {
        if let Err(e) = LiveVm::find(&self.vm_name).and_then(|vm| vm.ask(request)) {
            log::message(&e.to_string());
        }
    }
}

impl Guest for Typist {
    fn input(&mut self, bytes: &[u8]) -> usize {
        // If the VM is gone what is typed goes nowhere.
        let _ = self.writer.write_all(bytes);
        bytes.len()
    }

    fn wait_for_room(&mut self, _timeout: Duration) {}

    fn key(&mut self, key: Key) {
        match key {
            Key::Detach => self.detach(),
            Key::End => self.ask(berth_api::Client::kill),
            Key::PowerButton => self.ask(berth_api::Client::power_button),
            Key::Help => ATTACHED_HELP.lines().for_each(log::message),
        }
    }
}

//! One command, from its start to its end.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;

use berth_agent_protocol::{CHUNK, Exec, Frame, FromGuest, FromHost, MAX_CREDIT, Stream, data, message};
use parking_lot::{Condvar, Mutex};
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};
use signal_hook::iterator::Signals;

use super::connect::Link;
use super::output::Output;
use super::{ExecError, window};
use crate::terminal::{self, RawTerminal};
use crate::{console, log};

/// After so many SIGINT and SIGTERM the user wants an end, whatever the guest does.
const ENOUGH: u32 = 3;

/// What is said to the agent, by any thread.
#[derive(Clone)]
pub struct Line(Arc<Mutex<UnixStream>>);

impl Line {
    /// Says it. A line that is dead is noticed by who listens.
    pub fn say(&self, m: &FromHost) {
        self.send(&message(m).unwrap_or_default());
    }

    fn send(&self, bytes: &[u8]) {
        let _ = self.0.lock().write_all(bytes);
    }
}

/// Runs a command; returns its exit status as a shell has it. `keyboard`: the user's terminal is the command's.
///
/// # Errors
/// [`ExecError`].
pub fn run(link: Link, exec: &Exec, keyboard: bool) -> Result<u8, ExecError> {
    let Link { stream, decoder } = link;
    let line = Line(Arc::new(Mutex::new(stream.try_clone().map_err(ExecError::host("a connection"))?)));
    let mut incoming = Incoming { stream, decoder, buffer: vec![0; CHUNK] };
    line.send(&message(&FromHost::Exec(exec.clone())).ok_or(ExecError::TooLong)?);
    let credit = match incoming.message()? {
        FromGuest::Started { stdin_credit, .. } => stdin_credit,
        FromGuest::Failed { kind, text } => return Err(ExecError::Refused { kind, text }),
        other => return Err(ExecError::Protocol(format!("{other:?} instead of a start"))),
    };
    let input = Input::default();
    input.grant(credit);
    let raw =
        if keyboard { Some(RawTerminal::enter().map_err(ExecError::host("the terminal"))?) } else { None };
    pass_signals_on(line.clone(), exec.tty.is_some()).map_err(ExecError::host("signals"))?;
    if exec.stdin {
        let (input, line) = (input.clone(), line.clone());
        let thread = thread::Builder::new().name("stdin".to_owned());
        // It ends with the process: nothing can interrupt its read.
        thread.spawn(move || input.pass_on(&line)).map_err(ExecError::host("a thread"))?;
    }
    let start = |stream, to: &dyn AsFd| {
        Output::start(stream, to.as_fd(), line.clone()).map_err(ExecError::host("an output"))
    };
    let mut outputs = [start(Stream::Stdout, &io::stdout())?, start(Stream::Stderr, &io::stderr())?];
    let ended = incoming.until_exit(&input, &mut outputs);
    // What came is written, whatever came then.
    outputs.into_iter().for_each(Output::finish);
    drop(raw);
    ended
}

/// What comes from the agent.
struct Incoming {
    stream: UnixStream,
    decoder: berth_agent_protocol::Decoder,
    buffer: Vec<u8>,
}

impl Incoming {
    fn frame(&mut self) -> Result<Frame<FromGuest>, ExecError> {
        loop {
            let next = self.decoder.next_frame().map_err(|e| ExecError::Protocol(e.to_string()))?;
            if let Some(frame) = next {
                return Ok(frame);
            }
            match self.stream.read(&mut self.buffer) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(n) if n > 0 => self.decoder.feed(self.buffer.get(..n).unwrap_or_default()),
                _ => return Err(ExecError::Broken),
            }
        }
    }

    fn message(&mut self) -> Result<FromGuest, ExecError> {
        match self.frame()? {
            Frame::Message(m) => Ok(m),
            _ => Err(ExecError::Protocol("data before a start".to_owned())),
        }
    }

    fn until_exit(&mut self, input: &Input, outputs: &mut [Output; 2]) -> Result<u8, ExecError> {
        loop {
            match self.frame()? {
                Frame::Data(stream, bytes) => {
                    let output = outputs.iter_mut().find(|o| o.stream() == stream);
                    if !output.is_some_and(|o| o.take(bytes)) {
                        return Err(ExecError::Protocol("output that was not asked for".to_owned()));
                    }
                }
                Frame::Message(FromGuest::Exited(exit)) => return Ok(exit.status()),
                Frame::Message(FromGuest::Credit(bytes)) => input.grant(bytes),
                Frame::Message(FromGuest::StdinClosed) => input.close(),
                Frame::Message(FromGuest::Failed { kind, text }) => {
                    return Err(ExecError::Refused { kind, text });
                }
                Frame::Hello(_) | Frame::Message(_) => {
                    return Err(ExecError::Protocol("what nobody asked for".to_owned()));
                }
            }
        }
    }
}

/// The command's input, and how much of it the guest takes now.
#[derive(Clone, Default)]
struct Input(Arc<(Mutex<Credit>, Condvar)>);

#[derive(Default)]
struct Credit {
    bytes: u32,
    closed: bool,
}

impl Input {
    fn grant(&self, bytes: u32) {
        let (credit, changed) = &*self.0;
        let mut credit = credit.lock();
        credit.bytes = credit.bytes.saturating_add(bytes).min(MAX_CREDIT);
        changed.notify_all();
    }

    fn close(&self) {
        let (credit, changed) = &*self.0;
        credit.lock().closed = true;
        changed.notify_all();
    }

    /// Waits until something may be sent; how much. `None`: nothing any more.
    fn wait(&self) -> Option<usize> {
        let (credit, changed) = &*self.0;
        let mut credit = credit.lock();
        while credit.bytes == 0 && !credit.closed {
            changed.wait(&mut credit);
        }
        (!credit.closed).then_some(credit.bytes as usize)
    }

    /// Passes standard input on, to its end.
    fn pass_on(&self, line: &Line) {
        let mut buffer = vec![0; CHUNK];
        while let Some(most) = self.wait() {
            let most = most.min(buffer.len());
            match console::read_input(buffer.get_mut(..most).unwrap_or_default()) {
                Ok(0) => break,
                Ok(n) => {
                    self.0.0.lock().bytes -= n as u32;
                    line.send(&data(Stream::Stdin, buffer.get(..n).unwrap_or_default()));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && console::wait_for_input().is_ok() => {}
                Err(e) => {
                    log::message(&format!("cannot read standard input: {e}"));
                    break;
                }
            }
        }
        line.say(&FromHost::CloseStdin);
    }
}

/// From now on signals go to the command, by a thread that ends with the process.
fn pass_signals_on(line: Line, has_terminal: bool) -> io::Result<()> {
    let passed = [SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2];
    let mut signals = Signals::new(passed.iter().chain(&[SIGCONT, SIGWINCH]))?;
    thread::Builder::new().name("signals".to_owned()).spawn(move || {
        let mut asked = 0;
        for signal in signals.forever() {
            match signal {
                SIGCONT if terminal::is_raw() => terminal::make_raw(),
                SIGCONT => {}
                SIGWINCH => {
                    if let Some(size) = window().filter(|_| has_terminal) {
                        line.say(&FromHost::WindowSize(size));
                    }
                }
                signal => {
                    asked += u32::from(matches!(signal, SIGINT | SIGTERM));
                    if asked == ENOUGH {
                        terminal::restore();
                        log::message("ended by a third signal; the command in the guest gets SIGHUP");
                        std::process::exit(128 + signal);
                    }
                    line.say(&FromHost::Signal(signal as u8));
                }
            }
        }
    })?;
    Ok(())
}

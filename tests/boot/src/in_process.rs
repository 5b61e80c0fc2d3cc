//! A guest in this process, whose owner has the machine's own handle: for what a running VM can be told.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use berth_machine::options::{ConsoleKind, DeviceOptions, MemoryOptions};
use berth_machine::{EngineKind, Machine, MachineConfig, MachineControl, MachineError};

use crate::Setup;

/// How often it is looked whether something has happened.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// A running guest whose shell does what it is told, one line at a time. Dropping it ends it.
pub struct InProcess {
    machine: Machine,
    control: MachineControl,
    output: Receiver<u8>,
    deadline: Instant,
}

impl InProcess {
    /// Boots the default guest with `memory` bytes, two vCPUs and `devices`. All together has `limit`.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn start(
        setup: &Setup,
        memory: u64,
        devices: DeviceOptions,
        limit: Duration,
    ) -> Result<Self, MachineError> {
        // The last console that is named is that of the guest's programs.
        let console = if devices.console == ConsoleKind::Virtio { "console=hvc0 " } else { "" };
        let parameters = berth_guest_image::KERNEL_PARAMETERS;
        let config = MachineConfig {
            name: "in-process".to_owned(),
            engine: EngineKind::Soft,
            vcpus: 2,
            memory: MemoryOptions::of_size(memory),
            kernel: setup.kernel.clone(),
            initrd: Some(PathBuf::from(setup.initrd.path())),
            cmdline: format!("{parameters} {console}\"berth.run=sh /tests/obey.sh\""),
            debug_exit: false,
            no_reboot: true,
            code_cache_bytes: 256 << 20,
            store_dir: None,
            devices,
        };
        let (sender, output) = channel();
        let mut machine = Machine::new(config, Box::new(Sink(sender)))?;
        let control = machine.control();
        machine.start()?;
        let mut this = Self { machine, control, output, deadline: Instant::now() + limit };
        this.read_to("=== ready");
        Ok(this)
    }

    /// The machine's handle.
    pub fn control(&self) -> &MachineControl {
        &self.control
    }

    /// Does a line of shell in the guest; returns what it printed, without white space around it.
    ///
    /// # Panics
    /// When the guest's time is over, or the last command of the line fails.
    pub fn run(&mut self, line: &str) -> String {
        assert!(!line.contains('\n'), "one line: {line}");
        let text = format!("{line}\n");
        let mut rest = text.as_bytes();
        while !rest.is_empty() {
            let taken = self.control.console_input(rest);
            rest = &rest[taken..];
            self.control.wait_for_console_room(LOOK_AGAIN);
        }
        let said = self.read_to("=== done ");
        let status = self.read_to("\n");
        assert_eq!(status.trim(), "0", "{line}: {said}");
        said.trim().to_owned()
    }

    /// Waits until `done` says so.
    ///
    /// # Panics
    /// When the guest's time is over.
    pub fn wait_until(&self, what: &str, mut done: impl FnMut(&MachineControl) -> bool) {
        while !done(&self.control) {
            assert!(Instant::now() < self.deadline, "not in time: {what}");
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// What the console shows up to `mark`.
    fn read_to(&mut self, mark: &str) -> String {
        let mut seen = Vec::new();
        while !seen.ends_with(mark.as_bytes()) {
            let left = self.deadline.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(byte) => seen.push(byte),
                Err(e) => panic!("no {mark:?} ({e}) in: {}", String::from_utf8_lossy(&seen)),
            }
        }
        seen.truncate(seen.len() - mark.len());
        String::from_utf8_lossy(&seen).into_owned()
    }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        self.control.stop();
        self.machine.wait();
    }
}

/// The console's output.
struct Sink(Sender<u8>);

impl Write for Sink {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        for &byte in data {
            // At the end nobody reads any more.
            let _ = self.0.send(byte);
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

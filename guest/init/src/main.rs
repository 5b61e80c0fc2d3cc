//! The init program (PID 1) of Berth's default guest.
//!
//! ```text
//!   kernel ─► mounts ─► drivers of the PCI devices that exist ─► shell or command on the console
//!                                                                     │
//!        power button (ACPI event), poweroff, end of the shell ───────┴─► shutdown
//! ```
//!
//! Called `berth-agent`, the same file is the guest's agent (`guest/agent`): a guest that has vsock runs both, and keeps one
//! file in memory. Images of Debian get the file as their agent only. Called `berth-load`, it is the load of `berth rehearse`
//! (`guest/load`).
//!
//! It is one static program, and without threads unless it is the load. What it does not need at the prompt (the power button's driver)
//! it loads after the shell was started, so that the prompt comes early.
//!
//! Kernel command line: `berth.name=` host name, `berth.run="…"` a command instead of the shell, `berth.load=KIND` the
//! load of a rehearsal instead of it, `berth.winsize=COLUMNSxROWS` size of the user's terminal.

mod acpi_event;
mod agent;
mod cmdline;
mod console;
mod filesystem;
mod load;
mod modules;
mod power;
mod signals;

use std::io::Write;

use cmdline::CommandLine;
use console::Console;
use power::Action;

fn main() {
    if agent::is_called() {
        let _ = berth_guest_agent::run().inspect_err(|e| complain(&format!("the agent cannot go on: {e}")));
        std::process::exit(1);
    }
    if load::is_called() {
        load::run();
        std::process::exit(1);
    }
    if std::process::id() != 1 {
        eprintln!(
            "This is the init program of a Berth guest: it only runs as process 1 of a virtual machine."
        );
        std::process::exit(2);
    }
    let action = run().unwrap_or_else(|e| {
        complain(&format!("init cannot go on: {e}"));
        Action::PowerOff
    });
    power::shut_down(action)
}

/// Brings the guest up and stays until something ends it.
fn run() -> std::io::Result<Action> {
    filesystem::mount_all();
    let cmdline = CommandLine::read();
    if let Some(name) = &cmdline.name {
        filesystem::set_host_name(name);
    }
    let mut modules = modules::Modules::for_running_kernel();
    modules.load_for_bus("pci");
    modules.load_for_bus("virtio");

    let signals = signals::Signals::block_and_open()?;
    let console = Console::find();
    console.set_size(cmdline.window);
    say(&filesystem::summary());
    let child = match &cmdline.load {
        Some(kind) => load::start(kind)?,
        None => console.spawn(cmdline.command.as_deref())?,
    };
    let mut agent = agent::Agent::default();
    agent.start();

    // In this order: from the moment that the button works there is someone who listens.
    let acpi =
        acpi_event::AcpiEvents::open().inspect_err(|e| complain(&format!("no power button: {e}"))).ok();
    modules.load_for_bus("acpi");

    loop {
        signals.wait(acpi.as_ref())?;
        if acpi.as_ref().is_some_and(acpi_event::AcpiEvents::power_button_pressed) {
            return Ok(Action::PowerOff);
        }
        if let Some(action) = signals.requested_action() {
            return Ok(action);
        }
        let mut ended = None;
        power::reap(|pid, status| {
            ended = ended.or((pid == child).then_some(status));
            agent.process_ended(pid);
        });
        if let Some(status) = ended {
            if cmdline.command.is_some() {
                say(&format!("Berth guest: exit status {status}"));
            }
            return Ok(Action::PowerOff);
        }
    }
}

/// Prints a line on the console. A console that does not work is no reason to stop.
fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// As [`say`], for something that went wrong.
fn complain(line: &str) {
    let _ = writeln!(std::io::stderr(), "Berth guest: {line}");
}

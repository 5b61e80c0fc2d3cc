//! The machine's life with a scripted engine: each vCPU runs a Rust function instead of guest code.

use std::collections::VecDeque;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use crate::options::{DEFAULT_PRIORITY, MAX_PRIORITY, MemoryOptions};
use berth_cpu::{CpuState, MpState, VcpuId};
use berth_engine::{
    Bus, DirtyPages, Engine, EngineError, EventFd, Exit, InterruptControllers, LocalApic, StoodStill, Vcpu,
    VcpuHandle,
};
use berth_memory::layout::ports;
use berth_memory::{GuestMemory, GuestPhysAddr};
use parking_lot::{Condvar, Mutex};

use crate::*;

const LOAD_AT: u64 = 2 << 20;
const CODE: [u8; 4] = [0x0f, 0x0b, 0xf4, 0x90];
/// What vCPUs do when they have nothing to do: longer than any test takes.
const LONG: Duration = Duration::from_secs(20);

/// What a vCPU's function gets.
struct Context<'a> {
    id: VcpuId,
    /// Which run this is since the machine was made, from 0.
    turn: usize,
    state: &'a CpuState,
    bus: &'a dyn Bus,
    memory: &'a GuestMemory,
    handle: &'a ScriptHandle,
}

impl Context<'_> {
    /// Waits for a stop, as a halted vCPU does.
    fn halt(&self) -> Exit {
        let mut stop = self.handle.stop.lock();
        while !*stop {
            let timed_out = self.handle.wake.wait_for(&mut stop, LONG).timed_out();
            assert!(!timed_out, "nobody stopped vCPU {}", self.id);
        }
        *stop = false;
        Exit::Stopped
    }
}

type Script = Arc<dyn Fn(&Context<'_>) -> Exit + Send + Sync>;

#[derive(Default)]
struct ScriptHandle {
    stop: Mutex<bool>,
    wake: Condvar,
}

impl VcpuHandle for ScriptHandle {
    fn kick(&self) {}
    fn stop(&self) {
        *self.stop.lock() = true;
        self.wake.notify_all();
    }
}

struct ScriptVcpu {
    id: VcpuId,
    turn: usize,
    state: CpuState,
    memory: GuestMemory,
    handle: Arc<ScriptHandle>,
    script: Script,
}

impl Vcpu for ScriptVcpu {
    fn handle(&self) -> Arc<dyn VcpuHandle> {
        self.handle.clone()
    }
    fn run(&mut self, bus: &dyn Bus) -> Exit {
        let context = Context {
            id: self.id,
            turn: self.turn,
            state: &self.state,
            bus,
            memory: &self.memory,
            handle: &self.handle,
        };
        let exit = (self.script)(&context);
        self.turn += 1;
        exit
    }
    fn state(&mut self) -> CpuState {
        self.state.clone()
    }
    fn skip_time(&mut self, _time: StoodStill) {}
    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.state = state.clone();
        Ok(())
    }
}

struct ScriptEngine {
    memory: GuestMemory,
    script: Script,
}

impl Engine for ScriptEngine {
    fn name(&self) -> &'static str {
        "script"
    }
    fn physical_bits(&self) -> u8 {
        46
    }
    fn interrupt_controllers(&self) -> InterruptControllers {
        InterruptControllers::Devices
    }
    fn create_vcpu(
        &self,
        id: VcpuId,
        apic: Option<Arc<dyn LocalApic>>,
    ) -> Result<Box<dyn Vcpu>, EngineError> {
        assert!(apic.is_some());
        Ok(Box::new(ScriptVcpu {
            id,
            turn: 0,
            state: CpuState::reset(),
            memory: self.memory.clone(),
            handle: Arc::default(),
            script: self.script.clone(),
        }))
    }
    fn counters(&self) -> Vec<(String, u64)> {
        vec![("code.blocks".to_owned(), 7)]
    }

    fn skip_time(&self, _time: StoodStill) {}
    fn memory_written(&self, _start: GuestPhysAddr, _len: u64) {}
    fn add_doorbell(&self, _addr: GuestPhysAddr, _event: &EventFd) -> bool {
        false
    }
    fn remove_doorbell(&self, _addr: GuestPhysAddr, _event: &EventFd) {}
    fn begin_access_period(&self) -> bool {
        false
    }
    fn page_faults(&self) -> berth_memory::Faults {
        berth_memory::Faults::User
    }
    fn start_dirty_log(&self) -> Result<(), EngineError> {
        Ok(())
    }
    fn take_dirty(&self, _region: usize) -> Result<DirtyPages, EngineError> {
        Ok(DirtyPages::default())
    }
    fn stop_dirty_log(&self) -> Result<(), EngineError> {
        Ok(())
    }
    fn clock(&self) -> Result<u64, EngineError> {
        Ok(0)
    }
    fn set_clock(&self, _nanos: u64) -> Result<(), EngineError> {
        Ok(())
    }
}

/// A multiboot kernel in a file of its own, loaded at [`LOAD_AT`]; the file goes when this does.
struct Kernel(PathBuf);

impl Kernel {
    fn new() -> Self {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("berth-machine-{}-{number}", std::process::id()));
        let (magic, flags) = (0x1bad_b002_u32, 1_u32 << 16);
        let start = LOAD_AT as u32;
        let words = [magic, flags, 0_u32.wrapping_sub(magic + flags), start, start, 0, 0, start + 32];
        let file = [words.map(u32::to_le_bytes).concat(), CODE.to_vec()].concat();
        std::fs::write(&path, file).unwrap();
        Self(path)
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn config(kernel: &Kernel, vcpus: u8) -> MachineConfig {
    MachineConfig {
        name: "test".to_owned(),
        engine: EngineKind::Soft,
        vcpus,
        memory: MemoryOptions::of_size(8 << 20),
        kernel: kernel.0.clone(),
        initrd: None,
        cmdline: String::new(),
        debug_exit: true,
        no_reboot: false,
        code_cache_bytes: 1 << 20,
        store_dir: None,
        devices: Default::default(),
    }
}

fn machine(config: MachineConfig, script: impl Fn(&Context<'_>) -> Exit + Send + Sync + 'static) -> Machine {
    let script: Script = Arc::new(script);
    Machine::with_engine(config, Box::new(std::io::sink()), |memory, _| {
        Ok(Box::new(ScriptEngine { memory, script }))
    })
    .unwrap()
}

fn outcome(config: MachineConfig, script: impl Fn(&Context<'_>) -> Exit + Send + Sync + 'static) -> Outcome {
    let mut machine = machine(config, script);
    machine.start().unwrap();
    machine.wait()
}

/// Soft off, as ACPI does it: SLP_TYP of S5 and SLP_EN.
fn power_off(bus: &dyn Bus) {
    let value = u16::from(ports::SLP_TYP_S5) << 10 | 1 << 13;
    bus.port_write(ports::PM1A_CNT, &value.to_le_bytes());
}

fn reset(bus: &dyn Bus) {
    bus.port_write(ports::RESET, &[ports::RESET_VALUE]);
}

#[test]
fn the_guest_can_power_off() {
    let kernel = Kernel::new();
    let end = outcome(config(&kernel, 1), |c| {
        power_off(c.bus);
        c.halt()
    });
    assert_eq!(end, Outcome::PoweredOff);
}

#[test]
fn the_debug_exit_port_gives_its_code() {
    let kernel = Kernel::new();
    let script = |c: &Context<'_>| {
        c.bus.port_write(ports::DEBUG_EXIT, &[0x10]);
        c.halt()
    };
    assert_eq!(outcome(config(&kernel, 1), script), Outcome::DebugExit(0x21));
}

#[test]
fn all_vcpus_run_and_only_the_first_is_started() {
    let kernel = Kernel::new();
    let (seen, states): (Sender<_>, Receiver<_>) = channel();
    let mut machine = machine(config(&kernel, 3), move |c| {
        let thread = std::thread::current().name().unwrap_or_default().to_owned();
        seen.send((c.id.0, c.state.clone(), thread)).unwrap();
        c.halt()
    });
    machine.start().unwrap();
    let mut states: Vec<_> = (0..3).map(|_| states.recv_timeout(LONG).unwrap()).collect();
    states.sort_by_key(|(id, ..)| *id);
    assert_eq!(states[0].1.rip, LOAD_AT + 32);
    assert_eq!(states[0].1.mp_state, MpState::Runnable);
    assert!(states[1..].iter().all(|(_, state, _)| state.mp_state == MpState::WaitForSipi));
    let threads: Vec<&str> = states.iter().map(|(.., thread)| thread.as_str()).collect();
    assert_eq!(threads, ["test/vcpu0", "test/vcpu1", "test/vcpu2"]);
    machine.control().stop();
    assert_eq!(machine.wait(), Outcome::Stopped);
    assert_eq!(machine.wait(), Outcome::Stopped);
}

#[test]
fn a_reset_loads_the_kernel_again() {
    let kernel = Kernel::new();
    let end = outcome(config(&kernel, 2), |c| {
        if c.id.0 != 0 {
            return c.halt();
        }
        let mut code = [0; 4];
        c.memory.read(GuestPhysAddr(c.state.rip), &mut code).unwrap();
        if code != CODE || c.state.rip != LOAD_AT + 32 {
            return Exit::Failed { detail: format!("turn {}: {code:x?} at {:#x}", c.turn, c.state.rip) };
        }
        c.memory.write(GuestPhysAddr(c.state.rip), &[0; 4]).unwrap();
        if c.turn < 3 {
            reset(c.bus)
        } else {
            power_off(c.bus)
        }
        c.halt()
    });
    assert_eq!(end, Outcome::PoweredOff);
}

#[test]
fn a_reset_puts_devices_back() {
    let kernel = Kernel::new();
    let scratch = ports::SERIAL + 7;
    let end = outcome(config(&kernel, 1), move |c| {
        let mut value = [0];
        c.bus.port_read(scratch, &mut value);
        match (c.turn, value[0]) {
            (0, 0) => {
                c.bus.port_write(scratch, &[0x5a]);
                c.bus.port_read(scratch, &mut value);
                assert_eq!(value, [0x5a]);
                reset(c.bus);
            }
            (1, 0) => power_off(c.bus),
            other => return Exit::Failed { detail: format!("{other:?}") },
        }
        c.halt()
    });
    assert_eq!(end, Outcome::PoweredOff);
}

#[test]
fn without_reboot_a_reset_ends_the_machine() {
    let kernel = Kernel::new();
    let config = MachineConfig { no_reboot: true, ..config(&kernel, 1) };
    let end = outcome(config, |c| {
        reset(c.bus);
        c.halt()
    });
    assert_eq!(end, Outcome::Reset);
}

#[test]
fn the_owner_can_reset_and_stop() {
    let kernel = Kernel::new();
    let (seen, turns) = channel();
    let mut machine = machine(config(&kernel, 2), move |c| {
        if c.id.0 == 0 {
            seen.send(c.turn).unwrap();
        }
        c.halt()
    });
    machine.start().unwrap();
    let control = machine.control();
    for turn in 0..3 {
        assert_eq!(turns.recv_timeout(LONG), Ok(turn));
        control.reset();
    }
    assert_eq!(turns.recv_timeout(LONG), Ok(3));
    control.stop();
    assert_eq!(machine.wait(), Outcome::Stopped);
    // Afterwards the handle does nothing.
    control.stop();
    control.reset();
    control.power_button();
}

#[test]
fn a_triple_fault_ends_with_an_account() {
    let kernel = Kernel::new();
    let end = outcome(config(&kernel, 2), |c| match c.id.0 {
        0 => Exit::TripleFault { detail: "#UD, then #GP, then #NP".to_owned() },
        _ => c.halt(),
    });
    let Outcome::Failed(text) = end else { panic!("{end:?}") };
    for part in
        ["vCPU 0: triple fault: #UD, then #GP", "RIP 0000000000200020", "32-bit protected", "0f 0b f4 90"]
    {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
}

#[test]
fn a_panic_of_the_engine_ends_the_machine() {
    let kernel = Kernel::new();
    let end = outcome(config(&kernel, 2), |c| if c.id.0 == 1 { panic!("meant to") } else { c.halt() });
    assert!(matches!(&end, Outcome::Failed(text) if text.starts_with("vCPU 1: internal error")), "{end:?}");
}

#[test]
fn a_stop_without_reason_is_survived() {
    let kernel = Kernel::new();
    let end = outcome(config(&kernel, 1), |c| {
        if c.turn < 5 {
            return Exit::Stopped;
        }
        power_off(c.bus);
        c.halt()
    });
    assert_eq!(end, Outcome::PoweredOff);
}

#[test]
fn a_dropped_machine_stops() {
    let kernel = Kernel::new();
    let (seen, runs) = channel();
    let mut machine = machine(config(&kernel, 1), move |c| {
        seen.send(()).unwrap();
        c.halt()
    });
    machine.start().unwrap();
    runs.recv_timeout(LONG).unwrap();
    drop(machine);
    assert!(runs.recv().is_err(), "the vCPU's thread is gone, and its script with it");
}

#[test]
fn the_console_goes_both_ways() {
    /// Keeps what is written.
    struct Screen(Arc<Mutex<VecDeque<u8>>>);
    impl Write for Screen {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let kernel = Kernel::new();
    let screen = Arc::new(Mutex::new(VecDeque::new()));
    let script: Script = Arc::new(|c| {
        // Data ready, then the byte, each sent back.
        for _ in 0..2 {
            let mut byte = [0];
            while byte[0] & 1 == 0 {
                c.bus.port_read(ports::SERIAL + 5, &mut byte);
            }
            c.bus.port_read(ports::SERIAL, &mut byte);
            c.bus.port_write(ports::SERIAL, &byte);
        }
        power_off(c.bus);
        c.halt()
    });
    let console = Box::new(Screen(screen.clone()));
    let mut machine = Machine::with_engine(config(&kernel, 1), console, |memory, _| {
        Ok(Box::new(ScriptEngine { memory, script }))
    })
    .unwrap();
    assert_eq!(machine.control().console_input(b"ok"), 2);
    machine.start().unwrap();
    assert_eq!(machine.wait(), Outcome::PoweredOff);
    assert_eq!(*screen.lock(), b"ok");
}

#[test]
fn impossible_machines_are_refused() {
    let kernel = Kernel::new();
    let refused =
        |config| Machine::new(config, Box::new(std::io::sink())).map(|_| ()).unwrap_err().to_string();
    let good = config(&kernel, 1);
    assert!(refused(MachineConfig { vcpus: 0, ..good.clone() }).contains("0 vCPUs"));
    assert!(refused(MachineConfig { vcpus: 65, ..good.clone() }).contains("65 vCPUs"));
    assert!(
        refused(MachineConfig { memory: MemoryOptions::of_size(1024), ..good.clone() })
            .contains("memory size 1024")
    );
    assert!(refused(MachineConfig { kernel: "/nonexistent".into(), ..good }).contains("/nonexistent"));
}

#[test]
fn a_pause_parks_all_vcpus_until_the_resume() {
    let kernel = Kernel::new();
    let (seen, turns) = channel();
    let mut machine = machine(config(&kernel, 3), move |c| {
        seen.send((c.id.0, c.turn)).unwrap();
        c.halt()
    });
    let control = machine.control();
    machine.start().unwrap();
    for turn in 0..3 {
        let mut ran: Vec<_> = (0..3).map(|_| turns.recv_timeout(LONG).unwrap()).collect();
        ran.sort_unstable();
        assert_eq!(ran, [(0, turn), (1, turn), (2, turn)]);
        assert!(control.pause());
        assert_eq!(control.state(), MachineState::Paused);
        // Pausing twice changes nothing; nobody runs.
        assert!(control.pause());
        assert!(turns.recv_timeout(Duration::from_millis(20)).is_err());
        assert!(control.resume());
        assert_eq!(control.state(), MachineState::Running);
    }
    assert!(control.resume());
    control.stop();
    assert_eq!(machine.wait(), Outcome::Stopped);
    assert!(!control.pause(), "there is nothing left to pause");
    let states: Vec<_> = control.notices().after(0).into_iter().map(|r| r.notice).collect();
    assert_eq!(states.len(), 8, "{states:?}");
    assert_eq!(states.last(), Some(&Notice::State(MachineState::Ended)));
}

#[test]
fn a_frozen_machine_is_thawed_but_a_paused_one_is_not() {
    let kernel = Kernel::new();
    let (seen, turns) = channel();
    let mut machine = machine(config(&kernel, 2), move |c| {
        seen.send(c.turn).unwrap();
        c.halt()
    });
    let control = machine.control();
    machine.start().unwrap();
    let both_run = || (0..2).for_each(|_| _ = turns.recv_timeout(LONG).unwrap());
    both_run();
    assert!(control.stand_frozen());
    assert_eq!(control.state(), MachineState::Frozen);
    assert!(matches!(control.freeze(), Err(FreezeError::NotRunning)));
    assert!(control.thaw());
    both_run();
    // Whoever wants to use it resumes what is frozen too.
    assert!(control.stand_frozen() && control.resume());
    both_run();
    // Its owner wants it to stand still: then nobody else lets it go on.
    assert!(control.stand_frozen() && control.pause());
    assert_eq!(control.state(), MachineState::Paused);
    assert!(control.thaw());
    assert_eq!(control.state(), MachineState::Paused);
    // Nor is a paused one called frozen.
    assert!(control.stand_frozen());
    assert_eq!(control.state(), MachineState::Paused);
    assert!(turns.try_recv().is_err());
    assert!(control.resume());
    both_run();
    assert!(control.stand_frozen());
    control.stop();
    assert_eq!(machine.wait(), Outcome::Stopped);
    assert!(matches!(control.freeze(), Err(FreezeError::NotRunning)));
}

#[test]
fn shares_of_memory_are_changed_and_checked() {
    let kernel = Kernel::new();
    let machine = machine(config(&kernel, 1), |c| c.halt());
    let control = machine.control();
    let share = control.memory_share();
    assert_eq!((share.reserve, share.limit, share.priority), (0, None, DEFAULT_PRIORITY));
    let good = MemoryShare { reserve: 1 << 20, limit: Some(2 << 20), priority: 7 };
    control.set_memory_share(good).unwrap();
    for bad in [
        MemoryShare { reserve: 9 << 20, ..good },
        MemoryShare { limit: Some(9 << 20), ..good },
        MemoryShare { limit: Some(1 << 19), ..good },
        MemoryShare { priority: MAX_PRIORITY + 1, ..good },
    ] {
        assert!(control.set_memory_share(bad).is_err(), "{bad:?}");
        assert_eq!(control.memory_share(), good);
    }
}

#[test]
fn a_paused_machine_can_be_reset_and_stopped() {
    let kernel = Kernel::new();
    let (seen, turns) = channel();
    let mut machine = machine(config(&kernel, 2), move |c| {
        seen.send(c.turn).unwrap();
        c.halt()
    });
    let control = machine.control();
    machine.start().unwrap();
    let both = |turn| (0..2).for_each(|_| assert_eq!(turns.recv_timeout(LONG), Ok(turn)));
    both(0);
    assert!(control.pause());
    control.reset();
    both(1);
    assert!(control.pause());
    control.stop();
    assert_eq!(machine.wait(), Outcome::Stopped);
    assert!(control.notices().after(0).iter().any(|r| r.notice == Notice::Reset { by_guest: false }));
}

#[test]
fn what_a_guest_does_while_it_is_paused_is_not_lost() {
    let kernel = Kernel::new();
    let (ready, wait) = channel();
    let mut machine = machine(config(&kernel, 1), move |c| {
        ready.send(()).unwrap();
        let exit = c.halt();
        // The stop for the pause has come: its last instruction powers off.
        power_off(c.bus);
        exit
    });
    let control = machine.control();
    machine.start().unwrap();
    wait.recv_timeout(LONG).unwrap();
    assert!(control.pause());
    assert_eq!(machine.wait(), Outcome::PoweredOff);
}

#[test]
fn a_panic_of_the_guest_is_told() {
    let kernel = Kernel::new();
    let mut machine = machine(config(&kernel, 1), |c| {
        c.bus.port_write(ports::PANIC, &[1]);
        power_off(c.bus);
        c.halt()
    });
    machine.start().unwrap();
    assert_eq!(machine.wait(), Outcome::PoweredOff);
    let panic = Notice::GuestPanic { crash_loaded: false };
    assert!(machine.control().notices().after(0).iter().any(|r| r.notice == panic));
}

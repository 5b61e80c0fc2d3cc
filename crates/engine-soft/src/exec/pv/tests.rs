//! The interface from the guest's side: registers, hypercalls and structures in guest memory.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32};

use berth_cpu::bits::gpr;
use berth_cpu::msr as n;
use berth_engine::{ApicEvent, LocalApic, MsrFault};
use berth_memory::GuestPhysAddr;

use super::*;
use crate::code::Flow;
use crate::exec::msr;
use crate::exec::tests_support::*;
use crate::fault::Fault;

const AREA: u64 = 0x5000;

/// Records what is asked of it.
#[derive(Default)]
struct Recorder {
    ends: AtomicU32,
    others_wait: AtomicBool,
    sent: Mutex<Vec<u64>>,
}

impl LocalApic for Recorder {
    fn has_interrupt(&self) -> bool {
        false
    }
    fn acknowledge(&self) -> Option<u8> {
        None
    }
    fn take_event(&self) -> Option<ApicEvent> {
        None
    }
    fn has_event(&self) -> bool {
        false
    }
    fn cr8(&self) -> u8 {
        0
    }
    fn set_cr8(&self, _: u8) {}
    fn read_msr(&self, _: u32) -> Result<u64, MsrFault> {
        Err(MsrFault)
    }
    fn write_msr(&self, _: u32, _: u64) -> Result<(), MsrFault> {
        Err(MsrFault)
    }
    fn mmio_base(&self) -> Option<GuestPhysAddr> {
        None
    }
    fn mmio_read(&self, _: u16, _: &mut [u8]) {}
    fn mmio_write(&self, _: u16, _: &[u8]) {}
    fn send_ipi(&self, icr: u64) {
        self.sent.lock().unwrap().push(icr);
    }
    fn eoi(&self) {
        self.ends.fetch_add(1, Ordering::SeqCst);
    }
    fn needs_explicit_eoi(&self) -> bool {
        self.others_wait.load(Ordering::SeqCst)
    }
    fn reset(&self, _: bool) {}
    fn state(&self) -> berth_cpu::ApicState {
        berth_cpu::ApicState::reset(berth_cpu::VcpuId(0))
    }
    fn set_state(&self, _: &berth_cpu::ApicState) {}
}

fn machine() -> (Machine, Arc<Recorder>) {
    let mut m = Machine::long(0);
    let apic = Arc::new(Recorder::default());
    m.cpu.apic = Arc::clone(&apic) as Arc<dyn LocalApic>;
    (m, apic)
}

fn hypercall(m: &mut Machine, number: u64, args: [u64; 4]) -> i64 {
    m.cpu.s.gpr[gpr::RAX] = number;
    for (register, value) in [gpr::RBX, gpr::RCX, gpr::RDX, gpr::RSI].into_iter().zip(args) {
        m.cpu.s.gpr[register] = value;
    }
    assert_eq!(m.run(&[0x0f, 0x01, 0xd9]), Ok(Flow::Leave)); // vmmcall
    m.cpu.s.gpr[gpr::RAX] as i64
}

#[test]
fn the_clock_is_a_line_through_one_point() {
    let (mut m, _) = machine();
    msr::write(&mut m.cpu, n::KVM_SYSTEM_TIME_NEW, AREA | 1).unwrap();
    let (base, start) = (m.read(AREA + 8, 8), m.read(AREA + 16, 8));
    // 2 GHz: half a nanosecond a tick.
    assert_eq!((m.read(AREA + 24, 4), m.read(AREA + 28, 1), m.read(AREA + 29, 1)), (1 << 31, 0, 1));
    assert!(start == 0 && base <= m.cpu.msrs.tsc());
    assert_eq!(m.read(AREA, 4), 2);
    msr::write(&mut m.cpu, n::IA32_TSC_ADJUST, 1000).unwrap();
    assert_eq!(m.read(AREA + 8, 8), base + 1000, "it follows the guest's counter");
}

#[test]
fn clock_addresses_outside_ram_do_no_harm() {
    let (mut m, _) = machine();
    for bad in [u64::MAX, (4 << 20) - 16, 0xffff_ffff_ffff_f001] {
        msr::write(&mut m.cpu, n::KVM_SYSTEM_TIME_NEW, bad | 1).unwrap();
        msr::write(&mut m.cpu, n::KVM_WALL_CLOCK_NEW, bad).unwrap();
    }
}

#[test]
fn the_wall_clock_began_a_moment_ago() {
    let (mut m, _) = machine();
    msr::write(&mut m.cpu, n::KVM_WALL_CLOCK_NEW, AREA).unwrap();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let seconds = m.read(AREA + 4, 4);
    assert!(now - seconds < 60, "{seconds} is not near {now}");
    assert!(m.read(AREA, 4) == 2 && m.read(AREA + 8, 4) < 1_000_000_000);
}

#[test]
fn a_waiting_vcpu_is_preempted_and_flushes_later() {
    let (mut m, _) = machine();
    assert_eq!(msr::write(&mut m.cpu, n::KVM_STEAL_TIME, AREA | 3), Err(Fault::gp(0)));
    msr::write(&mut m.cpu, n::KVM_STEAL_TIME, AREA | 1).unwrap();
    suspend(&mut m.cpu);
    assert_eq!(m.read(AREA + 16, 1), 1);
    let before = m.cpu.s.jump_key;
    m.write(AREA + 16, 1, 3);
    resume(&mut m.cpu);
    assert_eq!(m.read(AREA + 16, 1), 0);
    assert_ne!(m.cpu.s.jump_key, before, "the TLB was flushed");
    let before = m.cpu.s.jump_key;
    suspend(&mut m.cpu);
    resume(&mut m.cpu);
    assert_eq!(m.cpu.s.jump_key, before);
}

#[test]
fn an_accepted_offer_is_one_end_of_interrupt() {
    let (mut m, apic) = machine();
    offer_eoi(&mut m.cpu, 0x30);
    take_eoi(&mut m.cpu);
    assert_eq!(apic.ends.load(Ordering::SeqCst), 0, "not enabled");
    assert_eq!(msr::write(&mut m.cpu, n::KVM_PV_EOI_EN, AREA | 3), Err(Fault::gp(0)));
    msr::write(&mut m.cpu, n::KVM_PV_EOI_EN, AREA | 1).unwrap();
    offer_eoi(&mut m.cpu, 0x30);
    assert_eq!(m.read(AREA, 1), 1);
    take_eoi(&mut m.cpu);
    assert_eq!((m.read(AREA, 1), apic.ends.load(Ordering::SeqCst)), (1, 0), "still open");
    m.write(AREA, 1, 0);
    take_eoi(&mut m.cpu);
    take_eoi(&mut m.cpu);
    assert_eq!(apic.ends.load(Ordering::SeqCst), 1);
}

#[test]
fn an_offer_is_withdrawn_when_another_interrupt_waits() {
    let (mut m, apic) = machine();
    msr::write(&mut m.cpu, n::KVM_PV_EOI_EN, AREA | 1).unwrap();
    offer_eoi(&mut m.cpu, 0x30);
    apic.others_wait.store(true, Ordering::SeqCst);
    take_eoi(&mut m.cpu);
    assert_eq!((m.read(AREA, 1), apic.ends.load(Ordering::SeqCst)), (0, 0));
    take_eoi(&mut m.cpu);
    offer_eoi(&mut m.cpu, 0x31);
    assert_eq!((m.read(AREA, 1), apic.ends.load(Ordering::SeqCst)), (0, 0));
}

#[test]
fn hypercalls_answer() {
    let (mut m, apic) = machine();
    assert_eq!(hypercall(&mut m, 9, [0; 4]), -95);
    assert_eq!(hypercall(&mut m, 77, [0; 4]), -1000);
    assert_eq!(hypercall(&mut m, 1, [0; 4]), 0);
    assert_eq!(hypercall(&mut m, 10, [1, 0, 0, 0xfd]), 1);
    assert_eq!(hypercall(&mut m, 10, [6, 0, 0, 0xfd]), 0, "there is only one vCPU");
    assert_eq!(hypercall(&mut m, 10, [1, 0, 0, 1 << 32]), -22);
    assert_eq!(*apic.sent.lock().unwrap(), [0xfd]);
    assert_eq!(hypercall(&mut m, 5, [0, 0, 0, 0]), 0);
    assert!(take_unhalt(&m.cpu) && !take_unhalt(&m.cpu));
    assert_eq!(hypercall(&mut m, 5, [0, 200, 0, 0]), 0);
    assert_eq!(hypercall(&mut m, 11, [0, 0, 0, 0]), 0);
    let mut user = Machine::long(3);
    assert_eq!(hypercall(&mut user, 11, [0; 4]), -1);
}

#[test]
fn a_loop_of_pause_gives_way_to_a_vcpu_without_a_host_cpu() {
    let (mut m, _) = machine();
    let (other, _state) = crate::shared::VcpuShared::new();
    m.cpu.vm.add_vcpu(Arc::clone(&other));
    let in_a_loop = |m: &mut Machine| {
        m.cpu.msrs.pv.spin = spin::Spin::default();
        // A thread that loses its CPU between the two seems to be in no loop.
        (0..100).map(|_| pause(&mut m.cpu).unwrap()).find(|flow| *flow == Flow::GiveWay)
    };
    assert_eq!(in_a_loop(&mut m), None, "no thread runs the other");
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let (say, said) = std::sync::mpsc::channel();
    let theirs = Arc::clone(&other);
    let thread = std::thread::spawn(move || {
        theirs.seat.take();
        say.send(()).unwrap();
        let _ = ended.recv();
    });
    said.recv().unwrap();
    // It may have to wait for a host CPU before it waits for us, and runs then.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while in_a_loop(&mut m).is_none() {
        assert!(std::time::Instant::now() < deadline, "it does not run, and nobody gives way");
    }
    assert_eq!(m.cpu.s.pauses_left, PAUSES);
    other.seat.leave();
    assert_eq!(in_a_loop(&mut m), None);
    drop(end);
    thread.join().unwrap();
}

#[test]
fn single_pauses_are_no_loop() {
    let (mut m, _) = machine();
    for _ in 0..3 {
        assert_eq!(pause(&mut m.cpu), Ok(Flow::Next));
        // Longer ago than any loop takes.
        m.cpu.msrs.pv.spin = spin::Spin::default();
    }
}

#[test]
fn who_gives_way_is_preempted_until_something_is_asked_of_it() {
    let (mut m, _) = machine();
    msr::write(&mut m.cpu, n::KVM_STEAL_TIME, AREA | 1).unwrap();
    m.write(AREA + 16, 1, 0);
    m.cpu.shared.request(crate::shared::request::INTERRUPT);
    give_way(&mut m.cpu);
    assert_eq!(m.read(AREA + 16, 1), 0, "it runs again");
    assert!(m.cpu.shared.has_requests() && m.cpu.interrupt_check);
}

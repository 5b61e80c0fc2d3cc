use crate::irq::InterruptController;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use berth_cpu::msr::{IA32_APIC_BASE, IA32_TSC_DEADLINE};
use berth_engine::{VcpuHandle, VcpuId};

use super::*;
use crate::irqchip::InterruptChips;
use crate::timer::{Timers, TscClock};

const HZ: u64 = 2_000_000_000;
const X2APIC: u64 = 0xfee0_0c00;

struct Vm {
    timers: Timers,
    chips: Arc<InterruptChips>,
}

impl Vm {
    fn new(vcpus: u8) -> Self {
        let timers = Timers::manual();
        let chips = InterruptChips::new(vcpus, &timers, &TscClock::new(HZ, timers.clock().clone())).unwrap();
        Self { timers, chips }
    }
    fn apic(&self, id: u8) -> &Arc<Lapic> {
        self.chips.local_apic(VcpuId(id)).unwrap()
    }
    /// All in x2APIC mode and enabled.
    fn x2apic(vcpus: u8) -> Self {
        let vm = Self::new(vcpus);
        for id in 0..vcpus {
            let apic = vm.apic(id);
            let bsp = apic.read_msr(IA32_APIC_BASE).unwrap() & 0x100;
            apic.write_msr(IA32_APIC_BASE, X2APIC | bsp).unwrap();
            apic.write_msr(0x80f, 0x1ff).unwrap();
        }
        vm
    }
}

fn read(apic: &Lapic, offset: u16) -> u32 {
    let mut data = [0; 4];
    apic.mmio_read(offset, &mut data);
    u32::from_le_bytes(data)
}
fn write(apic: &Lapic, offset: u16, value: u32) {
    apic.mmio_write(offset, &value.to_le_bytes());
}

#[derive(Default)]
struct Kicks(AtomicU32);
impl VcpuHandle for Kicks {
    fn kick(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
    fn stop(&self) {}
}

#[test]
fn interrupts_nest_by_priority_class() {
    let vm = Vm::x2apic(1);
    let apic = vm.apic(0);
    let send = |vector: u64| apic.write_msr(0x83f, vector).unwrap();
    send(0x51);
    assert_eq!(apic.acknowledge(), Some(0x51));
    send(0x5f);
    assert!(!apic.has_interrupt());
    send(0x61);
    assert!(apic.has_interrupt());
    assert_eq!(apic.acknowledge(), Some(0x61));
    assert_eq!(apic.read_msr(0x80a), Ok(0x60));
    assert!(apic.needs_explicit_eoi());
    apic.eoi();
    assert!(!apic.has_interrupt());
    apic.write_msr(0x80b, 0).unwrap();
    assert_eq!(apic.acknowledge(), Some(0x5f));
    assert!(!apic.needs_explicit_eoi());
}

#[test]
fn task_priority_holds_interrupts_back() {
    let vm = Vm::x2apic(1);
    let apic = vm.apic(0);
    apic.set_cr8(6);
    apic.write_msr(0x83f, 0x6f).unwrap();
    assert!(!apic.has_interrupt());
    assert_eq!(apic.acknowledge(), None);
    assert_eq!(apic.read_msr(0x808), Ok(0x60));
    apic.set_cr8(5);
    assert!(apic.has_interrupt());
    assert_eq!(apic.cr8(), 5);
}

#[test]
fn the_mode_changes_only_along_the_permitted_ways() {
    let vm = Vm::new(2);
    let apic = vm.apic(1);
    let set = |value| apic.write_msr(IA32_APIC_BASE, value);
    assert_eq!(apic.read_msr(IA32_APIC_BASE), Ok(0xfee0_0800));
    assert_eq!(apic.mmio_base(), Some(GuestPhysAddr(0xfee0_0000)));
    assert_eq!(apic.read_msr(0x802), Err(MsrFault));
    assert_eq!(set(0xfee0_0400), Err(MsrFault));
    assert_eq!(set(X2APIC), Ok(()));
    assert_eq!(apic.mmio_base(), None);
    assert_eq!(apic.read_msr(0x802), Ok(1));
    assert_eq!(set(0xfee0_0800), Err(MsrFault));
    assert_eq!(set(0xfee0_0000), Ok(()));
    assert_eq!(set(X2APIC), Err(MsrFault));
    assert_eq!(set(0xd000_0800), Ok(()));
    assert_eq!(apic.mmio_base(), Some(GuestPhysAddr(0xd000_0000)));
    assert_eq!(set(1 << 63), Err(MsrFault));
    assert_eq!(set(0xfee0_0801), Err(MsrFault));
    // The bootstrap flag is not the guest's to change.
    assert_eq!(set(0xfee0_0900), Ok(()));
    assert_eq!(apic.read_msr(IA32_APIC_BASE), Ok(0xfee0_0800));
}

#[test]
fn xapic_registers_read_as_the_manual_says() {
    let vm = Vm::new(2);
    let apic = vm.apic(1);
    assert_eq!(read(apic, 0x20), 0x0100_0000);
    assert_eq!(read(apic, 0x30), 0x0105_0014);
    assert_eq!(read(apic, 0xf0), 0xff);
    assert_eq!(read(apic, 0xe0), u32::MAX);
    write(apic, 0xe0, 0);
    assert_eq!(read(apic, 0xe0), 0x0fff_ffff);
    write(apic, 0xd0, u32::MAX);
    assert_eq!(read(apic, 0xd0), 0xff00_0000);
    assert_eq!(read(apic, 0x350), 0x1_0000);
    assert_eq!(read(vm.apic(0), 0x350), 0x700);
    let mut high_half = [0; 2];
    apic.mmio_read(0x32, &mut high_half);
    assert_eq!(high_half, [5, 1]);
    // A register that does not exist is an error, which a write of ESR shows.
    write(apic, 0x400, 1);
    assert_eq!(read(apic, 0x280), 0);
    write(apic, 0x280, 0);
    assert_eq!(read(apic, 0x280), 0x80);
}

#[test]
fn reserved_bits_of_x2apic_registers_fault() {
    let vm = Vm::x2apic(1);
    let apic = vm.apic(0);
    let refused = [
        (0x802, 0),
        (0x803, 0),
        (0x808, 0x100),
        (0x80b, 1),
        (0x80d, 0),
        (0x80e, 0),
        (0x80f, 0x200),
        (0x828, 1),
        (0x830, 1 << 13),
        (0x831, 0),
        (0x832, 0x100),
        (0x838, 1 << 32),
        (0x83e, 4),
        (0x83f, 0x100),
        (0x8ff, 0),
    ];
    for (msr, value) in refused {
        assert_eq!(apic.write_msr(msr, value), Err(MsrFault), "{msr:#x}");
    }
    for msr in [0x80b, 0x80e, 0x831, 0x83f, 0x840, 0x8ff, 0x1234] {
        assert_eq!(apic.read_msr(msr), Err(MsrFault), "{msr:#x}");
    }
}

#[test]
fn ipis_reach_whom_they_name() {
    let vm = Vm::x2apic(4);
    let took = || [0, 1, 2, 3].map(|id| vm.apic(id).acknowledge().inspect(|_| vm.apic(id).eoi()).is_some());
    let send = |icr| vm.apic(1).write_msr(0x830, icr).unwrap();
    send(0x40 | 2 << 32);
    assert_eq!(took(), [false, false, true, false]);
    send(0x40 | 1 << 11 | 0b1001 << 32);
    assert_eq!(took(), [true, false, false, true]);
    send(0x40 | 1 << 18);
    assert_eq!(took(), [false, true, false, false]);
    send(0x40 | 2 << 18);
    assert_eq!(took(), [true; 4]);
    send(0x40 | 3 << 18);
    assert_eq!(took(), [true, false, true, true]);
    send(0x40 | 0xffff_ffff << 32);
    assert_eq!(took(), [true; 4]);
    send(0x40 | 99 << 32);
    assert_eq!(took(), [false; 4]);
    vm.apic(1).send_ipi(0x40 | 3 << 32);
    assert_eq!(took(), [false, false, false, true]);
}

#[test]
fn an_xapic_sends_with_two_stores() {
    let vm = Vm::new(2);
    vm.apic(1).mmio_write(0xf0, &0x1ff_u32.to_le_bytes());
    write(vm.apic(0), 0x310, 0x0100_0000);
    write(vm.apic(0), 0x300, 0x41);
    assert_eq!(vm.apic(1).acknowledge(), Some(0x41));
    assert_eq!(read(vm.apic(0), 0x300), 0x41);
}

#[test]
fn start_up_sequence() {
    let vm = Vm::new(2);
    let (bsp, ap) = (vm.apic(0), vm.apic(1));
    write(bsp, 0x310, 0x0100_0000);
    write(bsp, 0x300, 0xc500);
    write(bsp, 0x300, 0x8500);
    write(bsp, 0x300, 0x0608);
    assert!(ap.has_event());
    assert_eq!(ap.take_event(), Some(ApicEvent::Init));
    ap.reset(true);
    assert_eq!(ap.take_event(), Some(ApicEvent::Startup { vector: 8 }));
    assert_eq!(ap.take_event(), None);
    write(bsp, 0x300, 0x0609);
    write(bsp, 0x300, 0xc500);
    write(bsp, 0x300, 0x0400);
    // INIT takes the start-up that it overtook with it.
    assert_eq!([(); 3].map(|()| ap.take_event()), [Some(ApicEvent::Init), Some(ApicEvent::Nmi), None]);
}

#[test]
fn illegal_vectors_are_errors() {
    let vm = Vm::x2apic(1);
    let apic = vm.apic(0);
    apic.write_msr(0x837, 0xfe).unwrap();
    apic.write_msr(0x830, 0x0f).unwrap();
    assert!(vm.chips.deliver_msi(0xfee0_0000, 0x03));
    assert_eq!(apic.acknowledge(), Some(0xfe));
    apic.write_msr(0x828, 0).unwrap();
    assert_eq!(apic.read_msr(0x828), Ok(0x60));
}

#[test]
fn one_shot_and_periodic_timer() {
    let vm = Vm::x2apic(1);
    let apic = vm.apic(0);
    apic.write_msr(0x83e, 0xb).unwrap();
    apic.write_msr(0x832, 0x80).unwrap();
    apic.write_msr(0x838, 1_000_000).unwrap();
    vm.timers.advance(400_000);
    assert_eq!(apic.read_msr(0x839), Ok(600_000));
    assert!(!apic.has_interrupt());
    vm.timers.advance(600_000);
    assert_eq!(apic.acknowledge(), Some(0x80));
    apic.eoi();
    vm.timers.advance(10_000_000);
    assert_eq!(apic.acknowledge(), None);
    apic.write_msr(0x832, 0x2_0081).unwrap();
    apic.write_msr(0x838, 1_000_000).unwrap();
    for _ in 0..3 {
        vm.timers.advance(1_000_000);
        assert_eq!(apic.acknowledge(), Some(0x81));
        apic.eoi();
    }
    apic.write_msr(0x838, 0).unwrap();
    vm.timers.advance(10_000_000);
    assert_eq!(apic.acknowledge(), None);
}

#[test]
fn tsc_deadline_timer() {
    let vm = Vm::x2apic(1);
    let apic = vm.apic(0);
    apic.set_tsc_offset(1_000_000);
    apic.write_msr(IA32_TSC_DEADLINE, 5).unwrap();
    assert_eq!(apic.read_msr(IA32_TSC_DEADLINE), Ok(0));
    apic.write_msr(0x832, 0x4_0082).unwrap();
    apic.write_msr(IA32_TSC_DEADLINE, 1_000_000 + HZ).unwrap();
    vm.timers.advance(999_999_999);
    assert!(!apic.has_interrupt());
    vm.timers.advance(1);
    assert_eq!(apic.acknowledge(), Some(0x82));
    assert_eq!(apic.read_msr(IA32_TSC_DEADLINE), Ok(0));
    apic.eoi();
    // A time in the past is now.
    apic.write_msr(IA32_TSC_DEADLINE, 1).unwrap();
    assert_eq!(apic.acknowledge(), Some(0x82));
    apic.eoi();
    // Leaving the mode disarms.
    apic.write_msr(IA32_TSC_DEADLINE, 10 * HZ).unwrap();
    apic.write_msr(0x832, 0x82).unwrap();
    assert_eq!(apic.read_msr(IA32_TSC_DEADLINE), Ok(0));
    vm.timers.advance(100_000_000_000);
    assert!(!apic.has_interrupt());
}

#[test]
fn the_vcpu_is_kicked_also_for_what_came_before_it() {
    let vm = Vm::x2apic(1);
    let apic = vm.apic(0);
    apic.write_msr(0x83f, 0x70).unwrap();
    let kicks = Arc::new(Kicks::default());
    apic.set_handle(kicks.clone());
    assert_eq!(kicks.0.load(Ordering::SeqCst), 1);
    apic.write_msr(0x83f, 0x70).unwrap();
    assert_eq!(kicks.0.load(Ordering::SeqCst), 1);
    apic.write_msr(0x83f, 0x71).unwrap();
    assert_eq!(kicks.0.load(Ordering::SeqCst), 2);
    vm.chips.raise_nmi();
    assert_eq!(kicks.0.load(Ordering::SeqCst), 3);
    assert_eq!(apic.take_event(), Some(ApicEvent::Nmi));
}

#[test]
fn reset_and_init() {
    let vm = Vm::x2apic(2);
    let apic = vm.apic(1);
    apic.write_msr(0x83f, 0x70).unwrap();
    apic.reset(true);
    assert_eq!(apic.read_msr(IA32_APIC_BASE), Ok(X2APIC));
    assert_eq!(apic.read_msr(0x80f), Ok(0xff));
    assert!(!apic.has_interrupt());
    apic.reset(false);
    assert_eq!(apic.read_msr(IA32_APIC_BASE), Ok(0xfee0_0800));
    assert_eq!(vm.apic(0).read_msr(0x80f), Ok(0x1ff));
}

#[test]
fn posts_from_other_threads_are_never_lost() {
    let vm = Vm::x2apic(2);
    let (me, other) = (vm.apic(0), vm.apic(1));
    const COUNT: u32 = 20_000;
    std::thread::scope(|scope| {
        let poster = scope.spawn(|| {
            for i in 0..COUNT {
                let vector = 0x40 + u64::from(i % 0xb0);
                other.write_msr(0x830, vector).unwrap();
                // Until it was taken, so that every post is one interrupt.
                while me.read_msr(0x820 + (vector as u32 >> 5)).unwrap() >> (vector & 31) & 1 != 0 {
                    std::thread::yield_now();
                }
            }
        });
        let mut taken = 0;
        while taken < COUNT && (me.has_interrupt() || !poster.is_finished()) {
            if me.has_interrupt() && me.acknowledge().is_some() {
                taken += 1;
                me.set_cr8((taken % 4) as u8);
                me.eoi();
            }
        }
        assert_eq!(taken, COUNT);
    });
}

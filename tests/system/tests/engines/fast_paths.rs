//! What an engine may do in place of the machine: doorbells and interrupts by eventfd.

use berth_engine::{EventFd, InterruptControllers, MessageInterrupts};
use berth_memory::GuestPhysAddr;
use berth_tests_system::bus::MmioAccess;
use berth_tests_system::prelude::*;
use std::sync::Arc;

/// Makes reads of an empty eventfd an error.
const EFD_NONBLOCK: i32 = 0o4000;
const DOORBELL: u64 = 0x40;
const OTHER: u64 = 0x80;

fn stores_to_a_doorbell_are_events_or_come_to_the_bus() {
    let mut g = Guest::long();
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    let place = GuestPhysAddr(MMIO + DOORBELL);
    let taken = g.engine.add_doorbell(place, &event);
    let main = g.code(|a| {
        asm!(a; mov(ebx, MMIO as u32); mov(eax, 7); mov(byte_ptr(rbx + DOORBELL), al));
        asm!(a; mov(word_ptr(rbx + DOORBELL), ax); mov(dword_ptr(rbx + DOORBELL), eax));
        asm!(a; mov(dword_ptr(rbx + OTHER), eax); done());
    });
    g.run(main).done();
    let stores = |g: &Guest| {
        let to_it = |access: &&MmioAccess| matches!(access, MmioAccess::Write(DOORBELL, ..));
        g.mmio().iter().filter(to_it).count() as u64
    };
    let events = event.read().unwrap_or(0);
    assert_eq!((events, stores(&g)), if taken { (3, 0) } else { (0, 3) });
    assert_eq!(g.mmio().last(), Some(&MmioAccess::Write(OTHER, 4, 7)));
    // Once it is removed every engine calls the bus.
    if taken {
        g.engine.remove_doorbell(place, &event);
    }
    let before = stores(&g);
    g.run(main).done();
    assert_eq!((event.read().unwrap_or(0), stores(&g) - before), (0, 3));
}

/// The engine's message interrupts, if it has them.
fn messages(g: &Guest) -> Option<Arc<dyn MessageInterrupts>> {
    match g.engine.interrupt_controllers() {
        InterruptControllers::Devices => None,
        InterruptControllers::LocalApics(apics) => Some(apics),
        InterruptControllers::Engine(sink) => Some(sink),
    }
}

fn a_write_to_a_message_event_interrupts() {
    let mut g = Guest::long();
    let Some(messages) = messages(&g) else { return };
    let main = g.code(|a| {
        let mut again = a.create_label();
        asm!(a; sti(); set_label(&mut again); hlt(); jmp(again));
    });
    let event = messages.message_event().expect("an eventfd");
    // Not in the window of local APICs: the engine must say that it does not take it.
    assert!(!event.set(0x1_fee0_0000, 0x25));
    for vector in [0x25, 0x26] {
        assert!(event.set(0xfee0_0000, vector));
        event.event().write(1).unwrap();
        g.run(main).vector(vector as u8);
    }
}

fn message_events_come_and_go() {
    let g = Guest::long();
    let Some(messages) = messages(&g) else { return };
    let mut events: Vec<_> = (0..40).map(|_| messages.message_event().expect("an eventfd")).collect();
    for (n, event) in (0x30..).zip(&events) {
        assert!(event.set(0xfee0_0000, n));
    }
    events.drain(..20);
    let more = messages.message_event().expect("an eventfd");
    assert!(more.set(0xfee0_0000, 0x29));
    assert!(events.iter().all(|event| event.set(0xfee0_0000, 0x2a)));
}

berth_tests_system::cases![
    stores_to_a_doorbell_are_events_or_come_to_the_bus,
    a_write_to_a_message_event_interrupts,
    message_events_come_and_go,
];

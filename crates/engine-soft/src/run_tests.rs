//! The run loop with small programs: enough to know that translated code is entered, linked and left.

use berth_cpu::bits::{cr0, cr4, efer};
use berth_cpu::{CpuState, Segment};
use berth_engine::{Bus, Exit, VcpuHandle};
use berth_memory::GuestPhysAddr;
use iced_x86::code_asm::*;
use parking_lot::Mutex;
use std::sync::Arc;

use crate::cpu::Cpu;
use crate::shared::VcpuShared;

const CODE: u64 = 0x10_0000;
const STACK: u64 = 0x20_0000;
const TABLES: u64 = 0x1000;

/// Records what is written to port 0x10, and stops the vCPU at a write to port 0xf4.
struct Recorder {
    vcpu: Arc<VcpuShared>,
    values: Mutex<Vec<u32>>,
}

impl Bus for Recorder {
    fn port_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn port_write(&self, port: u16, data: &[u8]) {
        if port == 0xf4 {
            self.vcpu.stop();
        } else if let Ok(bytes) = data.try_into() {
            self.values.lock().push(u32::from_le_bytes(bytes));
        }
    }
    fn mmio_read(&self, _: GuestPhysAddr, data: &mut [u8]) {
        data.fill(0xee);
    }
    fn mmio_write(&self, _: GuestPhysAddr, data: &[u8]) {
        self.values.lock().push(u32::from(data[0]) | 0x1000);
    }
}

fn long_mode(cpu: &mut Cpu) {
    let mem = cpu.vm.memory.clone();
    mem.write(GuestPhysAddr(TABLES), &(TABLES + 0x1007).to_le_bytes()).unwrap();
    mem.write(GuestPhysAddr(TABLES + 0x1000), &(TABLES + 0x2007).to_le_bytes()).unwrap();
    for i in 0..512u64 {
        mem.write(GuestPhysAddr(TABLES + 0x2000 + i * 8), &(i << 21 | 0x87).to_le_bytes()).unwrap();
    }
    let code = Segment { selector: 8, base: 0, limit: u32::MAX, attr: 0xa09b };
    let data = Segment { selector: 16, base: 0, limit: u32::MAX, attr: 0xc093 };
    let mut state = CpuState {
        rip: CODE,
        cs: code,
        cr0: cr0::PE | cr0::PG | cr0::WP | cr0::NE,
        cr3: TABLES,
        cr4: cr4::PAE | cr4::OSFXSR | cr4::OSXSAVE,
        xcr0: 7,
        efer: efer::LME | efer::LMA,
        ..CpuState::reset()
    };
    for seg in [&mut state.ss, &mut state.ds, &mut state.es, &mut state.fs, &mut state.gs] {
        *seg = data;
    }
    state.gpr[4] = STACK;
    cpu.set_architectural(&state);
}

/// Assembles `program` (which ends by itself) and gives the values that it wrote to port 0x10.
fn run(program: impl FnOnce(&mut CodeAssembler)) -> Vec<u32> {
    let mut cpu = Cpu::for_tests(16 << 20);
    long_mode(&mut cpu);
    let mut a = CodeAssembler::new(64).unwrap();
    program(&mut a);
    a.mov(al, 1).unwrap();
    a.out(0xf4, al).unwrap();
    let code = a.assemble(CODE).unwrap();
    cpu.vm.memory.write(GuestPhysAddr(CODE), &code).unwrap();
    let bus = Recorder { vcpu: Arc::clone(&cpu.shared), values: Mutex::new(Vec::new()) };
    let exit = cpu.run(&bus);
    assert_eq!(exit, Exit::Stopped, "at RIP {:#x}", cpu.s.rip);
    bus.values.into_inner()
}

#[test]
fn sums_in_a_loop() {
    let values = run(|a| {
        let mut top = a.create_label();
        a.mov(ecx, 1000).unwrap();
        a.xor(eax, eax).unwrap();
        a.set_label(&mut top).unwrap();
        a.add(eax, ecx).unwrap();
        a.dec(ecx).unwrap();
        a.jne(top).unwrap();
        a.out(0x10, eax).unwrap();
    });
    assert_eq!(values, [500_500]);
}

#[test]
fn calls_push_and_pop_through_memory() {
    let values = run(|a| {
        let mut f = a.create_label();
        let mut end = a.create_label();
        a.mov(r10, 7u64).unwrap();
        a.mov(r9, 5u64).unwrap();
        a.push(r10).unwrap();
        a.call(f).unwrap();
        a.pop(r11).unwrap();
        a.add(rax, r11).unwrap();
        a.out(0x10, eax).unwrap();
        a.jmp(end).unwrap();
        a.set_label(&mut f).unwrap();
        a.mov(rax, qword_ptr(rsp + 8)).unwrap();
        a.imul_2(rax, r9).unwrap();
        a.ret().unwrap();
        a.set_label(&mut end).unwrap();
        a.nop().unwrap();
    });
    assert_eq!(values, [42]);
}

#[test]
fn flags_survive_memory_accesses() {
    let values = run(|a| {
        let mut carry = a.create_label();
        let mut out = a.create_label();
        a.mov(rbx, 0x30_0000u64).unwrap();
        a.mov(eax, -1i32).unwrap();
        a.add(eax, 1).unwrap();
        a.mov(dword_ptr(rbx), 3).unwrap();
        a.adc(dword_ptr(rbx), 4).unwrap();
        a.cmp(dword_ptr(rbx), 9).unwrap();
        a.mov(edx, dword_ptr(rbx)).unwrap();
        a.jb(carry).unwrap();
        a.mov(edx, 0).unwrap();
        a.jmp(out).unwrap();
        a.set_label(&mut carry).unwrap();
        a.setb(ah).unwrap();
        a.movzx(ecx, ah).unwrap();
        a.shl(ecx, 8).unwrap();
        a.or(edx, ecx).unwrap();
        a.set_label(&mut out).unwrap();
        a.mov(eax, edx).unwrap();
        a.out(0x10, eax).unwrap();
    });
    assert_eq!(values, [0x108]);
}

#[test]
fn stores_change_code_that_was_translated() {
    let values = run(|a| {
        let mut patched = a.create_label();
        let mut again = a.create_label();
        a.xor(ebx, ebx).unwrap();
        a.set_label(&mut again).unwrap();
        a.nop().unwrap();
        a.set_label(&mut patched).unwrap();
        a.mov(eax, 0x11).unwrap(); // five bytes: b8 imm32
        a.out(0x10, eax).unwrap();
        a.lea(rdi, ptr(patched)).unwrap();
        a.mov(dword_ptr(rdi + 1), 0x22).unwrap();
        a.inc(ebx).unwrap();
        a.cmp(ebx, 2).unwrap();
        a.jb(again).unwrap();
    });
    assert_eq!(values, [0x11, 0x22]);
}

#[test]
fn devices_are_reached_and_accesses_cross_pages() {
    let values = run(|a| {
        a.mov(rbx, 0x2000_0000u64).unwrap(); // no RAM here
        a.mov(byte_ptr(rbx), 5).unwrap();
        a.mov(eax, dword_ptr(rbx)).unwrap();
        a.out(0x10, eax).unwrap();
        a.mov(rbx, 0x30_0ffdu64).unwrap();
        a.mov(dword_ptr(rbx), 0x1234_5678).unwrap();
        a.add(dword_ptr(rbx), 1).unwrap();
        a.mov(eax, dword_ptr(rbx)).unwrap();
        a.out(0x10, eax).unwrap();
    });
    assert_eq!(values, [0x1005, 0xeeee_eeee, 0x1234_5679]);
}

#[test]
fn vectors_and_x87_keep_their_values_across_helpers() {
    let values = run(|a| {
        a.mov(rbx, 0x30_0000u64).unwrap();
        a.mov(dword_ptr(rbx), 3).unwrap();
        a.fild(dword_ptr(rbx)).unwrap();
        a.vpbroadcastd(ymm3, xmmword_ptr(rbx)).unwrap_or(());
        a.movd(xmm4, dword_ptr(rbx)).unwrap();
        a.xor(eax, eax).unwrap();
        a.cpuid().unwrap(); // through a helper; changes rbx
        a.mov(rbx, 0x30_0000u64).unwrap();
        a.fiadd(dword_ptr(rbx)).unwrap();
        a.fistp(dword_ptr(rbx)).unwrap();
        a.movd(eax, xmm4).unwrap();
        a.add(eax, dword_ptr(rbx)).unwrap();
        a.out(0x10, eax).unwrap();
    });
    assert_eq!(values, [9]);
}

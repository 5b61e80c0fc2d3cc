//! Whole machines on every engine: small kernels that use the PC's devices, on the soft engine, on kvm with the kernel's
//! interrupt controllers, and on kvm with local APICs only.
//!
//! The kernels run in 64-bit mode, because a KVM without vmx and svm delivers interrupts at level 0 only there.

use std::path::{Path, PathBuf};

use berth_engine_kvm::device::Device;
use berth_engine_kvm::{KvmEngine, KvmOptions};
use berth_engine_soft::{DEFAULT_CODE_CACHE, SoftEngine, SoftOptions};
use iced_x86::code_asm::*;

use crate::*;

const LOAD_AT: u64 = 2 << 20;
/// Places in the image.
const MAIN: u64 = 0x200;
const HANDLER: u64 = 0x800;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const LOW_DIRECTORY: u64 = 0x3000;
const DEVICE_DIRECTORY: u64 = 0x4000;
const GDT: u64 = 0x5000;
/// Operands of LGDT and LIDT.
const GDTR: u64 = 0x5100;
const IDTR: u64 = 0x5110;
const IDT: u64 = 0x6000;
const IMAGE_END: u64 = 0x7000;
/// A counter, zero at first, and the top of the stack.
const COUNT: u64 = LOAD_AT + 0x8000;
const STACK: u64 = LOAD_AT + 0x1_0000;

const LAPIC: u64 = 0xfee0_0000;
const IOAPIC: u64 = 0xfec0_0000;
/// The vector whose handler the image has.
const VECTOR: u64 = 0x41;

/// Who runs a case.
#[derive(Clone, Copy, Debug)]
enum Runner {
    Soft,
    Kvm { split: bool },
}

/// All that this host has.
fn runners() -> Vec<Runner> {
    let mut runners = vec![Runner::Soft];
    match Device::open(Path::new("/dev/kvm")).and_then(|device| device.create_vm()) {
        Ok(_) => runners.extend([false, true].map(|split| Runner::Kvm { split })),
        Err(refusal) => eprintln!("skipped: kvm: {refusal}"),
    }
    runners
}

/// An image in a file that goes with this.
struct Image(PathBuf);

impl Drop for Image {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A multiboot kernel: tables, `main` in 64-bit mode with interrupts off, and the handler of [`VECTOR`].
fn image(name: &str, main: impl Fn(&mut CodeAssembler), handler: impl Fn(&mut CodeAssembler)) -> Image {
    let mut image = vec![0; IMAGE_END as usize];
    let mut put = |at: u64, bytes: &[u8]| image[at as usize..][..bytes.len()].copy_from_slice(bytes);
    let (magic, flags, start) = (0x1bad_b002_u32, 1_u32 << 16, LOAD_AT as u32);
    let header = [magic, flags, 0_u32.wrapping_sub(magic + flags), start, start, 0, 0, start + 32];
    put(0, &header.map(u32::to_le_bytes).concat());
    put(32, &assembled(32, LOAD_AT + 32, to_long_mode));
    put(
        MAIN,
        &assembled(64, LOAD_AT + MAIN, |a| {
            prologue(a).unwrap();
            main(a);
        }),
    );
    put(HANDLER, &assembled(64, LOAD_AT + HANDLER, handler));

    let present = |table: u64| ((LOAD_AT + table) | 3).to_le_bytes();
    put(PML4, &present(PDPT));
    put(PDPT, &present(LOW_DIRECTORY));
    put(PDPT + 3 * 8, &present(DEVICE_DIRECTORY));
    for n in 0..512 {
        // 2 MiB each, from 0 and from 3 GiB on.
        put(LOW_DIRECTORY + n * 8, &(n << 21 | 0x83).to_le_bytes());
        put(DEVICE_DIRECTORY + n * 8, &(3 << 30 | n << 21 | 0x83).to_le_bytes());
    }
    let (code, data) = (0x00af_9b00_0000_ffff_u64, 0x00cf_9300_0000_ffff_u64);
    put(GDT, &[0, code, data].map(u64::to_le_bytes).concat());
    put(GDTR, &[&23_u16.to_le_bytes()[..], &(LOAD_AT + GDT).to_le_bytes()].concat());
    put(IDTR, &[&0xfff_u16.to_le_bytes()[..], &(LOAD_AT + IDT).to_le_bytes()].concat());
    let entry = LOAD_AT + HANDLER;
    let gate = entry & 0xffff | 8 << 16 | 0x8e00 << 32 | (entry >> 16 & 0xffff) << 48;
    put(IDT + VECTOR * 16, &gate.to_le_bytes());

    let path = std::env::temp_dir().join(format!("berth-engines-{}-{name}", std::process::id()));
    std::fs::write(&path, image).unwrap();
    Image(path)
}

fn assembled(bitness: u32, at: u64, build: impl Fn(&mut CodeAssembler)) -> Vec<u8> {
    let mut a = CodeAssembler::new(bitness).unwrap();
    build(&mut a);
    a.assemble(at).unwrap()
}

fn to_long_mode(a: &mut CodeAssembler) {
    let code = |a: &mut CodeAssembler| {
        a.mov(eax, cr4)?;
        a.or(eax, 0x20)?;
        a.mov(cr4, eax)?;
        a.mov(eax, (LOAD_AT + PML4) as u32)?;
        a.mov(cr3, eax)?;
        a.mov(ecx, 0xc000_0080_u32)?;
        a.rdmsr()?;
        a.or(eax, 0x100)?;
        a.wrmsr()?;
        a.mov(eax, cr0)?;
        a.or(eax, 0x8000_0000_u32 as i32)?;
        a.mov(cr0, eax)?;
        a.lgdt(ptr(LOAD_AT + GDTR))?;
        // JMP FAR 8:MAIN.
        let target = ((LOAD_AT + MAIN) as u32).to_le_bytes();
        a.db(&[0xea, target[0], target[1], target[2], target[3], 8, 0])
    };
    code(a).unwrap();
}

fn prologue(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(eax, 16)?;
    a.mov(ss, eax)?;
    a.mov(rsp, STACK)?;
    a.mov(ebx, LOAD_AT as u32)?;
    a.lidt(ptr(rbx + IDTR))?;
    a.mov(ebx, COUNT as u32)
}

/// OUT of a constant.
fn out_byte(a: &mut CodeAssembler, port: u16, value: u32) {
    a.mov(edx, u32::from(port)).unwrap();
    a.mov(eax, value).unwrap();
    a.out(dx, al).unwrap();
}

/// A store of 4 bytes to a device; uses R8.
fn store(a: &mut CodeAssembler, addr: u64, value: u32) {
    a.mov(r8, addr).unwrap();
    a.mov(dword_ptr(r8), value).unwrap();
}

fn redirect(a: &mut CodeAssembler, pin: u32, low: u32) {
    for (register, value) in [(0x11 + 2 * pin, 0), (0x10 + 2 * pin, low)] {
        store(a, IOAPIC, register);
        store(a, IOAPIC + 0x10, value);
    }
}

/// Halts until the counter at RBX is `count`, then ends the VM with it.
fn wait_for(a: &mut CodeAssembler, count: u32) {
    let mut again = a.create_label();
    a.sti().unwrap();
    a.set_label(&mut again).unwrap();
    a.pause().unwrap();
    a.cmp(dword_ptr(rbx), count).unwrap();
    a.jb(again).unwrap();
    a.cli().unwrap();
    a.mov(eax, dword_ptr(rbx)).unwrap();
    a.out(berth_memory::layout::ports::DEBUG_EXIT as u32, al).unwrap();
    a.hlt().unwrap();
}

/// Counts, and does `acknowledge` with RAX and RDX saved.
fn counting(a: &mut CodeAssembler, acknowledge: impl Fn(&mut CodeAssembler)) {
    for register in [rax, rdx, r8] {
        a.push(register).unwrap();
    }
    a.inc(dword_ptr(rbx)).unwrap();
    acknowledge(a);
    for register in [r8, rdx, rax] {
        a.pop(register).unwrap();
    }
    a.iretq().unwrap();
}

/// Runs the image on each engine of this host: it must end with the debug exit `code`.
fn run_on_all(image: &Image, vcpus: u8, code: u8) {
    for runner in runners() {
        let config = MachineConfig {
            name: "engines".to_owned(),
            engine: EngineKind::Soft,
            vcpus,
            memory: crate::options::MemoryOptions::of_size(8 << 20),
            kernel: image.0.clone(),
            initrd: None,
            cmdline: String::new(),
            debug_exit: true,
            no_reboot: true,
            code_cache_bytes: 1 << 20,
            store_dir: None,
            devices: Default::default(),
        };
        let mut machine = Machine::with_engine(config, Box::new(std::io::sink()), |memory, _| match runner {
            Runner::Soft => Ok(Box::new(SoftEngine::new(
                memory,
                SoftOptions {
                    code_cache_bytes: DEFAULT_CODE_CACHE,
                    tsc_hz: berth_devices::timer::tsc_hz(),
                    vm_name: "engines".to_owned(),
                    vcpus,
                },
            )?)),
            Runner::Kvm { split } => {
                Ok(Box::new(KvmEngine::new(memory, KvmOptions { vcpus, split, ..KvmOptions::default() })?))
            }
        })
        .unwrap();
        machine.start().unwrap();
        assert_eq!(machine.wait(), Outcome::DebugExit(i32::from(code) << 1 | 1), "on {runner:?}");
    }
}

#[test]
fn a_kernel_reaches_long_mode_and_ends() {
    let image = image("exit", |a| wait_for(a, 0), |_| {});
    run_on_all(&image, 1, 0);
}

#[test]
fn the_timer_interrupts_through_the_pic() {
    let main = |a: &mut CodeAssembler| {
        // The PICs: vectors from VECTOR on, only input 0 open; the PIT: 1 kHz.
        for (port, value) in [(0x20, 0x11), (0x21, VECTOR as u32 & 0xf8), (0x21, 4), (0x21, 1), (0x21, 0xfe)]
        {
            out_byte(a, port, value);
        }
        for (port, value) in [(0x43, 0x34), (0x40, 0xa9), (0x40, 4)] {
            out_byte(a, port, value);
        }
        wait_for(a, 5);
    };
    // VECTOR & 0xf8 is where input 0 goes; the gate is at VECTOR: input 1 does not come, so both need the handler.
    let image = image("pic", main, |a| counting(a, |a| out_byte(a, 0x20, 0x20)));
    let mut bytes = std::fs::read(&image.0).unwrap();
    let gate = (IDT + VECTOR * 16) as usize;
    bytes.copy_within(gate..gate + 16, (IDT + (VECTOR & 0xf8) * 16) as usize);
    std::fs::write(&image.0, bytes).unwrap();
    run_on_all(&image, 1, 5);
}

#[test]
fn a_level_interrupt_of_the_ioapic_repeats_until_its_cause_is_gone() {
    const SERIAL: u16 = 0x3f8;
    let main = |a: &mut CodeAssembler| {
        store(a, LAPIC + 0xf0, 0x1ff);
        // LINT0 masked: no PIC.
        store(a, LAPIC + 0x350, 1 << 16);
        redirect(a, 4, 0x8000 | VECTOR as u32);
        // MCR: OUT2 lets the interrupt out. IER: transmitter empty, which it is.
        out_byte(a, SERIAL + 4, 8);
        out_byte(a, SERIAL + 1, 2);
        wait_for(a, 3);
    };
    let handler = |a: &mut CodeAssembler| {
        counting(a, |a| {
            let mut go_on = a.create_label();
            a.cmp(dword_ptr(rbx), 3).unwrap();
            a.jb(go_on).unwrap();
            // The cause goes.
            out_byte(a, SERIAL + 1, 0);
            a.set_label(&mut go_on).unwrap();
            store(a, LAPIC + 0xb0, 0);
        });
    };
    run_on_all(&image("level", main, handler), 1, 3);
}

#[test]
fn an_edge_of_the_ioapic_comes_once() {
    let main = |a: &mut CodeAssembler| {
        store(a, LAPIC + 0xf0, 0x1ff);
        store(a, LAPIC + 0x350, 1 << 16);
        redirect(a, 2, VECTOR as u32);
        // One shot of the PIT, 1 ms.
        for (port, value) in [(0x43, 0x30), (0x40, 0xa9), (0x40, 4)] {
            out_byte(a, port, value);
        }
        wait_for(a, 1);
    };
    run_on_all(&image("edge", main, |a| counting(a, |a| store(a, LAPIC + 0xb0, 0))), 1, 1);
}

//! A guest: memory with descriptor tables and page tables, vCPUs, devices, and what runs them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::Duration;

use berth_cpu::{CpuState, VcpuId};
use berth_engine::{Engine, Exit, InterruptControllers, LocalApic, Vcpu};
use berth_memory::{GuestMemory, GuestPhysAddr};
use iced_x86::BlockEncoderOptions;
use iced_x86::code_asm::{CodeAssembler, CodeLabel};

use crate::apic::{Apics, TestApic};
use crate::bus::{Devices, MmioAccess, TestBus};
use crate::end::{End, Why};
use crate::layout::{
    CODE, DONE_VECTOR, GDT, IDT, IO_MAP, IST_STACK, KERNEL_STACK, LDT, MAPPED_END, MMIO, RAM, STACK,
    STUB_SIZE, STUBS, STUBS_COUNT, TSS, port, selector,
};
use crate::mode::{Mode, descriptor_of};
use crate::paging::{PageTables, TableSpace, flag};

/// A run that takes longer than this has failed.
const TIME_LIMIT: Duration = Duration::from_secs(90);

/// What a guest can be made with.
#[derive(Clone, Debug)]
pub struct Options {
    /// Mode that it starts in.
    pub mode: Mode,
    /// Privilege level that it starts at: 0 or 3.
    pub cpl: u8,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Size of the code cache in bytes.
    pub code_cache: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { mode: Mode::Long, cpl: 0, vcpus: 1, code_cache: 8 << 20 }
    }
}

/// A gate for the IDT.
#[derive(Clone, Copy, Debug)]
pub struct Gate {
    /// Code segment of the handler.
    pub selector: u16,
    /// Offset of the handler.
    pub offset: u64,
    /// Type of the gate: 6, 7 (16-bit), 14 (interrupt) or 15 (trap).
    pub kind: u64,
    /// Lowest privilege that may use it with INT n.
    pub dpl: u64,
    /// IST number, in long mode.
    pub ist: u64,
    /// Present.
    pub present: bool,
}

struct Slot {
    vcpu: Box<dyn Vcpu>,
    apic: Arc<TestApic>,
    bus: TestBus,
    started: Option<CpuState>,
}

/// A guest that is being made, runs, or has run.
pub struct Guest {
    options: Options,
    /// RAM.
    pub memory: GuestMemory,
    /// The engine that runs it.
    pub engine: Arc<dyn Engine>,
    /// The state that vCPU 0 starts with; RIP comes from [`Self::run`].
    pub state: CpuState,
    /// The page tables that CR3 points at first.
    pub tables: PageTables,
    space: TableSpace,
    slots: Vec<Slot>,
    devices: Arc<Devices>,
    next_code: u64,
}

impl Guest {
    /// A guest with everything that its mode needs.
    pub fn new(options: Options) -> Self {
        let memory = GuestMemory::new(RAM).expect("guest memory");
        let engine = crate::engine::create(&memory, options.vcpus, options.code_cache);
        let mut space = TableSpace::new(&memory);
        let format = options.mode.paging().unwrap_or(crate::paging::Paging::FourLevel);
        let tables = PageTables::new(&memory, format, &mut space);
        let state = options.mode.state(options.cpl, tables.root);
        let apics: Arc<Apics> = Arc::new(OnceLock::new());
        let devices = Arc::new(Devices::new(Arc::clone(&apics)));
        let mut guest = Self {
            memory,
            engine,
            state,
            tables,
            space,
            slots: Vec::new(),
            devices,
            next_code: CODE,
            options,
        };
        guest.add_vcpus(&apics);
        guest.fill_tables();
        guest
    }

    /// 64-bit mode, level 0.
    pub fn long() -> Self {
        Self::new(Options::default())
    }

    /// 64-bit mode, level 3.
    pub fn long_user() -> Self {
        Self::new(Options { cpl: 3, ..Options::default() })
    }

    /// 64-bit mode, level 0, with several vCPUs: those after the first wait for a start-up IPI unless
    /// [`Self::start`] is called.
    pub fn smp(vcpus: u8) -> Self {
        Self::new(Options { vcpus, ..Options::default() })
    }

    /// Any mode at level 0.
    pub fn mode(mode: Mode) -> Self {
        Self::new(Options { mode, ..Options::default() })
    }

    /// Any mode at level 3.
    pub fn user(mode: Mode) -> Self {
        Self::new(Options { mode, cpl: 3, ..Options::default() })
    }

    fn add_vcpus(&mut self, apics: &Arc<Apics>) {
        for id in 0..self.options.vcpus {
            let controllers = self.engine.interrupt_controllers();
            let is_device = matches!(controllers, InterruptControllers::Devices);
            let apic = Arc::new(TestApic::new(id, apics, controllers));
            let given = is_device.then(|| Arc::clone(&apic) as Arc<dyn LocalApic>);
            let mut vcpu = self.engine.create_vcpu(VcpuId(id), given).expect("a vCPU");
            if let Some(apic) = apic.start_state() {
                vcpu.set_state(&CpuState { apic: Some(apic), ..CpuState::reset() })
                    .expect("a possible state");
            }
            apic.connect(vcpu.handle());
            let bus = TestBus::new(Arc::clone(&self.devices), vcpu.handle());
            let mut waiting = CpuState::reset();
            waiting.mp_state = berth_cpu::MpState::WaitForSipi;
            self.slots.push(Slot { vcpu, apic, bus, started: (id > 0).then_some(waiting) });
        }
        let _ = apics.set(self.slots.iter().map(|slot| Arc::clone(&slot.apic)).collect());
    }

    fn fill_tables(&mut self) {
        let mode = self.options.mode;
        for vector in 0..STUBS_COUNT {
            let stub = STUBS + vector * STUB_SIZE;
            // OUT imm8, AL; HLT; JMP to the HLT: the same bytes in every mode.
            self.write(stub, &[0xe6, (u64::from(port::VECTOR) + vector) as u8, 0xf4, 0xeb, 0xfd]);
            if mode == Mode::Real {
                self.set(vector * 4, 4, stub);
            } else {
                let gate =
                    Gate { dpl: if vector == u64::from(DONE_VECTOR) { 3 } else { 0 }, ..self.gate_to(stub) };
                self.set_gate(vector as u8, gate);
            }
        }
        if mode == Mode::Real {
            return;
        }
        for n in 0..8 {
            self.descriptor(n * 8, descriptor_of(n * 8));
        }
        self.descriptor(selector::DATA16, descriptor_of(selector::DATA16));
        self.system_descriptor(selector::TSS, TSS, 0xfff, 0x8b);
        if mode == Mode::Long {
            self.set(TSS + 4, 8, KERNEL_STACK);
            self.set(TSS + 36, 8, IST_STACK);
        } else {
            self.set(TSS + 4, 4, KERNEL_STACK);
            self.set(TSS + 8, 2, u64::from(selector::DATA));
        }
        // Ports 0xd0 to 0xff are open for level 3, all others closed.
        self.set(TSS + 0x66, 2, IO_MAP);
        self.write(TSS + IO_MAP, &[0xff; 0x400]);
        self.write(TSS + IO_MAP + 0xd0 / 8, &[0; 6]);
        if mode.paging().is_some() {
            let flags = if self.options.cpl == 3 { flag::USER } else { flag::KERNEL };
            for page in 0..MAPPED_END >> 12 {
                self.map(page << 12, page << 12, flags);
            }
            self.map(MMIO, MMIO, flags);
        }
    }

    /// Writes an LDT, TSS or gate-like system descriptor, of the size that the mode has.
    pub fn system_descriptor(&mut self, selector: u16, base: u64, limit: u64, attr: u16) {
        self.descriptor(selector, crate::mode::descriptor(base, limit, attr));
        if self.options.mode == Mode::Long {
            self.descriptor(selector + 8, base >> 32);
        }
    }

    /// Writes one entry of the GDT, or of the LDT for selectors with the table bit.
    pub fn descriptor(&mut self, selector: u16, raw: u64) {
        let table = if selector & 4 != 0 { LDT } else { GDT };
        self.set(table + u64::from(selector & !7), 8, raw);
    }

    /// An interrupt gate of the mode's size to level 0 code at `offset`.
    pub fn gate_to(&self, offset: u64) -> Gate {
        let mode = self.options.mode;
        let kind = if mode == Mode::Protected16 { 6 } else { 14 };
        Gate { selector: mode.code_selector(), offset, kind, dpl: 0, ist: 0, present: true }
    }

    /// Writes a gate to the IDT; in real mode only the offset counts.
    pub fn set_gate(&mut self, vector: u8, gate: Gate) {
        let low = gate.offset & 0xffff
            | u64::from(gate.selector) << 16
            | gate.ist << 32
            | (gate.kind | gate.dpl << 5 | u64::from(gate.present) << 7) << 40
            | (gate.offset >> 16 & 0xffff) << 48;
        match self.options.mode {
            Mode::Real => self.set(u64::from(vector) * 4, 4, gate.offset & 0xffff),
            Mode::Long => {
                self.set(IDT + u64::from(vector) * 16, 8, low);
                self.set(IDT + u64::from(vector) * 16 + 8, 8, gate.offset >> 32);
            }
            _ => self.set(IDT + u64::from(vector) * 8, 8, low),
        }
    }

    /// Makes `offset` the handler of `vector`, through an interrupt gate.
    pub fn handler(&mut self, vector: u8, offset: u64) {
        self.set_gate(vector, self.gate_to(offset));
    }

    /// Assembles code for the starting mode at the next free place, and returns where that is.
    pub fn code(&mut self, build: impl FnOnce(&mut CodeAssembler)) -> u64 {
        let at = self.next_code;
        let end = self.code_at(at, build);
        self.next_code = (end + 15) & !15;
        assert!(self.next_code <= crate::layout::DATA, "the space for code is used up");
        at
    }

    /// As [`Self::code`]; also returns the addresses of the labels that `build` returns.
    pub fn code_with<const N: usize>(
        &mut self,
        build: impl FnOnce(&mut CodeAssembler) -> [CodeLabel; N],
    ) -> (u64, [u64; N]) {
        let at = self.next_code;
        let mut a = CodeAssembler::new(self.options.mode.bitness()).expect("16, 32 or 64 bits");
        let labels = build(&mut a);
        let options = BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
        let result = a.assemble_options(at, options).expect("code that can be encoded");
        let bytes = &result.inner.code_buffer;
        self.write(at, bytes);
        self.next_code = (at + bytes.len() as u64 + 15) & !15;
        (at, labels.map(|label| result.label_ip(&label).expect("a label that was set")))
    }

    /// Assembles code for the starting mode at `at` (linear and physical); returns its end.
    pub fn code_at(&mut self, at: u64, build: impl FnOnce(&mut CodeAssembler)) -> u64 {
        self.assemble(self.options.mode.bitness(), at, at, build)
    }

    /// Assembles code of any size at the next free place, and returns where that is.
    pub fn code_of(&mut self, bitness: u32, build: impl FnOnce(&mut CodeAssembler)) -> u64 {
        let at = self.next_code;
        let end = self.assemble(bitness, at, at, build);
        self.next_code = (end + 15) & !15;
        at
    }

    /// Assembles code that will execute at offset `ip` to guest physical `physical`; returns its end there.
    pub fn assemble(
        &mut self,
        bitness: u32,
        ip: u64,
        physical: u64,
        build: impl FnOnce(&mut CodeAssembler),
    ) -> u64 {
        let mut a = CodeAssembler::new(bitness).expect("16, 32 or 64 bits");
        build(&mut a);
        let bytes = a.assemble(ip).expect("code that can be encoded");
        self.write(physical, &bytes);
        physical + bytes.len() as u64
    }

    /// Maps a 4 KiB page in the first page tables.
    pub fn map(&mut self, address: u64, physical: u64, flags: u64) {
        self.tables.map(&mut self.space, address, physical, flags, 12);
    }

    /// Maps a page of 2^`shift` bytes.
    pub fn map_large(&mut self, address: u64, physical: u64, flags: u64, shift: u32) {
        self.tables.map(&mut self.space, address, physical, flags, shift);
    }

    /// Clears the entry of a 4 KiB page.
    pub fn unmap(&mut self, address: u64) {
        self.tables.set(self.tables.entry(address, 12), 0);
    }

    /// Another tree of page tables with the same low memory.
    pub fn more_tables(&mut self) -> PageTables {
        let format = self.options.mode.paging().expect("a mode with paging");
        let mut tables = PageTables::new(&self.memory, format, &mut self.space);
        let flags = if self.options.cpl == 3 { flag::USER } else { flag::KERNEL };
        for page in 0..MAPPED_END >> 12 {
            tables.map(&mut self.space, page << 12, page << 12, flags, 12);
        }
        tables
    }

    /// Maps a 4 KiB page in other tables.
    pub fn map_in(&mut self, tables: &mut PageTables, address: u64, physical: u64, flags: u64) {
        tables.map(&mut self.space, address, physical, flags, 12);
    }

    /// Writes guest physical memory.
    #[track_caller]
    pub fn write(&mut self, at: u64, bytes: &[u8]) {
        self.memory.write(GuestPhysAddr(at), bytes).expect("RAM");
    }

    /// Writes a value of `size` bytes to guest physical memory.
    #[track_caller]
    pub fn set(&mut self, at: u64, size: usize, value: u64) {
        self.write(at, &value.to_le_bytes()[..size]);
    }

    /// Reads a value of `size` bytes from guest physical memory.
    #[track_caller]
    pub fn get(&self, at: u64, size: usize) -> u64 {
        let mut bytes = [0; 8];
        self.memory.read(GuestPhysAddr(at), &mut bytes[..size]).expect("RAM");
        u64::from_le_bytes(bytes)
    }

    /// Sets a general-purpose register that vCPU 0 starts with.
    pub fn reg(&mut self, index: usize, value: u64) {
        self.state.gpr[index] = value;
    }

    /// The values that the guest logged.
    pub fn log(&self) -> Vec<u32> {
        self.devices.log.lock().clone()
    }

    /// The accesses to the device page.
    pub fn mmio(&self) -> Vec<MmioAccess> {
        self.devices.mmio.lock().clone()
    }

    /// Calls `hook` with every value that the guest writes to the port for it.
    pub fn hook(&mut self, hook: impl Fn(u32) + Send + Sync + 'static) {
        *self.devices.hook.lock() = Some(Box::new(hook));
    }

    /// The local APIC of vCPU `index`.
    pub fn apic(&self, index: usize) -> Arc<TestApic> {
        Arc::clone(&self.slots[index].apic)
    }

    /// Lets vCPU `index` (1 or more) start at `entry` with the state of vCPU 0 and the stack below `stack`.
    pub fn start(&mut self, index: usize, entry: u64, stack: u64) {
        let mut state = self.state.clone();
        state.rip = entry;
        state.gpr[berth_cpu::bits::gpr::RSP] = stack;
        state.gpr[berth_cpu::bits::gpr::RDI] = index as u64;
        self.slots[index].started = Some(state);
    }

    /// Runs from `entry` until vCPU 0 ends.
    #[track_caller]
    pub fn run(&mut self, entry: u64) -> End {
        self.state.rip = entry;
        self.slots[0].started = Some(self.state.clone());
        self.resume()
    }

    /// Runs on until vCPU 0 ends.
    #[track_caller]
    pub fn resume(&mut self) -> End {
        self.run_all().swap_remove(0)
    }

    /// Runs from `entry`, and returns how each vCPU ended.
    #[track_caller]
    pub fn run_smp(&mut self, entry: u64) -> Vec<End> {
        self.state.rip = entry;
        self.slots[0].started = Some(self.state.clone());
        self.run_all()
    }

    #[track_caller]
    fn run_all(&mut self) -> Vec<End> {
        let handles: Vec<_> = self.slots.iter().map(|slot| slot.vcpu.handle()).collect();
        let memory = &self.memory;
        let over = AtomicBool::new(false);
        let timed_out = AtomicBool::new(false);
        let (finish, finished) = mpsc::channel::<()>();
        let ends: Vec<End> = std::thread::scope(|scope| {
            let (over, timed_out, handles) = (&over, &timed_out, &handles);
            // Moved in, so that a panic below ends the watchdog.
            let finish = finish;
            scope.spawn(move || {
                let result = finished.recv_timeout(TIME_LIMIT);
                timed_out.store(result == Err(mpsc::RecvTimeoutError::Timeout), Ordering::SeqCst);
                if result.is_err() {
                    over.store(true, Ordering::SeqCst);
                    handles.iter().for_each(|h| h.stop());
                }
            });
            let mut slots = self.slots.iter_mut();
            let first = slots.next().expect("vCPU 0");
            let others: Vec<_> = slots
                .map(|slot| scope.spawn(move || run_one(slot, memory, || over.load(Ordering::SeqCst))))
                .collect();
            let mut ends = vec![run_one(first, memory, || true)];
            over.store(true, Ordering::SeqCst);
            handles[1..].iter().for_each(|h| h.stop());
            ends.extend(others.into_iter().map(|t| t.join().expect("a vCPU thread")));
            // The receiver waits with a time limit, so it is there.
            let _ = finish.send(());
            ends
        });
        if timed_out.load(Ordering::SeqCst) {
            let accounts: Vec<_> = ends.iter().map(End::account).collect();
            panic!("the guest did not end within {TIME_LIMIT:?}: {}", accounts.join("; "));
        }
        ends
    }

    /// The state of vCPU 0 now.
    pub fn cpu_state(&mut self) -> CpuState {
        self.slots[0].vcpu.state()
    }

    /// Gives vCPU 0 a state at once, not only when it runs.
    #[track_caller]
    pub fn give(&mut self, state: &CpuState) {
        self.slots[0].vcpu.set_state(state).expect("a possible state");
    }

    /// Makes vCPU 0 stop from another thread: the returned function asks for it.
    pub fn stopper(&self) -> impl Fn() + Send + Sync + 'static {
        let handle = self.slots[0].vcpu.handle();
        move || handle.stop()
    }

    /// Top of a stack for vCPU `index` that no other one uses.
    pub fn stack_of(index: usize) -> u64 {
        if index == 0 { STACK } else { MAPPED_END - 0x1_0000 * index as u64 }
    }
}

/// Runs one vCPU until it ends; stops that nobody wanted yet (`over` false) are left-overs of an earlier run.
fn run_one(slot: &mut Slot, memory: &GuestMemory, over: impl Fn() -> bool) -> End {
    if let Some(state) = slot.started.take() {
        slot.vcpu.set_state(&state).expect("a possible state");
    }
    loop {
        let why = match slot.vcpu.run(&slot.bus) {
            Exit::Stopped => match slot.bus.take_why() {
                Some(why) => why,
                None if over() => Why::Stopped,
                None => continue,
            },
            Exit::TripleFault { detail } => Why::TripleFault(detail),
            Exit::Failed { detail } => panic!("the engine gave up: {detail}"),
        };
        return End::new(why, slot.vcpu.state(), memory.clone());
    }
}

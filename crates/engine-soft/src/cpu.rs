//! One vCPU of the soft engine as Rust code sees it.

use std::ptr::NonNull;
use std::sync::Arc;

use berth_cpu::bits::vector;
use berth_cpu::{CpuState, MpState, PendingEvents, PendingException, VcpuId};
use berth_engine::{Bus, EngineError, Exit, LocalApic, StoodStill, Vcpu, VcpuHandle};

use crate::code::Flow;
use crate::code::asm::Asm;
use crate::counters::Counters;
use crate::exec::deliver::Event;
use crate::fault::Fault;
use crate::host::X87;
use crate::memory::Flush;
use crate::mode::Mode;
use crate::shared::{StateRef, VcpuShared};
use crate::state::Seg;
use crate::vm::Vm;

/// A vCPU: its state block and everything that helpers need.
pub struct Cpu {
    /// What translated code sees too.
    pub s: StateRef,
    /// What all vCPUs of the VM share.
    pub vm: Arc<Vm>,
    /// Number of this vCPU.
    pub id: VcpuId,
    /// Its local APIC.
    pub apic: Arc<dyn LocalApic>,
    /// Registers that no translated code uses.
    pub msrs: crate::exec::msr::Msrs,
    /// Running, halted or waiting for start-up.
    pub mp_state: MpState,
    /// The side that other threads reach.
    pub shared: Arc<VcpuShared>,
    pub(crate) bus: Option<NonNull<dyn Bus>>,
    /// Private to memory access.
    pub(crate) mem: crate::memory::CpuMemory,
    /// x87 registers while the vCPU is not running.
    pub(crate) x87: X87,
    /// A fault that a stub's helper found: the run loop delivers it.
    pub(crate) pending_fault: Option<Fault>,
    /// A triple fault or failure that ends `run`.
    pub(crate) fatal: Option<Exit>,
    /// What a helper wants after its instruction.
    pub(crate) pending_flow: Option<Flow>,
    /// A jump to link to the next block that is found, with the jump key that it was taken under.
    pub(crate) pending_link: Option<(crate::code::cache::WantedLink, u64)>,
    /// Data breakpoints hit by the current instruction, as in DR6.
    pub(crate) pending_debug: u64,
    /// Translations were dropped because of something that this vCPU wrote.
    pub(crate) code_dropped: bool,
    /// The instruction at RIP must be executed while no other vCPU runs.
    pub(crate) wants_to_be_alone: bool,
    /// No other vCPU runs.
    pub(crate) is_alone: bool,
    /// Another vCPU should have this one's host CPU for a moment.
    pub(crate) gives_way: bool,
    /// Whether the instruction just executed is followed by a single-step trap, where TF from before it does
    /// not decide.
    pub(crate) trap_override: Option<bool>,
    /// The local APIC must be looked at before the next instruction.
    pub(crate) interrupt_check: bool,
    /// An NMI waits for the end of another one.
    pub(crate) nmi_pending: bool,
    /// An exception or acknowledged interrupt that came with the state and is delivered first.
    pub(crate) injected: Option<Event>,
    /// Eviction count that the jump cache belongs to.
    pub(crate) epoch: u64,
    /// [`Vm::dirty_epoch`] that its entries for stores belong to.
    pub(crate) dirty_epoch: u64,
    /// How often its slots miss.
    pub(crate) miss_rate: crate::memory::slots::MissRate,
    /// How busy it was of late.
    pub(crate) idle_watch: crate::idle::IdleWatch,
    /// Reused by the translator.
    pub(crate) asm: Asm,
}

// SAFETY: `bus` is only set while `run` executes on one thread; `s` is Send by itself; the rest are owned values
// and shared references to Sync types.
unsafe impl Send for Cpu {}

impl Cpu {
    /// A vCPU in the reset state.
    pub(crate) fn new(vm: Arc<Vm>, id: VcpuId, apic: Arc<dyn LocalApic>) -> Self {
        let (shared, s) = VcpuShared::new();
        let mut cpu = Self {
            msrs: crate::exec::msr::Msrs::new(),
            s,
            vm,
            id,
            apic,
            mp_state: MpState::Runnable,
            shared,
            bus: None,
            mem: crate::memory::CpuMemory::new(),
            x87: X87::reset(),
            pending_fault: None,
            fatal: None,
            pending_flow: None,
            pending_link: None,
            pending_debug: 0,
            code_dropped: false,
            wants_to_be_alone: false,
            is_alone: false,
            gives_way: false,
            trap_override: None,
            interrupt_check: true,
            nmi_pending: false,
            injected: None,
            epoch: 0,
            dirty_epoch: 0,
            miss_rate: Default::default(),
            idle_watch: crate::idle::IdleWatch::default(),
            asm: Asm::default(),
        };
        cpu.s.pauses_left = crate::exec::pv::PAUSES;
        cpu.initialize_first_level();
        cpu.empty_call_stack();
        cpu.set_architectural(&CpuState::reset());
        cpu
    }

    /// What this vCPU counts.
    pub(crate) fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    /// Must be called after anything that [`Mode::of`] looks at was changed, before the next instruction.
    pub fn mode_changed(&mut self) {
        self.s.mode = Mode::of(&self.s);
        self.update_jump_key();
    }

    /// Replaces the architectural state. x87 state goes to the host registers when `run` is entered.
    pub(crate) fn set_architectural(&mut self, state: &CpuState) {
        let s = &mut *self.s;
        s.gpr = state.gpr;
        s.rip = state.rip;
        s.set_rflags(state.rflags);
        for (seg, value) in
            Seg::ALL.into_iter().zip([state.es, state.cs, state.ss, state.ds, state.fs, state.gs])
        {
            *s.seg_mut(seg) = value;
        }
        (s.ldtr, s.tr, s.gdtr, s.idtr) = (state.ldtr, state.tr, state.gdtr, state.idtr);
        (s.cr0, s.cr2, s.cr3, s.cr4) = (state.cr0, state.cr2, state.cr3, state.cr4);
        (s.efer, s.dr, s.xcr0) = (state.efer, state.dr, state.xcr0);
        s.interrupt_shadow = state.interrupt_shadow;
        s.shadow_blocks_debug = false;
        s.nmi_blocked = state.nmi_blocked;
        let fpu = &state.fpu.0;
        s.mxcsr = u32::from_le_bytes([fpu[24], fpu[25], fpu[26], fpu[27]]) & 0xffff;
        for i in 0..16 {
            s.ymm[i][..16].copy_from_slice(&fpu[160 + i * 16..][..16]);
            s.ymm[i][16..].copy_from_slice(&fpu[576 + i * 16..][..16]);
        }
        self.x87 = X87::reset();
        self.x87.0[0..24].copy_from_slice(&fpu[0..24]);
        self.x87.0[32..160].copy_from_slice(&fpu[32..160]);
        if self.bus.is_some() {
            crate::host::load_x87(&self.x87);
        }
        self.mp_state = state.mp_state;
        self.set_pending(&state.pending);
        self.interrupt_check = true;
        self.mode_changed();
        self.flush_tlb(Flush::All);
    }

    fn set_pending(&mut self, pending: &PendingEvents) {
        self.nmi_pending = pending.nmi;
        let exception = pending.exception.map(|e| {
            let address = if e.vector == vector::PF { self.s.cr2 } else { 0 };
            Event::Fault(Fault { vector: e.vector, error: e.error, address })
        });
        self.injected = exception.or(pending.interrupt.map(Event::External));
    }

    fn pending(&self) -> PendingEvents {
        let mut pending = PendingEvents { nmi: self.nmi_pending, ..PendingEvents::default() };
        match self.injected {
            Some(Event::Fault(f)) => {
                pending.exception = Some(PendingException { vector: f.vector, error: f.error })
            }
            Some(Event::External(vector)) => pending.interrupt = Some(vector),
            Some(Event::Software { .. } | Event::Nmi) | None => {}
        }
        pending
    }

    fn architectural(&mut self) -> CpuState {
        let msrs = crate::exec::msr::save(self);
        let pending = self.pending();
        let apic = crate::exec::msr::save_apic(self);
        let s = &*self.s;
        let mut fpu = berth_cpu::XsaveArea::default();
        fpu.0[0..24].copy_from_slice(&self.x87.0[0..24]);
        fpu.0[24..28].copy_from_slice(&s.mxcsr.to_le_bytes());
        fpu.0[32..160].copy_from_slice(&self.x87.0[32..160]);
        for i in 0..16 {
            fpu.0[160 + i * 16..][..16].copy_from_slice(&s.ymm[i][..16]);
            fpu.0[576 + i * 16..][..16].copy_from_slice(&s.ymm[i][16..]);
        }
        fpu.0[512] = 7;
        CpuState {
            gpr: s.gpr,
            rip: s.rip,
            rflags: s.rflags(),
            es: *s.seg(Seg::Es),
            cs: *s.seg(Seg::Cs),
            ss: *s.seg(Seg::Ss),
            ds: *s.seg(Seg::Ds),
            fs: *s.seg(Seg::Fs),
            gs: *s.seg(Seg::Gs),
            ldtr: s.ldtr,
            tr: s.tr,
            gdtr: s.gdtr,
            idtr: s.idtr,
            cr0: s.cr0,
            cr2: s.cr2,
            cr3: s.cr3,
            cr4: s.cr4,
            efer: s.efer,
            dr: s.dr,
            xcr0: s.xcr0,
            fpu,
            msrs,
            apic: Some(Box::new(apic)),
            pending,
            mp_state: self.mp_state,
            interrupt_shadow: s.interrupt_shadow,
            nmi_blocked: s.nmi_blocked,
        }
    }
}

impl Vcpu for Cpu {
    fn handle(&self) -> Arc<dyn VcpuHandle> {
        Arc::clone(&self.shared) as Arc<dyn VcpuHandle>
    }

    fn run(&mut self, bus: &dyn Bus) -> Exit {
        Cpu::run(self, bus)
    }

    fn state(&mut self) -> CpuState {
        self.architectural()
    }

    fn skip_time(&mut self, time: StoodStill) {
        self.msrs.tsc_offset = self.msrs.tsc_offset.wrapping_sub(time.ticks);
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        state.check().map_err(|e| EngineError::BadState(e.to_string()))?;
        self.set_architectural(state);
        crate::exec::msr::restore(self, &state.msrs).map_err(|msr| {
            EngineError::BadState(format!("MSR {msr:#x} does not take its value on this CPU model"))
        })?;
        if let Some(apic) = &state.apic {
            crate::exec::msr::restore_apic(self, apic);
        }
        Ok(())
    }
}

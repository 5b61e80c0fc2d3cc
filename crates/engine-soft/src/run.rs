//! The run loop of a vCPU.
//!
//! ```text
//!   requests? ─► interrupt, NMI, INIT? ─► find block ─► translated code ─► why did it leave? ─┐
//!      ▲                                                                                     │
//!      └──────────────── deliver fault, trap, link blocks, halt ◄────────────────────────────┘
//! ```

use std::ptr::NonNull;

use crate::code::block::{Helped, SiteKind};
use crate::code::cache::Located;
use crate::code::signal::Guard;
use crate::code::{Flow, reason};
use crate::cpu::Cpu;
use crate::exec::deliver::{Event, deliver};
use crate::exec::pv;
use crate::fault::Fault;
use crate::mode::Mode;
use crate::shared::request;
use crate::state::SavedFlags;
use crate::translate::{BlockError, next_rip};
use berth_cpu::bits::{rflags, vector};
use berth_cpu::{CpuState, MpState};
use berth_engine::{ApicEvent, Bus, Exit};

/// So many interrupts (a busy guest gets some hundred a second) after which [`crate::memory::slots::Slots`] forget half
/// of their misses.
const MISSES_HALVED_EVERY: u64 = 256;

impl Cpu {
    /// Executes until an exit. The thread's GS base is the vCPU's from here on.
    pub(crate) fn run(&mut self, bus: &dyn Bus) -> Exit {
        // SAFETY: only the lifetime is erased. The pointer is used by `Cpu::bus` alone, while this call lasts,
        // and removed before it returns.
        self.bus = Some(unsafe {
            std::mem::transmute::<NonNull<dyn Bus + '_>, NonNull<dyn Bus + 'static>>(NonNull::from(bus))
        });
        let cpu: *mut Cpu = self;
        self.s.cpu = cpu;
        let exit = match self.enter_thread() {
            Ok(guard) => {
                let exit = self.run_loop();
                drop(guard);
                self.leave_thread();
                exit
            }
            Err(error) => Exit::Failed { detail: format!("the host refused a signal stack: {error}") },
        };
        self.bus = None;
        exit
    }

    fn enter_thread(&mut self) -> std::io::Result<Guard> {
        crate::host::set_gs_base(self.shared.block_address())?;
        let state: *mut crate::state::State = &mut *self.s;
        let guard = Guard::new(self.vm.cache.range(), self.vm.cache.stubs.exit_signal, state)?;
        crate::host::load_x87(&self.x87);
        self.shared.seat.take();
        Ok(guard)
    }

    fn leave_thread(&mut self) {
        self.shared.seat.leave();
        crate::host::save_x87(&mut self.x87);
    }

    /// The bus of the current run.
    pub fn bus(&self) -> &dyn Bus {
        let bus = self.bus.expect("helpers only run inside `run`");
        // SAFETY: set by `run` from a reference that outlives the call we are in.
        unsafe { bus.as_ref() }
    }

    /// Ends `run` with a failure.
    pub(crate) fn fail(&mut self, detail: String) {
        self.fatal.get_or_insert(Exit::Failed { detail });
    }

    /// Whether a long-running helper should stop at the next instruction boundary or chunk.
    pub fn should_leave(&self) -> bool {
        self.shared.has_requests()
    }

    /// Whether the block that is being executed must not go on: its own code may have changed.
    pub(crate) fn must_leave_block(&mut self) -> bool {
        std::mem::take(&mut self.code_dropped) || self.fatal.is_some()
    }

    /// Drops translations made from what was just written.
    pub(crate) fn code_written(&mut self, addr: berth_memory::GuestPhysAddr, len: u64) {
        // The running block may be one of those that were dropped.
        self.code_dropped |= self.vm.memory_written(addr, len) || self.vm.data_stored(addr);
    }

    /// Executes an instruction for translated code; false: leave.
    pub(crate) fn exec_in_block(&mut self, helped: &Helped) -> bool {
        let insn = &helped.insn;
        self.s.rip = insn.ip();
        self.counters().helped(insn.mnemonic());
        let mode = self.s.mode;
        let result = match helped.unavailable {
            None => crate::exec::execute(self, insn),
            Some(fault) => Err(fault),
        };
        let flow = match result {
            Ok(flow) => flow,
            Err(fault) => {
                self.pending_fault = Some(fault);
                self.s.exit_reason = reason::FAULT;
                return false;
            }
        };
        // A device may have raised an interrupt, or stopped the VM: that takes effect after this instruction.
        let leave = self.must_leave_block() || self.should_leave();
        if flow == Flow::Next && !leave {
            return true;
        }
        if flow != Flow::Jump {
            self.s.rip = next_rip(insn, mode.bitness());
        }
        use iced_x86::Mnemonic as M;
        if matches!(
            insn.mnemonic(),
            M::Int | M::Int1 | M::Int3 | M::Into | M::Syscall | M::Sysret | M::Sysretq
        ) {
            // For these the single-step trap goes by TF as they leave it: a handler's first instruction is not
            // trapped, and a return to a stepped program is.
            self.trap_override = Some(self.s.rflags_rest & rflags::TF != 0);
        }
        self.pending_flow = Some(flow);
        self.s.exit_reason = reason::FLOW;
        false
    }

    fn run_loop(&mut self) -> Exit {
        let vm = std::sync::Arc::clone(&self.vm);
        let mut execution = Some(vm.execution.read());
        loop {
            if let Some(exit) = self.fatal.take() {
                return exit;
            }
            if self.shared.is_called() {
                let asked = self.shared.take_requests();
                self.counters().requests.add(1);
                if asked & request::PAUSE != 0 {
                    execution = None;
                    vm.give_way();
                }
                if asked & request::SWEEP != 0 {
                    self.sweep();
                }
                if asked & request::FORGET != 0 {
                    self.clear_first_level();
                }
                if self.shared.take_stop() {
                    return Exit::Stopped;
                }
                self.interrupt_check = true;
                pv::update_steal_time(self);
            }
            if execution.is_none() {
                execution = Some(vm.execution.read());
            }
            self.notice_eviction();
            self.notice_dirty_log();
            if self.interrupt_check {
                self.look_for_events();
            }
            if self.mp_state != MpState::Runnable {
                execution = None;
                self.wait();
                continue;
            }
            if std::mem::take(&mut self.gives_way) {
                execution = None;
                pv::give_way(self);
                continue;
            }
            match self.step() {
                Ok(()) if !self.wants_to_be_alone => {}
                result => {
                    execution = None;
                    let alone = vm.alone(self.id);
                    if result.is_err() {
                        vm.drop_translations();
                    } else {
                        self.step_alone();
                    }
                    drop(alone);
                }
            }
        }
    }

    /// Executes one instruction while no other vCPU executes any: a read-modify-write that crosses pages is
    /// atomic only so.
    fn step_alone(&mut self) {
        self.wants_to_be_alone = false;
        self.notice_eviction();
        self.notice_dirty_log();
        self.is_alone = true;
        if self.step().is_err() {
            self.vm.drop_translations();
        }
        self.is_alone = false;
    }

    /// After an eviction every address in the jump cache and on the call stack is stale.
    fn notice_eviction(&mut self) {
        let epoch = self.vm.cache.epoch();
        if self.epoch != epoch {
            self.epoch = epoch;
            self.pending_link = None;
            self.empty_call_stack();
            for entry in &mut self.s.jump_cache {
                entry.key = 0;
            }
        }
    }

    /// After the log of written pages was taken every page must be marked again before it is stored to.
    fn notice_dirty_log(&mut self) {
        let epoch = self.vm.dirty_epoch();
        if self.dirty_epoch != epoch {
            self.dirty_epoch = epoch;
            self.drop_all_write_entries();
        }
    }

    /// Another vCPU translated code from pages that this one may have stored to.
    fn sweep(&mut self) {
        let pages = std::mem::take(&mut *self.shared.sweep.lock());
        let vm = std::sync::Arc::clone(&self.vm);
        for page in pages {
            let page = berth_memory::GuestPhysAddr(page);
            if let Some(host) = vm.host_map.host(page) {
                self.drop_write_entries(host);
            }
            // A translation that was begun before our last direct store and is not in the cache yet must not get there;
            // one that is there is compared.
            vm.code_pages.written(page);
            vm.cache.recheck(page, |at, out| {
                // RAM: code is only ever translated from there.
                let _ = vm.memory.read(berth_memory::GuestPhysAddr(at), out);
            });
        }
    }

    /// Waits for an event while halted or before start-up.
    fn wait(&mut self) {
        pv::suspend(self);
        let halted = self.mp_state == MpState::Halted;
        if halted && pv::take_unhalt(self) {
            self.mp_state = MpState::Runnable;
        } else if !(self.apic.has_event() || halted && self.interrupt_wakes()) {
            self.counters().waits.add(1);
            let again = self.before_idle();
            self.shared.park(again);
        }
        pv::resume(self);
        pv::update_steal_time(self);
        self.interrupt_check = true;
    }

    /// Takes what the local APIC has, as far as the vCPU may be interrupted now.
    fn look_for_events(&mut self) {
        pv::take_eoi(self);
        if self.s.interrupt_shadow && self.injected.is_none() {
            return;
        }
        if let Some(event) = self.injected.take() {
            self.mp_state = MpState::Runnable;
            self.deliver_event(event);
        }
        self.interrupt_check = false;
        self.s.interrupt_waiting = 0;
        if self.apic.has_event() {
            self.take_event();
            self.interrupt_check |= self.apic.has_event();
        }
        if self.nmi_pending && !self.s.nmi_blocked {
            self.nmi_pending = false;
            self.mp_state = MpState::Runnable;
            self.s.nmi_blocked = true;
            self.deliver_event(Event::Nmi);
        }
        if self.mp_state == MpState::WaitForSipi || !self.apic.has_interrupt() {
            return;
        }
        if self.s.interrupt_flag == 0 {
            // Looked at again when IF is set: every way to set it leaves translated code, or tests this.
            self.s.interrupt_waiting = 1;
            return;
        }
        if let Some(vector) = self.apic.acknowledge() {
            self.mp_state = MpState::Runnable;
            self.counters().interrupts.add(1);
            if self.counters().interrupts.get().is_multiple_of(MISSES_HALVED_EVERY) {
                self.s.slots.forget_misses();
            }
            pv::offer_eoi(self, vector);
            self.deliver_event(Event::External(vector));
            self.interrupt_check = true;
        }
    }

    /// Whether a pending interrupt ends HLT: it must be deliverable.
    fn interrupt_wakes(&self) -> bool {
        self.s.interrupt_flag == 1 && self.apic.has_interrupt()
    }

    fn take_event(&mut self) {
        match self.apic.take_event() {
            Some(ApicEvent::Nmi) if self.mp_state != MpState::WaitForSipi => self.nmi_pending = true,
            Some(ApicEvent::Init) => {
                self.set_architectural(&CpuState { mp_state: MpState::WaitForSipi, ..CpuState::reset() });
                self.apic.reset(true);
            }
            Some(ApicEvent::Startup { vector }) if self.mp_state == MpState::WaitForSipi => {
                self.set_architectural(&CpuState::after_sipi(vector));
            }
            _ => {}
        }
    }

    fn deliver_event(&mut self, event: Event) {
        if matches!(event, Event::Fault(_)) {
            self.counters().exceptions.add(1);
        }
        if let Err(triple) = deliver(self, event) {
            self.fatal.get_or_insert(Exit::TripleFault { detail: triple.detail });
        }
    }

    /// Executes from the current RIP until translated code is left, and handles why it was left.
    ///
    /// Only [`BlockError::Full`] is returned.
    fn step(&mut self) -> Result<(), BlockError> {
        let shadow = self.s.interrupt_shadow;
        let mut mode = self.s.mode;
        if shadow || self.is_alone {
            mode.0 |= Mode::SINGLE;
        }
        let watched = mode.has(Mode::WATCHED);
        let trap_flag = self.s.rflags_rest & rflags::TF != 0;
        if watched && self.instruction_breakpoint() {
            return Ok(());
        }
        let found = match self.find_block(mode) {
            Ok(found) => found,
            Err(BlockError::Fault(fault)) => {
                self.deliver_event(Event::Fault(fault));
                return Ok(());
            }
            Err(BlockError::NotRam(addr)) => {
                self.fail(format!("the guest executes at {addr}, where there is no RAM"));
                return Ok(());
            }
            Err(full) => return Err(full),
        };
        // An interrupt may have come between the jump and here: then this is another block.
        if let Some((link, key)) = self.pending_link.take()
            && (link.rip, key) == (self.s.rip, self.s.jump_key)
            && found.second_page.is_none()
        {
            self.vm.cache.link(&link, &found);
        }
        self.s.interrupt_shadow = false;
        self.s.shadow_blocks_debug = false;
        self.s.rflags_rest &= !rflags::RF;
        self.enter_code(self.vm.cache.address(found.entry_memory));
        let new_shadow = self.s.interrupt_shadow;
        let completed = self.after_code();
        let trap_flag = self.trap_override.take().unwrap_or(trap_flag);
        if (watched || trap_flag) && completed && !self.s.shadow_blocks_debug {
            self.debug_traps(trap_flag);
        }
        if shadow && !new_shadow || self.s.interrupt_flag == 1 && !self.s.interrupt_shadow {
            self.interrupt_check |= shadow || self.apic.has_interrupt();
        }
        Ok(())
    }

    fn enter_code(&mut self, entry: u64) {
        // SAFETY: `enter` is the stub of that signature in the cache, which this vCPU's VM keeps mapped; GS is set
        // to this vCPU's state block on this thread; `entry` is an entry of a live block (no eviction can happen
        // while we hold the execution lock). Translated code accesses the state block, guest RAM at addresses
        // from the TLB, and its own stack frame, nothing else.
        let enter =
            unsafe { std::mem::transmute::<usize, extern "C" fn(u64)>(self.vm.cache.stubs.enter as usize) };
        enter(entry);
    }

    /// Handles the reason for leaving. Returns whether the last instruction was completed (no exception).
    fn after_code(&mut self) -> bool {
        self.counters().left(self.s.exit_reason);
        self.counters().slot_misses.set(self.s.slot_misses);
        match self.s.exit_reason {
            reason::LOOKUP if self.s.is_64bit() && !crate::memory::is_canonical(self.s.rip) => {
                self.undo_branch();
                self.deliver_event(Event::Fault(Fault::gp(0)));
                false
            }
            reason::LOOKUP => true,
            reason::LINK => {
                let Some(link) = self.vm.cache.wanted_link(self.s.exit_value) else {
                    self.fail("a jump that is in no block wanted to be linked".to_owned());
                    return false;
                };
                self.s.rip = link.rip;
                self.pending_link = Some((link, self.s.jump_key));
                true
            }
            reason::FLOW => {
                match self.pending_flow.take() {
                    Some(Flow::Halt) => {
                        self.mp_state = MpState::Halted;
                        self.interrupt_check = true;
                    }
                    Some(Flow::GiveWay) => self.gives_way = true,
                    _ => {}
                }
                true
            }
            reason::FAULT => {
                if let Some(fault) = self.pending_fault.take() {
                    self.deliver_event(Event::Fault(fault));
                }
                false
            }
            reason::SIGNAL => self.host_signal(),
            reason::TOMB => {
                match self.vm.cache.dead_rip(self.s.exit_value) {
                    Some(rip) => self.s.rip = rip,
                    None => self.fail("a dead block that is in no place was entered".to_owned()),
                }
                true
            }
            reason::ALONE => {
                self.wants_to_be_alone = true;
                false
            }
            other => {
                self.fail(format!("translated code was left for the unknown reason {other}"));
                false
            }
        }
    }

    /// An indirect branch led to a non-canonical address: #GP belongs to the branch itself, before it moved RSP
    /// (SDM volume 2, CALL, JMP, RET).
    fn undo_branch(&mut self) {
        use iced_x86::{Code, Decoder, DecoderOptions, FlowControl};
        self.s.rip = self.s.branch;
        let mut bytes = [0; 15];
        let known = (1..=bytes.len())
            .rev()
            .find(|&n| self.load_bytes(crate::state::Seg::Cs, self.s.branch, &mut bytes[..n]).is_ok());
        let insn =
            Decoder::with_ip(64, &bytes[..known.unwrap_or(0)], self.s.branch, DecoderOptions::NONE).decode();
        let rsp = &mut self.s.gpr[berth_cpu::bits::gpr::RSP];
        match (insn.flow_control(), insn.code()) {
            (FlowControl::IndirectCall, _) => *rsp = rsp.wrapping_add(8),
            (FlowControl::Return, Code::Retnq_imm16) => {
                *rsp = rsp.wrapping_sub(8 + u64::from(insn.immediate16()))
            }
            (FlowControl::Return, _) => *rsp = rsp.wrapping_sub(8),
            _ => {}
        }
    }

    /// Turns a host signal into what it means for the guest.
    fn host_signal(&mut self) -> bool {
        let signal = self.s.scratch[2] as u32 as i32;
        let trap = (self.s.scratch[2] >> 32) as u8;
        let host_flags = self.s.scratch[3];
        let pc = self.s.exit_value;
        let Some(Located { rip, site, redirect }) = self.vm.cache.locate(pc) else {
            self.fail(format!(
                "signal {signal} (trap {trap}) at host address {pc:#x}, which is no known instruction"
            ));
            return false;
        };
        self.s.rip = rip;
        if let Some(slow) = redirect {
            // The address is bad and the flags are nowhere: the slow path computes them and finds the exception.
            self.enter_code(slow);
            return self.after_code();
        }
        let (in_host, at_poll, stack) = match site {
            SiteKind::Poll { host_flags, .. } => (host_flags, true, false),
            SiteKind::Instruction { host_flags, stack, .. } => (host_flags, false, stack),
        };
        if in_host {
            self.s.flags = SavedFlags::from_rflags(host_flags);
        }
        if at_poll {
            return true;
        }
        let no_xm = self.s.cr4 & berth_cpu::bits::cr4::OSXMMEXCPT == 0;
        let fault = match (signal, trap) {
            (libc::SIGFPE, vector::XM) if no_xm => Fault::ud(),
            (libc::SIGFPE, vector::DE | vector::MF | vector::XM) => Fault::plain(trap),
            (libc::SIGILL, _) => Fault::ud(),
            // Linux makes #SS SIGBUS.
            (libc::SIGSEGV | libc::SIGBUS, _) if stack => Fault::with_error(vector::SS, 0),
            (libc::SIGSEGV, _) | (libc::SIGBUS, vector::SS) => Fault::gp(0),
            _ => {
                self.fail(format!("signal {signal} (trap {trap}) at guest RIP {rip:#x}"));
                return false;
            }
        };
        self.deliver_event(Event::Fault(fault));
        false
    }

    /// #DB for an instruction breakpoint at RIP (SDM volume 3, 18.3.1.1). True if it was delivered.
    fn instruction_breakpoint(&mut self) -> bool {
        if self.s.rflags_rest & rflags::RF != 0 || self.s.dr[7] & 0xff == 0 {
            return false;
        }
        let lin = if self.s.is_64bit() {
            self.s.rip
        } else {
            self.s.seg(crate::state::Seg::Cs).base.wrapping_add(self.s.rip) & 0xffff_ffff
        };
        let hit = (0..4)
            .filter(|i| self.s.dr[7] >> (i * 2) & 3 != 0 && self.s.dr[7] >> (16 + i * 4) & 3 == 0)
            .filter(|&i| self.s.dr[i] == lin)
            .fold(0, |bits, i| bits | 1u64 << i);
        if hit == 0 {
            return false;
        }
        self.s.dr[6] = self.s.dr[6] & !0xf | hit;
        self.s.dr[7] &= !(1 << 13);
        self.deliver_event(Event::Fault(Fault::plain(vector::DB)));
        true
    }

    /// #DB after an instruction: single step and data breakpoints (SDM volume 3, 18.3.1).
    fn debug_traps(&mut self, trap_flag: bool) {
        if let Some(trap) = self.debug_condition(trap_flag) {
            self.s.dr[7] &= !(1 << 13);
            self.deliver_event(Event::Fault(trap));
        }
    }

    /// The #DB for data breakpoints that were hit, and for a single step if there is one; DR6 says which.
    pub(crate) fn debug_condition(&mut self, single_step: bool) -> Option<Fault> {
        let hits = std::mem::take(&mut self.pending_debug);
        if hits == 0 && !single_step {
            return None;
        }
        self.s.dr[6] = self.s.dr[6] & !0xf | hits | if single_step { 1 << 14 } else { 0 };
        Some(Fault::plain(vector::DB))
    }
}

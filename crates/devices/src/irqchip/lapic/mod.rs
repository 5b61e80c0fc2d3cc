//! One vCPU's local APIC (SDM volume 3, chapter 11), in xAPIC and x2APIC mode.
//!
//! What other threads post is atomic: IRR, TMR, and one word of flags that `has_interrupt` and `has_event` read.
//! Everything else is under a lock that only the vCPU itself and its timer take often.
//!
//! The flag `INTERRUPT` says that the highest IRR bit is above the processor priority. A poster sets the IRR
//! bit, reads the priority and sets the flag; the owner stores the priority, clears the flag, reads IRR and sets
//! it again if need be. All of it is sequentially consistent, so that whichever of the two comes second sees what
//! the other did: the flag may be set for nothing (then `acknowledge` gives `None` and clears it), but never
//! missing.

mod access;
mod registers;
mod state;
mod timer;
mod vcpu;

use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, fence};
use std::sync::{Arc, OnceLock, Weak};

use berth_engine::{VcpuHandle, VcpuId};
use parking_lot::Mutex;
use tracing::trace;

use self::registers::{ESR_RECEIVE_ILLEGAL, LVT_MASKED, Lvt, Registers, highest};
use self::timer::Mode;
use super::InterruptChips;
use super::message::{DeliveryMode, Message, Route};
use crate::timer::{Clock, Nanos, Timer, Timers, TscClock};

pub use timer::BUS_CLOCK_HZ;

/// The highest IRR bit is above the processor priority.
const INTERRUPT: u32 = 1 << 0;
/// The PIC asserts INTR, and LINT0 lets it through.
const EXTINT: u32 = 1 << 1;
const NMI: u32 = 1 << 2;
const INIT: u32 = 1 << 3;
/// A start-up IPI is pending; its vector is in bits 8 to 15.
const STARTUP: u32 = 1 << 4;
const STARTUP_SHIFT: u32 = 8;
const STARTUP_VECTOR: u32 = 0xff << STARTUP_SHIFT;

/// The first vector that is not reserved for exceptions and can be sent.
const FIRST_VECTOR: u8 = 16;

/// One local APIC. Made by [`InterruptChips`].
pub struct Lapic {
    flags: AtomicU32,
    ppr: AtomicU8,
    irr: [AtomicU32; 8],
    tmr: [AtomicU32; 8],
    /// [`Route`] of `registers`.
    route: AtomicU64,
    /// IA32_APIC_BASE of `registers`.
    base: AtomicU64,
    /// Whether `registers` let the PIC's interrupts pass.
    extint: AtomicBool,
    id: VcpuId,
    /// What is added to the host's TSC.
    tsc_offset: AtomicU64,
    registers: Mutex<Registers>,
    handle: OnceLock<Arc<dyn VcpuHandle>>,
    chips: Weak<InterruptChips>,
    clock: Clock,
    tsc: TscClock,
    timer: Timer,
}

impl Lapic {
    pub(super) fn new(id: VcpuId, chips: Weak<InterruptChips>, timers: &Timers, tsc: TscClock) -> Arc<Self> {
        Arc::new_cyclic(|me: &Weak<Self>| {
            let me = me.clone();
            let timer = timers.timer(move || {
                if let Some(lapic) = me.upgrade() {
                    lapic.timer_expired();
                }
            });
            let registers = Registers::new(id);
            Self {
                flags: AtomicU32::new(0),
                ppr: AtomicU8::new(0),
                irr: Default::default(),
                tmr: Default::default(),
                route: AtomicU64::new(registers.route(id.0).pack()),
                base: AtomicU64::new(registers.base),
                extint: AtomicBool::new(registers.accepts_extint()),
                id,
                tsc_offset: AtomicU64::new(0),
                registers: Mutex::new(registers),
                handle: OnceLock::new(),
                chips,
                clock: timers.clock().clone(),
                tsc,
                timer,
            }
        })
    }

    /// The vCPU that this APIC belongs to; also its APIC ID.
    pub fn id(&self) -> VcpuId {
        self.id
    }

    /// Connects the APIC to its vCPU, once; later calls change nothing. The vCPU is kicked, for what was posted
    /// before.
    pub fn set_handle(&self, handle: Arc<dyn VcpuHandle>) {
        if self.handle.set(handle).is_ok() {
            fence(SeqCst);
            self.kick();
        }
    }

    /// Sets what the TSC that IA32_TSC_DEADLINE is compared with is ahead of the host's, modulo 2^64. It is 0 after
    /// creation, and stays so with an engine that converts deadlines to the host's TSC itself.
    pub fn set_tsc_offset(&self, offset: u64) {
        self.tsc_offset.store(offset, SeqCst);
        self.arm_timer(&self.registers.lock());
    }

    /// Posts an NMI at pin LINT1, if the guest lets it through.
    pub(super) fn raise_lint1(&self) {
        let open = self.registers.lock().lvt(Lvt::Lint1) & (LVT_MASKED | 0x700) == 0x400;
        if open {
            self.post_event(NMI, 0);
        }
    }

    pub(super) fn route(&self) -> Route {
        Route::unpack(self.route.load(SeqCst))
    }
    pub(super) fn priority(&self) -> u8 {
        self.ppr.load(SeqCst)
    }

    /// Follows the PIC's output; the caller holds the PIC's lock. Returns whether the vCPU is to be kicked.
    pub(super) fn follow_pic(&self, intr: bool) -> bool {
        if intr && self.extint.load(SeqCst) {
            self.flags.fetch_or(EXTINT, SeqCst) & EXTINT == 0
        } else {
            self.flags.fetch_and(!EXTINT, SeqCst);
            false
        }
    }

    /// Takes a message that is meant for this APIC. Returns whether it was accepted.
    pub(super) fn accept(&self, message: &Message) -> bool {
        let route = self.route();
        if !route.enabled {
            return false;
        }
        match message.mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                if !route.software_enabled {
                    return false;
                }
                if message.vector < FIRST_VECTOR {
                    self.error(ESR_RECEIVE_ILLEGAL);
                } else {
                    self.post(message.vector, message.level);
                }
            }
            DeliveryMode::Nmi => self.post_event(NMI, 0),
            DeliveryMode::Init => self.post_event(INIT, STARTUP | STARTUP_VECTOR),
            DeliveryMode::Startup => {
                self.post_event(STARTUP | u32::from(message.vector) << STARTUP_SHIFT, STARTUP_VECTOR);
            }
            DeliveryMode::Smi | DeliveryMode::ExtInt | DeliveryMode::Reserved => {
                trace!("dropped {message:?}");
                return false;
            }
        }
        true
    }

    /// Wakes the vCPU; called without any lock of the interrupt controllers.
    pub(super) fn kick(&self) {
        fence(SeqCst);
        if let Some(handle) = self.handle.get() {
            handle.kick();
        }
    }

    fn post_event(&self, set: u32, clear: u32) {
        let update = |flags| Some(flags & !clear | set);
        // The closure always gives a value.
        let _ = self.flags.fetch_update(SeqCst, SeqCst, update);
        self.kick();
    }

    /// Makes an interrupt pending. The vCPU is kicked even if its priority is too high for it: paravirtual EOI
    /// must not be offered any more for the one in service.
    fn post(&self, vector: u8, level: bool) {
        let (word, bit) = (usize::from(vector >> 5), 1 << (vector & 31));
        if level {
            self.tmr[word].fetch_or(bit, SeqCst);
        } else if self.tmr[word].load(SeqCst) & bit != 0 {
            self.tmr[word].fetch_and(!bit, SeqCst);
        }
        if self.irr[word].fetch_or(bit, SeqCst) & bit != 0 {
            // Whoever set it kicked already.
            return;
        }
        if vector >> 4 > self.ppr.load(SeqCst) >> 4 {
            self.flags.fetch_or(INTERRUPT, SeqCst);
        }
        self.kick();
    }

    fn error(&self, bit: u32) {
        let mut regs = self.registers.lock();
        regs.errors |= bit;
        let lvt = regs.lvt(Lvt::Error);
        drop(regs);
        if lvt & LVT_MASKED == 0 && lvt as u8 >= FIRST_VECTOR {
            self.post(lvt as u8, false);
        }
    }

    fn registers(&self) -> &Mutex<Registers> {
        &self.registers
    }
    fn irr_word(&self, word: usize) -> u32 {
        self.irr[word].load(SeqCst)
    }
    fn tmr_word(&self, word: usize) -> u32 {
        self.tmr[word].load(SeqCst)
    }
    fn is_level(&self, vector: u8) -> bool {
        self.tmr_word(usize::from(vector >> 5)) >> (vector & 31) & 1 != 0
    }
    fn highest_request(&self) -> Option<u8> {
        highest(|word| self.irr_word(word))
    }
    fn now(&self) -> Nanos {
        self.clock.now()
    }
    fn tsc_now(&self) -> u64 {
        self.tsc.now().wrapping_add(self.tsc_offset.load(SeqCst))
    }

    /// Shows what other threads need of the registers.
    fn publish(&self, regs: &Registers) {
        self.extint.store(regs.accepts_extint(), SeqCst);
        self.route.store(regs.route(self.id.0).pack(), SeqCst);
        self.base.store(regs.base, SeqCst);
    }

    /// Follows a change of TPR, ISR or IRR (see the module's head).
    fn update_priority(&self, regs: &Registers) {
        let ppr = regs.ppr();
        self.ppr.store(ppr, SeqCst);
        self.flags.fetch_and(!INTERRUPT, SeqCst);
        if self.highest_request().is_some_and(|v| v >> 4 > ppr >> 4) {
            self.flags.fetch_or(INTERRUPT, SeqCst);
        }
    }

    fn clear_requests(&self) {
        for word in self.irr.iter().chain(&self.tmr) {
            word.store(0, SeqCst);
        }
        self.flags.fetch_and(!(INTERRUPT | EXTINT), SeqCst);
    }

    /// Arms the host's timer for the guest's.
    fn arm_timer(&self, regs: &Registers) {
        let deadline = match regs.timer_mode() {
            Mode::TscDeadline => (regs.tsc_deadline != 0).then(|| {
                let host = regs.tsc_deadline.saturating_sub(self.tsc_now());
                self.tsc.deadline(self.tsc.now().saturating_add(host))
            }),
            Mode::OneShot | Mode::Periodic => regs.count.expiry,
        };
        self.timer.set(deadline);
    }

    /// Called when the timer may have expired.
    fn timer_expired(&self) {
        let mut regs = self.registers.lock();
        let mode = regs.timer_mode();
        let expired = match mode {
            Mode::TscDeadline => {
                let expired = regs.tsc_deadline != 0 && self.tsc_now() >= regs.tsc_deadline;
                if expired {
                    regs.tsc_deadline = 0;
                }
                expired
            }
            Mode::OneShot | Mode::Periodic => {
                let now = self.now();
                regs.count.expire(now, mode)
            }
        };
        // For the next period, or because the host's clock came a little early, or to disarm.
        self.arm_timer(&regs);
        let lvt = regs.lvt(Lvt::Timer);
        drop(regs);
        if expired && lvt & LVT_MASKED == 0 {
            if lvt as u8 >= FIRST_VECTOR {
                self.post(lvt as u8, false);
            } else {
                self.error(ESR_RECEIVE_ILLEGAL);
            }
        }
    }
}

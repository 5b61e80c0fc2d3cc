//! What a run of a guest gives back.

use berth_cpu::bits::{efer, gpr, vector};
use berth_cpu::{CpuState, Segment};
use berth_memory::{GuestMemory, GuestPhysAddr};

use crate::layout::DONE_VECTOR;
use crate::paging;

/// Why a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// The guest wrote to the port for it.
    Done,
    /// A vector without a handler of the case's own.
    Vector(u8),
    /// Triple fault, with the engine's account.
    TripleFault(String),
    /// Somebody else stopped it: the time limit, or the end of vCPU 0.
    Stopped,
}

/// What the delivery of an exception or interrupt pushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Error code, for the vectors that have one.
    pub error: Option<u32>,
    /// Where the handler returns to.
    pub rip: u64,
    /// CS there.
    pub cs: u16,
    /// RFLAGS there.
    pub flags: u64,
    /// Stack pointer there, if it was pushed.
    pub rsp: Option<u64>,
    /// SS there, if it was pushed.
    pub ss: Option<u16>,
}

/// How a vCPU ended.
#[derive(Clone, Debug)]
pub struct End {
    /// Why.
    pub why: Why,
    /// All of its state then.
    pub state: CpuState,
    memory: GuestMemory,
}

impl End {
    pub(crate) fn new(why: Why, state: CpuState, memory: GuestMemory) -> Self {
        Self { why, state, memory }
    }

    /// A general-purpose register.
    pub fn reg(&self, index: usize) -> u64 {
        self.state.gpr[index]
    }

    /// RAX.
    pub fn rax(&self) -> u64 {
        self.reg(gpr::RAX)
    }

    /// The case expects that the guest came to its own end.
    #[track_caller]
    pub fn done(self) -> Self {
        match self.why {
            Why::Done | Why::Vector(DONE_VECTOR) => self,
            Why::Vector(vector::UD) if self.int_n_is_undefined() => self,
            _ => panic!("the guest did not come to its end: {}", self.account()),
        }
    }

    /// Whether it is only the INT n at the end of code at level 3 that this host's KVM does not have.
    fn int_n_is_undefined(&self) -> bool {
        let frame = self.frame(vector::UD);
        let mut code = [0; 2];
        let at = paging::resolve(&self.memory, &self.state, frame.rip);
        at.is_some_and(|at| self.memory.read(GuestPhysAddr(at), &mut code).is_ok())
            && code == [0xcd, DONE_VECTOR]
            && frame.cs & 3 == 3
            && crate::engine::is_emulated()
    }

    /// The case expects a triple fault.
    #[track_caller]
    pub fn triple_fault(&self) {
        assert!(matches!(self.why, Why::TripleFault(_)), "no triple fault: {}", self.account());
    }

    /// The case expects that the run ended in the handler of `vector`.
    #[track_caller]
    pub fn vector(&self, vector: u8) -> Frame {
        assert!(self.why == Why::Vector(vector), "vector {vector} was expected: {}", self.account());
        self.frame(vector)
    }

    /// The same, and the error code.
    #[track_caller]
    pub fn fault(&self, vector: u8, error: u32) -> Frame {
        let frame = self.vector(vector);
        assert_eq!(frame.error, Some(error), "error code of vector {vector}: {}", self.account());
        frame
    }

    /// The case expects a page fault at `address` with `error`.
    #[track_caller]
    pub fn page_fault(&self, address: u64, error: u32) -> Frame {
        let frame = self.fault(vector::PF, error);
        assert_eq!(self.state.cr2, address, "CR2 {:#x}: {}", self.state.cr2, self.account());
        frame
    }

    /// Reads what `vector`'s delivery pushed at the current stack pointer.
    fn frame(&self, vector: u8) -> Frame {
        let long = self.state.efer & efer::LMA != 0;
        let protected = self.state.cr0 & 1 != 0;
        let size = match (long, protected, self.state.cs.attr & Segment::DB != 0) {
            (true, ..) => 8,
            (_, true, true) => 4,
            _ => 2,
        };
        let has_error = protected && matches!(vector, 8 | 10..=14 | 17);
        let first = usize::from(has_error);
        let at = |n: usize| self.stack(size, n);
        let cs = at(first + 1) as u16;
        let flags = at(first + 2);
        let outer = long || protected && cs & 3 > self.state.cs.selector & 3 || flags & 1 << 17 != 0;
        Frame {
            error: has_error.then(|| at(0) as u32),
            rip: at(first),
            cs,
            flags,
            rsp: outer.then(|| at(first + 3)),
            ss: outer.then(|| at(first + 4) as u16),
        }
    }

    /// Value `n` of `size` bytes on the stack.
    #[track_caller]
    pub fn stack(&self, size: usize, n: usize) -> u64 {
        let long = self.state.efer & efer::LMA != 0;
        let mask = if long || self.state.ss.attr & Segment::DB != 0 { u64::MAX } else { 0xffff };
        let base = if long { 0 } else { self.state.ss.base };
        let address = base.wrapping_add(self.reg(gpr::RSP).wrapping_add((n * size) as u64) & mask);
        let physical = paging::resolve(&self.memory, &self.state, address).expect("a mapped stack");
        let mut bytes = [0; 8];
        self.memory.read(GuestPhysAddr(physical), &mut bytes[..size]).expect("a stack in RAM");
        u64::from_le_bytes(bytes)
    }

    /// For messages: what happened instead.
    pub fn account(&self) -> String {
        let s = &self.state;
        let mut text = format!("{:?} at {:04x}:{:x}", self.why, s.cs.selector, s.rip);
        if let Why::Vector(vector) = self.why {
            text += &format!(", {:x?}", self.frame(vector));
        }
        text += &format!(", CR2 {:#x}, RAX {:#x}, RCX {:#x}, RSP {:#x}", s.cr2, s.gpr[0], s.gpr[1], s.gpr[4]);
        text
    }
}

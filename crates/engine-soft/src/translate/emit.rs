//! Assembles one block.

use iced_x86::{Encoder, Instruction, InstructionInfoFactory, Mnemonic};

use super::access::seg_of;
use super::class::{Class, FirstWish, first_wish, has_memory};
use super::copy::{may_raise, needs_alignment};
use super::fetch::chained;
use super::flags::Flags;
use super::liveness::{Window, dead_before, window};
use crate::code::asm::{Asm, Label, gs};
use crate::code::block::{Draft, Helped, Link, Site, SiteKind};
use crate::code::cache::Key;
use crate::code::regs::{ADDR, R11};
use crate::code::stubs::Stubs;
use crate::fault::Fault;
use crate::state::Seg;
use crate::vm::Vm;

/// State of assembling one block.
pub(super) struct Emitter<'a> {
    pub(super) asm: &'a mut Asm,
    pub(super) vm: &'a Vm,
    pub(super) stubs: Stubs,
    pub(super) key: Key,
    pub(super) flags: Flags,
    pub(super) encoder: Encoder,
    pub(super) info: InstructionInfoFactory,
    /// Whether jumps may be linked and looked up in the jump cache.
    pub(super) chained: bool,
    pub(super) links: Vec<Link>,
    sites: Vec<Site>,
    polls: Vec<u64>,
    /// Where to go on after a signal at a site whose flags are nowhere: the access's way to the slow path.
    redirects: Vec<(u32, Label)>,
    /// The same for the access that is being assembled.
    pub(super) redirect: Option<Label>,
    /// Whether the flags before the current instruction are read by exceptions only.
    pub(super) flags_dead: bool,
    /// What to do about the flags of the current instruction.
    pub(super) window: Option<Window>,
    #[expect(clippy::vec_box, reason = "the code has their addresses")]
    instructions: Vec<Box<Helped>>,
}

impl<'a> Emitter<'a> {
    pub(super) fn new(asm: &'a mut Asm, key: Key, vm: &'a Vm) -> Self {
        asm.clear();
        Self {
            asm,
            vm,
            stubs: vm.cache.stubs,
            key,
            flags: Flags::MEMORY,
            encoder: Encoder::new(64),
            info: InstructionInfoFactory::new(),
            chained: chained(key.mode) && !vm.debug.no_chain,
            links: Vec::new(),
            sites: Vec::new(),
            polls: Vec::new(),
            redirects: Vec::new(),
            redirect: None,
            flags_dead: false,
            window: None,
            instructions: Vec::new(),
        }
    }

    /// Assembles `list`, which is not empty.
    pub(super) fn block(mut self, list: &[(Instruction, Class)], source: Box<[u8]>) -> Draft {
        let first = list.iter().position(|(i, c)| first_wish(i, *c) != FirstWish::None);
        let wish = first.map(|at| match first_wish(&list[at].0, list[at].1) {
            // An exception before the flags are overwritten shows the old ones.
            FirstWish::Overwrites if list[..=at].iter().any(|(i, c)| *c == Class::Copy && may_raise(i)) => {
                FirstWish::Host
            }
            wish => wish,
        });
        let prefers_host = matches!(wish, Some(FirstWish::Host | FirstWish::Overwrites));
        let (entry_memory, entry_host) = match wish {
            Some(FirstWish::Overwrites) => {
                self.flags = Flags::HOST;
                let entry = self.asm.head();
                (entry, entry)
            }
            Some(FirstWish::Host) => {
                let memory = self.asm.head();
                self.asm.restore_flags();
                self.flags = Flags::HOST;
                (memory, self.asm.head())
            }
            _ => {
                let host = self.asm.head();
                self.asm.save_flags();
                self.flags = Flags::MEMORY;
                (self.asm.head(), host)
            }
        };
        let dead = dead_before(list);
        let mut windows = 0;
        for (at, (insn, class)) in list.iter().enumerate() {
            if !self.vm.debug.no_dead_flags {
                self.flags_dead = dead[at];
                self.window = window(list, at, &dead, &mut self.info, windows % 2);
                windows += usize::from(self.window.is_some());
            }
            self.instruction(insn, *class, at + 1 == list.len());
        }
        let (last, class) = &list[list.len() - 1];
        if list.len() > 1 && list[list.len() - 2].1 == Class::Sti {
            self.interrupt_window(self.next_rip(last));
        }
        if !class.ends_block() {
            self.exit_to(self.next_rip(last), None);
        }
        self.asm.finish();
        let settled = |p: u32| self.asm.settled(p);
        Draft {
            key: self.key,
            second_page: None,
            source,
            sites: self.sites.iter().map(|s| Site { host: settled(s.host), what: s.what }).collect(),
            polls: std::mem::take(&mut self.polls),
            redirects: self.redirects.iter().map(|&(at, to)| (settled(at), self.asm.label_at(to))).collect(),
            links: self
                .links
                .iter()
                .map(|l| Link { field: settled(l.field), exit: settled(l.exit), ..*l })
                .collect(),
            instructions: std::mem::take(&mut self.instructions),
            entry_memory: settled(entry_memory),
            entry_host: settled(entry_host),
            prefers_host,
        }
    }

    /// RIP after `insn`, as wide as the mode's instruction pointer.
    pub(super) fn next_rip(&self, insn: &Instruction) -> u64 {
        next_rip(insn, self.key.mode.bitness())
    }

    fn instruction(&mut self, insn: &Instruction, class: Class, is_last: bool) {
        match class {
            Class::Copy => self.copy(insn),
            Class::Nop => {}
            Class::Pause => self.pause(insn),
            Class::Lea => self.lea(insn),
            Class::BitString => self.bit_string(insn),
            Class::Push => self.push(insn),
            Class::Pop => self.pop(insn),
            Class::Leave => self.leave(insn),
            Class::Jump => self.jump(insn),
            Class::JumpIf => self.jump_if(insn, is_last),
            Class::JumpCounter => self.jump_counter(insn),
            Class::Call => self.call(insn),
            Class::CallIndirect => self.call_indirect(insn),
            Class::JumpIndirect => self.jump_indirect(insn),
            Class::Return => self.ret(insn),
            Class::Cli => self.asm.store_byte(gs!(interrupt_flag), 0),
            Class::Direction(down) => self.asm.store_byte(gs!(direction), u8::from(down)),
            Class::PushFlags => self.push_flags(insn),
            Class::ReadSegment => self.read_segment(insn),
            Class::Sti => self.asm.store_byte(gs!(interrupt_flag), 1),
            Class::SwapGs => self.swap_gs(),
            Class::ReadTsc => self.read_tsc(insn),
            Class::SetAc(on) => self.set_ac(insn, on),
            Class::String => self.string(insn),
            Class::Helper => self.helper(insn, None),
            Class::HelperEnd => {
                self.helper(insn, None);
                // The helper may have found nothing to leave for.
                self.exit_to(self.next_rip(insn), None);
            }
            Class::Unavailable(fault) => {
                self.helper(insn, Some(fault));
                self.exit_to(insn.ip(), None);
            }
        }
    }

    /// Calls [`crate::exec::execute`] for `insn`.
    pub(super) fn helper(&mut self, insn: &Instruction, unavailable: Option<Fault>) {
        self.flags.to_memory(self.asm);
        let boxed = Box::new(Helped { insn: *insn, unavailable });
        self.asm.mov_imm(ADDR, &raw const *boxed as u64);
        self.instructions.push(boxed);
        self.asm.call_abs(self.stubs.exec);
        self.flags = Flags::MEMORY;
    }

    /// Notes that the host instruction assembled next is `insn` and may raise a signal.
    pub(super) fn site(&mut self, insn: &Instruction, host_flags: bool) {
        // These have reasons of their own for #GP.
        let own = needs_alignment(insn) || matches!(insn.mnemonic(), Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr);
        let stack = has_memory(insn) && seg_of(insn.memory_segment()) == Seg::Ss && !own;
        self.site_of(insn, host_flags, stack);
    }

    /// Notes that the host instruction assembled next accesses the stack for `insn`.
    pub(super) fn stack_site(&mut self, insn: &Instruction) {
        self.site_of(insn, false, true);
    }

    fn site_of(&mut self, insn: &Instruction, host_flags: bool, stack: bool) {
        let offset = insn.ip().wrapping_sub(self.key.rip) as u16;
        let host = self.asm.pos();
        if let Some(slow) = self.redirect {
            self.redirects.push((host, slow));
        }
        self.sites.push(Site { host, what: SiteKind::Instruction { offset, host_flags, stack } });
    }

    /// Leaves translated code here if the vCPU was asked to; then `rip` is the next instruction.
    pub(super) fn poll(&mut self, rip: u64) {
        // gs:0 is the poll pointer.
        self.asm.load(R11, crate::code::asm::Mem::Gs(0));
        let index = self.polls.len() as u16;
        self.polls.push(rip);
        let host = self.asm.pos();
        self.sites.push(Site { host, what: SiteKind::Poll { index, host_flags: !self.flags.in_memory() } });
        self.asm.load_zx(R11, crate::code::asm::Mem::base(R11, 0), 1);
    }
}

/// RIP after `insn` in code of the given width.
pub(crate) fn next_rip(insn: &Instruction, bitness: u32) -> u64 {
    match bitness {
        16 => u64::from(insn.next_ip16()),
        32 => u64::from(insn.next_ip32()),
        _ => insn.next_ip(),
    }
}

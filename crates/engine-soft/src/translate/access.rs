//! Memory operands: address arithmetic, the TLB check, and the way to the slow path.

use berth_memory::GuestPhysAddr;
use iced_x86::{FlowControl, Instruction, Register};

use super::emit::Emitter;
use super::liveness::Recover;
use crate::code::asm::{Label, Mem, cc, gpr_offset, gs, state_offset};
use crate::code::regs::{ADDR, Home, HostReg, R11, home};
use crate::code::stubs::{Descriptor, FINISH_ONLY, RefillArgument, slot_offset, tlb_table_offset};
use crate::memory::slots::Slot;
use crate::memory::slow::Kind;
use crate::memory::tlb::{TLB_ENTRIES, TlbEntry, TlbTable};
use crate::mode::Mode;
use crate::state::{Seg, State};

/// A memory access of an instruction.
#[derive(Clone, Copy, Debug)]
pub(super) struct Access {
    pub kind: Kind,
    /// Bytes.
    pub size: usize,
    /// Segment of the operand.
    pub seg: Seg,
    /// Misaligned operands raise #GP, whatever else is wrong with them.
    pub aligned: bool,
}

/// How the guest address of an access is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Address {
    /// It is in r15, and is not computed again.
    Computed,
    /// The memory operand of the instruction.
    Operand,
    /// A register that the instruction has not changed yet, and a displacement.
    Based(HostReg, i32),
}

/// Where the body of an access finds the bytes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Operand {
    /// r15 is the host address.
    Host,
    /// r15 is added to the guest's base and displacement.
    Guest { base: HostReg, disp: i32 },
}

impl Operand {
    pub(super) fn mem(self) -> Mem {
        match self {
            Operand::Host => Mem::base(ADDR, 0),
            Operand::Guest { base, disp } => Mem::Any { base: Some(base), index: Some((ADDR, 1)), disp },
        }
    }
}

/// The segment that iced names.
pub(super) fn seg_of(register: Register) -> Seg {
    match register {
        Register::ES => Seg::Es,
        Register::CS => Seg::Cs,
        Register::SS => Seg::Ss,
        Register::FS => Seg::Fs,
        Register::GS => Seg::Gs,
        _ => Seg::Ds,
    }
}

impl Emitter<'_> {
    /// Loads the guest register `register` (any width; its full register is meant) into `scratch` if it lives
    /// in the state block; returns where it is.
    pub(super) fn register(&mut self, register: Register, scratch: HostReg) -> HostReg {
        match home(register.full_register().number()) {
            Home::Host(reg) => reg,
            Home::State(n) => {
                self.asm.load(scratch, Mem::Gs(gpr_offset(n)));
                scratch
            }
        }
    }

    /// Computes the effective address of the memory operand into r15. May clobber r11; keeps flags.
    pub(super) fn effective_address(&mut self, insn: &Instruction) {
        let (base, index) = (insn.memory_base(), insn.memory_index());
        if matches!(base, Register::RIP | Register::EIP) {
            self.asm.mov_imm(ADDR, insn.ip_rel_memory_address());
            return;
        }
        let mode = self.key.mode;
        let displacement = insn.memory_displacement64();
        let width = if base != Register::None {
            base.size()
        } else if index != Register::None {
            index.size()
        } else {
            // Displacement only.
            let value = match insn.memory_displ_size() {
                2 => displacement & 0xffff,
                4 if !mode.is_64bit() => displacement & 0xffff_ffff,
                _ => displacement,
            };
            self.asm.mov_imm(ADDR, value);
            return;
        };
        let mem = self.plain_address(insn);
        self.asm.lea(width == 8, ADDR, mem);
        if width == 2 {
            self.asm.reg(false, &[0x0f, 0xb7], ADDR, ADDR); // movzx r15d, r15w
        }
    }

    /// The memory operand of `insn`, which has a base or an index and is not relative to RIP, in host registers. Loads
    /// what lives in the state block into r15 and r11.
    pub(super) fn plain_address(&mut self, insn: &Instruction) -> Mem {
        let (base, index) = (insn.memory_base(), insn.memory_index());
        let base = (base != Register::None).then(|| self.register(base, ADDR));
        let scale = insn.memory_index_scale() as u8;
        let index = (index != Register::None).then(|| (self.register(index, R11), scale));
        Mem::Any { base, index, disp: insn.memory_displacement64() as i32 }
    }

    /// Adds the base of FS or GS in 64-bit mode to r15. Keeps flags.
    pub(super) fn add_segment_base(&mut self, seg: Seg) {
        if self.key.mode.is_64bit() && matches!(seg, Seg::Fs | Seg::Gs) {
            self.asm.load(R11, Mem::Gs(segment_base_offset(seg)));
            self.asm.lea(true, ADDR, Mem::Any { base: Some(ADDR), index: Some((R11, 1)), disp: 0 });
        }
    }

    /// Whether flags that are nowhere may stay there during this access.
    fn may_defer(&self, address: Address) -> Option<Recover> {
        let possible = self.flags_dead && address != Address::Computed;
        self.flags.recover().filter(|_| possible)
    }

    /// The guest address into r15. Keeps flags; clobbers r11.
    fn locate(&mut self, insn: &Instruction, address: Address) {
        match address {
            Address::Computed => {}
            Address::Operand => {
                self.effective_address(insn);
                self.add_segment_base(seg_of(insn.memory_segment()));
            }
            Address::Based(base, 0) => self.asm.mov(ADDR, base),
            Address::Based(base, disp) => self.asm.lea(true, ADDR, Mem::base(base, disp)),
        }
    }

    /// Base and displacement, if the address is nothing else and both can be a part of the instruction.
    fn based(&self, insn: &Instruction, address: Address) -> Option<(HostReg, i32)> {
        match address {
            Address::Based(base, disp) => Some((base, disp)),
            Address::Operand => {
                let base = insn.memory_base();
                let plain = base.is_gpr64()
                    && insn.memory_index() == Register::None
                    && !matches!(seg_of(insn.memory_segment()), Seg::Fs | Seg::Gs);
                match home(base.number()) {
                    Home::Host(reg) if plain => Some((reg, insn.memory_displacement64() as i32)),
                    _ => None,
                }
            }
            Address::Computed => None,
        }
    }

    /// Makes the memory at guest address `address` accessible, and calls `body`, which assembles the instruction itself
    /// on the operand that it is given together with whatever it commits. For stores `body` is called twice: the
    /// second copy is for what the slow path has to finish. The host's flags are destroyed before it.
    ///
    /// `restores`: `body` leaves the flags of the guest in the host's flags.
    pub(super) fn access(
        &mut self,
        insn: &Instruction,
        access: Access,
        address: Address,
        restores: bool,
        body: impl Fn(&mut Self, Operand),
    ) {
        let mode = self.key.mode;
        // Code segments cannot be written, and perhaps not be read.
        let far_segment = !mode.is_64bit() && matches!(access.seg, Seg::Cs | Seg::Fs | Seg::Gs);
        let segmented = mode.has(Mode::SEGMENTED) || far_segment;
        let unchecked = segmented || mode.has(Mode::WATCHED) || mode.has(Mode::ALIGN) || self.vm.debug.no_tlb;
        let mut descriptor = Descriptor {
            kind: access.kind,
            size: access.size as u8,
            stack: access.seg == Seg::Ss,
            aligned: access.aligned,
            segment: segmented.then_some(access.seg),
            slot: None,
        };
        let (hit, after) = (self.asm.label(), self.asm.label());
        if unchecked {
            self.flags.to_memory(self.asm);
            self.locate(insn, address);
            self.flags.host_lost();
            self.slow_call(insn, descriptor);
            if access.kind != Kind::Read {
                self.asm.jmp(hit); // five bytes, skipped for special stores
                body(self, Operand::Host);
                self.finish_store(insn, restores);
                self.asm.jmp(after);
            }
            self.asm.bind(hit);
            body(self, Operand::Host);
            self.asm.bind(after);
            return;
        }
        let recover = self.may_defer(address);
        if recover.is_none() {
            self.flags.to_memory(self.asm);
        }
        let table = TlbTable::new(mode.tlb_class(), access.kind != Kind::Read);
        let slot = self.slot(insn, table);
        let based = self.based(insn, address).filter(|_| slot.is_some() && !self.vm.debug.no_direct);
        let miss = self.asm.label();
        if based.is_none() {
            self.locate(insn, address);
        }
        self.flags.host_lost();
        match (slot, based) {
            (Some(number), Some(based)) => self.check_slot_of(table, number, based, access.size, miss),
            (Some(number), None) => self.check_slot(table, number, access.size, miss),
            (None, _) => self.check_tlb(table, access.size, miss),
        }
        let operand = based.map_or(Operand::Host, |(base, disp)| Operand::Guest { base, disp });
        self.asm.bind(hit);
        self.redirect = recover.map(|_| miss);
        body(self, operand);
        self.redirect = None;
        self.asm.bind(after);

        let flags_after = self.flags;
        let was_cold = self.asm.is_cold();
        self.asm.set_cold(true);
        self.asm.bind(miss);
        if let Some(recover) = recover {
            recover.emit(self.asm);
            self.asm.save_flags();
        }
        if recover.is_some() || based.is_some() {
            self.locate(insn, address);
        }
        let found = if based.is_some() { self.asm.label() } else { hit };
        if let Some(number) = slot {
            self.asm.mov_imm(R11, u64::from(RefillArgument::pack(number, access.size)));
            self.asm.call_abs(self.stubs.refill[table.index()]);
            self.asm.jmp(found); // five bytes, skipped if the TLB does not have the page
            descriptor.slot = Some(number as u16);
        }
        self.slow_call(insn, descriptor);
        self.asm.jmp(found); // five bytes, skipped for special stores
        if access.kind != Kind::Read {
            body(self, Operand::Host);
            self.finish_store(insn, restores);
            self.asm.jmp(after);
        }
        if let Some((base, disp)) = based {
            // From the host address to what it is added to.
            self.asm.bind(found);
            self.asm.lea(true, R11, Mem::base(base, disp));
            self.asm.reg(true, &[0x2b], ADDR, R11);
            self.asm.jmp(hit);
        }
        self.asm.set_cold(was_cold);
        self.flags = flags_after;
    }

    /// The number of a slot for the access of `insn`, unless it is better off without.
    fn slot(&self, insn: &Instruction, table: TlbTable) -> Option<usize> {
        let instruction = GuestPhysAddr(self.key.gpa.wrapping_add(insn.ip().wrapping_sub(self.key.rip)));
        if self.vm.debug.no_slots || self.vm.slotless.has(instruction) {
            return None;
        }
        let by_rsp = insn.memory_base().full_register() == Register::RSP;
        let stack = by_rsp || insn.memory_base() == Register::None && insn.is_stack_instruction();
        let own = !self.vm.debug.no_unshare && self.key.mode.cpl() == 3 && self.vm.unshared.has(instruction);
        if !stack && self.key.mode.cpl() < 3 {
            // Kernels work for one task after the other, each with pages of its own.
            return None;
        }
        Some(self.vm.slot_numbers.next(table, insn.ip(), stack && !own))
    }

    /// r15 becomes what is added to the guest address to get the host's, if the slot has the page; to `miss` if not.
    /// Clobbers r11. It is no part of the address's latency.
    fn check_slot_of(
        &mut self,
        table: TlbTable,
        number: usize,
        (base, disp): (HostReg, i32),
        size: usize,
        miss: Label,
    ) {
        let slot = slot_offset(table, number);
        let a = &mut *self.asm;
        match disp {
            0 => a.mov(R11, base),
            _ => a.lea(true, R11, Mem::base(base, disp)),
        }
        a.mem(&[], true, &[0x2b], R11, Mem::Gs(slot + std::mem::offset_of!(Slot, tag) as i32));
        a.alu_imm(true, 7, R11, 4096 - size as i32 + 1);
        a.jcc(cc::AE, miss);
        a.load(ADDR, Mem::Gs(slot + std::mem::offset_of!(Slot, delta) as i32));
    }

    /// r15 becomes the host address if the slot has the page; to `miss` with r15 as it is if not. Clobbers r11.
    fn check_slot(&mut self, table: TlbTable, number: usize, size: usize, miss: Label) {
        let slot = slot_offset(table, number);
        let a = &mut *self.asm;
        a.mov(R11, ADDR);
        a.mem(&[], true, &[0x2b], R11, Mem::Gs(slot + std::mem::offset_of!(Slot, tag) as i32));
        a.alu_imm(true, 7, R11, 4096 - size as i32 + 1);
        a.jcc(cc::AE, miss);
        a.mem(&[], true, &[0x03], ADDR, Mem::Gs(slot + std::mem::offset_of!(Slot, delta) as i32));
    }

    /// The same by a search of the TLB.
    fn check_tlb(&mut self, table: TlbTable, size: usize, miss: Label) {
        let table = tlb_table_offset(table);
        let tag = table + std::mem::offset_of!(TlbEntry, tag) as i32;
        let host = table + std::mem::offset_of!(TlbEntry, host) as i32;
        let restore = self.asm.label();
        let a = &mut *self.asm;
        // r11 = index of the page * 16; r15 = address - tag.
        a.mov32(R11, ADDR);
        a.shr(false, R11, 8);
        a.alu_imm(false, 4, R11, ((TLB_ENTRIES - 1) << 4) as i32);
        a.mem(&[], true, &[0x2b], ADDR, Mem::GsBase(R11, tag));
        a.alu_imm(true, 7, ADDR, 4096 - size as i32 + 1);
        a.jcc(cc::AE, restore);
        a.mem(&[], true, &[0x03], ADDR, Mem::GsBase(R11, host));
        let was_cold = a.is_cold();
        a.set_cold(true);
        a.bind(restore);
        a.mem(&[], true, &[0x03], ADDR, Mem::GsBase(R11, tag));
        a.jmp(miss);
        a.set_cold(was_cold);
    }

    fn slow_call(&mut self, insn: &Instruction, descriptor: Descriptor) {
        self.asm.store_imm(gs!(rip), insn.ip(), R11);
        self.asm.mov_imm(R11, u64::from(descriptor.pack()));
        self.asm.call_abs(self.stubs.slow);
    }

    /// After a special store. `host_flags`: the instruction left its flags in the host's flags.
    fn finish_store(&mut self, insn: &Instruction, host_flags: bool) {
        if host_flags {
            self.asm.save_flags();
        }
        // A call jumps after its store, wherever the store went.
        let call = matches!(insn.flow_control(), FlowControl::Call | FlowControl::IndirectCall);
        self.asm.mov_imm(ADDR, if call { FINISH_ONLY } else { self.next_rip(insn) });
        self.asm.call_abs(self.stubs.finish);
        if host_flags {
            self.asm.restore_flags();
        }
    }
}

/// Offset from GS:0 of the base of a segment register.
pub(super) fn segment_base_offset(seg: Seg) -> i32 {
    let segments = std::mem::offset_of!(State, segments);
    let base = std::mem::offset_of!(berth_cpu::Segment, base);
    state_offset(segments + seg as usize * size_of::<berth_cpu::Segment>() + base)
}

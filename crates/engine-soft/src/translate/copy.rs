//! Ordinary instructions: the same instruction again, with its operands replaced.

use iced_x86::{
    Code, CpuidFeature, EncodingKind, Instruction, InstructionInfoOptions, Mnemonic, OpAccess, OpKind,
    Register,
};

use super::access::{Access, Address, Operand, seg_of};
use super::class::has_memory;
use super::emit::Emitter;
use super::flags::Effect;
use crate::code::asm::{Mem, gpr_offset, gs};
use crate::code::regs::{ADDR, GUEST_RSP, Home, HostReg, R11, home};
use crate::memory::slow::Kind;

/// A guest register (or one of AH to BH) that is in a scratch register while the instruction executes.
#[derive(Clone, Copy, Debug)]
struct Borrowed {
    from: Borrow,
    scratch: HostReg,
    load: bool,
    store: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Borrow {
    /// A register that lives in the state block.
    State(usize),
    /// AH, CH, DH or BH (number 4 to 7), which cannot be encoded beside r8 to r15.
    HighByte(u8),
}

/// How to execute an instruction natively.
#[derive(Clone)]
struct Plan {
    insn: Instruction,
    borrowed: Vec<Borrowed>,
    /// Whether the host may raise a signal at it.
    may_signal: bool,
    effect: Effect,
    /// The host's flags must be the guest's before it.
    restore: bool,
}

impl Emitter<'_> {
    /// The template of [`super::class::Class::Copy`].
    pub(super) fn copy(&mut self, insn: &Instruction) {
        let effect = Effect::of(insn);
        if !has_memory(insn) {
            if effect.needs_host() {
                self.flags.to_host(self.asm);
            }
            if may_raise(insn) || !self.in_place(insn) {
                let plan = self.plan(insn, &[ADDR, R11], effect, false);
                self.native(insn, &plan);
            }
            self.after(effect);
            return;
        }
        if !self.flags_dead {
            self.flags.to_memory(self.asm);
        }
        if waits_for_x87(insn) {
            // A pending exception of an earlier x87 instruction comes before any fault of the operand.
            self.site(insn, false);
            self.asm.bytes(&[0x9b]); // fwait
        }
        let seg = seg_of(insn.memory_segment());
        let plan = self.plan(insn, &[R11], effect, effect.needs_host());
        let size = match insn.code() {
            // AMD's CPUs read 32 bits and use 16 of them (seen on Zen).
            Code::Movsxd_r16_rm16 if self.vm.is_amd => 4,
            _ => insn.memory_size().size().max(1),
        };
        let access = Access { kind: self.kind(insn), size, seg, aligned: needs_alignment(insn) };
        let in_host = effect != Effect::None;
        self.access(insn, access, Address::Operand, in_host, |e, operand| match operand {
            Operand::Host => e.native(insn, &plan),
            Operand::Guest { base, .. } => {
                let mut direct = plan.clone();
                direct.insn.set_memory_base(sized(base, 8));
                direct.insn.set_memory_index(Register::R15);
                direct.insn.set_memory_displacement64(insn.memory_displacement64());
                direct.insn.set_memory_displ_size(insn.memory_displ_size());
                e.native(insn, &direct);
            }
        });
        if plan.restore {
            self.flags.host_restored();
        }
        self.after(effect);
    }

    /// After an ordinary instruction with this effect.
    fn after(&mut self, effect: Effect) {
        self.flags.after(effect);
        if let Some(window) = self.window {
            self.flags.set_recover(window.recover);
        }
    }

    /// What the instruction does with its memory operand.
    fn kind(&mut self, insn: &Instruction) -> Kind {
        let options = InstructionInfoOptions::NO_MEMORY_USAGE | InstructionInfoOptions::NO_REGISTER_USAGE;
        let info = self.info.info_options(insn, options);
        let at = (0..insn.op_count()).find(|&i| insn.op_kind(i) == OpKind::Memory).unwrap_or(0);
        // An x87 store does not take place if it raises an unmasked exception, which only the next instruction shows.
        let may_not_store = matches!(
            insn.mnemonic(),
            Mnemonic::Fst
                | Mnemonic::Fstp
                | Mnemonic::Fist
                | Mnemonic::Fistp
                | Mnemonic::Fisttp
                | Mnemonic::Fbstp
        );
        match info.op_access(at) {
            OpAccess::Write if may_not_store => Kind::Modify,
            OpAccess::Write => Kind::Write,
            OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite => Kind::Modify,
            _ => Kind::Read,
        }
    }

    /// Decides which registers to borrow. `free`: scratch registers for values. r15 is the address if there is
    /// a memory operand, and can still take a result.
    fn plan(&mut self, insn: &Instruction, free: &[HostReg], effect: Effect, restore: bool) -> Plan {
        let options = InstructionInfoOptions::NO_MEMORY_USAGE | InstructionInfoOptions::NO_REGISTER_USAGE;
        let accesses: [OpAccess; 5] = {
            let info = self.info.info_options(insn, options);
            [info.op0_access(), info.op1_access(), info.op2_access(), info.op3_access(), info.op4_access()]
        };
        let memory = has_memory(insn);
        let mut out = *insn;
        out.set_code(encodable(insn.code()));
        let uses_rex = memory || self.needs_rex(insn);

        let mut borrowed: Vec<Borrowed> = Vec::new();
        // Sources first: they need registers of their own.
        for pass in [true, false] {
            for i in 0..insn.op_count() {
                let register = insn.op_register(i);
                if insn.op_kind(i) != OpKind::Register || !register.is_gpr() {
                    continue;
                }
                let from = if is_high_byte(register) {
                    if !uses_rex {
                        continue;
                    }
                    Borrow::HighByte(high_byte_number(register))
                } else if let Home::State(n) = home(number_of(register)) {
                    Borrow::State(n)
                } else {
                    continue;
                };
                let access = accesses[i as usize];
                let pure_write = access == OpAccess::Write && register.size() >= 4;
                let writes = !matches!(
                    access,
                    OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess | OpAccess::None
                );
                if pass == pure_write {
                    continue;
                }
                if let Some(b) = borrowed.iter_mut().find(|b| b.from == from) {
                    b.store |= writes;
                    continue;
                }
                let taken = |r: HostReg, only_results: bool| {
                    borrowed.iter().any(|b| b.scratch == r && (!only_results || b.store))
                };
                let choice = if pure_write {
                    // A result may share the register of a source, which is read before.
                    [R11, ADDR].into_iter().find(|&r| !taken(r, true))
                } else {
                    free.iter().copied().find(|&r| !taken(r, false))
                };
                let scratch = choice.expect("no instruction has more register operands than fit");
                borrowed.push(Borrowed { from, scratch, load: !pure_write, store: writes });
            }
        }

        for i in 0..insn.op_count() {
            match insn.op_kind(i) {
                OpKind::Register => {
                    let register = insn.op_register(i);
                    if register.is_gpr() {
                        out.set_op_register(i, self.replace(register, uses_rex, &borrowed));
                    }
                }
                OpKind::Memory => {
                    out.set_memory_base(Register::R15);
                    out.set_memory_index(Register::None);
                    out.set_memory_index_scale(1);
                    out.set_memory_displacement64(0);
                    out.set_memory_displ_size(0);
                    out.set_segment_prefix(Register::None);
                }
                _ => {}
            }
        }
        Plan { insn: out, borrowed, may_signal: memory || may_raise(insn), effect, restore }
    }

    /// Whether an operand makes a REX prefix necessary in the copy (beside which AH to BH do not exist).
    fn needs_rex(&self, insn: &Instruction) -> bool {
        (0..insn.op_count()).any(|i| {
            let r = insn.op_register(i);
            insn.op_kind(i) == OpKind::Register
                && r.is_gpr()
                && !is_high_byte(r)
                && r.full_register() == Register::RSP
        })
    }

    /// The host register that stands for a guest register operand.
    fn replace(&self, register: Register, uses_rex: bool, borrowed: &[Borrowed]) -> Register {
        let (from, size) = if is_high_byte(register) {
            if !uses_rex {
                return register;
            }
            (Borrow::HighByte(high_byte_number(register)), 1)
        } else {
            match home(number_of(register)) {
                Home::Host(reg) => return sized(reg, register.size()),
                Home::State(n) => (Borrow::State(n), register.size()),
            }
        };
        let reg = borrowed.iter().find(|b| b.from == from).map_or(GUEST_RSP, |b| b.scratch);
        sized(reg, size)
    }

    /// Assembles the native instruction with its loads and stores of borrowed registers.
    fn native(&mut self, insn: &Instruction, plan: &Plan) {
        if plan.restore {
            self.asm.restore_flags();
        }
        if let Some(window) = self.window {
            window.store_operands(self.asm);
        }
        for b in plan.borrowed.iter().filter(|b| b.load) {
            match b.from {
                Borrow::State(n) => self.asm.load(b.scratch, Mem::Gs(gpr_offset(n))),
                Borrow::HighByte(n) => {
                    self.asm.mem(&[], false, &[0x88], n, Mem::Gs(gs!(scratch)));
                    self.asm.load_zx(b.scratch, Mem::Gs(gs!(scratch)), 1);
                }
            }
        }
        if plan.may_signal {
            // With a memory operand the flags have been saved, unless they were restored for this instruction:
            // then both places are right.
            self.site(insn, !self.flags.in_memory());
        }
        self.encode(&plan.insn);
        for b in plan.borrowed.iter().filter(|b| b.store) {
            match b.from {
                Borrow::State(n) => self.asm.store(Mem::Gs(gpr_offset(n)), b.scratch),
                Borrow::HighByte(n) => {
                    self.asm.mem(&[], false, &[0x88], b.scratch, Mem::Gs(gs!(scratch)));
                    self.asm.mem(&[], false, &[0x8a], n, Mem::Gs(gs!(scratch)));
                }
            }
        }
        let _ = plan.effect;
    }

    fn encode(&mut self, insn: &Instruction) {
        match self.encoder.encode(insn, 0) {
            Ok(_) => {
                let bytes = self.encoder.take_buffer();
                self.asm.bytes(&bytes);
                let mut bytes = bytes;
                bytes.clear();
                self.encoder.set_buffer(bytes);
            }
            Err(error) => {
                tracing::error!(%insn, %error, "an instruction has no encoding in 64-bit mode; it raises #UD");
                let mut bytes = self.encoder.take_buffer();
                bytes.clear();
                self.encoder.set_buffer(bytes);
                self.asm.bytes(&[0x0f, 0x0b]); // ud2: becomes the guest's #UD
            }
        }
    }

    /// LEA: address arithmetic without an access.
    pub(super) fn lea(&mut self, insn: &Instruction) {
        let (base, index) = (insn.memory_base(), insn.memory_index());
        let wide = |r: Register| r == Register::None || r.is_gpr64();
        if let Home::Host(to) = home(number_of(insn.op0_register()))
            && (base != Register::None || index != Register::None)
            && wide(base)
            && wide(index)
        {
            let mem = self.plain_address(insn);
            let size = insn.op0_register().size();
            let prefix: &[u8] = if size == 2 { &[0x66] } else { &[] };
            return self.asm.mem(prefix, size == 8, &[0x8d], to, mem);
        }
        self.effective_address(insn);
        let size = insn.op0_register().size();
        match home(number_of(insn.op0_register())) {
            Home::Host(reg) => match size {
                8 => self.asm.mov(reg, ADDR),
                4 => self.asm.mov32(reg, ADDR),
                _ => {
                    self.asm.bytes(&[0x66]);
                    self.asm.reg(false, &[0x8b], reg, ADDR);
                }
            },
            Home::State(n) => {
                if size == 4 {
                    self.asm.mov32(ADDR, ADDR);
                }
                self.asm.store_sized(Mem::Gs(gpr_offset(n)), ADDR, if size == 4 { 8 } else { size });
            }
        }
    }

    /// BT, BTS, BTR, BTC with a bit index in a register, which reaches beyond the operand (SDM volume 2, BT).
    pub(super) fn bit_string(&mut self, insn: &Instruction) {
        self.flags.to_memory(self.asm);
        self.flags.host_lost();
        let size = insn.op1_register().size();
        let index = insn.op1_register();
        self.effective_address(insn);
        let reg = self.register(index, R11);
        // r11 = index of the operand-sized unit, signed.
        match size {
            2 => self.asm.reg(true, &[0x0f, 0xbf], R11, reg),
            4 => self.asm.reg(true, &[0x63], R11, reg),
            _ if reg != R11 => self.asm.mov(R11, reg),
            _ => {}
        }
        self.asm.reg(true, &[0xc1], 7, R11); // sar r11, log2(bits)
        self.asm.bytes(&[(size * 8).trailing_zeros() as u8]);
        let no_register = insn.memory_base() == Register::None && insn.memory_index() == Register::None;
        let narrow = insn.memory_base().size() == 4
            || insn.memory_index().size() == 4
            || no_register && insn.memory_displ_size() == 4;
        let wide = self.key.mode.is_64bit() && !narrow;
        let mem = Mem::Any { base: Some(ADDR), index: Some((R11, size as u8)), disp: 0 };
        self.asm.lea(wide, ADDR, mem);
        if insn.memory_base().size() == 2 || insn.memory_index().size() == 2 {
            self.asm.reg(false, &[0x0f, 0xb7], ADDR, ADDR);
        }
        let seg = seg_of(insn.memory_segment());
        self.add_segment_base(seg);

        let mut out = *insn;
        out.set_memory_base(Register::R15);
        out.set_memory_index(Register::None);
        out.set_memory_index_scale(1);
        out.set_memory_displacement64(0);
        out.set_memory_displ_size(0);
        out.set_segment_prefix(Register::None);
        out.set_op_register(1, sized(R11, size));
        let kind = if insn.mnemonic() == Mnemonic::Bt { Kind::Read } else { Kind::Modify };
        let insn = *insn;
        self.access(&insn, Access { kind, size, seg, aligned: false }, Address::Computed, true, |e, _| {
            let reg = e.register(index, R11);
            if reg != R11 {
                e.asm.mov(R11, reg);
            }
            e.asm.alu_imm(false, 4, R11, (size * 8 - 1) as i32);
            // Only CF changes.
            e.asm.restore_flags_only();
            e.site(&insn, false);
            e.encode(&out);
        });
        self.flags.host_restored();
        self.flags.after(Effect::Merge);
    }
}

fn is_high_byte(register: Register) -> bool {
    matches!(register, Register::AH | Register::CH | Register::DH | Register::BH)
}

/// Encoding number of a general-purpose register's full register.
pub(super) fn number_of(register: Register) -> usize {
    register.full_register().number()
}

/// Encoding number of AH, CH, DH or BH: 4 to 7.
fn high_byte_number(register: Register) -> u8 {
    number_of(register) as u8 + 4
}

/// Host register `reg` as an operand of `size` bytes.
pub(super) fn sized(reg: HostReg, size: usize) -> Register {
    let n = u32::from(reg);
    match size {
        1 if reg < 4 => Register::AL + n,
        1 => Register::SPL + (n - 4),
        2 => Register::AX + n,
        4 => Register::EAX + n,
        _ => Register::RAX + n,
    }
}

/// Whether the instruction waits for pending x87 exceptions: all of x87 and MMX but the FN forms (SDM volume 1,
/// 8.6).
fn waits_for_x87(insn: &Instruction) -> bool {
    let fpu = insn
        .cpuid_features()
        .iter()
        .any(|f| matches!(f, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387));
    let mmx =
        (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Register && insn.op_register(i).is_mm());
    (fpu || mmx) && !matches!(insn.mnemonic(), Mnemonic::Fnstcw | Mnemonic::Fnstsw)
}

/// Whether a misaligned memory operand raises #GP (SDM volume 1, 14.9; volume 2, table 2-15).
pub(super) fn needs_alignment(insn: &Instruction) -> bool {
    use Mnemonic::*;
    let size = insn.memory_size().size();
    match insn.encoding() {
        EncodingKind::VEX => matches!(
            insn.mnemonic(),
            Vmovaps | Vmovapd | Vmovdqa | Vmovntps | Vmovntpd | Vmovntdq | Vmovntdqa
        ),
        EncodingKind::Legacy => {
            let free = matches!(
                insn.mnemonic(),
                Movups
                    | Movupd
                    | Movdqu
                    | Lddqu
                    | Pcmpestri
                    | Pcmpestri64
                    | Pcmpestrm
                    | Pcmpestrm64
                    | Pcmpistri
                    | Pcmpistrm
            );
            // The SHA instructions want alignment too, but CPUs report a page fault first.
            size == 16 && !free && !insn.cpuid_features().contains(&CpuidFeature::SHA)
        }
        _ => false,
    }
}

/// Whether the instruction can raise an exception on its register operands.
pub(super) fn may_raise(insn: &Instruction) -> bool {
    let vector = (0..insn.op_count()).any(|i| {
        let r = insn.op_register(i);
        insn.op_kind(i) == OpKind::Register && (r.is_xmm() || r.is_ymm() || r.is_mm())
    });
    let x87 = [CpuidFeature::FPU, CpuidFeature::FPU287, CpuidFeature::FPU387, CpuidFeature::MMX];
    let features = insn.cpuid_features();
    vector
        || features.iter().any(|f| x87.contains(f))
        || matches!(insn.mnemonic(), Mnemonic::Wait | Mnemonic::Div | Mnemonic::Idiv)
}

/// The same operation in an encoding that exists in 64-bit mode.
fn encodable(code: Code) -> Code {
    match code {
        Code::Inc_r16 => Code::Inc_rm16,
        Code::Inc_r32 => Code::Inc_rm32,
        Code::Dec_r16 => Code::Dec_rm16,
        Code::Dec_r32 => Code::Dec_rm32,
        Code::Mov_AL_moffs8 => Code::Mov_r8_rm8,
        Code::Mov_AX_moffs16 => Code::Mov_r16_rm16,
        Code::Mov_EAX_moffs32 => Code::Mov_r32_rm32,
        Code::Mov_RAX_moffs64 => Code::Mov_r64_rm64,
        Code::Mov_moffs8_AL => Code::Mov_rm8_r8,
        Code::Mov_moffs16_AX => Code::Mov_rm16_r16,
        Code::Mov_moffs32_EAX => Code::Mov_rm32_r32,
        Code::Mov_moffs64_RAX => Code::Mov_rm64_r64,
        Code::Add_rm8_imm8_82 => Code::Add_rm8_imm8,
        Code::Or_rm8_imm8_82 => Code::Or_rm8_imm8,
        Code::Adc_rm8_imm8_82 => Code::Adc_rm8_imm8,
        Code::Sbb_rm8_imm8_82 => Code::Sbb_rm8_imm8,
        Code::And_rm8_imm8_82 => Code::And_rm8_imm8,
        Code::Sub_rm8_imm8_82 => Code::Sub_rm8_imm8,
        Code::Xor_rm8_imm8_82 => Code::Xor_rm8_imm8,
        Code::Cmp_rm8_imm8_82 => Code::Cmp_rm8_imm8,
        other => other,
    }
}

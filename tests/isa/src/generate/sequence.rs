//! Cases of several instructions, with jumps, calls and loops: where flags live across memory accesses, and how
//! blocks are linked.

use std::collections::HashMap;

use berth_cpu::bits::gpr;
use fastrand::Rng;
use iced_x86::{
    Code, FlowControl, Instruction, InstructionInfoFactory, Mnemonic as M, OpAccess, OpKind, Register,
};

use super::round_trip;
use super::single::needs;
use crate::case::{Case, CodeMode, Item, Target, assemble};
use crate::flow::reads_undefined;
use crate::forms::Catalogue;
use crate::layout::CODE;
use crate::operands::Operands;
use crate::state::{Needs, Risk, Setup};

/// Instructions that compilers use all the time.
const COMMON: &[M] = &[
    M::Mov,
    M::Add,
    M::Adc,
    M::Sub,
    M::Sbb,
    M::And,
    M::Or,
    M::Xor,
    M::Cmp,
    M::Test,
    M::Lea,
    M::Inc,
    M::Dec,
    M::Neg,
    M::Not,
    M::Shl,
    M::Shr,
    M::Sar,
    M::Rol,
    M::Ror,
    M::Rcl,
    M::Rcr,
    M::Push,
    M::Pop,
    M::Movzx,
    M::Movsx,
    M::Movsxd,
    M::Imul,
    M::Mul,
    M::Xchg,
    M::Xadd,
    M::Cmpxchg,
    M::Bt,
    M::Bts,
    M::Btr,
    M::Btc,
    M::Bsf,
    M::Bsr,
    M::Popcnt,
    M::Tzcnt,
    M::Lzcnt,
    M::Cdq,
    M::Cqo,
    M::Cwde,
    M::Cdqe,
    M::Bswap,
    M::Shld,
    M::Shrd,
    M::Lahf,
    M::Sahf,
    M::Pushfq,
    M::Stc,
    M::Clc,
    M::Cmc,
    M::Andn,
    M::Blsr,
    M::Shlx,
    M::Mulx,
    M::Adcx,
    M::Adox,
    M::Movbe,
    M::Seta,
    M::Setae,
    M::Setb,
    M::Setbe,
    M::Sete,
    M::Setg,
    M::Setge,
    M::Setl,
    M::Setle,
    M::Setne,
    M::Setno,
    M::Setnp,
    M::Setns,
    M::Seto,
    M::Setp,
    M::Sets,
    M::Cmova,
    M::Cmovae,
    M::Cmovb,
    M::Cmovbe,
    M::Cmove,
    M::Cmovg,
    M::Cmovge,
    M::Cmovl,
    M::Cmovle,
    M::Cmovne,
    M::Cmovno,
    M::Cmovnp,
    M::Cmovns,
    M::Cmovo,
    M::Cmovp,
    M::Cmovs,
    M::Movsb,
    M::Movsq,
    M::Stosb,
    M::Stosq,
    M::Lodsb,
    M::Scasb,
    M::Cmpsb,
    M::Cld,
    M::Std,
    M::Leave,
    M::Enter,
];

/// Instructions that only end a sequence early, or that single cases are enough for.
const NOT_IN_SEQUENCES: &[M] = &[
    M::Ud0,
    M::Ud1,
    M::Ud2,
    M::Int,
    M::Int1,
    M::Int3,
    M::Into,
    M::Bound,
    M::Wrfsbase,
    M::Wrgsbase,
    M::Ldmxcsr,
    M::Vldmxcsr,
    M::Fldenv,
    M::Frstor,
    M::Fxrstor,
    M::Fxrstor64,
    M::Fxsave,
    M::Fxsave64,
    M::Fnstenv,
    M::Fnsave,
    M::Div,
    M::Idiv,
    M::Aam,
    M::Popf,
    M::Popfd,
    M::Popfq,
];

/// The forms that sequences are made of.
pub struct Pool {
    mode: CodeMode,
    common: HashMap<M, Vec<Code>>,
    common_names: Vec<M>,
    integer: Vec<Code>,
    vector: Vec<Code>,
    x87: Vec<Code>,
    jumps: Vec<Code>,
}

impl Pool {
    /// The forms of `catalogue` for `mode`.
    pub fn new(catalogue: &Catalogue, mode: CodeMode) -> Self {
        let all = catalogue.compared(mode);
        let mut pool = Self {
            mode,
            common: HashMap::new(),
            common_names: Vec::new(),
            integer: Vec::new(),
            vector: Vec::new(),
            x87: Vec::new(),
            jumps: Vec::new(),
        };
        for code in all {
            let info = code.op_code();
            let mut plain = Instruction::default();
            plain.set_code(code);
            let flow = plain.flow_control();
            if flow == FlowControl::ConditionalBranch
                && (plain.is_jcc_short() || plain.is_jcc_near())
                && info.operand_size() == if mode == CodeMode::Bits64 { 0 } else { 32 }
            {
                pool.jumps.push(code);
            }
            if flow != FlowControl::Next || !info.cpl3() || NOT_IN_SEQUENCES.contains(&code.mnemonic()) {
                continue;
            }
            if info.is_input_output() || matches!(code.mnemonic(), M::Cli | M::Sti) || plain.is_vsib() {
                continue;
            }
            if COMMON.contains(&code.mnemonic()) {
                pool.common.entry(code.mnemonic()).or_default().push(code);
            }
            use iced_x86::CpuidFeature as F;
            let features = code.cpuid_features();
            if features.iter().any(|f| matches!(f, F::FPU | F::FPU287 | F::FPU387 | F::MMX)) {
                pool.x87.push(code);
            } else if is_vector(code) {
                pool.vector.push(code);
            } else {
                pool.integer.push(code);
            }
        }
        pool.common_names = COMMON.iter().copied().filter(|m| pool.common.contains_key(m)).collect();
        pool
    }

    fn pick(&self, rng: &mut Rng, theme: Theme) -> Code {
        let one = |rng: &mut Rng, list: &[Code]| {
            list.get(rng.usize(..list.len().max(1))).copied().unwrap_or(Code::Nopd)
        };
        let special = rng.u8(..100) < 45;
        match theme {
            Theme::Vector if special => one(rng, &self.vector),
            Theme::X87 if special => one(rng, &self.x87),
            _ if rng.u8(..100) < 20 => one(rng, &self.integer),
            _ => {
                let name = self.common_names[rng.usize(..self.common_names.len())];
                one(rng, &self.common[&name])
            }
        }
    }
}

fn is_vector(code: Code) -> bool {
    use iced_x86::OpCodeOperandKind as O;
    code.op_code().op_kinds().iter().any(|k| {
        matches!(
            k,
            O::xmm_or_mem
                | O::ymm_or_mem
                | O::xmm_reg
                | O::xmm_rm
                | O::xmm_vvvv
                | O::ymm_reg
                | O::ymm_rm
                | O::ymm_vvvv
        )
    })
}

#[derive(Clone, Copy)]
enum Theme {
    Integer,
    Vector,
    X87,
}

struct Builder<'a> {
    rng: &'a mut Rng,
    pool: &'a Pool,
    catalogue: &'a Catalogue,
    setup: &'a Setup,
    theme: Theme,
    keep: Vec<usize>,
    start: u64,
    info: InstructionInfoFactory,
    items: Vec<Item>,
}

impl Builder<'_> {
    /// An instruction without a jump; `fixed`: registers that it must not write.
    fn plain(&mut self, fixed: &[usize]) -> Option<Item> {
        for _ in 0..100 {
            let code = self.pool.pick(self.rng, self.theme);
            let Needs { strings, .. } = needs(code);
            // String instructions need their registers as pointers.
            let has = |r| self.setup.pointers.iter().any(|p| p.register == r);
            if strings && !(has(gpr::RSI) && has(gpr::RDI)) {
                continue;
            }
            let memory = self.rng.u8(..100) < 55;
            let mut operands = Operands {
                rng: self.rng,
                setup: self.setup,
                keep: &self.keep,
                risk: Risk::Low,
                memory,
                near: self.start,
            };
            let Some(mut insn) = operands.choose(code) else { continue };
            let counts = self.setup.gpr[gpr::RCX] < 4096;
            if !counts {
                insn.set_has_rep_prefix(false);
                insn.set_has_repne_prefix(false);
            }
            let item = Item { insn, prefix: None, target: None };
            let Some(decoded) = round_trip(&item, code, self.start, self.pool.mode, self.catalogue) else {
                continue;
            };
            if self.writes(&decoded, fixed) {
                continue;
            }
            return Some(Item { insn: decoded, ..item });
        }
        None
    }

    fn writes(&mut self, insn: &Instruction, registers: &[usize]) -> bool {
        let used = self.info.info(insn).used_registers();
        used.iter().any(|u| {
            let r = u.register();
            let writes = !matches!(
                u.access(),
                OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess
            );
            writes && r.is_gpr() && registers.contains(&r.full_register().number())
        })
    }

    fn push_plain(&mut self, count: usize, fixed: &[usize]) {
        for _ in 0..count {
            if let Some(item) = self.plain(fixed) {
                self.items.push(item);
            }
        }
    }

    fn branch(&mut self, code: Code, target: Option<Target>) {
        let mut insn = Instruction::default();
        insn.set_code(code);
        let kind =
            if self.pool.mode == CodeMode::Bits64 { OpKind::NearBranch64 } else { OpKind::NearBranch32 };
        insn.set_op0_kind(kind);
        if insn.is_loop() || insn.is_loopcc() {
            insn.set_op0_kind(kind);
        }
        self.items.push(Item { insn, prefix: None, target });
    }

    /// A conditional jump over a few instructions.
    fn skip(&mut self) {
        let Some(&code) = self.pool.jumps.get(self.rng.usize(..self.pool.jumps.len().max(1))) else { return };
        let at = self.items.len();
        self.branch(code, None);
        let count = self.rng.usize(0..4);
        self.push_plain(count, &[]);
        self.items[at].target = Some(Target::Item(self.items.len()));
    }

    /// A counted loop.
    fn repeat(&mut self) {
        let count = self.rng.u32(1..40);
        if let Ok(set) = Instruction::with2(Code::Mov_r32_imm32, Register::ECX, count) {
            self.items.push(Item { insn: set, prefix: None, target: None });
        }
        let body = self.items.len();
        let length = self.rng.usize(1..5);
        self.push_plain(length, &[gpr::RCX]);
        let bits64 = self.pool.mode == CodeMode::Bits64;
        let code = match (self.rng.u8(..4), bits64) {
            (0, true) => Code::Loop_rel8_64_RCX,
            (0, false) => Code::Loop_rel8_32_ECX,
            (1, true) => Code::Loopne_rel8_64_RCX,
            (1, false) => Code::Loope_rel8_32_ECX,
            (_, bits64) => {
                if let Ok(dec) = Instruction::with1(Code::Dec_rm32, Register::ECX) {
                    self.items.push(Item { insn: dec, prefix: None, target: None });
                }
                match (self.rng.bool(), bits64) {
                    (true, true) => Code::Jne_rel8_64,
                    (true, false) => Code::Jne_rel8_32,
                    (false, true) => Code::Jne_rel32_64,
                    (false, false) => Code::Jne_rel32_32,
                }
            }
        };
        self.branch(code, Some(Target::Item(body)));
    }

    /// A call of a subroutine that returns.
    fn call(&mut self) {
        let bits64 = self.pool.mode == CodeMode::Bits64;
        let stack = [gpr::RSP];
        let call = self.items.len();
        self.branch(if bits64 { Code::Call_rel32_64 } else { Code::Call_rel32_32 }, None);
        let count = self.rng.usize(0..3);
        self.push_plain(count, &[]);
        let jump = self.items.len();
        self.branch(if bits64 { Code::Jmp_rel8_64 } else { Code::Jmp_rel8_32 }, None);
        self.items[call].target = Some(Target::Item(self.items.len()));
        let count = self.rng.usize(0..3);
        self.push_plain(count, &stack);
        let ret = Instruction::with(if bits64 { Code::Retnq } else { Code::Retnd });
        self.items.push(Item { insn: ret, prefix: None, target: None });
        self.items[jump].target = Some(Target::Item(self.items.len()));
    }
}

/// A case of 2 to about 20 instructions. `None` if random choices did not give one.
pub fn sequence(pool: &Pool, seed: u64, catalogue: &Catalogue) -> Option<Case> {
    let mut rng = Rng::with_seed(seed);
    let strings = rng.bool();
    let needs = Needs { strings, division: false, frame: rng.u8(..4) == 0 };
    let setup = Setup::random(&mut rng, pool.mode, Risk::Low, needs);
    let theme = match rng.u8(..8) {
        0 | 1 => Theme::Vector,
        2 => Theme::X87,
        _ => Theme::Integer,
    };
    let keep: Vec<usize> = setup.pointers.iter().map(|p| p.register).chain([gpr::RSP]).collect();
    let start =
        if rng.u8(..10) == 0 { CODE + 4096 - rng.u64(1..60) } else { CODE + 0x100 + rng.u64(..0xc00) };
    let pieces = rng.usize(1..5);
    let mut b = Builder {
        rng: &mut rng,
        pool,
        catalogue,
        setup: &setup,
        theme,
        keep,
        start,
        info: InstructionInfoFactory::new(),
        items: Vec::new(),
    };
    for _ in 0..pieces {
        match b.rng.u8(..10) {
            0..3 => b.skip(),
            3 => b.repeat(),
            4 => b.call(),
            _ => {
                let count = b.rng.usize(1..5);
                b.push_plain(count, &[]);
            }
        }
    }
    let mut items = std::mem::take(&mut b.items);
    for _ in 0..60 {
        let Some(at) = reads_undefined(&items) else { break };
        if items[at].target.is_some() {
            // A jump that always or never jumps is as good: test of a register with itself defines all but AF.
            let test = Instruction::with2(Code::Test_rm32_r32, Register::EAX, Register::EDX).ok()?;
            insert(&mut items, at, Item { insn: test, prefix: None, target: None });
        } else if let Some(other) = b.plain(&[gpr::RCX, gpr::RSP]) {
            items[at] = other;
        }
    }
    if items.is_empty() || reads_undefined(&items).is_some() {
        return None;
    }
    let code = assemble(&items, start, pool.mode).ok()?;
    Some(Case {
        mode: pool.mode,
        items,
        code,
        gpr: setup.gpr,
        rflags: setup.rflags,
        fpu: setup.fpu,
        patches: Vec::new(),
    })
}

/// Inserts an item; jumps keep their targets, and jumps to `at` lead to the new item.
fn insert(items: &mut Vec<Item>, at: usize, item: Item) {
    for other in items.iter_mut() {
        if let Some(Target::Item(t)) = &mut other.target
            && *t > at
        {
            *t += 1;
        }
    }
    items.insert(at, item);
}
